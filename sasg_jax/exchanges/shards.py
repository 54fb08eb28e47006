"""Trees cut into equal shards, one for each worker that serves it: every tensor of n entries into M
shards of ceil(n/M) entries each, padded with zeros, so that they have one shape.
"""

import dataclasses

import jax
import jax.numpy as jnp

from sasg_jax.compressors.base import Compressed, Compressor
from sasg_jax.numerics import PyTree


def cut(tree: PyTree, num_shards: int) -> PyTree:
    """Cuts every leaf of n entries into rows. ``# shape=(num_shards, ceil(n / num_shards))``"""
    pad = lambda x: jnp.pad(x.reshape(-1), (0, -x.size % num_shards))
    return jax.tree.map(lambda x: pad(x).reshape(num_shards, -1), tree)


def join(shards: PyTree, like: PyTree) -> PyTree:
    """The inverse of :func:`cut`: leaves with the shapes of ``like``."""
    uncut = lambda rows, leaf: rows.reshape(-1)[: leaf.size].reshape(leaf.shape)
    return jax.tree.map(uncut, shards, like)


def one_shard(tree: PyTree, num_shards: int) -> PyTree:
    """Shapes and dtypes of one shard of ``tree``."""
    return jax.eval_shape(lambda tree: first(cut(tree, num_shards)), tree)


def first(tree: PyTree) -> PyTree:
    """The first row of every leaf."""
    return jax.tree.map(lambda x: x[0], tree)


def per_shard(compressor: Compressor, num_shards: int) -> Compressor:
    """Compresses every shard by itself: each message has a leading axis over shards. With top-k
    every shard sends its k/M largest entries (at least one), also where another has larger ones."""

    def init_memory(tree):
        one = compressor.init_memory(first(cut(tree, num_shards)))
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (num_shards, *x.shape)), one)

    shard_key = lambda key, shard: None if key is None else jax.random.fold_in(key, shard)

    def compress(tree, memory, key):
        one = lambda x: compressor.compress(x[0], x[1], shard_key(key, x[2]))
        shards = cut(tree, num_shards), memory, jnp.arange(num_shards)
        message, remainder, memory = jax.lax.map(one, shards)
        return Compressed(message, join(remainder, tree), memory)

    def decompress_sum(messages, like, key):
        shard = one_shard(like, num_shards)
        by_shard = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), messages)
        one = lambda x: compressor.decompress_sum(x[0], shard, shard_key(key, x[1]))
        return join(jax.lax.map(one, (by_shard, jnp.arange(num_shards))), like)

    size = lambda tree: compressor.message_size(one_shard(tree, num_shards))
    return dataclasses.replace(
        compressor,
        compress=compress,
        decompress_sum=decompress_sum,
        init_memory=init_memory,
        num_values=lambda tree: num_shards * size(tree).paper_bits // 32,
    )
