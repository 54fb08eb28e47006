r"""Compressors: what of a tensor is sent, and how it is decoded.

A compressor turns a tree into a message, a pytree of arrays of static shapes that depend on the
tree's shapes alone, and a remainder, what the message left out:

.. math:: x = \mathrm{decompress}(\mathcal{C}(x)) + \mathrm{remainder}

The worker keeps the remainder as its residual and adds it to what it sends next (error feedback).
"""

import math
from collections.abc import Callable
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


class Compressor(NamedTuple):
    """Pure functions of trees of arrays; made by :func:`identity` and :func:`top_k`."""

    compress: Callable[[PyTree], tuple[Message, PyTree]]
    """``message, remainder = compress(tree)``."""
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


def identity() -> Compressor:
    """Sends everything: the message is the tree itself.

    >>> import jax.numpy as jnp
    >>> identity().message_size({"w": jnp.zeros(100)})
    MessageSize(bytes=400, paper_bits=3200)
    """

    def compress(tree):
        return tree, jax.tree.map(jnp.zeros_like, tree)

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

    return Compressor(compress, decompress_sum, message_size, lossless=True)


class TopKMessage(NamedTuple):
    """The kept entries of one vector, each index at most once, in no particular order."""

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
      selection: how the entries are found, see :mod:`sasg_jax.selection`; the set of entries is the
        same. ``"auto"``, ``"lax"`` or ``"pruned"``.

    Guarantees:
      - Conservation: ``decompress(message) + remainder == tree``, bit for bit.
      - Lemma 1: :math:`\|x - \mathcal{C}(x)\|^2 \le (1 - k/d)\|x\|^2` for every vector.

    Raises:
      ValueError: an argument is out of its range.

    >>> import jax.numpy as jnp
    >>> compressor = top_k(0.5)
    >>> message, remainder = compressor.compress(jnp.array([1.0, -4.0, 3.0, 2.0]))
    >>> sorted(message.indices.tolist()), remainder.tolist()
    ([1, 2], [1.0, 0.0, 0.0, 2.0])

    References: Stich et al., `Sparsified SGD with Memory <https://arxiv.org/abs/1809.07599>`_, 2018
    """
    density = check_density("density", density)
    check_choice("scope", scope, ("tensor", "tree"))
    check_choice("selection", selection, tuple(selection_lib.METHODS))

    def kept(size: int) -> int:
        return max(1, math.floor(density * size))

    def compress_vector(x):
        indices = selection_lib.magnitude_top_k(x, kept(x.size), method=selection)
        message = TopKMessage(x[indices], indices.astype(_index_dtype(x.size)))
        return message, x.at[indices].set(0, unique_indices=True)

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

    if scope == "tensor":

        def compress(tree):
            leaves, treedef = jax.tree.flatten(tree)
            pairs = [compress_vector(leaf.reshape(-1)) for leaf in leaves]
            remainder = [rest.reshape(x.shape) for (_, rest), x in zip(pairs, leaves, strict=True)]
            return treedef.unflatten([m for m, _ in pairs]), treedef.unflatten(remainder)

        def decompress_sum(messages, like):
            leaves, treedef = jax.tree.flatten(like)
            sums = [
                decompress_sum_vector(m, x.size, x.dtype).reshape(x.shape)
                for m, x in zip(treedef.flatten_up_to(messages), leaves, strict=True)
            ]
            return treedef.unflatten(sums)

        def message_size(tree):
            sizes = [vector_size(leaf.size, leaf.dtype) for leaf in jax.tree.leaves(tree)]
            return MessageSize(*map(sum, zip(*sizes, strict=True)))

    else:

        def compress(tree):
            message, rest = compress_vector(_concatenate(tree))
            return message, _split(rest, tree)

        def decompress_sum(messages, like):
            vector = jax.eval_shape(_concatenate, like)
            return _split(decompress_sum_vector(messages, vector.size, vector.dtype), like)

        def message_size(tree):
            vector = jax.eval_shape(_concatenate, tree)
            return vector_size(vector.size, vector.dtype)

    return Compressor(compress, decompress_sum, message_size, lossless=False)


def _index_dtype(size: int) -> jnp.dtype:
    """The smallest unsigned integer type that holds the indices of a vector of ``size``."""
    for dtype in (jnp.uint8, jnp.uint16):
        if size <= jnp.iinfo(dtype).max + 1:
            return jnp.dtype(dtype)
    return jnp.dtype(jnp.uint32)


def _sum_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Sums over workers are taken in at least float32."""
    return jnp.promote_types(dtype, jnp.float32)


def _concatenate(tree: PyTree) -> jax.Array:
    """All entries of the tree in one vector, of a type that holds every leaf's values exactly."""
    leaves = jax.tree.leaves(tree)
    dtype = jnp.result_type(*(leaf.dtype for leaf in leaves))
    return jnp.concatenate([leaf.reshape(-1).astype(dtype) for leaf in leaves])


def _split(vector: jax.Array, like: PyTree) -> PyTree:
    """Inverse of :func:`_concatenate`."""
    leaves, treedef = jax.tree.flatten(like)
    parts, start = [], 0
    for leaf in leaves:
        part = vector[start : start + leaf.size]
        parts.append(part.reshape(leaf.shape).astype(leaf.dtype))
        start += leaf.size
    return treedef.unflatten(parts)
