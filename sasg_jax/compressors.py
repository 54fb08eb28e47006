r"""Compressors: what of a tensor is sent, and how it is decoded.

A compressor turns a tree into a message, a pytree of arrays of static shapes that depend on the
tree's shapes alone, and a remainder, what the message left out:

.. math:: x = \mathrm{decompress}(\mathcal{C}(x)) + \mathrm{remainder}

The worker keeps the remainder as its residual and adds it to what it sends next (error feedback).
It also keeps the compressor's memory, e.g. a threshold that serves for the next message; that of
most compressors holds no arrays.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sasg_jax import selection as selection_lib
from sasg_jax._checks import check_choice, check_density
from sasg_jax.control_flow import sum_rows

PyTree = Any
Message = PyTree


class MessageSize(NamedTuple):
    """What one message weighs, in exact Python integers."""

    bytes: int
    """Bytes of everything in the message: values and indices."""
    paper_bits: int
    """32 bits for every value and nothing for indices, the convention of the paper's Table II."""


class Compressed(NamedTuple):
    """What :attr:`Compressor.compress` makes of a tree."""

    message: Message
    remainder: PyTree
    """What the message left out, like the tree."""
    memory: PyTree
    """For the next tree."""


class Compressor(NamedTuple):
    """Pure functions of trees of arrays; made by :func:`identity` and :func:`top_k`."""

    init_memory: Callable[[PyTree], PyTree]
    """``memory = init_memory(tree)``: the memory before the first message, without arrays for most
    compressors. ``tree`` has arrays or ``jax.ShapeDtypeStruct``."""
    compress: Callable[..., Compressed]
    """``message, remainder, memory = compress(tree, memory)``; without ``memory`` the initial."""
    decompress_sum: Callable[[Message, PyTree], PyTree]
    """``tree = decompress_sum(messages, like)``: the sum of decoded messages.

    Every array of ``messages`` has one more leading axis, over messages. The sum is taken in the
    order of that axis, so all replicas get the same bits. Shapes and dtypes are those of ``like``.
    """
    message_size: Callable[[PyTree], MessageSize]
    """``message_size(tree)`` for a tree of arrays or of ``jax.ShapeDtypeStruct``."""
    lossless: bool
    """Whether the remainder is always zero, so that no residual need be kept."""

    def decompress(self, message: Message, like: PyTree) -> PyTree:
        """Returns the one decoded ``message``."""
        return self.decompress_sum(jax.tree.map(lambda x: x[None], message), like)


def compress_with_feedback(
    compressor: Compressor, tree: PyTree, residual: PyTree, memory: PyTree
) -> Compressed:
    """Compresses ``tree + residual``; the remainder is the next residual.

    A lossless compressor has no residual: ``()``, before and after.
    """
    if compressor.lossless:
        message, _, memory = compressor.compress(tree, memory)
        return Compressed(message, residual, memory)
    return compressor.compress(jax.tree.map(jnp.add, tree, residual), memory)


def identity() -> Compressor:
    """Sends everything: the message is the tree itself.

    >>> import jax.numpy as jnp
    >>> identity().message_size({"w": jnp.zeros(100)})
    MessageSize(bytes=400, paper_bits=3200)
    """

    def compress(tree, memory=()):
        return Compressed(tree, jax.tree.map(jnp.zeros_like, tree), memory)

    def decompress_sum(messages, like):
        def total(rows, reference):
            return sum_rows(rows.astype(_sum_dtype(reference.dtype))).astype(reference.dtype)

        return jax.tree.map(total, messages, like)

    def message_size(tree):
        leaves = jax.tree.leaves(tree)
        return MessageSize(
            bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in leaves),
            paper_bits=32 * sum(leaf.size for leaf in leaves),
        )

    return Compressor(_no_memory, compress, decompress_sum, message_size, lossless=True)


class TopKMessage(NamedTuple):
    """The kept entries of one vector, each index at most once, in no particular order.

    A whole message is a tuple of these: one for each tensor, or one for the tree.
    """

    values: jax.Array  # shape=(k,), dtype of the vector
    indices: jax.Array  # shape=(k,), the smallest unsigned integer type that fits


