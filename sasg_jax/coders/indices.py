"""Coders of indices."""

import jax
import jax.numpy as jnp

from sasg_jax import bits
from sasg_jax._checks import check_int
from sasg_jax.coders.base import IndexCoder


def plain_indices() -> IndexCoder:
    """Each in the smallest unsigned integer type that fits."""
    return IndexCoder(
        name="plain",
        num_bits=lambda kept, size: kept * index_dtype(size).itemsize * 8,
        encode=lambda indices, size: indices.astype(index_dtype(size)),
        decode=lambda code, kept, size: _in_range(code.astype(jnp.int32), size),
    )


def index_dtype(size: int) -> jnp.dtype:
    """The smallest unsigned integer type that holds the indices of a vector of ``size``."""
    return jnp.dtype("uint8" if size <= 1 << 8 else "uint16" if size <= 1 << 16 else "uint32")


def fixed() -> IndexCoder:
    """Each in ⌈log₂ n⌉ bits."""
    width = lambda size: (size - 1).bit_length()
    unpack = lambda code, kept, size: bits.unpack_integers(code, width(size), kept)
    return IndexCoder(
        name="fixed",
        num_bits=lambda kept, size: kept * width(size),
        encode=lambda indices, size: bits.pack_integers(indices, width(size)),
        decode=lambda code, kept, size: _in_range(unpack(code, kept, size), size),
    )


def tiled(tile: int = 4096) -> IndexCoder:
    """Each by its place in a tile of ``tile`` entries, a power of two; and how many are in each."""
    tile = check_int("tile", tile, minimum=2)
    low = tile.bit_length() - 1
    if tile != 1 << low:
        raise ValueError(f"Expected tile={tile} to be a power of two.")
    count_width = lambda kept: min(tile, kept).bit_length()
    num_tiles = lambda size: -(-size // tile)

    def encode(indices, size):
        counts = jnp.zeros(num_tiles(size), jnp.int32).at[indices // tile].add(1)
        counts = bits.pack_integers(counts, count_width(indices.size))
        return counts, bits.pack_integers(indices, low)

    def decode(code, kept, size):
        counts = bits.unpack_integers(code[0], count_width(kept), num_tiles(size))
        ends = jnp.cumsum(counts.astype(jnp.int32))
        slots = jnp.arange(kept, dtype=jnp.int32)
        # More than are kept, or fewer, stand in what was not written by encode.
        tiles = jnp.searchsorted(ends, slots, side="right").astype(jnp.uint32)
        tiles = jnp.minimum(tiles, num_tiles(size) - 1)
        return _in_range(tiles << low | bits.unpack_integers(code[1], low, kept), size)

    return IndexCoder(
        name="tiled" if tile == 4096 else f"tiled({tile})",
        num_bits=lambda kept, size: kept * low + num_tiles(size) * count_width(kept),
        encode=encode,
        decode=decode,
    )


def bitmap() -> IndexCoder:
    """A bit for each entry."""
    first = lambda code, kept: bits.first_set_bits(bits.bytes_to_words(code), kept)[0]
    return IndexCoder(
        name="bitmap",
        num_bits=lambda kept, size: size,
        encode=lambda indices, size: bits.words_to_bytes(bits.set_bits(indices, size), size),
        decode=lambda code, kept, size: _in_range(first(code, kept), size),
    )


def elias_fano() -> IndexCoder:
    """Of each the l lowest bits, and the others as differences in unary; or, where that is shorter
    (short vectors, or most of a vector), :func:`fixed`, :func:`bitmap` or, of all entries, nothing.

    References: Elias, `Efficient storage and retrieval by content and address of static files
    <https://doi.org/10.1145/321812.321820>`_, 1974"""

    def best(kept: int, size: int) -> IndexCoder:
        return min((_all(), _elias_fano(), fixed(), bitmap()), key=lambda x: x.num_bits(kept, size))

    return IndexCoder(
        name="elias_fano",
        num_bits=lambda kept, size: best(kept, size).num_bits(kept, size),
        encode=lambda indices, size: best(indices.size, size).encode(indices, size),
        decode=lambda code, kept, size: best(kept, size).decode(code, kept, size),
    )


def _all() -> IndexCoder:
    """Of all entries of a vector nothing need be said."""
    return IndexCoder(
        name="all",
        num_bits=lambda kept, size: 0 if kept == size else 2**63,
        encode=lambda indices, size: (),
        decode=lambda code, kept, size: jnp.arange(kept, dtype=jnp.int32),
    )


def _elias_fano() -> IndexCoder:
    low_width = lambda kept, size: (size // kept).bit_length() - 1  # floor(log2(n / k))
    num_high = lambda kept, size: kept + ((size - 1) >> low_width(kept, size))

    def encode(indices, size):
        kept = indices.size
        low = low_width(kept, size)
        # The i-th of the ascending high parts h sets bit h + i: no two set the same.
        high = bits.set_bits((indices >> low) + jnp.arange(kept), num_high(kept, size))
        high = bits.words_to_bytes(high, num_high(kept, size))
        return bits.pack_integers(indices, low), high

    def decode(code, kept, size):
        low = low_width(kept, size)
        bit, _ = bits.first_set_bits(bits.bytes_to_words(code[1]), kept)
        high = jnp.clip(bit - jnp.arange(kept), 0, (size - 1) >> low).astype(jnp.uint32)
        return _in_range(high << low | bits.unpack_integers(code[0], low, kept), size)

    return IndexCoder(
        name="elias_fano",
        num_bits=lambda kept, size: kept * low_width(kept, size) + num_high(kept, size),
        encode=encode,
        decode=decode,
    )


def _in_range(indices: jax.Array, size: int) -> jax.Array:
    return jnp.minimum(indices.astype(jnp.uint32), size - 1).astype(jnp.int32)


INDEX_CODERS: dict[str, IndexCoder] = {
    "plain": plain_indices(),
    "fixed": fixed(),
    "tiled": tiled(),
    "bitmap": bitmap(),
    "elias_fano": elias_fano(),
}
