r"""Compressors: what of a tensor is sent, and how it is decoded.

A compressor turns a tree into a message, a pytree of arrays of static shapes that depend on the
tree's shapes alone, and a remainder, what the message left out:

.. math:: x = \mathrm{decompress}(\mathcal{C}(x)) + \mathrm{remainder}

The worker keeps the remainder as its residual and adds it to what it sends next (error feedback).
"""

import itertools
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
    >>> sorted(message[0].indices.tolist()), remainder.tolist()
    ([1, 2], [1.0, 0.0, 0.0, 2.0])

    References: Stich et al., `Sparsified SGD with Memory <https://arxiv.org/abs/1809.07599>`_, 2018
    """
    density = check_density("density", density)
    check_choice("scope", scope, _SCOPES)
    check_choice("selection", selection, selection_lib.METHODS)

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

    to_vectors, from_vectors = _SCOPES[scope]

    def compress(tree):
        pairs = [compress_vector(x) for x in to_vectors(tree)]
        return tuple(message for message, _ in pairs), from_vectors([r for _, r in pairs], tree)

    def decompress_sum(messages, like):
        sums = [
            decompress_sum_vector(message, x.size, x.dtype)
            for message, x in zip(messages, jax.eval_shape(to_vectors, like), strict=True)
        ]
        return from_vectors(sums, like)

    def message_size(tree):
        sizes = [vector_size(x.size, x.dtype) for x in jax.eval_shape(to_vectors, tree)]
        return MessageSize(*map(sum, zip(*sizes, strict=True)))

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


def _flatten_each(tree: PyTree) -> list[jax.Array]:
    return [leaf.reshape(-1) for leaf in jax.tree.leaves(tree)]


def _unflatten_each(vectors: list[jax.Array], like: PyTree) -> PyTree:
    leaves, treedef = jax.tree.flatten(like)
    return treedef.unflatten(
        [x.reshape(leaf.shape) for x, leaf in zip(vectors, leaves, strict=True)]
    )


def _concatenate(tree: PyTree) -> list[jax.Array]:
    """All entries in one vector, of a type that holds the values of every leaf exactly."""
    leaves = jax.tree.leaves(tree)
    dtype = jnp.result_type(*(leaf.dtype for leaf in leaves))
    return [jnp.concatenate([leaf.reshape(-1).astype(dtype) for leaf in leaves])]


def _split(vectors: list[jax.Array], like: PyTree) -> PyTree:
    leaves, treedef = jax.tree.flatten(like)
    ends = list(itertools.accumulate(leaf.size for leaf in leaves))
    parts = jnp.split(vectors[0], ends[:-1])
    return treedef.unflatten(
        [x.reshape(leaf.shape).astype(leaf.dtype) for x, leaf in zip(parts, leaves, strict=True)]
    )


# How a tree becomes the vectors among whose entries the selection is made, and back.
_SCOPES = {"tensor": (_flatten_each, _unflatten_each), "tree": (_concatenate, _split)}
