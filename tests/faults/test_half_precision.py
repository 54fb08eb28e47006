"""Half precision: sums before the division fit, and what γ g + e makes out of range is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from problems import M

import sasg_jax

BIG = 30_000  # fits into float16 where the sum over workers does not
PARAMS = {"float16": jnp.zeros(4, jnp.float16)}
MIXED = PARAMS | {"float32": jnp.zeros(3)}


def _mean_inside():
    """A compressor that is nothing but the mean that it is handed."""

    def compress_mean(tree, memory, key, mean):
        return sasg_jax.Compressed(mean(tree), jax.tree.map(jnp.zeros_like, tree), memory)

    return sasg_jax.Compressor(name="mean", compress_mean=compress_mean)


EVERYTHING, TOP = sasg_jax.identity(), sasg_jax.top_k(1.0)
PARTS = {
    **{exchange: (EVERYTHING, {"exchange": exchange}) for exchange in sasg_jax.exchanges.EXCHANGES},
    "psum, mixed": (EVERYTHING, {"exchange": "psum"}),
    "mean inside": (_mean_inside(), {}),
    "top_k of the tree, mixed": (sasg_jax.top_k(1.0, scope="tree"), {}),
    "reconstruction": (EVERYTHING, {"feedback": sasg_jax.reconstruction()}),
    "reuse": (EVERYTHING, {"silence": "reuse"}),
    "two ways": (TOP, {"downlink": TOP}),
    "two ways, sharded": (EVERYTHING, {"downlink": TOP, "exchange": "sharded"}),
}
# Simulated, these differ in nothing; on devices, all that do not sum have the server's half alike.
CASES = [("vmap", name) for name in PARTS if name not in ("lazy", "relay", "server")]
ON_DEVICES = (*sasg_jax.exchanges.EXCHANGES, "psum, mixed", "mean inside")
CASES += [("shard_map", name) for name in ON_DEVICES]


def _updates(driver, grads):
    """Of one worker, for every transformation, and whether each was finite."""
    made = {}
    for name in [name for case, name in CASES if case == driver]:
        compressor, parts = PARTS[name]
        tx = sasg_jax.aggregate(compressor, num_workers=M, **parts)
        params = MIXED if "mixed" in name else PARAMS
        mine = {leaf: grads[leaf] for leaf in params}
        updates, state = tx.update(mine, tx.init(params), params)
        made[name] = updates, sasg_jax.diagnostics(state).finite
    return made


@functools.cache
def _made(driver):
    if driver == "vmap":
        mapped = jax.vmap(lambda grads: _updates(driver, grads), axis_name="workers")
    else:
        mesh = jax.sharding.Mesh(jax.devices()[:M], ("workers",))
        each = jax.P("workers")
        mapped = jax.shard_map(
            lambda grads: jax.tree.map(lambda x: x[None], _updates(driver, problems.at(grads, 0))),
            mesh=mesh,
            in_specs=each,
            out_specs=each,
            check_vma=False,
        )
    return jax.jit(mapped)(jax.tree.map(lambda x: jnp.full((M, *x.shape), BIG, x.dtype), MIXED))


@pytest.mark.parametrize(("driver", "name"), CASES)
def test_a_mean_that_fits_is_made_of_a_sum_that_does_not(driver, name):
    """In a tree of two types, each leaf in its own type."""
    updates, finite = _made(driver)[name]
    assert finite.all()
    for leaf, x in updates.items():
        assert x.dtype == leaf
        assert (x == jnp.asarray(BIG, leaf)).all(), leaf


MANY = 300  # counted in bfloat16 one by one, it stays 256


@pytest.mark.parametrize("options", [{}, {"chunk_size": 150}], ids=["at once", "in chunks"])
@pytest.mark.parametrize("silence", ["keep", "drop"])
def test_a_mean_over_many_in_bfloat16(silence, options):
    ones = lambda params, batch: params.sum() * batch.sum()
    exchange = "psum" if silence == "keep" else "gather"
    tx = sasg_jax.compressed_sgd(
        1.0, sasg_jax.identity(), num_workers=MANY, silence=silence, exchange=exchange
    )
    train_step = sasg_jax.make_train_step(ones, tx, num_workers=MANY, **options)
    state = train_step.init(jnp.zeros(1, jnp.bfloat16))
    state, _ = train_step.step(state, np.ones((MANY, 1), np.float32))
    assert state.params == -1


def test_a_mean_over_many_accumulated_gradients_in_bfloat16():
    ones = sasg_jax.gradient(lambda params, batch: (params * batch).sum(), accumulate=MANY)
    made = ones.evaluate(jnp.zeros(1, jnp.bfloat16), (), (), (), jnp.ones((MANY, 1)))
    np.testing.assert_array_equal(made.direction, jnp.ones(1, jnp.bfloat16))


def _remember_value():
    def update(updates, state, params=None, **extra):
        return updates, {"value": extra["value"].astype(jnp.float32)}

    return optax.GradientTransformationExtraArgs(lambda params: {"value": jnp.zeros(())}, update)


@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}], ids=["at once", "in chunks"])
def test_the_mean_of_losses_that_fits(options):
    """And neither a refused nor an absent worker's loss is in it."""
    loss = lambda params, batch: (params.sum() + batch.sum()).astype(jnp.float16)
    tx = sasg_jax.pipeline(
        sasg_jax.aggregate(sasg_jax.identity(), num_workers=M), _remember_value()
    )
    train_step = sasg_jax.make_train_step(loss, tx, num_workers=M, pass_value=True, **options)
    state = train_step.init(jnp.zeros(2, jnp.float16))
    losses = np.array([[2 * BIG], [np.nan], [10_000], [2 * BIG]], np.float16)
    state, _ = train_step.step(state, losses, np.array([True, True, False, True]))
    assert optax.tree.get(state.opt_state, "value") == 2 * BIG


