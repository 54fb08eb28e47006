"""A compressor and a coder are a compressor again."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sasg_jax
from sasg_jax.coders import coded
from sasg_jax.compressors import Compressed

RNG = np.random.default_rng(0)
TREE = {
    "a": RNG.normal(size=(3, 4)).astype(np.float32),
    "b": jnp.asarray(RNG.normal(size=7), jnp.bfloat16),
}


def _rounds():
    """Values as whole eighths in one byte; the rest as it is."""

    def encode(message):
        is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
        return jax.tree.map(lambda x: (8 * x).astype(jnp.int8) if is_float(x) else x, message)

    def decode(sent, shapes):
        return jax.tree.map(
            lambda x, s: x if x.dtype == s.dtype else x.astype(s.dtype) / 8, sent, shapes
        )

    return sasg_jax.Coder(name="eighths()", encode=encode, decode=decode)


INNER = {"identity": sasg_jax.identity(), "top_k": sasg_jax.top_k(0.5)}
ROUNDED = {name: coded(inner, _rounds()) for name, inner in INNER.items()}


@functools.cache
def _jitted(compressor):
    return jax.jit(compressor.compress), jax.jit(compressor.decompress)


def _compress(compressor, tree, key=None):
    return _jitted(compressor)[0](tree, compressor.init_memory(tree), key)


def _decompress(compressor, message, like, key=None):
    return _jitted(compressor)[1](message, like, key)


@pytest.mark.parametrize("name", INNER)
def test_plain_changes_nothing(name):
    inner = INNER[name]
    compressor = coded(inner, sasg_jax.plain())
    got, want = _compress(compressor, TREE), _compress(inner, TREE)
    chex.assert_trees_all_equal(got, want)
    chex.assert_trees_all_equal(
        _decompress(compressor, got.message, TREE), _decompress(inner, want.message, TREE)
    )
    assert compressor.message_size(TREE) == inner.message_size(TREE)
    assert compressor.exact == inner.exact
    assert compressor.unbiased == inner.unbiased
    assert compressor.name == f"{inner.name} as plain()"


@pytest.mark.parametrize("name", INNER)
def test_remainder_takes_in_what_was_rounded(name):
    """Of what the inner compressor keeps, the server gets whole eighths, rounded towards zero."""
    inner = INNER[name]
    compressor = ROUNDED[name]
    message, remainder, _ = _compress(compressor, TREE)
    received = _decompress(compressor, message, TREE)
    kept = _decompress(inner, _compress(inner, TREE).message, TREE)
    for key, x in TREE.items():
        want = np.trunc(8 * np.asarray(kept[key], np.float32)) / 8
        np.testing.assert_array_equal(np.asarray(received[key], np.float32), want)
        assert np.any(want != np.asarray(kept[key]))
        np.testing.assert_array_equal(remainder[key], x - received[key])


@pytest.mark.parametrize("name", INNER)
def test_sum_of_coded_messages(name):
    compressor = ROUNDED[name]
    messages = [_compress(compressor, jax.tree.map(lambda x, s=s: s * x, TREE)).message
                for s in (1, -2, 3)]  # fmt: skip
    decoded = [_decompress(compressor, message, TREE) for message in messages]
    stacked = jax.tree.map(lambda *rows: jnp.stack(rows), *messages)
    total = jax.jit(compressor.decompress_sum)(stacked, TREE, None)
    for key in TREE:
        rows = [np.asarray(tree[key], np.float32) for tree in decoded]
        np.testing.assert_array_equal(total[key], rows[0] + rows[1] + rows[2])


def test_size_is_that_of_what_is_sent():
    """Bytes of the code; the paper's bits count values, however they are written."""
    assert ROUNDED["identity"].message_size(TREE) == (19, 32 * 19)
    assert ROUNDED["top_k"].message_size(TREE) == (9 + 9, 32 * 9)


def test_what_is_rounded_is_neither_exact_nor_unbiased_nor_adds_up():
    compressor = ROUNDED["identity"]
    assert [compressor.exact, compressor.unbiased, compressor.linear] == [False] * 3


def test_message_of_zeros_decodes_to_zeros():
    compressor = ROUNDED["top_k"]
    zero = compressor.zero_message(TREE)
    chex.assert_trees_all_equal_shapes_and_dtypes(zero, _compress(compressor, TREE).message)
    decoded = _decompress(compressor, zero, TREE)
    assert not any(np.any(x) for x in jax.tree.leaves(decoded))


@pytest.mark.parametrize("shares_key", [True, False])
def test_keys_and_memory_pass_through(shares_key):
    """What is drawn with a shared key is drawn again to decode it; a key of one's own never is."""

    def decompress_sum(rows, like, key):
        assert (key is not None) == shares_key
        noise = jax.random.uniform(key, like.shape) if shares_key else 0
        return rows.sum(0) - rows.shape[0] * noise

    inner = sasg_jax.Compressor(
        name="noisy()",
        compress=lambda x, memory, key: Compressed(
            x + jax.random.uniform(key, x.shape), jnp.zeros_like(x), memory + 1
        ),
        decompress_sum=decompress_sum,
        init_memory=lambda x: jnp.zeros(()),
        random=True,
        shares_key=shares_key,
    )
    compressor, x, key = coded(inner, _rounds()), jnp.arange(4.0), jax.random.key(3)
    message, remainder, memory = _compress(compressor, x, key)
    assert memory == 1
    assert (compressor.random, compressor.shares_key) == (True, shares_key)
    received = _decompress(compressor, message, x, key if shares_key else None)
    np.testing.assert_allclose(remainder, x - received, atol=1e-6)
    exact = x if shares_key else x + jax.random.uniform(key, x.shape)
    np.testing.assert_allclose(received, exact, atol=1 / 8)
