"""Singular vectors drawn by singular values."""

import compressor_checks as checks
import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from problems import M

import sasg_jax
from sasg_jax.compressors.draws import factor_of

RNG = np.random.default_rng(0)
X = (RNG.normal(size=(9, 7)) @ np.diag(0.6 ** np.arange(7))).astype(np.float32)


def test_any_numbers():
    checks.check_any_numbers(sasg_jax.atomo(2))


def test_programs():
    checks.check_programs(sasg_jax.atomo(1))


def _probabilities(s, rank):
    share = jnp.asarray(s / s[0], jnp.float32)
    return np.minimum(1, float(factor_of(share, rank)) * s / s[0])


@pytest.mark.parametrize("rank", [1, 3])
def test_is_right_in_the_mean(rank):
    """And the error is what the probabilities of the singular values make it."""
    s = np.linalg.svd(X.astype(np.float64))[1]
    error = np.sum(s**2 * (1 / _probabilities(s, rank) - 1))
    found = checks.check_mean(sasg_jax.atomo(rank), jnp.asarray(X), error, draws=4096)
    np.testing.assert_allclose(found * np.sum(s**2), error, rtol=0.1)


def test_at_most_rank_vectors_and_those_that_are_sure():
    compressor, keys = sasg_jax.atomo(3), jax.random.split(jax.random.key(0), 200)
    once = lambda key: compressor.compress(jnp.asarray(X), ((),), key).message[0].right
    right = np.asarray(jax.jit(jax.vmap(once))(keys))
    sizes = np.linalg.norm(right, axis=1)
    assert (sizes > 0).sum(1).min() >= 2
    s = np.linalg.svd(X.astype(np.float64))[1]
    sure = _probabilities(s, 3) >= 1
    assert sure[0]
    np.testing.assert_allclose(sizes[:, 0], s[0], rtol=1e-4)


def test_a_matrix_of_small_rank_is_exact():
    """Rounding of the decomposition takes no place."""
    x = jnp.asarray(np.outer(np.arange(12.0), np.ones(10)), jnp.float32)
    message, remainder, _ = checks.compress(sasg_jax.atomo(2), x, jax.random.key(0))
    np.testing.assert_allclose(remainder, 0, atol=1e-4)
    assert not np.any(message[0].right[:, 1])


def test_size_is_the_formula():
    tree = {"kernel": jnp.zeros((3, 3, 4, 16)), "bias": jnp.zeros(16),
            "half": jnp.zeros((40, 30), jnp.bfloat16)}  # fmt: skip
    size = sasg_jax.atomo(2).message_size(tree)
    assert size == (4 * (2 * 52 + 16) + 2 * 2 * 70, 32 * (2 * 52 + 16 + 2 * 70))


def test_equals_a_loop():
    """Singular vectors come with any sign, and their products do not."""
    key, centres = jax.random.key(7), problems.centres(rounds=20)
    tx = sasg_jax.compressed_sgd(0.2, sasg_jax.atomo(1), num_workers=M, key=key)
    step = sasg_jax.make_train_step(problems.quadratic_loss, tx, num_workers=M)
    run = jax.jit(problems.scan_rounds(step.step))
    state, _ = run(step.init(problems.quadratic_params()), (centres,))
    place = checks.NAMES.index("w")
    start = jax.jit(lambda t, m: jax.random.bits(jax.random.fold_in(
        jax.random.fold_in(jax.random.fold_in(key, t), m), place), (), jnp.uint32))  # fmt: skip
    w = np.zeros((4, 6))
    for t in range(20):
        total = np.zeros((4, 6))
        for m in range(M):
            u, s, vt = np.linalg.svd(0.2 * (w - centres["w"][t, m]), full_matrices=False)
            p = _probabilities(s, 1)
            steps = [int(min(q, 1 - 2.0**-24) * 2**32) for q in p.astype(np.float32)]
            after = int(start(t, m)) + np.cumsum(np.array(steps, object))
            drawn = [(a // 2**32) > ((a - s) // 2**32) for a, s in zip(after, steps, strict=True)]
            total += (u * np.where(drawn, s / p, 0)) @ vt
        w = w - total / M
    np.testing.assert_allclose(state.params["w"], w, rtol=1e-3, atol=1e-4)


def test_says_what_it_is():
    x = sasg_jax.atomo(2)
    assert (x.name, x.unbiased, x.random, x.linear) == ("atomo(2)", True, True, False)
    with pytest.raises(ValueError, match=r"^Expected rank=0 to be an integer of at least 1"):
        sasg_jax.atomo(0)
