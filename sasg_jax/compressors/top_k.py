"""Keeps the entries of largest magnitude."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sasg_jax import selection as selection_lib
from sasg_jax._checks import check_choice, check_fraction
from sasg_jax.coders import INDEX_CODERS, VALUE_CODERS, IndexCoder, ValueCoder
from sasg_jax.coders.base import find as find_coder
from sasg_jax.coders.values import shorter
from sasg_jax.compressors.base import Compressed, Compressor
from sasg_jax.numerics import PyTree, wide


class TopKMessage(NamedTuple):
    """The kept entries of one vector, each index at most once, as they are written. A whole message
    is a tuple of these: one for each tensor, or one for the tree."""

    values: PyTree  # what the coder of values makes of k; plain: dtype of the vector
    indices: PyTree  # of indices; plain: the smallest unsigned integer type that fits


def top_k(
    density: float,
    *,
    scope: str = "tensor",
    selection: str = "auto",
    values: str | ValueCoder = "plain",
    indices: str | IndexCoder = "plain",
) -> Compressor:
    r"""Keeps the entries of largest magnitude; of equal ones, those with the lowest index.

    .. math:: k = \max(1, \lfloor \mathrm{density} \cdot d \rfloor)

    with the product rounded as Python does: ``top_k(0.29)`` keeps 28 of 100 entries.

    Args:
      density: kept fraction k/d, in (0, 1].
      scope: ``"tensor"`` selects in every tensor by itself (the paper's setting), ``"tree"``
        among all entries of the tree at once, fewer than 2³¹.
      selection: ``"auto"``, ``"lax"`` and ``"pruned"`` find the same set; ``"approximate"`` reuses
        a threshold from message to message, and is faster on a CPU. See :mod:`sasg_jax.selection`.
      values, indices: how they are written, by name or a coder: see :mod:`sasg_jax.coders`. Values
        of a vector so short that their code would take more bytes are written plainly.

    Guarantees:
      - Conservation: ``remainder == tree - decompress(message)``, bit for bit; with plain values
        ``decompress(message) + remainder == tree`` as well.
      - Lemma 1: :math:`\|x - \mathcal{C}(x)\|^2 \le (1 - \delta)\|x\|^2` for every vector, with
        :math:`\delta = k/d`; with ``"approximate"`` :math:`\delta = 0.8\,k/d`. Both are for plain
        values. With one sign and magnitude :math:`\delta > 0`, of no such size.

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
    values_as = find_coder(ValueCoder, "values", values, VALUE_CODERS)
    indices_as = find_coder(IndexCoder, "indices", indices, INDEX_CODERS)
    is_approximate = selection == "approximate"
    to_vectors, from_vectors = _SCOPES[scope]
    num_kept = lambda size: max(1, math.floor(density * size))

    coder_of = lambda size, dtype: shorter(values_as, num_kept(size), dtype)

    def compress_vector(x, threshold):
        kept = num_kept(x.size)
        if kept == x.size:  # all of them, whatever their magnitudes
            indices = jnp.arange(kept)
        elif is_approximate:
            indices, threshold = selection_lib.approximate_top_k(x, kept, threshold)
        else:
            indices = selection_lib.magnitude_top_k(x, kept, method=selection)
        if indices_as.name != "plain":
            indices = jnp.sort(indices.astype(jnp.int32))
        # Without the barrier they would be gathered anew in each kernel that reads them.
        chosen, coder = jax.lax.optimization_barrier(x[indices]), coder_of(x.size, x.dtype)
        code = coder.encode(chosen)
        left_out = 0 if coder.exact else chosen - coder.decode(code, kept, x.dtype)
        message = TopKMessage(code, indices_as.encode(indices, x.size))
        return message, x.at[indices].set(left_out, unique_indices=True), threshold

    def decode(message, vector):
        kept = num_kept(vector.size)
        x = coder_of(vector.size, vector.dtype).decode(message.values, kept, vector.dtype)
        return indices_as.decode(message.indices, kept, vector.size), x.astype(wide(vector.dtype))

    def decompress_sum_vector(messages, vector):
        # One message after another: indices are then unique within a scatter, which accelerators
        # run in parallel and still give every replica the same bits.
        def add(total, message):
            indices, x = decode(message, vector)
            return total.at[indices].add(x, unique_indices=True), None

        return jax.lax.scan(add, jnp.zeros(vector.size, wide(vector.dtype)), messages)[0]

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
    for argument, coder in (("values", values_as), ("indices", indices_as)):
        arguments += [f"{argument}={coder.name!r}"] * (coder.name != "plain")
    name = f"top_k({', '.join(arguments)})"
    return Compressor(
        name=name,
        compress=compress,
        decompress_sum=decompress_sum,
        init_memory=init_memory,
        num_values=lambda tree: sum(num_kept(x.size) for x in jax.eval_shape(to_vectors, tree)),
    )


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
