"""Control flow over workers that ``vmap`` and XLA would make slow."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

PyTree = Any


def update_if(
    active: jax.Array, fn: Callable[..., tuple[PyTree, PyTree]], carried: PyTree, *operands: PyTree
) -> tuple[PyTree, PyTree]:
    """Runs ``carried, output = fn(carried, *operands)`` where ``active``, and nothing elsewhere.

    Like a ``lax.cond`` whose other branch returns ``carried`` as it is and an output of zeros.
    Under ``vmap`` a ``lax.cond`` becomes a select: both branches run for every entry, and every
    array is written anew. This loops over the active entries instead and writes their rows in
    place, so that a simulated round, like a real one, pays for a worker's upload only if there is
    one.

    Args:
      active: whether to run ``fn``. ``# shape=(), dtype=bool``
      fn: pure function of its arguments; it must not close over traced values. The carried tree
        that it returns has the structure, shapes and dtypes of ``carried``.
      carried: pytree of arrays.
      *operands: pytrees of arrays.

    Returns:
      The new carried tree and the output.
    """
    carried, operands = jax.tree.map(jnp.asarray, (carried, operands))
    output_shapes = jax.eval_shape(fn, carried, *operands)[1]

    def zeros(leading=()):
        return jax.tree.map(lambda s: jnp.zeros(leading + s.shape, s.dtype), output_shapes)

    @custom_vmap
    def conditional(active, carried, operands):
        return lax.cond(
            active,
            lambda carried: fn(carried, *operands),
            lambda carried: (carried, zeros()),
            carried,
        )

    @conditional.def_vmap
    def loop_over_active(size, batched, active, carried, operands):
        active_batched, carried_batched, operands_batched = batched
        # Inside a traced branch or loop, constants arrive as scalars that are no arrays.
        operands = jax.tree.map(jnp.asarray, operands)

        def stacked(x, is_batched):
            return x if is_batched else jnp.broadcast_to(x, (size, *x.shape))

        active = stacked(active, active_batched)
        carried = jax.tree.map(stacked, carried, carried_batched)
        order = jnp.argsort(~active, stable=True)  # the active entries first, in their order

        def body(i, loop_state):
            carried, outputs = loop_state
            entry = order[i]

            def read(rows, is_batched=True):
                return lax.dynamic_index_in_dim(rows, entry, keepdims=False) if is_batched else rows

            new_carried, output = fn(
                jax.tree.map(read, carried), *jax.tree.map(read, operands, operands_batched)
            )
            # A row is written in place only when nothing reads the old one any more. Else XLA
            # copies all rows: so where the row is written must depend on the output.
            place = entry + zero_after(output)
            carried = jax.tree.map(functools.partial(_write_row, place), carried, new_carried)
            outputs = jax.tree.map(functools.partial(_write_row, entry), outputs, output)
            return carried, outputs

        result = lax.fori_loop(0, active.sum(), body, (carried, zeros((size,))))
        return result, jax.tree.map(lambda _: True, result)

    return conditional(active, carried, operands)


def _write_row(entry: jax.Array, rows: jax.Array, row: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(rows, row, entry, axis=0)


def zero_after(tree: PyTree) -> jax.Array:
    """Zero, which XLA only knows when it has the floats in a tree. ``# shape=(), dtype=int32``"""
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating) and x.size]
    # The magnitude, as an integer, is at least 0: that of NaN too.
    magnitudes = [jnp.abs(x.reshape(-1)[0]).astype(jnp.int32) for x in floats]
    return sum((jnp.minimum(x, 0) for x in magnitudes), jnp.zeros((), jnp.int32))


@custom_vmap
def for_all(flag: jax.Array) -> jax.Array:
    """``flag``, or under ``vmap`` whether it holds for all entries: the same for all of them.

    For a ``lax.cond`` that skips work which no entry needs. With a flag for each entry it would
    become a select, and copy for each entry whatever the branches close over.
    """
    return flag


@for_all.def_vmap
def _for_all_rule(size, batched, flag):
    del size
    return (flag.all() if batched[0] else flag), False


def sum_rows(rows: jax.Array) -> jax.Array:
    """Sums over the leading axis, one row after another, so that all replicas get the same bits.

    (XLA's own reduction over a leading axis is tens of times slower on the CPU, in jaxlib 0.10.)
    """
    return add_rows(rows[0], rows[1:])


def add_rows(total: jax.Array, rows: jax.Array) -> jax.Array:
    """Adds the rows of the leading axis to a total, one after another."""
    return lax.scan(lambda total, row: (total + row, None), total, rows, unroll=8)[0]
