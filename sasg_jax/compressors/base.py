"""What a compressor is: a pair of pure functions and a few facts about them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sasg_jax._checks import check_like, require
from sasg_jax.numerics import PyTree


class MessageSize(NamedTuple):
    """What one message weighs, in exact Python integers."""

    bytes: int  # of everything in it, values and indices
    paper_bits: int  # 32 for every value and nothing for indices, as in the paper's Table II


class Compressed(NamedTuple):
    """What :attr:`Compressor.compress` makes of a tree."""

    message: PyTree
    remainder: PyTree  # what the message left out, like the tree
    memory: PyTree  # for the next tree


def _not_given(*args: Any) -> Any:
    raise TypeError("A compressor needs compress and decompress_sum, or compress_mean.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compressor:
    """Pure functions of trees of arrays, e.g. :func:`identity` and :func:`top_k`.

    Args:
      compress: ``message, remainder, memory = compress(tree, memory, key)``. A message is a pytree
        of arrays whose shapes depend on those of the tree alone. A message of zeros must decode to
        zeros: it stands for one that was not sent.
      decompress_sum: ``tree = decompress_sum(messages, like, key)``: the sum of decoded messages,
        whose arrays have one more leading axis. It is taken in the order of that axis, so that all
        replicas get the same bits, and in at least float32. Shapes are those of ``like``.
      expand, restore: for one whose numbers stand for other coordinates than the tree's, e.g.
        frequencies: ``numbers = expand(message, like, key)`` of one message, in at least float32,
        and ``tree = restore(numbers, like)``, which is linear. See :meth:`mean_over_senders`.
      num_values: how many values a message for ``tree`` holds; by default its floats.
      shares_key: whether all workers must draw the same, and ``decompress_sum`` again: the key is
        then that of the round, in place of the worker's own. Else ``decompress_sum`` gets None.
      compress_mean: in place of the two functions, for one that needs means over workers in the
        middle of its work: ``mean_of_trees, remainder, memory = compress_mean(tree, memory, key,
        mean)``, where ``mean`` averages a pytree; the first and the memory are the same on all."""

    name: str  # in errors, with its settings: "top_k(0.01)"
    compress: Callable[[PyTree, PyTree, Any], Compressed] = _not_given
    decompress_sum: Callable[[PyTree, PyTree, Any], PyTree] = _not_given
    init_memory: Callable[[PyTree], PyTree] = lambda tree: ()  # before the first message
    expand: Callable[[PyTree, PyTree, Any], PyTree] | None = None
    restore: Callable[[PyTree, PyTree], PyTree] = lambda numbers, like: numbers
    num_values: Callable[[PyTree], int] | None = None
    exact: bool = False  # the remainder is always zero, so that no residual need be kept
    unbiased: bool = False  # the decoded message is the tree in the mean, so that none need be kept
    linear: bool = False  # messages may be added before they are decoded, so that a sum serves
    random: bool = False  # compress draws random numbers, and needs a key
    shares_key: bool = False
    compress_mean: Callable[[PyTree, PyTree, Any, Callable], Compressed] | None = None

    def decompress(self, message: PyTree, like: PyTree, key: Any = None) -> PyTree:
        """The one decoded ``message``, in the dtypes of ``like``. ValueError for one of another
        structure, shape or dtype than messages for ``like`` have, e.g. one that was cut short."""
        if self.compress_mean is None:
            shapes = self.message_shapes(like)
            check_like("message", message, shapes, "a message for like")
            dtypes = [[x.dtype for x in jax.tree.leaves(tree)] for tree in (message, shapes)]
            require(dtypes[0] == dtypes[1], "message of dtypes", dtypes[0], f"to be of {dtypes[1]}")
        tree = self.decompress_sum(jax.tree.map(lambda x: x[None], message), like, key)
        return jax.tree.map(lambda x, leaf: x.astype(leaf.dtype), tree, like)

    def mean_over_senders(self, messages: PyTree, like: PyTree, key: Any = None) -> PyTree:
        """Each coordinate's mean over those ``messages``, with a leading axis, that have a number
        other than 0 there; 0 where none has. In at least float32, and in the order of that axis."""
        first = lambda rows: jax.tree.map(lambda x: x[0], rows)
        alone = lambda message: jax.tree.map(lambda x: x[None], message)
        whole = lambda message, like, key: self.decompress_sum(alone(message), like, key)
        numbers = lambda message: (self.expand or whole)(message, like, key)

        def add(carried, message):
            x = numbers(message)
            fresh = x, jax.tree.map(lambda x: (x != 0).astype(jnp.int32), x)
            return jax.tree.map(jnp.add, carried, fresh), None

        shapes = jax.eval_shape(numbers, jax.eval_shape(first, messages))
        zeros = lambda dtype=None: lambda s: jnp.zeros(s.shape, dtype or s.dtype)
        start = jax.tree.map(zeros(), shapes), jax.tree.map(zeros(jnp.int32), shapes)
        (total, count), _ = jax.lax.scan(add, start, messages)
        mean = jax.tree.map(lambda x, count: x / jnp.maximum(count, 1), total, count)
        return self.restore(mean, like)

    def message_shapes(self, tree: PyTree) -> PyTree:
        """Shapes and dtypes of a message for ``tree``, or of what ``compress_mean`` averages."""
        leaves, treedef = jax.tree.flatten(tree)
        return _message_shapes(self, treedef, tuple((x.shape, x.dtype) for x in leaves))

    def zero_message(self, tree: PyTree) -> PyTree:
        """The message of zeros, which stands for one that was not sent."""
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), self.message_shapes(tree))

    def message_size(self, tree: PyTree) -> MessageSize:
        """The size of a message for ``tree`` (arrays or ``jax.ShapeDtypeStruct``)."""
        leaves = jax.tree.leaves(self.message_shapes(tree))
        floats = [x.size for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]
        values = sum(floats) if self.num_values is None else self.num_values(tree)
        return MessageSize(sum(x.size * x.dtype.itemsize for x in leaves), 32 * values)


@functools.lru_cache(maxsize=256)
def _message_shapes(compressor: Compressor, treedef: Any, leaves: tuple[Any, ...]) -> PyTree:
    def message(tree, key):
        memory = compressor.init_memory(tree)
        if compressor.compress_mean is None:
            return compressor.compress(tree, memory, key).message
        averaged = []
        compressor.compress_mean(tree, memory, key, lambda x: averaged.append(x) or x)
        return averaged

    tree = treedef.unflatten([jax.ShapeDtypeStruct(*leaf) for leaf in leaves])
    return jax.eval_shape(message, tree, jax.eval_shape(lambda: jax.random.key(0)))
