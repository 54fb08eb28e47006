"""What a stranger tried: schedules that say nothing, rounds without anybody, a map over seeds."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from problems import DENSITY, DRIVERS, LEARNING_RATE, METHODS, M

import sasg_jax

PARAMS = {"w": jnp.arange(4.0)}
BATCH = jnp.arange(4.0)


def _loss(params, batch):
    return jnp.sum(jnp.square(params["w"] - batch))


def _train_step(tx, loss_fn=_loss, **options):
    return sasg_jax.make_train_step(loss_fn, tx, num_workers=M, donate=False, **options)


@pytest.mark.parametrize("name", ["sgd", "sasg", "two_way"])
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_a_step_under_vmap_over_seeds_is_each_seeds_own(name, chunk_size):
    """What all workers share may differ between seeds."""
    tx = METHODS[name](LEARNING_RATE, num_workers=M)
    train_step = _train_step(tx, problems.quadratic_loss, chunk_size=chunk_size)
    start = problems.quadratic_params()
    starts = [start, jax.tree.map(lambda x: x + 1, start)]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *starts)
    batch = jax.tree.map(lambda x: x[0], problems.centres(rounds=1, seed=1))
    step = jax.vmap(train_step.step, in_axes=(0, None))
    together = jax.vmap(train_step.init)(stacked)
    for _ in range(3):
        together, _ = step(together, batch)
    for i, start in enumerate(starts):
        alone = train_step.init(start)
        for _ in range(3):
            alone, _ = train_step.step(alone, batch)
        chex.assert_trees_all_close(problems.at(together, i), alone, atol=1e-6)


@pytest.mark.parametrize(
    "schedule",
    [lambda t: None, lambda t: jnp.ones(4), lambda t: jnp.ones(1), lambda t: 0.1j],
    ids=["nothing", "a rate an entry", "a vector of one", "complex"],
)
def test_a_schedule_gives_one_real_number(schedule):
    tx = sasg_jax.compressed_sgd(schedule, sasg_jax.identity(), num_workers=M)
    train_step = _train_step(tx)
    state = train_step.init(PARAMS)
    with pytest.raises(ValueError, match=r"(?s)^Expected learning_rate=.* gives one real number"):
        train_step.step(state, BATCH)


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_round_without_anybody_is_no_perfect_one(driver):
    """What follows its value keeps on waiting for a better one; `present` may be a list."""
    plateau = optax.contrib.reduce_on_plateau(patience=1, factor=0.5)
    parts = sasg_jax.aggregate(sasg_jax.identity(), num_workers=M), optax.sgd(0.1), plateau
    train_step = _train_step(sasg_jax.pipeline(*parts), driver=driver, pass_value=True)
    state, _ = train_step.step(train_step.init(PARAMS), BATCH, [True, False, True, True])
    best = float(state.opt_state.after[-1].best_value)
    assert best == pytest.approx(np.mean([np.square(np.arange(4.0) - x).sum() for x in (0, 2, 3)]))
    state, _ = train_step.step(state, BATCH, [False] * M)
    assert float(state.opt_state.after[-1].best_value) == best


def test_settings_that_print_alike_are_not_the_same():
    """Half of four entries, and a little less, which is one."""
    make = lambda density: sasg_jax.compressed_sgd(
        1.0, sasg_jax.top_k(density), sasg_jax.every(2), num_workers=M, silence="reuse"
    )
    state = _train_step(make(0.5)).init(PARAMS)
    with pytest.raises(ValueError, match=r"it has compressor=top_k\(0\.4999999\)"):
        _train_step(make(0.4999999)).step(state, BATCH)
    assert sasg_jax.residual(0.9999999).name != sasg_jax.residual(1).name


@pytest.mark.parametrize("silence", ["keep", "drop"])
def test_reconstruction_says_itself_what_a_silent_worker_counts_as(silence):
    parts = {"num_workers": M, "feedback": sasg_jax.reconstruction(), "silence": silence}
    with pytest.raises(ValueError, match=r"^Expected feedback='reconstruction\(\)' only where"):
        sasg_jax.compressed_sgd(0.1, sasg_jax.top_k(DENSITY), sasg_jax.every(2), **parts)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_a_model_state_keeps_its_shapes(chunk_size):
    def loss_fn(params, batch, *, model_state):
        return _loss(params, batch), {"mean": jnp.zeros(5)}

    options = {"chunk_size": chunk_size, "has_model_state": True}
    train_step = _train_step(sasg_jax.sgd(0.1, num_workers=M), loss_fn, **options)
    state = train_step.init(PARAMS, {"mean": jnp.zeros(1)})
    with pytest.raises(ValueError, match=r"^Expected the model state\['mean'\] to have its shape"):
        train_step.step(state, BATCH)


@pytest.mark.parametrize("driver", DRIVERS)
def test_python_numbers_beside_the_loss(driver):
    loss_fn = lambda params, batch: (_loss(params, batch), {"n": 3})
    train_step = _train_step(sasg_jax.sgd(0.1, num_workers=M), loss_fn, driver=driver, has_aux=True)
    _, info = train_step.step(train_step.init(PARAMS), BATCH)
    np.testing.assert_array_equal(info.aux["n"], [3] * M)


def test_the_servers_memory_keeps_its_type_among_wider_ones():
    """Of entries of several types, all of which one selection is made among."""
    with jax.enable_x64(True):
        params = {"a": jnp.ones(3, jnp.float32), "b": jnp.ones(3, jnp.float64)}
        compressor, feedback = sasg_jax.top_k(0.5, scope="tree"), sasg_jax.reconstruction()
        parts = {"num_workers": M, "feedback": feedback, "exchange": "gather"}
        tx = sasg_jax.compressed_sgd(0.1, compressor, **parts)
        loss_fn = lambda params, batch: sum(jnp.sum(x * batch) for x in params.values())
        train_step = _train_step(tx, loss_fn)
        state, _ = train_step.step(train_step.init(params), jnp.ones(M))
        memory = state.opt_state.server.memory
        assert (memory["a"].dtype, memory["b"].dtype) == (jnp.float32, jnp.float64)
