"""Random numbers: each worker draws its own, anew in every round, and nobody disturbs others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import M

import sasg_jax

DRIVERS = {
    "vmap": {},
    "chunks": {"chunk_size": 2},
    "shard_map": {"driver": "shard_map"},
}
ROUNDS, BAD = 4, (1, 2)  # the round and the worker of a gradient that is refused
STEPS = 2


def _words(key):
    return jax.random.key_data(key).ravel()


def _loss(params, batch, *, model_state, key):
    """Reports the keys that it has, and moves those in its state on, as a model's dropout does."""
    seen = {"key": _words(key)} | {name: _words(keys) for name, keys in model_state.items()}
    moved = {
        "own": jax.random.fold_in(model_state["own"], 0),
        "stack": jax.vmap(lambda key: jax.random.fold_in(key, 0))(model_state["stack"]),
    }
    return jnp.sum(params * batch), (moved, seen)


@functools.cache
def _train_step(name):
    way = sasg_jax.local_steps(
        _loss, optax.sgd(0.1), steps=STEPS, has_aux=True, has_model_state=True, has_key=True
    )
    tx = sasg_jax.pipeline(
        optax.add_noise(0.1, 0.5, jax.random.key(3)), sasg_jax.sparse_sgd(0.1, num_workers=M)
    )
    return sasg_jax.make_train_step(way, tx, num_workers=M, **DRIVERS[name])


@functools.cache
def _seen(name, refused=False):
    """The keys of each kind. ``# shape=(ROUNDS, M, keys of a round, words)``"""
    train_step = _train_step(name)
    model_state = {"own": jax.random.key(1), "stack": jax.random.split(jax.random.key(2), 2)}
    state = train_step.init(jnp.ones(2), model_state, jax.random.key(4))
    rounds = []
    for t in range(ROUNDS):
        batch = np.ones((M, STEPS, 2), np.float32)
        if refused and t == BAD[0]:
            batch[BAD[1]] = np.nan
        noise = np.asarray(jax.random.key_data(optax.tree.get(state.opt_state, "rng_key")))
        state, info = train_step.step(state, batch)
        assert info.finite.all() == ((t, refused) != (BAD[0], True))
        rounds.append({"noise": noise, **info.aux})
    kinds = {kind: np.stack([np.asarray(r[kind]) for r in rounds]) for kind in rounds[0]}
    return {kind: x.reshape(ROUNDS, M, -1, 2) for kind, x in kinds.items()}


KINDS = {"key": STEPS, "own": STEPS, "stack": 2 * STEPS, "noise": 1}  # keys in a round


@pytest.mark.parametrize("kind", KINDS)
def test_all_draw_differently_in_every_round_and_step(kind):
    """The key of the loss, keys in the model state, alone and in an array, and in front of ours."""
    keys = _seen("vmap")[kind].reshape(-1, 2)
    assert len(keys) == ROUNDS * M * KINDS[kind]
    assert len({tuple(key) for key in keys.tolist()}) == len(keys)


@pytest.mark.parametrize("driver", ["chunks", "shard_map"])
def test_every_driver_draws_the_same(driver):
    for kind in KINDS:
        np.testing.assert_array_equal(_seen(driver)[kind], _seen("vmap")[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_a_refused_round_disturbs_nobody(kind):
    """The others draw what they would have drawn; the worker itself goes on from what it had."""
    plain, disturbed = _seen("vmap")[kind], _seen("vmap", refused=True)[kind]
    t, bad = BAD
    others = [m for m in range(M) if m != bad]
    np.testing.assert_array_equal(disturbed[:, others], plain[:, others])
    np.testing.assert_array_equal(disturbed[: t + 1, bad], plain[: t + 1, bad])
    if kind == "key":  # of the round, not of what has gone before
        np.testing.assert_array_equal(disturbed[:, bad], plain[:, bad])
    else:
        np.testing.assert_array_equal(disturbed[t + 1 :, bad], plain[t:-1, bad])
