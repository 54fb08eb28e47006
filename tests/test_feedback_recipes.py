"""Methods whose feedback is their own, beside loops written from their formulas: EF21 and its
momentum, DIANA, DGC."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import recipes

import sasg_jax
from examples import qsgd

ROUNDS, RATE = 30, 0.1


def top(x, kept):
    """The entries of largest magnitude, of the whole vector."""
    chosen = np.argsort(-np.abs(x), kind="stable")[:kept]
    return np.where(np.isin(np.arange(x.size), chosen), x, 0)


def _here(given, present, t, m, g):
    return np.isfinite(g).all() and (present is None or present[t, m])


def _each(tree):
    """Each worker's of a tree with a leading axis over workers. shape=(M, SIZE)"""
    return np.concatenate([np.asarray(x).reshape(len(x), -1) for x in jax.tree.leaves(tree)], 1)


def _hard(num_workers):
    """With workers that are absent and gradients that are refused."""
    given = recipes.data(num_workers, ROUNDS, noise=0.5)
    present = np.random.default_rng(1).random((ROUNDS, num_workers)) < 0.8
    given.targets[[0, 5, 12], [0, num_workers // 2, num_workers - 1], 0] = np.nan
    return given, present


# EF21 ---------------------------------------------------------------------------------------------


def _ef21(given, kept, momentum, present=None, period=1):
    """v ← (1 - η) v + η g, also in the rounds between one's turns; h ← h + C(v - h)."""
    M = given.targets.shape[1]
    w, path = recipes.start(), [recipes.start()]
    h, v = np.zeros((M, recipes.SIZE)), [None] * M
    for t in range(ROUNDS):
        for m in range(M):
            g = given.grad(t, m, w)
            if not _here(given, present, t, m, g):
                continue
            v[m] = g if v[m] is None else (1 - momentum) * v[m] + momentum * g
            if (t + m) % period == 0:
                h[m] += top(v[m] - h[m], kept)
        w = w - RATE * h.mean(0)
        path.append(w)
    return np.array(path), h, v


@pytest.mark.parametrize(("num_workers", "momentum"), [(1, 0.25), (4, None)])
def test_ef21(num_workers, momentum):
    given = recipes.data(num_workers, ROUNDS, noise=0.5)
    how = {"density": 0.4, "scope": "tree", "momentum": momentum}
    run = recipes.run(sasg_jax.ef21(RATE, num_workers=num_workers, **how), given)
    recipes.assert_same_path(run, _ef21(given, 2, 1.0 if momentum is None else momentum)[0])
    assert run.uploaded.all()


def test_ef21_with_momentum_in_turns():
    """Silent workers keep up their average; absent ones and refused gradients are no part of it.
    Both sides have the same of each worker."""
    given, present = _hard(4)
    ours = sasg_jax.aggregate(
        sasg_jax.top_k(0.4, scope="tree"),
        sasg_jax.every(2),
        feedback=sasg_jax.reconstruction(momentum=0.25),
        num_workers=4,
    )
    run = recipes.run(sasg_jax.pipeline(ours, optax.sgd(RATE)), given, present=present)
    path, h, v = _ef21(given, 2, 0.25, present, period=2)
    recipes.assert_same_path(run, path)
    memory = run.state.worker.feedback
    np.testing.assert_allclose(_each(memory.reconstruction), h, atol=1e-4)
    np.testing.assert_allclose(_each(memory.average), np.stack(v), atol=1e-4)
    np.testing.assert_allclose(recipes.flat(run.state.server.memory), h.sum(0), atol=1e-4)


# DIANA --------------------------------------------------------------------------------------------


def _shared_half():
    """Twice a random half of the entries, the same for all: unbiased, of variance 1."""

    def kept(tree, key):
        keys = jax.random.split(key, len(jax.tree.leaves(tree)))
        keys = jax.tree.unflatten(jax.tree.structure(tree), list(keys))
        return jax.tree.map(lambda x, k: jax.random.bernoulli(k, 0.5, x.shape), tree, keys)

    def compress(tree, memory, key):
        sent = jax.tree.map(lambda x, keep: jnp.where(keep, 2 * x, 0), tree, kept(tree, key))
        return sasg_jax.Compressed(sent, jax.tree.map(jnp.subtract, tree, sent), memory)

    return sasg_jax.Compressor(
        name="half()",
        compress=compress,
        decompress_sum=lambda rows, like, key: jax.tree.map(lambda x: x.sum(0), rows),
        unbiased=True,
        linear=True,
        random=True,
        shares_key=True,
    ), kept


@pytest.mark.parametrize(("num_workers", "damping"), [(1, 0.5), (4, 0.25)])
def test_diana(num_workers, damping):
    """ĝ = h + mean Q(g - h) of the h before, and h ← h + a Q: handed the same random numbers."""
    compressor, kept = _shared_half()
    key = jax.random.key(3)
    given = recipes.data(num_workers, ROUNDS, noise=0.5)
    tx = sasg_jax.diana(RATE, compressor, num_workers=num_workers, damping=damping, key=key)
    run = recipes.run(tx, given)
    w, path = recipes.start(), [recipes.start()]
    h = np.zeros((num_workers, recipes.SIZE))
    for t in range(ROUNDS):
        draw = np.asarray(recipes.flat(kept(recipes.params(), jax.random.fold_in(key, t))))
        g = np.stack([given.grad(t, m, w) for m in range(num_workers)])
        q = np.where(draw, 2 * (g - h), 0)
        w, h = w - RATE * (h + q).mean(0), h + damping * q
        path.append(w)
    recipes.assert_same_path(run, path)
    np.testing.assert_allclose(recipes.flat(run.state.server.memory), h.sum(0), atol=1e-4)


def test_dianas_noise_vanishes():
    """With gradients of all the data, where plain QSGD's does not: at the same rate and levels."""
    given = recipes.data(4, 400)
    given = recipes.Data(given.rows[:, :, :5], given.targets[:, :, :5])
    how: Any = {"num_workers": 4, "key": jax.random.key(0)}
    with_h = recipes.run(sasg_jax.diana(0.3, qsgd.qsgd(3), damping=0.25, **how), given)
    without = recipes.run(sasg_jax.compressed_sgd(0.3, qsgd.qsgd(3), **how), given)
    rows = given.rows[0].reshape(-1, recipes.SIZE).astype(np.float64)
    best = np.linalg.lstsq(rows, given.targets[0].reshape(-1).astype(np.float64))[0]
    distance = lambda run: np.linalg.norm(run.path[-50:] - best, axis=1).mean()
    assert distance(with_h) < 1e-2 * distance(without)


# DGC ----------------------------------------------------------------------------------------------


def _dgc(given, kept, momentum, masking, *, present=None, period=1):
    M = given.targets.shape[1]
    w, path = recipes.start(), [recipes.start()]
    u, v = np.zeros((M, recipes.SIZE)), np.zeros((M, recipes.SIZE))
    for t in range(ROUNDS):
        step = np.zeros(recipes.SIZE)
        for m in range(M):
            g = RATE * given.grad(t, m, w)
            if not _here(given, present, t, m, g):
                continue
            u[m] = momentum * u[m] + g
            v[m] += u[m]
            if (t + m) % period:
                continue
            sent = top(v[m], kept)
            step += sent
            v[m] -= sent
            if masking:
                u[m][sent != 0] = 0
        w = w - step / M
        path.append(w)
    return np.array(path), u, v


@pytest.mark.parametrize(("num_workers", "masking"), [(1, True), (4, False)])
def test_dgc(num_workers, masking):
    given = recipes.data(num_workers, ROUNDS, noise=0.5)
    how = {"density": 0.4, "scope": "tree", "momentum": 0.7, "masking": masking}
    run = recipes.run(sasg_jax.dgc(RATE, num_workers=num_workers, **how), given)
    recipes.assert_same_path(run, _dgc(given, 2, 0.7, masking)[0])


def test_dgc_in_turns():
    """Who is silent goes on with its momentum; absent and refused ones do not."""
    given, present = _hard(4)
    tx = sasg_jax.compressed_sgd(
        RATE,
        sasg_jax.top_k(0.4, scope="tree"),
        sasg_jax.every(2),
        feedback=sasg_jax.momentum_residual(0.7),
        num_workers=4,
    )
    run = recipes.run(tx, given, present=present)
    path, u, v = _dgc(given, 2, 0.7, True, present=present, period=2)
    recipes.assert_same_path(run, path)
    memory = run.state.worker.feedback
    np.testing.assert_allclose(_each(memory.velocity), u, atol=1e-4)
    np.testing.assert_allclose(_each(memory.residual), v, atol=1e-4)


def test_dgc_of_everything_is_momentum():
    """Without masking; with it nothing is left of the momentum."""
    given = recipes.data(1, ROUNDS, noise=0.5)
    for masking, momentum in ((False, 0.7), (True, None)):
        how = {"density": 1.0, "momentum": 0.7, "masking": masking}
        run = recipes.run(sasg_jax.dgc(RATE, num_workers=1, **how), given)
        sgd = sasg_jax.pipeline(
            sasg_jax.aggregate(sasg_jax.identity(), num_workers=1), optax.sgd(RATE, momentum)
        )
        np.testing.assert_allclose(run.path, recipes.run(sgd, given).path, atol=1e-5)
