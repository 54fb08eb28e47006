"""A round made chunk by chunk is the round made at once."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from problems import LEARNING_RATE, METHODS

import sasg_jax

M = 12


def _losses(params, batch, *, model_state, key):
    images, labels = batch
    loss = problems.mlp_loss(params, (images + 0.1 * jax.random.normal(key, images.shape), labels))
    return loss, ({"mean": 0.9 * model_state["mean"] + 0.1 * images.mean(0)}, {"double": 2 * loss})


def _run(tx, chunk_size, rounds=25):
    train_step = sasg_jax.make_train_step(
        _losses,
        tx,
        num_workers=M,
        chunk_size=chunk_size,
        has_aux=True,
        has_model_state=True,
        has_key=True,
    )
    state = train_step.init(problems.mlp_params(), {"mean": jnp.zeros(20)}, jax.random.key(3))
    infos = []
    for t in range(rounds):
        images, labels = problems.at(problems.mlp_batches(M), t)
        if t == 9:
            images = np.where(np.arange(M)[:, None, None] == 5, np.nan, images)
        state, info = train_step.step(state, (images, labels))
        infos.append(problems.to_numpy(info))
    state = state._replace(keys=jax.random.key_data(state.keys))
    return problems.to_numpy(state), infos


def _assert_close(a, b):
    chex.assert_trees_all_equal_structs(a, b)
    chex.assert_trees_all_close(a, b, rtol=2e-5, atol=1e-6)


OPTIMIZERS = {
    **{name: lambda name=name: METHODS[name](LEARNING_RATE, num_workers=M) for name in METHODS},
    "shared": lambda: METHODS["sasg"](
        LEARNING_RATE, num_workers=M, share_stale_params=True, alpha=2e3
    ),
    "server": lambda: METHODS["sasg"](LEARNING_RATE, num_workers=M, exchange="server", alpha=2e3),
    "adamw": lambda: optax.chain(
        optax.clip_by_global_norm(1.0),
        sasg_jax.aggregate(
            sasg_jax.top_k(0.1),
            sasg_jax.innovation(3e4, max_staleness=5, history=3),
            num_workers=M,
            downlink=sasg_jax.top_k(0.2),
        ),
        optax.adamw(1e-2),
    ),
    "momentum": lambda: optax.chain(
        optax.trace(0.5), sasg_jax.aggregate(sasg_jax.top_k(0.1), num_workers=M), optax.sgd(0.1)
    ),
}


@pytest.mark.parametrize(
    ("name", "chunk_size"), [*((name, 4) for name in OPTIMIZERS), ("shared", 1), ("sasg", 12)]
)
def test_chunks_make_the_same_round(name, chunk_size):
    """States, reports, model states and keys; with what stands before and after the aggregation."""
    state, infos = _run(OPTIMIZERS[name](), chunk_size)
    want, want_infos = _run(OPTIMIZERS[name](), None)
    _assert_close(state, want)
    _assert_close(infos, want_infos)
    if name in ("shared", "server", "adamw", "lasg", "sasg"):
        uploaded = np.stack([info.uploaded for info in infos])[10:]
        assert 0.05 < uploaded.mean() < 0.95


def test_only_a_chunks_gradients_are_in_memory():
    """Bytes of the compiled round beyond its state, by what the compiler says of it."""
    params = {"w": jnp.zeros((256, 256))}

    def loss(params, batch):
        return jnp.sum(jnp.square(params["w"] @ batch))

    def temporary_bytes(chunk_size, workers=32):
        tx = sasg_jax.sasg(0.1, num_workers=workers, density=0.001, share_stale_params=True)
        train_step = sasg_jax.make_train_step(loss, tx, num_workers=workers, chunk_size=chunk_size)
        batch = jnp.ones((workers, 256))
        step: Any = train_step.step  # jitted
        compiled = step.lower(train_step.init(params), batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    d = 4 * 256 * 256
    assert temporary_bytes(None) > 64 * d  # two gradients of each worker
    assert temporary_bytes(2) < 16 * d


@pytest.mark.parametrize(
    ("kwargs", "tx", "message"),
    [
        ({"chunk_size": 0}, None, "Expected chunk_size=0 to be an integer of at least 1"),
        ({"chunk_size": 5}, None, "Expected chunk_size=5 to divide num_workers=12"),
        (
            {"chunk_size": 4, "driver": "shard_map", "devices": list(range(M))},
            None,
            "Expected chunk_size=4 to be None for driver='shard_map'",
        ),
        (
            {"chunk_size": 4},
            lambda: METHODS["sasg"](0.1, num_workers=M, exchange="sharded"),
            "Expected chunk_size=4 to be None for exchange='sharded'",
        ),
        (
            {"chunk_size": 4},
            lambda: optax.MultiSteps(METHODS["sasg"](0.1, num_workers=M), 2),
            "Expected chunk_size=4 to be None with optax.MultiSteps",
        ),
    ],
)
def test_what_cannot_be_is_refused(kwargs, tx, message):
    tx = METHODS["sasg"](0.1, num_workers=M) if tx is None else tx()

    def one_round():
        train_step = sasg_jax.make_train_step(problems.mlp_loss, tx, num_workers=M, **kwargs)
        state = train_step.init(problems.mlp_params())
        train_step.step(state, problems.at(problems.mlp_batches(M), 0))

    with pytest.raises(ValueError, match=message):
        one_round()
