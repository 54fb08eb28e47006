"""Messages as one vector of words: a collective of every array by itself would wait as often."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sasg_jax.control_flow import stacked
from sasg_jax.exchanges.base import Exchange, over_workers
from sasg_jax.numerics import PyTree


def packed(words_to_rows: Callable[..., jax.Array], **fields: Any) -> Exchange:
    """An exchange of packed messages: ``rows = words_to_rows(words, flags, axis_name)``."""

    def collect(message, flags, axis_name):
        rows = lambda message, flags: words_to_rows(pack(message), flags, axis_name)
        on_devices = lambda message, flags: unpack_rows(rows(message, flags), message)
        return over_workers(on_devices, stacked, axis_name, message, flags)

    return Exchange(collect=collect, moved_bytes=packed_bytes, **fields)


def pack(tree: PyTree) -> jax.Array:
    """All arrays of ``tree`` in one vector of 32-bit words, padded by at most three bytes."""
    wide, narrow = [], []
    for x in jax.tree.leaves(tree):
        is_wide = x.dtype.itemsize >= 4
        bits = lax.bitcast_convert_type(x.reshape(-1), jnp.uint32 if is_wide else jnp.uint8)
        (wide if is_wide else narrow).append(bits.reshape(-1))
    if narrow:
        octets = jnp.concatenate(narrow)
        octets = jnp.pad(octets, (0, -octets.size % 4)).reshape(-1, 4)
        wide.append(lax.bitcast_convert_type(octets, jnp.uint32))
    return jnp.concatenate(wide)


def unpack(words: jax.Array, shapes: PyTree) -> PyTree:
    """The inverse of :func:`pack`."""
    leaves, treedef = jax.tree.flatten(shapes)
    num_wide = sum(s.size * s.dtype.itemsize // 4 for s in leaves if s.dtype.itemsize >= 4)
    octets = lax.bitcast_convert_type(words[num_wide:], jnp.uint8).reshape(-1)
    taken = {True: 0, False: 0}

    def take(s):
        is_wide = s.dtype.itemsize >= 4
        unit, source = (4, words) if is_wide else (1, octets)
        per_entry = s.dtype.itemsize // unit
        start, count = taken[is_wide], s.size * per_entry
        taken[is_wide] = start + count
        shape = (s.size, per_entry) if per_entry > 1 else (s.size,)
        bits = source[start : start + count].reshape(shape)
        return lax.bitcast_convert_type(bits, s.dtype).reshape(s.shape)

    return treedef.unflatten([take(s) for s in leaves])


def unpack_rows(rows: jax.Array, like: PyTree) -> PyTree:
    """Every row as a tree of shapes ``like``, with a leading axis."""
    return jax.vmap(lambda row: unpack(row, like))(rows)


def packed_bytes(shapes: PyTree) -> int:
    """The size of arrays of ``shapes`` once they are packed into words."""
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    return -(-size // 4) * 4
