"""Keeps the entries of largest magnitude of every tile of a tensor, or of its cosine transform."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sasg_jax._checks import check_choice, check_fraction, check_int, require
from sasg_jax.coders import INDEX_CODERS, VALUE_CODERS, IndexCoder, ValueCoder
from sasg_jax.coders.base import find as find_coder
from sasg_jax.coders.values import shorter
from sasg_jax.compressors.base import Compressed, Compressor
from sasg_jax.compressors.top_k import TopKMessage
from sasg_jax.numerics import wide
from sasg_jax.selection import lax_top_k


def chunked_top_k(
    density: float,
    *,
    tile: int = 64,
    transform: str | None = None,
    values: str | ValueCoder = "plain",
    indices: str | IndexCoder = "plain",
    magnitudes: str = "tensor",
) -> Compressor:
    r"""Keeps the entries of largest magnitude of each tile of a tensor, in every tile as many.

    .. math:: k = \max(1, \lfloor \mathrm{density} \cdot s \rfloor)

    of the s entries of a tile; of equal ones, those with the lowest index.

    Matrices are cut into tiles of at most ``tile`` by ``tile``, tensors of more axes as matrices of
    their last axis and the others. Vectors are matrices of rows of at most ``tile``: 4,096 entries
    in succession are one tile. A side is the largest divisor of its axis above ``tile`` / 2, else
    sides are as equal as can be and the last tile is padded; what is padded is never chosen in
    place of an entry. That is the authors' tiling where an axis has such a divisor. They take the
    largest there is, down to 1, and vectors in tiles of up to 64, of which SparseLoCo then sends
    all.

    Args:
      density: kept fraction of a tile, in (0, 1]: 1/64 (64 of 4,096) is SparseLoCo's, 1/128 DeMo's.
      tile: the longest side of a tile, at least 2 and at most 1024.
      transform: None, or ``"dct"``: choose among the entries of the orthonormal DCT-II of each
        tile (of a vector, of its rows), and transform back what is decoded.
      values, indices: how they are written, as in :func:`sasg_jax.top_k`; indices are those of the
        vector of all tiles. ``"tiled"`` is what peers do, in about 12 bits; ``"elias_fano"`` takes
        about 8 at 1/64.
      magnitudes: whose values a coder writes together, as with one set of magnitudes: those of a
        ``"tensor"``, or of each ``"tile"``.

    Guarantees:
      - Conservation: ``remainder == tree - decompress(message)``, bit for bit; with ``"dct"`` where
        the compiler makes the same of both, and else but for the last bit. (There a number of half
        precision that would not fit becomes the largest.)
      - Lemma 1 as for :func:`sasg_jax.top_k`, in every tile, for plain values.

    ValueError for an argument out of its range.

    >>> import jax.numpy as jnp
    >>> compressor = chunked_top_k(0.25, tile=2)
    >>> x = jnp.array([[1.0, 2.0, 0.1, 0.2], [-3.0, 0.0, 0.3, -0.4]])
    >>> message, remainder, _ = compressor.compress(x, (), None)
    >>> message[0].indices.tolist(), remainder.tolist()[1][::3]
    ([2, 7], [0.0, 0.0])

    References: Sarfi et al., `SparseLoCo <https://arxiv.org/abs/2508.15706>`_, 2025; Peng et al.,
    `DeMo <https://arxiv.org/abs/2411.19870>`_, 2024
    """
    density = check_fraction("density", density)
    tile = check_int("tile", tile, minimum=2)
    require(tile <= 1024, "tile", tile, "to be an integer of at most 1024")
    allowed = "to be None or 'dct'"
    require(transform is None or transform == "dct", "transform", transform, allowed)
    check_choice("magnitudes", magnitudes, ("tensor", "tile"))
    values_as = find_coder(ValueCoder, "values", values, VALUE_CODERS)
    indices_as = find_coder(IndexCoder, "indices", indices, INDEX_CODERS)
    num_kept = lambda tiling: max(1, math.floor(density * tiling.entries))
    forward, back = (_dct, _inverse_dct) if transform else (_as_it_is, _as_it_is)
    coded = lambda dtype: wide(dtype) if transform else dtype

    def coder_of(tiling, dtype):
        """The coder of values, and how many there are of those that it writes together."""
        kept = num_kept(tiling)
        together = kept if magnitudes == "tile" else kept * tiling.num_tiles
        return shorter(values_as, together, dtype), together

    def compress_leaf(leaf):
        tiling = _tiling(leaf.shape, tile)
        kept, (coder, together) = num_kept(tiling), coder_of(tiling, leaf.dtype)
        tiles = forward(to_tiles(leaf.astype(coded(leaf.dtype)), tiling), tiling)
        # What is padded is chosen last, as NaN is. A transform has no such places.
        among = tiles if transform else to_tiles(leaf, tiling, jnp.nan)
        inside = jnp.sort(jax.vmap(lambda x: lax_top_k(x, kept))(among), axis=1)
        indices = (jnp.arange(tiling.num_tiles)[:, None] * tiling.entries + inside).reshape(-1)
        # Without the barrier they would be gathered anew in each kernel that reads them.
        vector = tiles.reshape(-1)
        chosen = jax.lax.optimization_barrier(_fitting(vector[indices], leaf.dtype))
        code = jax.vmap(coder.encode)(chosen.reshape(-1, together))
        message = TopKMessage(code, indices_as.encode(indices.astype(jnp.int32), vector.size))
        if transform:
            decoded = decompress_sum_leaf(jax.tree.map(lambda x: x[None], message), leaf)
            received = _fitting(decoded, leaf.dtype).astype(tiles.dtype)
            return message, _fitting(leaf.astype(tiles.dtype) - received, leaf.dtype)
        left_out = 0 if coder.exact else chosen - decode_values(message, tiling, leaf.dtype)
        rest = vector.at[indices].set(left_out, unique_indices=True)
        return message, from_tiles(rest.reshape(tiles.shape), tiling)

    def decode_values(message, tiling, dtype):
        coder, together = coder_of(tiling, dtype)
        return jax.vmap(lambda code: coder.decode(code, together, dtype))(message.values).ravel()

    def add(total, message, leaf):
        """A message's values, added to the vector of all tiles."""
        tiling = _tiling(leaf.shape, tile)
        kept = num_kept(tiling) * tiling.num_tiles
        indices = indices_as.decode(message.indices, kept, total.size)
        x = decode_values(message, tiling, leaf.dtype).astype(total.dtype)
        if transform:  # no sum of them, whichever they are, is infinite
            most = float(jnp.finfo(total.dtype).max) / tile**2
            x = jnp.clip(x, -most, most)
        return total.at[indices].add(x, unique_indices=True)

    def empty(leaf):
        tiling = _tiling(leaf.shape, tile)
        return jnp.zeros(tiling.num_tiles * tiling.entries, wide(leaf.dtype))

    def restore_leaf(vector, leaf):
        tiling = _tiling(leaf.shape, tile)
        tiles = jax.lax.optimization_barrier(vector).reshape(tiling.num_tiles, tiling.entries)
        return from_tiles(back(tiles, tiling), tiling)

    def decompress_sum_leaf(messages, leaf):
        # One message after another, as in top_k.
        step = lambda total, message: (add(total, message, leaf), None)
        return restore_leaf(jax.lax.scan(step, empty(leaf), messages)[0], leaf)

    def compress(tree, memory, key):
        leaves, treedef = jax.tree.flatten(tree)
        parts = [compress_leaf(leaf) for leaf in leaves]
        messages, remainders = zip(*parts, strict=True) if parts else ((), ())
        return Compressed(messages, treedef.unflatten(remainders), memory)

    def by_leaf(fn):
        """Of the parts of a message, one for each leaf, a tree like ``like``."""

        def of_tree(parts, like, key=None):
            leaves, treedef = jax.tree.flatten(like)
            return treedef.unflatten([fn(*pair) for pair in zip(parts, leaves, strict=True)])

        return of_tree

    arguments = [str(density)] + [f"tile={tile}"] * (tile != 64)
    arguments += [f"transform={transform!r}"] * (transform is not None)
    for argument, coder in (("values", values_as), ("indices", indices_as)):
        arguments += [f"{argument}={coder.name!r}"] * (coder.name != "plain")
    arguments += [f"magnitudes={magnitudes!r}"] * (magnitudes != "tensor")
    tilings = lambda tree: [_tiling(x.shape, tile) for x in jax.tree.leaves(tree)]
    return Compressor(
        name=f"chunked_top_k({', '.join(arguments)})",
        compress=compress,
        decompress_sum=by_leaf(decompress_sum_leaf),
        expand=by_leaf(lambda message, leaf: add(empty(leaf), message, leaf)),
        restore=lambda numbers, like: jax.tree.map(restore_leaf, numbers, like),
        num_values=lambda tree: sum(x.num_tiles * num_kept(x) for x in tilings(tree)),
    )


