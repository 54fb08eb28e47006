"""A second message for what the first one leaves out."""

from typing import Any, cast

import compressor_checks as checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sasg_jax

COMPRESSOR = sasg_jax.induced(sasg_jax.top_k(0.1), sasg_jax.qsgd(1, 16))
X = checks.tree()["vector"]


def test_programs():
    checks.check_programs(COMPRESSOR)


def test_the_parts_of_a_message():
    """The first is that of top-k, the second of what it leaves out; and both are counted."""
    tree, first, second = checks.tree(all_types=False), sasg_jax.top_k(0.1), sasg_jax.qsgd(1, 16)
    message, remainder, _ = checks.compress(COMPRESSOR, tree, jax.random.key(0))
    alone, rest, _ = checks.compress(first, tree)
    for x, y in zip(jax.tree.leaves(message[0]), jax.tree.leaves(alone), strict=True):
        np.testing.assert_array_equal(x, y)
    decoded = checks.decompress(COMPRESSOR, message, tree)
    again = checks.decompress(second, message[1], tree)
    for name, x in tree.items():
        np.testing.assert_allclose(decoded[name] + remainder[name], x, atol=1e-5)
        np.testing.assert_array_equal(remainder[name], rest[name] - again[name])
    sizes = [part.message_size(tree) for part in (first, second, COMPRESSOR)]
    assert np.array(sizes[0]).tolist() == (np.array(sizes[2]) - np.array(sizes[1])).tolist()


def test_is_right_in_the_mean():
    """With an error that is smaller by what the first one takes away."""
    rest = np.asarray(checks.compress(sasg_jax.top_k(0.1), X)[1])
    bound = sum(4 * np.sum(rest[i : i + 16] ** 2) for i in range(0, 77, 16))
    part = checks.check_mean(COMPRESSOR, X, bound)
    alone = checks.check_mean(sasg_jax.qsgd(1, 16), X, 4 * float(jnp.sum(X**2)))
    assert part < 0.8 * alone


def test_any_numbers_come_back_as_numbers():
    x = {"x": jnp.asarray([0, 3e38, -1e-40, 1, -3e38] * 9), "y": jnp.zeros(40)}
    message, remainder, _ = checks.compress(COMPRESSOR, x, jax.random.key(0))
    decoded = checks.decompress(COMPRESSOR, message, x)
    for leaf in jax.tree.leaves((decoded, remainder)):
        assert np.isfinite(leaf).all()
    assert not decoded["y"].any()
    nothing = checks.decompress(COMPRESSOR, COMPRESSOR.zero_message(x), x)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(nothing))


def test_a_run_keeps_nothing():
    """And gets as near as plain SGD does, whose noise it adds to."""
    tx = sasg_jax.compressed_sgd(0.1, COMPRESSOR, num_workers=4, key=jax.random.key(0))
    assert tx.method.feedback.name == "none()"
    shared = sasg_jax.induced(sasg_jax.random_k(0.5), sasg_jax.random_k(0.25, unbiased=True))
    both = sasg_jax.compressed_sgd(0.1, shared, num_workers=4, key=jax.random.key(0))
    assert both.method.exchange.name == "psum"
    key = jax.random.key(1)
    message, remainder, _ = checks.compress(shared, X, key)
    decoded = checks.decompress(shared, message, X, key)
    np.testing.assert_allclose(decoded + remainder, X, atol=1e-5)


def test_equals_a_loop():
    """Both halves of the key are used, and what the first sends is not drawn again."""
    compressor = sasg_jax.induced(sasg_jax.sign(), sasg_jax.natural())

    def in_numpy(p, drawn):
        first = np.abs(p).mean() * np.where(p < 0, -1, 1)
        rest = p - first
        low = 2.0 ** np.floor(np.log2(np.abs(rest)))
        up = drawn.reshape(p.shape) / 2.0**23 < np.abs(rest) / low - 1
        return first + np.sign(rest) * np.where(up, 2 * low, low)

    rows = lambda key, shape: jax.random.bits(key, (int(np.prod(shape)),), jnp.uint32) >> 9
    checks.check_run(compressor, in_numpy, rows, key_of_tensor=_second)


def _second(key, place):
    return jax.random.fold_in(jax.random.split(key)[1], place)


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"^Expected second='sign\(\)' to be unbiased, e.g. "):
        sasg_jax.induced(sasg_jax.top_k(0.1), sasg_jax.sign())
    with pytest.raises(ValueError, match=r"^Expected first=3 to be a compressor"):
        sasg_jax.induced(cast(Any, 3), sasg_jax.qsgd())
    with pytest.raises(ValueError, match=r"^Expected first='random_k\(0.1\)' to draw from a worke"):
        sasg_jax.induced(sasg_jax.random_k(0.1), sasg_jax.qsgd())
