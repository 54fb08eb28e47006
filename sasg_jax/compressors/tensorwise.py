"""Compressors that write every tensor by itself, made of how one is written and read."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sasg_jax.compressors.base import Compressed, Compressor
from sasg_jax.numerics import PyTree, wide


def tensorwise(
    name: str,
    encode: Callable[[jax.Array, PyTree, Any], tuple[PyTree, PyTree]],
    decode: Callable[[PyTree, jax.ShapeDtypeStruct, Any], jax.Array],
    *,
    init_memory: Callable[[jax.ShapeDtypeStruct], PyTree] = lambda x: (),
    num_values: Callable[[PyTree], int] | None = None,
    unbiased: bool = False,
    linear: bool = False,
    random: bool = False,
    shares_key: bool = False,
) -> Compressor:
    """A compressor of a code for one tensor. A tensor whose code would take no fewer bytes than it
    does is sent as it is.

    Args:
      encode: ``code, memory = encode(x, memory, key)``, of a tensor in its own dtype; the key is
        that of the compressor, folded by the number of the tensor in the tree.
      decode: ``x = decode(code, like, key)``, of the size of ``like`` and of float32 at least; zero
        for a code of zeros. The key is None but with ``shares_key``. What it gives is brought into
        the range of the dtype and rounded to it, where messages need not add up.
      init_memory: of a tensor.
      num_values, unbiased, linear, random, shares_key: see :class:`Compressor`."""

    @functools.lru_cache(maxsize=1024)
    def is_plain(shape, dtype):
        x = jax.ShapeDtypeStruct(shape, dtype)
        key = jax.eval_shape(lambda: jax.random.key(0))
        code, _ = jax.eval_shape(encode, x, jax.eval_shape(lambda: init_memory(x)), key)
        num_bytes = sum(part.size * part.dtype.itemsize for part in jax.tree.leaves(code))
        return num_bytes >= x.size * x.dtype.itemsize

    def decode_one(code, like, key):
        # Behind barriers, so that the sender, a receiver and the remainder round alike.
        code = jax.lax.optimization_barrier(code)
        if is_plain(like.shape, like.dtype):
            x = code.astype(wide(like.dtype))
        else:
            x = decode(code, like, key).reshape(like.shape)
        if not linear:
            largest = jnp.finfo(like.dtype).max.astype(x.dtype)
            x = jnp.clip(x, -largest, largest).astype(like.dtype).astype(x.dtype)
        return jax.lax.optimization_barrier(jnp.where(jnp.isfinite(x), x, 0))

    def key_of(key, place):
        return None if key is None else jax.random.fold_in(key, place)

    def init(tree):
        of_leaf = lambda x: () if is_plain(x.shape, x.dtype) else init_memory(x)
        return tuple(map(of_leaf, jax.tree.leaves(tree)))

    def compress(tree, memory, key):
        leaves, treedef = jax.tree.flatten(tree)
        codes, rest, memories = [], [], []
        for place, (x, own) in enumerate(zip(leaves, memory, strict=True)):
            key_here = key_of(key, place)
            plain = is_plain(x.shape, x.dtype)
            code, new = (x, ()) if plain else encode(x, own, key_here)
            decoded = decode_one(code, x, key_here if shares_key else None)
            codes, memories = codes + [code], memories + [new]
            rest.append(x - decoded.astype(x.dtype))
        return Compressed(tuple(codes), treedef.unflatten(rest), tuple(memories))

    def decompress_sum(messages, like, key):
        leaves, treedef = jax.tree.flatten(like)

        def total(place, rows, x):
            one = lambda row: decode_one(row, x, key_of(key, place) if shares_key else None)
            zeros = jnp.zeros(x.shape, wide(x.dtype))
            return jax.lax.scan(lambda total, row: (total + one(row), None), zeros, rows)[0]

        return treedef.unflatten(map(total, range(len(leaves)), messages, leaves))

    return Compressor(
        name=name,
        compress=compress,
        decompress_sum=decompress_sum,
        init_memory=init,
        num_values=num_values,
        unbiased=unbiased,
        linear=linear,
        random=random,
        shares_key=shares_key,
    )


def every_entry(tree: PyTree) -> int:
    """The number of values in a message that says something of every entry."""
    return sum(x.size for x in jax.tree.leaves(tree))


SMALLEST = 1e-30
"""Tensors, or blocks of them, with no larger magnitude decode to zeros: on most machines numbers
below 1e-38 count as 0, and there must be room to divide by it."""


def quotient(x: jax.Array, by: jax.Array) -> jax.Array:
    """``x / by`` for numbers that are no larger than ``by``, which is 0 or above ``SMALLEST``; 0
    where it is 0."""
    # XLA multiplies by 1 / by, which is no float for the largest; and it may square a quotient as a
    # quotient of squares, which the barrier prevents.
    scale = jnp.where(by > 1, 2.0**-64, 1.0).astype(x.dtype)
    parts = jnp.where(by > 0, scale * x / jnp.where(by > 0, scale * by, 1), 0)
    return jax.lax.optimization_barrier(parts)


def by_largest(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest magnitude of each row, or 0 where it is below ``SMALLEST``, and the rows as parts
    of it: their squares and sums fit. ``# shape=(rows, 1), (rows, columns)``"""
    top = jnp.abs(x).max(1, keepdims=True)
    top = jnp.where(top < SMALLEST, 0, top)
    return top, quotient(x, top)


def rows_of(x: jax.Array, length: int) -> jax.Array:
    """The entries of ``x``, of float32 at least, in rows, the last padded with zeros.
    ``# shape=(ceil(size / length), length)``"""
    x = x.reshape(-1).astype(wide(x.dtype))
    return jnp.pad(x, (0, -x.size % length)).reshape(-1, length)


def sound_scale(scale: jax.Array) -> jax.Array:
    """A magnitude that has arrived: 0 for what is none."""
    return jnp.where(jnp.isfinite(scale), jnp.abs(scale), 0)


def round_at_random(x: jax.Array, key: Any) -> jax.Array:
    """``x`` rounded down, or up as often as makes it right in the mean, to multiples of 2⁻²³."""
    low = jnp.floor(x)
    return low + (jax.random.uniform(key, x.shape, x.dtype) < x - low)