def test_the_mean_of_model_states_that_fits():
    state = {"half": jnp.full((M, 2), BIG, jnp.float16), "many": jnp.ones((MANY, 2), jnp.bfloat16)}
    mean = sasg_jax.mean_model_state(state)
    assert (mean["half"] == BIG).all()
    assert (mean["many"] == 1).all()


def test_a_rate_that_only_the_product_can_hold():
    method = sasg_jax.make_method(sasg_jax.identity(), num_workers=1, learning_rate=1e-8)
    w = jnp.zeros(2, jnp.float16)  # 1e-8 would be 0
    states = sasg_jax.init_worker(method, w), sasg_jax.init_server(method, w)
    _, post = sasg_jax.worker_half(method, *states, jnp.full_like(w, BIG), w, index=0)
    np.testing.assert_allclose(post.message, 3e-4, rtol=1e-3)


# What is out of range -----------------------------------------------------------------------------

LARGEST = {"float16": 60_000, "float32": 3e38, "bfloat16": 3e38}
FEEDBACK = {
    # name: γ, feedback, what it has in memory, and g, each times the largest
    "γ g": (2.0, sasg_jax.residual(), 0, 1),
    "γ g + e": (1.0, sasg_jax.residual(), 1, 1),
    "g + e": (None, sasg_jax.residual(), 1, 1),
    "g - h": (None, sasg_jax.reconstruction(), -1, 1),
    "γ g without feedback": (2.0, sasg_jax.none(), 0, 1),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "float16") for name in FEEDBACK), ("γ g + e", "float32"), ("γ g", "bfloat16")],
)
def test_what_is_compressed_is_out_of_range(name, dtype):
    """The worker is silent, says so, and what it carries stays as it was."""
    rate, feedback, kept, direction = FEEDBACK[name]
    method = sasg_jax.make_method(
        sasg_jax.identity(), num_workers=1, learning_rate=rate, feedback=feedback
    )
    w = jnp.zeros(3, dtype)
    worker, server = sasg_jax.init_worker(method, w), sasg_jax.init_server(method, w)
    memory = jax.tree.map(lambda x: x + kept * jnp.asarray(LARGEST[dtype], dtype), worker.feedback)
    worker = worker._replace(feedback=memory)
    g = direction * jnp.full(3, LARGEST[dtype], dtype)
    new, post = sasg_jax.worker_half(method, worker, server, g, w, index=0)
    assert not post.uploaded
    assert not new.finite
    assert not post.message.any()
    for old, x in zip(jax.tree.leaves(memory), jax.tree.leaves(new.feedback), strict=True):
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(old, np.float32))


def test_a_silent_worker_that_would_keep_what_is_out_of_range():
    method = sasg_jax.make_method(sasg_jax.identity(), sasg_jax.every(2), num_workers=2)
    w = jnp.zeros(3, jnp.float16)
    worker, server = sasg_jax.init_worker(method, w), sasg_jax.init_server(method, w)
    g = jnp.full(3, LARGEST["float16"], jnp.float16)
    half = lambda worker: sasg_jax.worker_half(method, worker, server, g, w, index=1)
    once, post = half(worker)
    assert not post.uploaded
    assert once.finite
    np.testing.assert_array_equal(once.feedback.residual, g)
    twice, _ = half(once)
    assert not twice.finite
    np.testing.assert_array_equal(twice.feedback.residual, g)


@pytest.mark.parametrize("exchange", ["server", "sharded"])
def test_what_goes_down_is_out_of_range(exchange):
    """u + r does not fit: nobody steps, all say so, and r stays for the next round."""
    tx = sasg_jax.compressed_sgd(
        1.0, sasg_jax.identity(), num_workers=1, downlink=sasg_jax.top_k(0.5), exchange=exchange
    )
    params = jnp.zeros(2, jnp.float16)
    state = sasg_jax.stack_workers(tx.init(params), 1)
    axes = sasg_jax.worker_axes(state)
    one = jax.vmap(
        lambda g, state: tx.update(g, state, params),
        in_axes=(0, axes),
        out_axes=(None, axes),
        axis_name="workers",
    )

    def step(state, g):
        updates, state = one(g, state)
        return state, (updates, sasg_jax.diagnostics(state).finite)

    grads = np.array([[[60_000, 50_000]], [[60_000, 50_000]], [[0, 0]]], np.float16)
    _, (updates, finite) = jax.lax.scan(step, state, grads)
    np.testing.assert_array_equal(
        updates, -np.array([[60_000, 0], [0, 0], [0, 50_000]], np.float16)
    )
    assert finite.ravel().tolist() == [True, False, True]