def top_k(density: float, *, scope: str = "tensor", selection: str = "auto") -> Compressor:
    r"""Keeps the entries of largest magnitude; of equal ones, those with the lowest index.

    .. math:: k = \max(1, \lfloor \mathrm{density} \cdot d \rfloor)

    The product is rounded to a float before the floor, as Python does: ``top_k(0.29)`` keeps 28 of
    100 entries.

    Args:
      density: kept fraction k/d, in (0, 1].
      scope: ``"tensor"`` selects in every tensor by itself (the paper's setting). ``"tree"``
        selects among all entries of the tree at once.
      selection: how the entries are found, see :mod:`sasg_jax.selection`. ``"auto"``, ``"lax"`` and
        ``"pruned"`` find the same set. ``"approximate"``, which reuses a threshold from message to
        message, is faster on the CPU and does not find exactly the k largest.

    Guarantees:
      - Conservation: ``decompress(message) + remainder == tree``, bit for bit.
      - Lemma 1: :math:`\|x - \mathcal{C}(x)\|^2 \le (1 - \delta)\|x\|^2` for every vector, with
        :math:`\delta = k/d`; with ``"approximate"`` :math:`\delta = 0.8\,k/d`.

    Raises:
      ValueError: an argument is out of its range.

    >>> import jax.numpy as jnp
    >>> compressor = top_k(0.5)
    >>> message, remainder, _ = compressor.compress(jnp.array([1.0, -4.0, 3.0, 2.0]))
    >>> sorted(message[0].indices.tolist()), remainder.tolist()
    ([1, 2], [1.0, 0.0, 0.0, 2.0])

    References: Stich et al., `Sparsified SGD with Memory <https://arxiv.org/abs/1809.07599>`_, 2018
    """
    density = check_density("density", density)
    check_choice("scope", scope, _SCOPES)
    check_choice("selection", selection, (*selection_lib.METHODS, "approximate"))
    is_approximate = selection == "approximate"

    def kept(size: int) -> int:
        return max(1, math.floor(density * size))

    def compress_vector(x, threshold):
        if is_approximate:
            indices, threshold = selection_lib.approximate_top_k(x, kept(x.size), threshold)
        else:
            indices = selection_lib.magnitude_top_k(x, kept(x.size), method=selection)
        message = TopKMessage(x[indices], indices.astype(_index_dtype(x.size)))
        return message, x.at[indices].set(0, unique_indices=True), threshold

    def decompress_sum_vector(messages, size, dtype):
        # One message after another: indices are then unique within a scatter, which accelerators
        # run in parallel and still give every replica the same bits.
        def add(total, message):
            indices = message.indices.astype(jnp.int32)
            return total.at[indices].add(message.values, unique_indices=True), None

        messages = messages._replace(values=messages.values.astype(_sum_dtype(dtype)))
        return lax.scan(add, jnp.zeros(size, _sum_dtype(dtype)), messages)[0].astype(dtype)

    def vector_size(size, dtype):
        k = kept(size)
        return MessageSize(k * (dtype.itemsize + _index_dtype(size).itemsize), 32 * k)

    to_vectors, from_vectors = _SCOPES[scope]

    def init_memory(tree):
        vectors = jax.eval_shape(to_vectors, tree)
        return tuple(jnp.zeros((), jnp.float32) if is_approximate else () for _ in vectors)

    def compress(tree, memory=None):
        thresholds = init_memory(tree) if memory is None else memory
        messages, remainders, thresholds = zip(
            *map(compress_vector, to_vectors(tree), thresholds), strict=True
        )
        return Compressed(messages, from_vectors(remainders, tree), thresholds)

    def decompress_sum(messages, like):
        sums = [
            decompress_sum_vector(message, x.size, x.dtype)
            for message, x in zip(messages, jax.eval_shape(to_vectors, like), strict=True)
        ]
        return from_vectors(sums, like)

    def message_size(tree):
        sizes = [vector_size(x.size, x.dtype) for x in jax.eval_shape(to_vectors, tree)]
        return MessageSize(*map(sum, zip(*sizes, strict=True)))

    return Compressor(init_memory, compress, decompress_sum, message_size, lossless=False)


def _no_memory(tree: PyTree) -> PyTree:
    del tree
    return ()


def _index_dtype(size: int) -> jnp.dtype:
    """The smallest unsigned integer type that holds the indices of a vector of ``size``."""
    for dtype in (jnp.uint8, jnp.uint16):
        if size <= jnp.iinfo(dtype).max + 1:
            return jnp.dtype(dtype)
    return jnp.dtype(jnp.uint32)


def _sum_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Sums over workers are taken in at least float32."""
    return jnp.promote_types(dtype, jnp.float32)


def _flatten_each(tree: PyTree) -> list[jax.Array]:
    return [leaf.reshape(-1) for leaf in jax.tree.leaves(tree)]


def _unflatten_each(vectors: Sequence[jax.Array], like: PyTree) -> PyTree:
    leaves, treedef = jax.tree.flatten(like)
    return treedef.unflatten(
        [x.reshape(leaf.shape) for x, leaf in zip(vectors, leaves, strict=True)]
    )


def _concatenate(tree: PyTree) -> list[jax.Array]:
    """All entries in one vector, of a type that holds the values of every leaf exactly."""
    leaves = jax.tree.leaves(tree)
    dtype = jnp.result_type(*(leaf.dtype for leaf in leaves))
    return [jnp.concatenate([leaf.reshape(-1).astype(dtype) for leaf in leaves])]


def _split(vectors: Sequence[jax.Array], like: PyTree) -> PyTree:
    leaves, treedef = jax.tree.flatten(like)
    ends = list(itertools.accumulate(leaf.size for leaf in leaves))
    parts = jnp.split(vectors[0], ends[:-1])
    return treedef.unflatten(
        [x.reshape(leaf.shape).astype(leaf.dtype) for x, leaf in zip(parts, leaves, strict=True)]
    )


# How a tree becomes the vectors among whose entries the selection is made, and back.
_SCOPES = {"tensor": (_flatten_each, _unflatten_each), "tree": (_concatenate, _split)}
