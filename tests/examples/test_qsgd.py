"""QSGD against a NumPy loop that draws the same numbers, and against what it promises."""

import jax
import jax.numpy as jnp
import numpy as np
import problems
from problems import M

import sasg_jax
from examples import qsgd

LEVELS, RATE, ROUNDS = 3, 0.2, 12


def _draws(key, shapes):
    """The numbers of each worker in each round. ``# shape=(ROUNDS, M, ...)``"""

    def draw(round, worker):
        key_of_worker = jax.random.fold_in(jax.random.fold_in(key, round), worker)
        keys = jax.random.split(key_of_worker, len(shapes))
        return {
            name: jax.random.uniform(k, shapes[name]) for name, k in zip(shapes, keys, strict=True)
        }

    over_all = jax.vmap(jax.vmap(draw, in_axes=(None, 0)), in_axes=(0, None))
    return problems.to_numpy(jax.jit(over_all)(np.arange(ROUNDS), np.arange(M)))


def test_equals_a_loop():
    """The key is folded by the round and then by the worker, and split over tensors."""
    key, centres = jax.random.key(7), problems.centres(rounds=ROUNDS)
    tx = sasg_jax.compressed_sgd(RATE, qsgd.qsgd(LEVELS), num_workers=M, key=key)
    step = sasg_jax.make_train_step(problems.quadratic_loss, tx, num_workers=M)
    state, infos = problems.scan_rounds(step.step)(
        step.init(problems.quadratic_params()), (centres,)
    )
    assert infos.uploaded.all()

    w = problems.to_numpy(problems.quadratic_params())
    draws = _draws(key, {name: w[name].shape for name in sorted(w)})
    for t in range(ROUNDS):
        total = {name: np.zeros_like(x) for name, x in w.items()}
        for m in range(M):
            for name in w:
                p = RATE * (w[name] - centres[name][t, m])
                norm = np.sqrt((p**2).sum())
                level = np.floor(LEVELS * np.abs(p) / norm + draws[name][t, m])
                total[name] += norm * np.sign(p) * level / LEVELS
        w = {name: x - total[name] / M for name, x in w.items()}
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), state.params, w
    )


def test_is_right_in_the_mean():
    compressor = qsgd.qsgd(LEVELS)
    x = {"w": jax.random.normal(jax.random.key(1), (3, 4))}

    def decoded(key):
        message, remainder, _ = compressor.compress(x, (), key)
        tree = compressor.decompress(message, x)
        return tree["w"], tree["w"] + remainder["w"]

    samples, whole = jax.jit(jax.vmap(decoded))(jax.random.split(jax.random.key(0), 4096))
    error = np.abs(samples.mean(0) - x["w"]) / (samples.std(0) / np.sqrt(4096))
    assert error.max() < 4.5  # standard errors, of twelve entries
    np.testing.assert_allclose(whole, np.broadcast_to(x["w"], whole.shape), rtol=1e-5)


def test_a_tensor_of_zeros_stays_one():
    compressor, zeros = qsgd.qsgd(LEVELS), {"w": jnp.zeros(5)}
    with jax.debug_nans(True):  # 0 / 0 would be cast away
        message, _, _ = compressor.compress(zeros, (), jax.random.key(0))
    assert not np.any(compressor.decompress(message, zeros)["w"])
