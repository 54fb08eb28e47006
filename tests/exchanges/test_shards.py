"""Trees cut into shards, and compressors within them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sasg_jax
from sasg_jax.compressors import Compressed
from sasg_jax.exchanges import shards

TREE = {
    "a": np.arange(10, dtype=np.float32) - 4.5,
    "b": np.arange(12, dtype=np.float32).reshape(3, 4),
    "c": np.float32(7),
}


@pytest.mark.parametrize("num_shards", [1, 2, 3, 4, 16])
def test_join_undoes_cut(num_shards):
    rows = shards.cut(TREE, num_shards)
    assert {k: x.shape for k, x in rows.items()} == {
        k: (num_shards, -(-np.size(x) // num_shards)) for k, x in TREE.items()
    }
    chex.assert_trees_all_equal(shards.join(rows, TREE), TREE)


def test_shards_are_consecutive_and_filled_up_with_zeros():
    rows = shards.cut(TREE, 4)
    np.testing.assert_array_equal(rows["a"][1], TREE["a"][3:6])
    np.testing.assert_array_equal(rows["a"][3], [TREE["a"][9], 0, 0])
    np.testing.assert_array_equal(rows["c"], [[7], [0], [0], [0]])


def test_one_shard_has_the_shapes_of_a_row():
    want = jax.tree.map(lambda x: x[0], shards.cut(TREE, 3))
    chex.assert_trees_all_equal_shapes_and_dtypes(shards.one_shard(TREE, 3), want)


@pytest.mark.parametrize(("scope", "num_shards"), [("tensor", 1), ("tensor", 16), ("tree", 3)])
def test_conserves_bit_for_bit(scope, num_shards):
    """decoded + remainder = tree, with the same number of entries from every shard."""
    compressor = shards.per_shard(sasg_jax.top_k(0.3, scope=scope), num_shards)
    message, remainder, _ = _compress(compressor, TREE)
    sent = jax.jit(compressor.decompress)(message, TREE)
    chex.assert_trees_all_equal(jax.tree.map(jnp.add, sent, remainder), TREE)
    for x in jax.tree.leaves(message):
        assert x.shape[0] == num_shards
    assert sum(x.nbytes for x in jax.tree.leaves(message)) == compressor.message_size(TREE).bytes


def _compress(compressor, tree, key=None):
    return jax.jit(compressor.compress)(tree, compressor.init_memory(tree), key)


def test_selects_within_each_shard():
    """The largest of every half, also where one half holds the two largest."""
    compressor = shards.per_shard(sasg_jax.top_k(0.25), 2)
    x = jnp.array([1.0, 2, 0, 0, 9, 8, 7, 6])
    message, remainder, _ = _compress(compressor, x)
    np.testing.assert_array_equal(compressor.decompress(message, x), [0, 2, 0, 0, 9, 0, 0, 0])
    np.testing.assert_array_equal(remainder, [1, 0, 0, 0, 0, 8, 7, 6])


def test_sum_of_messages():
    compressor = shards.per_shard(sasg_jax.top_k(0.5), 2)
    x, y = jnp.array([1.0, 2, 3, 4]), jnp.array([8.0, 1, 1, 5])
    messages = jax.tree.map(
        lambda *rows: jnp.stack(rows), _compress(compressor, x)[0], _compress(compressor, y)[0]
    )
    np.testing.assert_array_equal(compressor.decompress_sum(messages, x, None), [8, 2, 0, 9])


def test_identity_in_shards_is_exact():
    compressor = shards.per_shard(sasg_jax.identity(), 4)
    message, remainder, _ = _compress(compressor, TREE)
    assert compressor.exact
    chex.assert_trees_all_equal(compressor.decompress(message, TREE), TREE)
    chex.assert_trees_all_equal(remainder, jax.tree.map(np.zeros_like, TREE))


def test_values_are_counted_in_every_shard():
    """Three shards of four entries, the last two of them filled up, send one value each."""
    compressor = shards.per_shard(sasg_jax.top_k(0.25), 3)
    assert compressor.message_size(jnp.zeros(10)) == (3 * (4 + 1), 3 * 32)


def test_each_shard_has_a_memory_and_a_key_of_its_own():
    """And what a shared key has drawn is drawn again to decode it."""

    def draw(tree, key):
        return jax.tree.map(lambda x: jax.random.uniform(key, x.shape), tree)

    def compress(tree, memory, key):
        message = jax.tree.map(jnp.subtract, tree, draw(tree, key))
        return Compressed(message, jax.tree.map(jnp.zeros_like, tree), memory + tree["a"][0])

    noisy = sasg_jax.Compressor(
        name="noisy()",
        compress=compress,
        decompress_sum=lambda rows, like, key: jax.tree.map(
            lambda rows, noise: rows.sum(0) + noise, rows, draw(like, key)
        ),
        init_memory=lambda tree: jnp.zeros(()),
        random=True,
        shares_key=True,
    )
    compressor, tree = shards.per_shard(noisy, 2), {"a": jnp.array([1.0, 1, 3, 3])}
    key = jax.random.key(0)
    message, _, memory = _compress(compressor, tree, key)
    np.testing.assert_array_equal(memory, [1, 3])
    noise = np.array([[1, 1], [3, 3]]) - message["a"]
    assert len(np.unique(noise)) == 4
    decoded = compressor.decompress(message, tree, key)
    chex.assert_trees_all_close(decoded, tree, atol=1e-6)
    _, _, memory = compressor.compress(tree, memory, key)
    np.testing.assert_array_equal(memory, [2, 6])
