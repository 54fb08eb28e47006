"""Signs that are drawn by magnitude."""

import compressor_checks as checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sasg_jax

COMPRESSORS = [sasg_jax.ternary(), sasg_jax.ternary(None)]
X = checks.tree()["vector"]


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=lambda x: x.name)
def test_any_numbers(compressor):
    checks.check_any_numbers(compressor)


def test_programs():
    checks.check_programs(COMPRESSORS[0])


def test_size_is_the_formula():
    like = checks.tree()
    size = COMPRESSORS[0].message_size(like)
    want = checks.plain_bytes(like, lambda n: 4 + -(-n // 5))
    assert size == (want, 32 * (45 + 45 + 192 + 1 + 77))


def test_is_right_in_the_mean():
    """Without clipping; the error is what the formula says, not only at most that."""
    x = np.asarray(X, np.float64)
    error = np.abs(x).max() * np.abs(x).sum() - np.sum(x**2)
    found = checks.check_mean(COMPRESSORS[1], X, error)
    np.testing.assert_allclose(found, error / np.sum(x**2), rtol=0.05)


def test_clips_at_root_mean_squares():
    """Which entries of one value do not exceed."""
    x = np.r_[np.ones(99), -50].astype(np.float32)
    compressor, size = sasg_jax.ternary(1.5), np.sqrt(np.mean(x**2))
    message, remainder, _ = checks.compress(compressor, jnp.asarray(x), jax.random.key(0))
    np.testing.assert_allclose(message[0].scale, 1.5 * size, rtol=1e-5)
    np.testing.assert_allclose(remainder[-1], -50 + 1.5 * size, rtol=1e-5)
    same, _, _ = checks.compress(compressor, jnp.full(100, 3.0), jax.random.key(0))
    np.testing.assert_allclose(same[0].scale, 3)


def _in_numpy(clip):
    def decoded(p, drawn):
        bound = np.inf if clip is None else clip * np.sqrt(np.mean(p**2))
        x = np.clip(p, -bound, bound)
        scale = np.abs(x).max()
        return scale * np.sign(x) * (drawn.reshape(p.shape) < np.abs(x) / scale)

    return decoded


def test_equals_a_loop():
    """As it comes with a residual; without clipping, none, and last messages serve again."""
    draw = lambda key, shape: jax.random.uniform(key, (int(np.prod(shape)),))
    checks.check_run(COMPRESSORS[0], _in_numpy(2.5), draw)
    rule = sasg_jax.innovation(40.0, history=3)
    checks.check_run(COMPRESSORS[1], _in_numpy(None), draw, rule=rule)


def test_says_what_it_is():
    assert [x.name for x in COMPRESSORS] == ["ternary(2.5)", "ternary(None)"]
    assert [x.unbiased for x in COMPRESSORS] == [False, True]


@pytest.mark.parametrize("clip", [0, -1, "2", float("nan"), float("inf"), True])
def test_bad_clip(clip):
    with pytest.raises(ValueError, match=r"^Expected clip=.* to be a number above 0\.$"):
        sasg_jax.ternary(clip)
