"""The ring has the parameters of the last rounds, and serves as well as a copy for each worker."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from problems import LEARNING_RATE, METHODS, M

import sasg_jax
from sasg_jax.rules.recent_params import init_recent, read_recent, write_recent
from sasg_jax.states import find_state


@pytest.mark.parametrize("max_staleness", [2, 3, 10])
def test_has_the_rounds_that_a_worker_may_ask_for(max_staleness):
    like = {"w": jnp.zeros(2)}
    recent = init_recent(like, max_staleness)
    read, write = jax.jit(read_recent), jax.jit(write_recent)
    for t in range(25):
        for staleness in range(1, min(max_staleness, t + 1)):
            found = read(recent, jnp.int32(t - staleness))
            np.testing.assert_array_equal(found["w"], [t - staleness, -(t - staleness)])
        recent = write(recent, {"w": jnp.array([t, -t], float)}, jnp.int32(t))
    assert recent["w"].shape == (max_staleness - 1, 2)  # and it keeps no more than that


def test_keeps_nothing_where_nobody_asks():
    params = jnp.zeros(3)  # a tree may be one array
    assert init_recent(params, 1) == ()
    assert write_recent((), params, jnp.int32(5)) == ()


def _optimizer(name, share):
    """Some workers are silent, and some until they must upload."""
    alpha = 100.0
    kwargs = {"history": 2, "max_staleness": 4, "share_stale_params": share}
    if name != "aggregate":
        return METHODS[name](LEARNING_RATE, num_workers=M, alpha=alpha, **kwargs)
    rule = sasg_jax.innovation(alpha, **kwargs)
    tx = sasg_jax.aggregate(sasg_jax.top_k(0.1), rule, num_workers=M)
    return optax.chain(tx, optax.adamw(LEARNING_RATE))


ROUNDS = 40


def _run(name, driver, share):
    """The optimiser's state after, the parameters after, and what happened in every round."""
    images, labels = problems.softmax_batches(M, ROUNDS)
    images = images.copy()
    images[20:27, 1] = np.nan
    train_step = sasg_jax.make_train_step(
        problems.softmax_loss, _optimizer(name, share), num_workers=M, driver=driver, donate=False
    )
    run = jax.jit(lambda state, batches: jax.lax.scan(train_step.step, state, batches))
    state, infos = run(train_step.init(problems.softmax_params()), (images, labels))
    return find_state(state.opt_state), jax.device_get((state.params, infos._asdict()))


@pytest.mark.parametrize(
    ("name", "driver"),
    [
        ("two_way", "vmap"),
        ("sasg", "shard_map"),
        pytest.param("lasg", "vmap", marks=pytest.mark.slow),
        pytest.param("aggregate", "vmap", marks=pytest.mark.slow),
    ],
)
def test_shared_and_own_stale_parameters_give_the_same_run(name, driver):
    """Bit for bit, also past gradients that are not finite, after which a worker is staler than
    the ring is long."""
    ours, run = _run(name, driver, share=True)
    theirs, want = _run(name, driver, share=False)
    chex.assert_trees_all_equal(run, want)
    infos = run[1]
    assert 0.2 < infos["uploaded"][2:].mean() < 0.9
    assert infos["staleness"].max() > 4
    # Workers asked for different rounds at once.
    assert len(np.unique(infos["staleness"][15:20])) > 2
    assert ours.worker.rule.stale_params == ()
    assert ours.server.rule.previous_params == ()
    assert theirs.server.rule.recent_params == ()
    for row in jax.tree.leaves(ours.server.rule.recent_params):
        assert row.shape[0] == 3
