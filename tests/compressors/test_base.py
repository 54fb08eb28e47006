"""What every compressor guarantees, and what is made of a compressor's two functions."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sasg_jax
from sasg_jax.compressors import Compressed


def _tree(dtype=jnp.float32, seed=0):
    """A matrix, a vector, a scalar and a tensor of size 1."""
    rng = np.random.default_rng(seed)
    shapes = {"matrix": (8, 25), "one": (1,), "scalar": (), "vector": (31,)}
    return {k: jnp.asarray(rng.normal(size=shape), dtype) for k, shape in shapes.items()}


COMPRESSORS = {
    "identity": sasg_jax.identity(),
    "tensor": sasg_jax.top_k(0.1),
    "tree": sasg_jax.top_k(0.1, scope="tree"),
}
VALUES = {"identity": 233, "tensor": 25, "tree": 23}


@functools.cache
def _jitted(compressor):
    return tuple(
        map(jax.jit, (compressor.compress, compressor.decompress, compressor.decompress_sum))
    )


def _compress(compressor, tree):
    return _jitted(compressor)[0](tree, compressor.init_memory(tree), None)


def _decompress(compressor, message, like):
    return _jitted(compressor)[1](message, like)


def _decompress_sum(compressor, messages, like):
    return _jitted(compressor)[2](messages, like, None)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", COMPRESSORS)
def test_conservation_bit_for_bit(name, dtype):
    """decompress(message) + remainder == tree, and no entry is in both."""
    compressor, tree = COMPRESSORS[name], _tree(dtype)
    message, remainder, _ = _compress(compressor, tree)
    decoded = _decompress(compressor, message, tree)
    chex.assert_trees_all_equal_shapes_and_dtypes(decoded, remainder, tree)
    chex.assert_trees_all_equal(jax.tree.map(jnp.add, decoded, remainder), tree)
    for x, y in zip(jax.tree.leaves(decoded), jax.tree.leaves(remainder), strict=True):
        assert not bool(jnp.any((x != 0) & (y != 0)))
    kept = sum(int(jnp.count_nonzero(x)) for x in jax.tree.leaves(decoded))
    assert kept == VALUES[name]


@pytest.mark.parametrize("name", COMPRESSORS)
def test_mixed_dtypes(name):
    tree = {"half": jnp.ones(4, jnp.bfloat16) * 3, "single": jnp.full(4, 1 / 3, jnp.float32)}
    compressor = COMPRESSORS[name]
    message, remainder, _ = _compress(compressor, tree)
    decoded = _decompress(compressor, message, tree)
    chex.assert_trees_all_equal_shapes_and_dtypes(decoded, remainder, tree)
    chex.assert_trees_all_equal(jax.tree.map(jnp.add, decoded, remainder), tree)


# Sums of messages ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMPRESSORS)
def test_sum_of_messages_goes_in_order_bit_for_bit(name):
    """As many replicas add them up, each by itself: a left fold of what one message decodes to."""
    compressor = COMPRESSORS[name]
    trees = [_tree(seed=seed) for seed in range(5)]
    messages = [_compress(compressor, tree).message for tree in trees]
    want = [_decompress(compressor, message, trees[0]) for message in messages]
    total = jax.tree.map(np.asarray, want[0])
    for tree in want[1:]:
        total = jax.tree.map(lambda x, y: x + np.asarray(y), total, tree)
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *messages)
    got = _decompress_sum(compressor, stacked, trees[0])
    chex.assert_trees_all_equal(got, total)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_half_precision_is_summed_in_float32(name):
    """256 + 1 + 1 + 2 is 260; in bfloat16 every 1 is rounded away. Nor need the sum fit: its mean
    is what counts."""
    compressor = COMPRESSORS[name]
    for dtype, values, total in (
        (jnp.bfloat16, (256, 1, 1, 2), 260),
        (jnp.float16, (6e4, 6e4, 6e4, 6e4), 4 * float(jnp.float16(6e4))),
    ):
        rows = [_compress(compressor, jnp.full(1, v, dtype)).message for v in values]
        stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *rows)
        got = _decompress_sum(compressor, stacked, jnp.zeros(1, dtype))
        chex.assert_type(got, jnp.float32)
        assert got.tolist() == [total]


@pytest.mark.parametrize("name", COMPRESSORS)
def test_message_of_zeros_stands_for_one_that_was_not_sent(name):
    compressor, tree = COMPRESSORS[name], _tree(jnp.bfloat16)
    zero = compressor.zero_message(tree)
    message = _compress(compressor, tree).message
    chex.assert_trees_all_equal_shapes_and_dtypes(zero, message)
    decoded = _decompress(compressor, zero, tree)
    assert not any(np.any(x) for x in jax.tree.leaves(decoded))
    both = jax.tree.map(lambda *rows: jnp.stack(rows), zero, message)
    total = _decompress_sum(compressor, both, tree)
    alone = _decompress(compressor, message, tree)
    chex.assert_trees_all_equal(total, jax.tree.map(lambda x: np.float32(x), alone))


# What a message weighs ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", COMPRESSORS)
def test_message_size_is_what_the_arrays_hold(name, dtype):
    compressor, tree = COMPRESSORS[name], _tree(dtype)
    message = _compress(compressor, tree).message
    size = compressor.message_size(tree)
    assert size.bytes == sum(np.asarray(x).nbytes for x in jax.tree.leaves(message))
    assert compressor.message_size(jax.eval_shape(lambda: tree)) == size
    # Values only, and 32 bits each also where they have half of that: the paper's convention.
    assert size.paper_bits == 32 * VALUES[name]


def test_size_of_a_compressor_with_other_values():
    """num_values takes the place of the floating-point numbers in a message."""
    signs = sasg_jax.Compressor(
        name="signs()",
        compress=lambda tree, memory, key: Compressed(
            (jnp.packbits(tree > 0), jnp.abs(tree).mean()), tree, memory
        ),
        decompress_sum=lambda rows, like, key: like,
        num_values=lambda tree: tree.size,
    )
    assert signs.message_size(jnp.ones(20)) == (3 + 4, 32 * 20)


def test_size_counts_everything_that_means_are_taken_of():
    """Twice, in two types; and compress is not needed."""

    def compress_mean(tree, memory, key, mean):
        low = mean(tree.astype(jnp.bfloat16)).astype(tree.dtype)
        rest = mean((tree - low)[:2])
        return Compressed(low.at[:2].add(rest), tree - low, memory)

    compressor = sasg_jax.Compressor(name="twice()", compress_mean=compress_mean)
    assert compressor.message_size(jnp.ones(5)) == (5 * 2 + 2 * 4, 32 * 7)
    with pytest.raises(TypeError, match="compress and decompress_sum, or compress_mean"):
        compressor.decompress(jnp.ones(5), jnp.ones(5))


def test_shapes_do_not_depend_on_the_values_of_a_memory_or_a_key():
    """They are found without running anything, with a key and a memory of its own."""

    def compress(tree, memory, key):
        noise = jax.random.uniform(key, tree.shape)
        return Compressed((tree + noise)[: memory.size], tree, memory)

    compressor = sasg_jax.Compressor(
        name="noisy()",
        compress=compress,
        decompress_sum=lambda rows, like, key: rows.sum(0),
        init_memory=lambda tree: jnp.zeros(2),
        random=True,
    )
    (shape,) = jax.tree.leaves(compressor.message_shapes(jnp.ones(5)))
    assert (shape.shape, shape.dtype) == ((2,), jnp.float32)