# Tiles --------------------------------------------------------------------------------------------


class _Tiling(NamedTuple):
    """How a tensor is cut."""

    shape: tuple[int, ...]  # of the tensor
    matrix: tuple[int, int]  # as which it is read; a vector's may be longer than that
    sides: tuple[int, int]  # of a tile
    is_vector: bool

    @property
    def grid(self) -> tuple[int, int]:
        rows, columns = (-(-a // b) for a, b in zip(self.matrix, self.sides, strict=True))
        return rows, columns

    @property
    def num_tiles(self) -> int:
        return math.prod(self.grid)

    @property
    def entries(self) -> int:
        return math.prod(self.sides)


@functools.lru_cache(maxsize=4096)
def _tiling(shape: tuple[int, ...], tile: int) -> _Tiling:
    is_vector, size = len(shape) < 2, math.prod(shape)
    columns = _side(size, tile) if is_vector else shape[-1]
    matrix = -(-size // columns), columns
    rows, columns = (_side(axis, tile) for axis in matrix)
    return _Tiling(shape, matrix, (rows, columns), is_vector)


def _side(axis: int, tile: int) -> int:
    divisors = [side for side in range(tile, tile // 2, -1) if axis % side == 0]
    return divisors[0] if divisors else -(-axis // -(-axis // tile))


def to_tiles(x: jax.Array, tiling: _Tiling, fill: float = 0.0) -> jax.Array:
    """``# shape=(tiles, entries)``, padded with ``fill``."""
    (rows, columns), (height, width), grid = tiling.matrix, tiling.sides, tiling.grid
    pad = functools.partial(jnp.pad, constant_values=fill)
    x = pad(x.reshape(-1), (0, rows * columns - x.size)).reshape(rows, columns)
    x = pad(x, ((0, grid[0] * height - rows), (0, grid[1] * width - columns)))
    return x.reshape(grid[0], height, grid[1], width).swapaxes(1, 2).reshape(tiling.num_tiles, -1)


def from_tiles(tiles: jax.Array, tiling: _Tiling) -> jax.Array:
    """The inverse of :func:`to_tiles`."""
    (rows, columns), (height, width), grid = tiling.matrix, tiling.sides, tiling.grid
    x = tiles.reshape(*grid, height, width).swapaxes(1, 2)
    x = x.reshape(grid[0] * height, grid[1] * width)[:rows, :columns]
    return x.reshape(-1)[: math.prod(tiling.shape)].reshape(tiling.shape)


# The transform ------------------------------------------------------------------------------------


def _as_it_is(tiles: jax.Array, tiling: _Tiling) -> jax.Array:
    return tiles


def _dct(tiles: jax.Array, tiling: _Tiling) -> jax.Array:
    return _on_both_sides(tiles, tiling, lambda side: cosines(side))


def _inverse_dct(tiles: jax.Array, tiling: _Tiling) -> jax.Array:
    return _on_both_sides(tiles, tiling, lambda side: cosines(side).T)


def _on_both_sides(tiles, tiling: _Tiling, matrix: Callable[[int], np.ndarray]) -> jax.Array:
    """A X Bᵀ for every tile X; of the tiles of a vector, X Bᵀ."""
    height, width = tiling.sides
    x = tiles.reshape(tiling.num_tiles, height, width)
    product = functools.partial(jnp.einsum, precision="highest")
    x = product("thw,vw->thv", x, jnp.asarray(matrix(width), x.dtype))
    if not tiling.is_vector:
        x = product("gh,thv->tgv", jnp.asarray(matrix(height), x.dtype), x)
    return x.reshape(tiling.num_tiles, -1)


@functools.lru_cache(maxsize=256)
def cosines(size: int) -> np.ndarray:
    """The orthonormal DCT-II: row f is the f-th cosine. ``# shape=(size, size)``"""
    frequency, place = np.arange(size)[:, None], np.arange(size)[None]
    rows = np.cos(np.pi * frequency * (2 * place + 1) / (2 * size)) * np.sqrt(2 / size)
    rows[0] /= np.sqrt(2)
    # A cosine that is zero is not to be what rounding makes of it, for whoever asks for signs.
    return np.where(np.abs(rows) < 1e-12, 0, rows)


def _fitting(x: jax.Array, dtype: Any) -> jax.Array:
    """``x`` in ``dtype``; what would be rounded to infinity, as the largest."""
    if x.dtype == dtype:
        return x
    largest = float(jnp.finfo(dtype).max)
    return jnp.clip(x, -largest, largest).astype(dtype)
