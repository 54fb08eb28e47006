"""Coders of values: what comes back, and of any numbers."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sasg_jax
from sasg_jax.coders import VALUE_CODERS, signs

SIGNS = {coder.name: coder for coder in (signs(), signs(2), signs(4), signs(8), signs(2, 10))}
CODERS = {**VALUE_CODERS, **SIGNS}
RNG = np.random.default_rng(0)
TOP = np.sort(np.abs(RNG.standard_normal(100_000)))[-1000:] * RNG.choice([-1, 1], 1000)
HEAVY = np.sort(np.abs(RNG.standard_t(3, 100_000)))[-1000:] * RNG.choice([-1, 1], 1000)
TINY = np.finfo(np.float32).smallest_subnormal
LARGEST = np.finfo(np.float32).max


@functools.cache
def _jitted(name):
    return jax.jit(CODERS[name].encode), jax.jit(CODERS[name].decode, static_argnums=(1, 2))


def _around(name, x):
    encode, decode = _jitted(name)
    return np.asarray(decode(encode(jnp.asarray(x)), len(x), jnp.asarray(x).dtype))


def test_plain_is_exact():
    x = TOP.astype(np.float32)
    np.testing.assert_array_equal(_around("plain", x), x)
    assert [name for name, coder in CODERS.items() if coder.exact] == ["plain"]


def test_bfloat16_rounds_to_nearest():
    x = TOP.astype(np.float32)
    np.testing.assert_array_equal(_around("bfloat16", x), x.astype(jnp.bfloat16).astype(x.dtype))


def test_one_magnitude_is_the_mean():
    x = np.asarray([3.0, -1, 2, -2, 0.5], np.float32)
    np.testing.assert_allclose(_around("sign", x), 1.7 * np.sign(x), rtol=1e-6)


def _lloyd(x, levels):
    """The same in float64, entry by entry."""
    magnitudes = np.abs(np.asarray(x, np.float64))
    low, high = max(magnitudes.min(), 1e-4 * magnitudes.max()), magnitudes.max()
    centres = high * (low / high) ** np.linspace(1, 0, levels)
    level = np.zeros(len(x), int)
    for _ in range(4):
        middles = [(a + b) / 2 for a, b in itertools.pairwise(centres)]
        level = np.asarray([sum(m > middle for middle in middles) for m in magnitudes])
        centres = [magnitudes[level == i].mean() if (level == i).any() else c
                   for i, c in enumerate(centres)]  # fmt: skip
    return np.sign(x) * np.asarray(centres)[level]


@pytest.mark.parametrize("levels", [2, 4, 8])
@pytest.mark.parametrize("x", [TOP, HEAVY, RNG.standard_normal(77)], ids=["top", "heavy", "all"])
def test_magnitudes_against_a_loop(levels, x):
    x = x.astype(np.float32)
    np.testing.assert_allclose(_around(f"sign{levels}", x), _lloyd(x, levels), rtol=1e-5)


@pytest.mark.parametrize("name", SIGNS)
def test_magnitudes_add_up_to_those_that_were_sent(name):
    for x in (TOP, HEAVY):
        x = RNG.permutation(x).astype(np.float32)
        received = _around(name, x)
        np.testing.assert_array_equal(np.sign(received), np.sign(x))
        np.testing.assert_allclose(np.abs(received).sum(), np.abs(x).sum(), rtol=1e-5)


def test_what_is_lost():
    """Of the squares, by more magnitudes less: little of a normal tail, more of a heavy one."""
    lost = lambda name, x: np.sum((_around(name, x) - x) ** 2) / np.sum(x**2)
    for x, bounds in ((TOP, (0.012, 0.005, 0.002, 0.001)), (HEAVY, (0.3, 0.13, 0.06, 0.02))):
        found = [lost(name, x.astype(np.float32)) for name in ("sign", "sign2", "sign4", "sign8")]
        assert all(one < bound for one, bound in zip(found, bounds, strict=True))
        assert found == sorted(found, reverse=True)
        assert found[0] > bounds[1]


def test_blocks_have_magnitudes_of_their_own():
    x = np.repeat(np.asarray([1, -100, 7], np.float32), [10, 10, 3])
    np.testing.assert_allclose(_around("sign2(block=10)", x), x, rtol=1e-6)
    code = signs(block=10).encode(jnp.asarray(x))
    assert code.magnitudes.shape == (3, 1)
    assert code.signs.tolist() == [0, 0b11111100, 0b1111]


@pytest.mark.parametrize("name", SIGNS)
@pytest.mark.parametrize("count", [1, 8, 9, 1000])
def test_bits_of_each(name, count):
    """A sign, and which of the magnitudes."""
    levels = int(name[4:5] or 1)
    code = _jitted(name)[0](jnp.ones(count, jnp.float32))
    assert code.signs.size == -(-count * (1 + int(np.log2(levels))) // 8)
    blocks = -(-count // 10) if "block" in name else 1
    assert code.magnitudes.shape == (blocks, levels)


ODD = {
    "zeros": np.zeros(9),
    "one zero": np.asarray([0, 1, -1, 2]),
    "denormals": np.full(9, TINY),
    "near the smallest": np.asarray([1.2e-38, -2e-38, 1e-36]),
    "the largest": np.full(9, LARGEST) * [1, -1, 1, 1, 1, -1, 1, 1, 1],
    "one huge": np.r_[np.ones(30), -LARGEST],
    "huge and denormal": np.asarray([LARGEST, TINY]),
    "one": np.asarray([-3.0]),
}


@pytest.mark.parametrize("name", CODERS)
@pytest.mark.parametrize("case", ODD)
def test_finite_of_any_numbers(name, case):
    x = ODD[case].astype(np.float32)
    code = _jitted(name)[0](jnp.asarray(x))
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(code))
    received = _around(name, x)
    assert np.isfinite(received).all()
    assert (np.abs(received) <= np.abs(x).max()).all()
    if case == "zeros":
        assert not received.any()


@pytest.mark.parametrize("name", CODERS)
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_types(name, dtype):
    x = jnp.asarray([6e4, -6e4, 1, -2] * 5, dtype)
    received = CODERS[name].decode(CODERS[name].encode(x), x.size, dtype)
    assert received.dtype == dtype
    assert np.isfinite(np.asarray(received, np.float32)).all()
    np.testing.assert_array_equal(np.sign(np.asarray(received, np.float32)), np.sign(x))


def _random(shape):
    octets = np.frombuffer(RNG.bytes(shape.size * shape.dtype.itemsize), shape.dtype)
    return jnp.asarray(octets.reshape(shape.shape))


@pytest.mark.parametrize("name", CODERS)
def test_random_bytes_decode_to_finite_values(name):
    for dtype in (jnp.float32, jnp.float16):
        shapes = jax.eval_shape(CODERS[name].encode, jnp.zeros(33, dtype))
        for _ in range(100):
            values = _jitted(name)[1](jax.tree.map(_random, shapes), 33, dtype)
            assert np.isfinite(np.asarray(values, np.float32)).all()
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        assert not np.asarray(_jitted(name)[1](zeros, 33, dtype)).any()


@pytest.mark.parametrize("levels", [0, 3, 16, True, "2", None])
def test_levels_are_powers_of_two(levels):
    with pytest.raises(ValueError, match=r"^Expected levels="):
        signs(levels)


@pytest.mark.parametrize("block", [0, -1, 1.5, "all"])
def test_block_is_a_count(block):
    with pytest.raises(ValueError, match=r"^Expected block=.* to be an integer of at least 1"):
        signs(block=block)


def test_unknown_coder():
    with pytest.raises(ValueError, match=r"^Expected values='int8' to be one of 'plain', 'bfloa"):
        sasg_jax.top_k(0.1, values="int8")
