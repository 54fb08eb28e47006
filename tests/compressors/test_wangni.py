"""Entries drawn by magnitude."""

import compressor_checks as checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sasg_jax
from sasg_jax.coders import elias_fano
from sasg_jax.compressors.draws import factor_of

COMPRESSOR = sasg_jax.wangni(0.2)
RNG = np.random.default_rng(0)
LONG = RNG.standard_t(3, 300).astype(np.float32)


def test_any_numbers():
    checks.check_any_numbers(COMPRESSOR)


def test_programs():
    checks.check_programs(COMPRESSOR)


def test_size_is_the_formula():
    """k signs, five to a byte, one number, and k/8 exact values; places by Elias and Fano."""
    like = checks.tree()

    def size_of(x):
        k = max(1, int(0.2 * x.size))
        room, bits = -(-k // 8), elias_fano().num_bits
        shapes = [jax.eval_shape(lambda n=n: elias_fano().encode(jnp.arange(n), x.size))
                  for n in (k, room)]  # fmt: skip
        places = sum(part.size for part in jax.tree.leaves(shapes))
        assert places <= (bits(k, x.size) + bits(room, x.size)) / 8 + 4
        return 4 + -(-k // 5) + room * x.dtype.itemsize + places

    want = sum(min(size_of(x), x.nbytes) for x in like.values())
    size = COMPRESSOR.message_size(like)
    assert size == (want, 32 * (9 + 9 + 38 + 1 + 15))
    million = sasg_jax.wangni(0.01).message_size(jax.ShapeDtypeStruct((10**6,), jnp.float32))
    assert million.bytes * 8 / 10**4 < 16


def _probabilities(x, k):
    """And which are sent exactly. In float64, with c as it is and the limit of k/8."""
    magnitudes = np.abs(x.astype(np.float64)) / np.abs(x).max()
    factor = float(factor_of(jnp.asarray(magnitudes, jnp.float32), k))
    room = -(-k // 8)
    limit = np.sort(magnitudes)[::-1][room] if room < x.size else 0
    factor = min(factor, 1 / limit) if limit else factor
    return np.minimum(1, factor * magnitudes)


@pytest.mark.parametrize("x", [LONG, LONG**3, np.ones(100, np.float32)], ids=["3", "heavy", "flat"])
def test_is_right_in_the_mean(x):
    """And the error is what the probabilities make it."""
    p = _probabilities(x, max(1, int(0.05 * x.size)))
    error = np.sum(x.astype(np.float64) ** 2 * (1 / p - 1))
    found = checks.check_mean(sasg_jax.wangni(0.05), jnp.asarray(x), error)
    np.testing.assert_allclose(found * np.sum(x.astype(np.float64) ** 2), error, rtol=0.1)


def test_never_more_than_there_is_room_for():
    """k drawn at most, and what is drawn by chance has one magnitude."""
    compressor = sasg_jax.wangni(0.1)
    message = lambda key: compressor.compress(jnp.asarray(LONG), ((),), key).message[0]
    keys = jax.random.split(jax.random.key(0), 500)
    decoded = lambda key: compressor.decompress((message(key),), jnp.asarray(LONG))
    rows = np.asarray(jax.jit(jax.vmap(decoded))(keys))
    assert (np.count_nonzero(rows, axis=1) <= 30).all()
    assert np.count_nonzero(rows, axis=1).min() >= 28
    for row in rows[:50]:
        by_chance = row[(row != 0) & (row != LONG)]
        assert np.ptp(np.abs(by_chance)) <= 1e-6 * np.abs(by_chance).max()
        assert (np.sign(row[row != 0]) == np.sign(LONG[row != 0])).all()


def test_few_entries_are_exact():
    """As many as there is room for, whatever else is zero."""
    x = jnp.zeros(400).at[jnp.asarray([5, 50, 399])].set(jnp.asarray([1.0, -3e4, 1e-3]))
    message, remainder, _ = checks.compress(sasg_jax.wangni(0.1), x, jax.random.key(0))
    assert not remainder.any()
    np.testing.assert_array_equal(checks.decompress(sasg_jax.wangni(0.1), message, x), x)


def _in_numpy(p, start):
    """With teeth of a comb from a start, in exact integers."""
    k = max(1, int(0.25 * p.size))
    x = p.reshape(-1)
    prob = _probabilities(x, k).astype(np.float32)
    exact = np.zeros(x.size, bool)
    exact[np.argsort(-np.abs(x))[: -(-k // 8)]] = True
    exact &= prob >= 1 - 1e-6
    steps = [
        0 if e else int(min(q, 1 - 2.0**-24) * 2**32) for q, e in zip(prob, exact, strict=True)
    ]
    after = int(start) + np.cumsum(np.array(steps, object))
    whole = np.array([a // 2**32 for a in after]) - np.array(
        [(a - s) // 2**32 for a, s in zip(after, steps, strict=True)]
    )
    drawn = (whole > 0) | exact
    return np.where(drawn, x / np.maximum(prob, 1e-30), 0).reshape(p.shape)


def test_equals_a_loop():
    draw = lambda key, shape: jax.random.bits(key, (), jnp.uint32)
    checks.check_run(sasg_jax.wangni(0.25), _in_numpy, draw)


def test_says_what_it_is():
    x = COMPRESSOR
    assert (x.name, x.unbiased, x.random, x.linear) == ("wangni(0.2)", True, True, False)


@pytest.mark.parametrize("density", [0, 1.5, "0.1"])
def test_bad_density(density):
    with pytest.raises(ValueError, match=r"^Expected density=.* in \(0, 1\]\.$"):
        sasg_jax.wangni(density)
