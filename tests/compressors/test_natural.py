"""Powers of two, rounded to at random."""

import compressor_checks as checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sasg_jax

COMPRESSOR = sasg_jax.natural()


def test_any_numbers():
    checks.check_any_numbers(COMPRESSOR)


def test_programs():
    checks.check_programs(COMPRESSOR)


def test_size_is_the_formula():
    """A sign and an exponent: 9 bits, or 6 of float16."""
    size_of = lambda x: -(-x.size * (6 if x.dtype == jnp.float16 else 9) // 8)
    like = checks.tree()
    want = sum(min(size_of(x), x.nbytes) for x in like.values())
    assert COMPRESSOR.message_size(like) == (want, 32 * (45 + 45 + 192 + 1 + 77))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_is_a_power_of_two_beside_each(dtype):
    x = jnp.asarray(np.random.default_rng(0).standard_t(2, 500), dtype)
    message, _, _ = checks.compress(COMPRESSOR, x, jax.random.key(0))
    got = np.asarray(checks.decompress(COMPRESSOR, message, x), np.float64)
    exact = np.asarray(x, np.float64)
    low = 2.0 ** np.floor(np.log2(np.abs(exact)))
    assert (np.sign(got) == np.sign(exact)).all()
    assert ((np.abs(got) == low) | (np.abs(got) == 2 * low)).all()
    powers = jnp.asarray(2.0 ** np.arange(-14, 16), dtype)
    np.testing.assert_array_equal(checks.compress(COMPRESSOR, powers, jax.random.key(0))[1], 0)


def test_is_right_in_the_mean():
    """Within an eighth of ‖x‖², which 1.5, half way, has one ninth of; 4/3 has all of it."""
    x = checks.tree()["vector"]
    checks.check_mean(COMPRESSOR, x, float(jnp.sum(x**2)) / 8)
    worst = checks.check_mean(COMPRESSOR, jnp.full(50, 4 / 3), 50 * 16 / 9 / 8)
    np.testing.assert_allclose(worst, 1 / 8, rtol=0.05)


def test_the_ends_of_a_type():
    """Nothing is rounded out of range; numbers below the normal ones are right in the mean."""
    largest = jnp.full(40, jnp.finfo(jnp.float16).max)
    message, _, _ = checks.compress(COMPRESSOR, largest, jax.random.key(0))
    assert set(checks.decompress(COMPRESSOR, message, largest).tolist()) == {2.0**15}
    small = jnp.full(8000, 2.0**-14 / 4, jnp.float16)
    message, _, _ = checks.compress(COMPRESSOR, small, jax.random.key(0))
    got = np.asarray(checks.decompress(COMPRESSOR, message, small), np.float64)
    assert set(got.tolist()) == {0, 2.0**-14}
    np.testing.assert_allclose(got.mean(), 2.0**-16, rtol=0.1)


def _in_numpy(p, drawn):
    """By logarithms, in place of bits."""
    magnitude = np.abs(p.astype(np.float64))
    low = 2.0 ** np.floor(np.log2(magnitude))
    up = drawn.reshape(p.shape) / 2.0**23 < magnitude / low - 1
    return np.sign(p) * np.where(up, 2 * low, low)


def test_equals_a_loop():
    draw = lambda key, shape: jax.random.bits(key, (int(np.prod(shape)),), jnp.uint32) >> 9
    checks.check_run(COMPRESSOR, _in_numpy, draw)


def test_says_what_it_is():
    x = COMPRESSOR
    assert (x.name, x.unbiased, x.random, x.exact, x.linear) == ("natural()", True, True, False,
                                                                False)  # fmt: skip
