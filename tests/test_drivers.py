"""The drivers of one worker's round: a round made chunk by chunk is the round made at once."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from problems import DENSITY, LEARNING_RATE, METHODS

import sasg_jax
from sasg_jax import drivers

M, ROUNDS = 7, 20
TOP_K = sasg_jax.top_k(DENSITY)


def _losses(params, batch, *, model_state, key):
    images, labels = batch
    images = images + 0.1 * jax.random.normal(key, images.shape)
    loss = problems.softmax_loss(params, (images, labels))
    return loss, ({"mean": 0.9 * model_state["mean"] + 0.1 * images.mean(0)}, {"double": 2 * loss})


def _direction(steps=None):
    has = {"has_aux": True, "has_model_state": True, "has_key": True}
    if steps is None:
        return sasg_jax.gradient(_losses, **has)
    return sasg_jax.local_steps(_losses, optax.sgd(0.1, momentum=0.5), steps=steps, **has)


OPTIMIZERS = {
    **{name: (METHODS[name](LEARNING_RATE, num_workers=M), None) for name in METHODS},
    "adamw": (
        sasg_jax.pipeline(
            optax.clip_by_global_norm(1.0),
            sasg_jax.aggregate(
                TOP_K,
                sasg_jax.innovation(30.0, max_staleness=5, history=3, share_stale_params=True),
                num_workers=M,
                downlink=sasg_jax.top_k(0.2),
            ),
            optax.adamw(1e-2),
        ),
        None,
    ),
    "momentum and local steps": (
        sasg_jax.pipeline(
            optax.trace(0.5),
            sasg_jax.aggregate(TOP_K, sasg_jax.every(2), num_workers=M),
            optax.sgd(0.1),
        ),
        2,
    ),
}


def _rounds(steps):
    """Batches with a worker whose gradient is no number for a round, and who is present."""
    images, labels = problems.softmax_batches(M, ROUNDS * (steps or 1))
    images = images.copy()
    images[9, 5] = np.nan
    if steps is not None:
        images, labels = (
            np.swapaxes(x.reshape(ROUNDS, steps, *x.shape[1:]), 1, 2) for x in (images, labels)
        )
    present = np.random.default_rng(5).random((ROUNDS, M)) < 0.9
    present[9 // (steps or 1), 5] = True
    return (images, labels), present


@functools.cache
def _run(name, chunk_size):
    tx, steps = OPTIMIZERS[name]
    train_step = sasg_jax.make_train_step(
        _direction(steps), tx, num_workers=M, chunk_size=chunk_size
    )
    state = train_step.init(
        problems.softmax_params(), {"mean": jnp.zeros(12)}, jax.random.PRNGKey(3)
    )
    run = jax.jit(problems.scan_rounds(train_step.step))
    return jax.device_get(run(state, _rounds(steps)))


def _case(name, chunk_size, slow=False):
    return pytest.param(name, chunk_size, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(
    ("name", "chunk_size"),
    [
        _case("adamw", 3),  # two chunks and a rest
        _case("momentum and local steps", 4, slow=True),
        *(_case(name, 3, slow=True) for name in METHODS),
        *(_case("adamw", chunk_size, slow=True) for chunk_size in (1, 7, 100)),
    ],
)
def test_chunks_make_the_same_round(name, chunk_size):
    """States, reports, model states; with what stands before and after the aggregation."""
    state, infos = _run(name, chunk_size)
    want, want_infos = _run(name, None)
    chex.assert_trees_all_equal_structs(state, want)
    chex.assert_trees_all_close(state, want, rtol=2e-5, atol=1e-6)
    chex.assert_trees_all_close(infos, want_infos, rtol=2e-5, atol=1e-6)
    assert np.argwhere(~infos.finite).tolist() == [[9 // (OPTIMIZERS[name][1] or 1), 5]]
    if name not in ("sgd", "sparse_sgd"):
        assert 0.05 < infos.uploaded[10:].mean() < 0.85


def test_only_a_chunks_gradients_are_in_memory():
    """Two gradients of each worker would be 64 times the parameters. What the compiled round takes
    beyond its state is what the compiler says of it."""
    params, workers = {"w": jnp.zeros((256, 256))}, 32

    def loss(params, batch):
        return jnp.sum(jnp.square(params["w"] @ batch))

    tx = sasg_jax.sasg(0.1, num_workers=workers, density=0.001, share_stale_params=True)
    train_step = sasg_jax.make_train_step(loss, tx, num_workers=workers, chunk_size=2)
    step: Any = train_step.step  # jitted
    compiled = step.lower(train_step.init(params), jnp.ones((workers, 256))).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 20 * 4 * 256 * 256


def _takes_means():
    return sasg_jax.Compressor(
        name="means()", compress_mean=lambda tree, memory, key, mean: mean(tree)
    )


@pytest.mark.parametrize(
    ("tx", "message"),
    [
        (
            METHODS["sasg"](0.1, num_workers=M, exchange="sharded"),
            r"to be None where every worker is a server too \(exchange='sharded'\)",
        ),
        (
            sasg_jax.compressed_sgd(0.1, _takes_means(), num_workers=M),
            "to be None where .* where the compressor takes means over all workers",
        ),
        (
            optax.chain(optax.clip(1.0), METHODS["sasg"](0.1, num_workers=M)),
            "only for a transformation of sasg_jax whose .* into sasg_jax.pipeline in place of op",
        ),
    ],
    ids=["sharded", "means", "chain"],
)
def test_what_cannot_be_made_in_chunks_is_refused(tx, message):
    with pytest.raises(ValueError, match=f"^Expected chunk_size=4 {message}"):
        sasg_jax.make_train_step(problems.softmax_loss, tx, num_workers=M, chunk_size=4)


# Drivers as functions -----------------------------------------------------------------------------


def test_drivers_take_any_round_of_a_worker():
    """One that adds up the workers' batches, in a state of which a part belongs to each worker."""
    workers = 4
    tx = METHODS["sgd"](1.0, num_workers=workers)
    opt_state = sasg_jax.stack_workers(tx.init({"w": jnp.zeros(2)}), workers)
    opt_state = jax.device_get(opt_state)
    start = sasg_jax.TrainState(
        {"w": np.zeros(2, np.float32)}, opt_state, np.arange(4, dtype=np.int32), ()
    )
    batch = np.arange(1, 5, dtype=np.float32)

    def one_worker(state, batch, present):
        there = present[jax.lax.axis_index("workers")]
        total = jax.lax.psum(jnp.where(there, batch, 0), "workers")
        params = jax.tree.map(lambda w: w + total, state.params)
        info = sasg_jax.RoundInfo(
            batch, there, there, state.model_state, batch, total, total > 0, ()
        )
        return state._replace(params=params, model_state=state.model_state + 1), info

    present = np.array([True, False, True, True])
    devices = jax.devices()[:workers]
    mapped = {
        "simulate": functools.partial(
            drivers.simulate, one_worker, num_workers=workers, axis_name="workers"
        ),
        "on_mesh": functools.partial(
            drivers.on_mesh, one_worker, mesh=jax.sharding.Mesh(devices, ("workers",))
        ),
        "on_devices": drivers.on_devices(
            one_worker, start, devices=devices, axis_name="workers", donate=False
        ),
    }
    for name, driver in mapped.items():
        driver = driver if name == "on_devices" else jax.jit(driver)
        state, info = jax.device_get(driver(start, batch, present))
        assert state.params["w"].tolist() == [8, 8], name
        assert state.model_state.tolist() == [1, 2, 3, 4], name
        assert info.loss.tolist() == [1, 2, 3, 4], name
        assert info.uploaded.tolist() == present.tolist(), name
        assert info.threshold == 8, name
        chex.assert_trees_all_equal(state.opt_state, opt_state)


def test_simulation_refuses_as_shared_what_depends_on_the_worker():
    tx = METHODS["sgd"](1.0, num_workers=2)
    opt_state = sasg_jax.stack_workers(tx.init({"w": jnp.zeros(2)}), 2)
    start = sasg_jax.TrainState({"w": np.zeros(2, np.float32)}, opt_state, (), ())

    def one_worker(state, batch, present):
        report = batch, batch, batch, batch, batch
        info = sasg_jax.RoundInfo(*report, jnp.zeros(()), jnp.asarray(True), ())
        return state._replace(params={"w": state.params["w"] + batch}), info

    with pytest.raises(ValueError, match=r"^Expected params and .* to be the same on all workers"):
        drivers.simulate(
            one_worker, start, np.ones(2, np.float32), None, num_workers=2, axis_name="workers"
        )
