"""Entries that a shared seed draws."""

import compressor_checks as checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sasg_jax
from sasg_jax.compressors.random_k import draw_places

COMPRESSORS = [sasg_jax.random_k(0.3), sasg_jax.random_k(0.1, unbiased=True)]
X = checks.tree()["vector"]


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=lambda x: x.name)
def test_any_numbers(compressor):
    checks.check_any_numbers(compressor)


@pytest.mark.parametrize(("kept", "size"), [(3, 10), (1, 7), (10, 10), (99, 100), (31, 45)])
def test_each_place_is_drawn_as_often_and_none_twice(kept, size):
    keys = jax.random.split(jax.random.key(0), 4000)
    places = np.asarray(jax.jit(jax.vmap(lambda key: draw_places(key, kept, size)))(keys))
    assert all(len(set(row)) == kept for row in places)
    assert places.min() >= 0
    assert places.max() < size
    counts, part = np.bincount(places.reshape(-1), minlength=size), kept / size
    spread = np.sqrt(4000 * part * (1 - part))
    assert np.abs(counts - 4000 * part).max() <= 5 * spread


def test_places_of_the_largest_tensors():
    """No product of numbers that int32 does not hold."""
    size = 2**31 - 1
    places = np.asarray(jax.jit(lambda key: draw_places(key, 7, size))(jax.random.key(1)))
    assert len(set(places.tolist())) == 7
    assert places.min() >= 0


def test_is_right_in_the_mean():
    """And the squared error is n/k - 1 of ‖x‖², of c = 1 what is not drawn."""
    k = 7
    bound = (X.size / k - 1) * float(jnp.sum(X**2))
    found = checks.check_mean(COMPRESSORS[1], X, bound)
    np.testing.assert_allclose(found, X.size / k - 1, rtol=0.1)
    remainder = jax.jit(lambda key: COMPRESSORS[0].compress(X, ((),), key).remainder)
    rest = jax.vmap(remainder)(jax.random.split(jax.random.key(0), 2000))
    part = np.sum(np.asarray(rest) ** 2, 1).mean() / np.sum(np.asarray(X) ** 2)
    np.testing.assert_allclose(part, 1 - 23 / 77, rtol=0.05)


def test_messages_add_up():
    """What is decoded of a sum is the sum of what is decoded; in half precision too."""
    for dtype in (jnp.float32, jnp.float16):
        rows = jnp.asarray(np.random.default_rng(1).normal(size=(3, 40)) * 2e4, dtype)
        for compressor in COMPRESSORS:
            key = jax.random.key(2)
            messages = [compressor.compress(x, ((),), key).message[0] for x in rows]
            each = [compressor.decompress((m,), rows[0], key) for m in messages]
            total = jnp.stack([m.astype(jnp.float32) for m in messages]).sum(0)
            got = compressor.decompress_sum((total[None],), rows[0], key)
            want = sum(np.asarray(x, np.float32) for x in each)
            np.testing.assert_allclose(got, want, rtol=2e-3 if dtype == jnp.float16 else 1e-5)


def test_no_entry_is_in_both():
    compressor, key = COMPRESSORS[0], jax.random.key(5)
    message, remainder, _ = checks.compress(compressor, X, key)
    decoded = checks.decompress(compressor, message, X, key)
    assert not np.any((np.asarray(decoded) != 0) & (np.asarray(remainder) != 0))
    np.testing.assert_array_equal(decoded + remainder, X)
    assert np.count_nonzero(decoded) == 23


def test_size_is_the_formula():
    """Values alone: floor(density · n) of each tensor, at least one, and 32 bits in the paper's
    picture also of half precision."""
    counts = {"bfloat16": 13, "float16": 13, "matrix": 57, "scalar": 1, "vector": 23}
    size = COMPRESSORS[0].message_size(checks.tree())
    assert size == (2 * 26 + 4 * 81, 32 * sum(counts.values()))


def _draw(key, shape):
    return draw_places(key, max(1, int(0.3 * np.prod(shape))), int(np.prod(shape)))


def _in_numpy(p, places):
    decoded = np.zeros(p.size)
    decoded[places] = p.reshape(-1)[places]
    return decoded.reshape(p.shape)


@pytest.mark.parametrize("rule", [None, sasg_jax.every(2)], ids=["always", "turns"])
def test_equals_a_loop(rule):
    """All workers draw from the key of the round."""
    checks.check_run(COMPRESSORS[0], _in_numpy, _draw, rule=rule)


def test_a_sum_serves():
    tx = sasg_jax.compressed_sgd(0.1, COMPRESSORS[0], num_workers=4, key=jax.random.key(0))
    assert tx.method.exchange.name == "psum"
    assert tx.method.feedback.name == "residual()"
    free = sasg_jax.compressed_sgd(0.1, COMPRESSORS[1], num_workers=4, key=jax.random.key(0))
    assert free.method.feedback.name == "none()"


def test_last_messages_cannot_be_decoded():
    with pytest.raises(ValueError, match=r"^Expected silence='reuse' to be 'keep' or 'drop' for "):
        sasg_jax.aggregate(
            COMPRESSORS[0], sasg_jax.innovation(1.0), num_workers=4, key=jax.random.key(0)
        )


def test_says_what_it_is():
    assert [x.name for x in COMPRESSORS] == ["random_k(0.3)", "random_k(0.1, unbiased=True)"]
    for x in COMPRESSORS:
        assert (x.random, x.shares_key, x.linear, x.exact) == (True, True, True, False)
    assert [x.unbiased for x in COMPRESSORS] == [False, True]


@pytest.mark.parametrize(("argument", "value"), [("density", 0), ("density", 1.5), ("unbiased", 1)])
def test_bad_arguments(argument, value):
    with pytest.raises(ValueError, match=rf"^Expected {argument}={value!r} "):
        sasg_jax.random_k(**{"density": 0.1, argument: value})
