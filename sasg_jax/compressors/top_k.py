"""Keeps the entries of largest magnitude."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sasg_jax import selection as selection_lib
from sasg_jax._checks import check_choice, check_fraction
from sasg_jax.compressors.base import Compressed, Compressor
from sasg_jax.numerics import PyTree, wide


class TopKMessage(NamedTuple):
    """The kept entries of one vector, each index at most once, in no particular order. A whole
    message is a tuple of these: one for each tensor, or one for the tree."""

    values: jax.Array  # shape=(k,), dtype of the vector
    indices: jax.Array  # shape=(k,), the smallest unsigned integer type that fits


def top_k(density: float, *, scope: str = "tensor", selection: str = "auto") -> Compressor:
    r"""Keeps the entries of largest magnitude; of equal ones, those with the lowest index.

    .. math:: k = \max(1, \lfloor \mathrm{density} \cdot d \rfloor)

    with the product rounded as Python does: ``top_k(0.29)`` keeps 28 of 100 entries.

    Args:
      density: kept fraction k/d, in (0, 1].
      scope: ``"tensor"`` selects in every tensor by itself (the paper's setting), ``"tree"``
        among all entries of the tree at once, fewer than 2³¹.
      selection: ``"auto"``, ``"lax"`` and ``"pruned"`` find the same set; ``"approximate"`` reuses
        a threshold from message to message, and is faster on a CPU. See :mod:`sasg_jax.selection`.

    Guarantees:
      - Conservation: ``decompress(message) + remainder == tree``, bit for bit.
      - Lemma 1: :math:`\|x - \mathcal{C}(x)\|^2 \le (1 - \delta)\|x\|^2` for every vector, with
        :math:`\delta = k/d`; with ``"approximate"`` :math:`\delta = 0.8\,k/d`.

    ValueError for an argument, or a tree for ``scope="tree"``, out of its range.

    >>> import jax.numpy as jnp
    >>> message, remainder, _ = top_k(0.5).compress(jnp.array([1.0, -4.0, 3.0, 2.0]), ((),), None)
    >>> sorted(message[0].indices.tolist()), remainder.tolist()
    ([1, 2], [1.0, 0.0, 0.0, 2.0])

    References: Stich et al., `Sparsified SGD with Memory <https://arxiv.org/abs/1809.07599>`_, 2018
    """
    density = check_fraction("density", density)
    check_choice("scope", scope, _SCOPES)
    check_choice("selection", selection, (*selection_lib.METHODS, "approximate"))
    is_approximate = selection == "approximate"
    to_vectors, from_vectors = _SCOPES[scope]

    def compress_vector(x, threshold):
        kept = max(1, math.floor(density * x.size))
        if kept == x.size:  # all of them, whatever their magnitudes
            indices = jnp.arange(kept)
        elif is_approximate:
            indices, threshold = selection_lib.approximate_top_k(x, kept, threshold)
        else:
            indices = selection_lib.magnitude_top_k(x, kept, method=selection)
        message = TopKMessage(x[indices], indices.astype(index_dtype(x.size)))
        return message, x.at[indices].set(0, unique_indices=True), threshold

    def decompress_sum_vector(messages, vector):
        # One message after another: indices are then unique within a scatter, which accelerators
        # run in parallel and still give every replica the same bits.
        def add(total, message):
            indices = message.indices.astype(jnp.int32)
            return total.at[indices].add(message.values, unique_indices=True), None

        dtype = wide(vector.dtype)
        messages = messages._replace(values=messages.values.astype(dtype))
        return jax.lax.scan(add, jnp.zeros(vector.size, dtype), messages)[0]

    def init_memory(tree):
        threshold = lambda: jnp.zeros((), jnp.float32) if is_approximate else ()
        return tuple(threshold() for _ in jax.eval_shape(to_vectors, tree))

    def compress(tree, memory, key):
        parts = [compress_vector(*pair) for pair in zip(to_vectors(tree), memory, strict=True)]
        messages, remainders, thresholds = zip(*parts, strict=True) if parts else ((), (), ())
        remainder = from_vectors(remainders, tree)
        remainder = jax.tree.map(lambda x, leaf: x.astype(leaf.dtype), remainder, tree)
        return Compressed(messages, remainder, thresholds)

    def decompress_sum(messages, like, key):
        pairs = zip(messages, jax.eval_shape(to_vectors, like), strict=True)
        total = from_vectors([decompress_sum_vector(*pair) for pair in pairs], like)
        return jax.tree.map(lambda x, leaf: x.astype(wide(leaf.dtype)), total, like)

    arguments = [str(density)] + [f"scope={scope!r}"] * (scope != "tensor")
    arguments += [f"selection={selection!r}"] * is_approximate
    name = f"top_k({', '.join(arguments)})"
    return Compressor(
        name=name, compress=compress, decompress_sum=decompress_sum, init_memory=init_memory
    )


def index_dtype(size: int) -> jnp.dtype:
    """The smallest unsigned integer type that holds the indices of a vector of ``size``."""
    return jnp.dtype("uint8" if size <= 1 << 8 else "uint16" if size <= 1 << 16 else "uint32")


def _flatten_each(tree: PyTree) -> list[jax.Array]:
    return [leaf.reshape(-1) for leaf in jax.tree.leaves(tree)]


def _unflatten_each(vectors: Sequence[jax.Array], like: PyTree) -> PyTree:
    leaves, treedef = jax.tree.flatten(like)
    return treedef.unflatten([x.reshape(y.shape) for x, y in zip(vectors, leaves, strict=True)])


def _concatenate(tree: PyTree) -> list[jax.Array]:
    """All entries in one vector, of a type that holds the values of every leaf exactly."""
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        total += leaf.size
        if total >= 2**31:
            why = "Expected params to have fewer than 2**31 entries in all for "
            why += f"top_k(scope='tree'): params{jax.tree_util.keystr(path)} takes them to "
            raise ValueError(why + f"{total}. Use scope='tensor'.")
    vectors = _flatten_each(tree)
    if not vectors:
        return []
    dtype = jnp.result_type(*(x.dtype for x in vectors))
    # Written part by part. A concatenation is made anew in each kernel that reads it: XLA's fast
    # top-k is lost behind one, and a message takes ten times as long.
    whole, start = jnp.zeros(total, dtype), 0
    for x in vectors:
        whole = jax.lax.dynamic_update_slice(whole, x.astype(dtype), (start,))
        start += x.size
    return [whole]


def _split(vectors: Sequence[jax.Array], like: PyTree) -> PyTree:
    if not vectors:
        return like
    ends = itertools.accumulate(leaf.size for leaf in jax.tree.leaves(like))
    return _unflatten_each(jnp.split(vectors[0], list(ends)[:-1]), like)


# How a tree becomes the vectors among whose entries the selection is made, and back.
_SCOPES = {"tensor": (_flatten_each, _unflatten_each), "tree": (_concatenate, _split)}
