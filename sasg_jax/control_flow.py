"""Control flow over workers that ``vmap`` and XLA would make slow."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.extend.core import jaxpr_as_fun

from sasg_jax.numerics import PyTree


def stacked(size: int, tree: PyTree, batched: PyTree) -> PyTree:
    """``tree`` with a leading axis of ``size`` on every array, also where it is not ``batched``."""
    stack = lambda x, is_batched: x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
    return jax.tree.map(stack, tree, batched)


def update_if(active: jax.Array, fn: Callable[..., Any], carried: PyTree, *operands: PyTree) -> Any:
    """Runs ``carried, output = fn(carried, *operands)`` where ``active``, and nothing elsewhere.

    Like a ``lax.cond`` whose other branch returns ``carried`` as it is and an output of zeros.
    Under ``vmap`` that would become a select: both branches run for every entry, and every array is
    written anew. This loops over the active entries instead and writes their rows in place: a
    simulated round, like a real one, pays for a worker's upload only if there is one. ``fn`` must
    not close over traced values, and keeps the shapes and dtypes of ``carried``."""
    carried, operands = jax.tree.map(jnp.asarray, (carried, operands))
    output_shapes = jax.eval_shape(fn, carried, *operands)[1]
    zero_rows = lambda leading: lambda s: jnp.zeros(leading + s.shape, s.dtype)
    zeros = lambda *leading: jax.tree.map(zero_rows(leading), output_shapes)

    @custom_vmap
    def conditional(active, carried, operands):
        run = lambda carried: fn(carried, *operands)
        return lax.cond(active, run, lambda carried: (carried, zeros()), carried)

    @conditional.def_vmap
    def loop_over_active(size, batched, active, carried, operands):
        # Inside a traced branch or loop, constants arrive as scalars that are no arrays.
        operands = jax.tree.map(jnp.asarray, operands)
        active, carried = stacked(size, (active, carried), tuple(batched[:2]))
        order = jnp.argsort(~active, stable=True)  # the active entries first, in their order

        def body(i, loop_state):
            (carried, outputs), entry = loop_state, order[i]
            row = lambda rows: lax.dynamic_index_in_dim(rows, entry, keepdims=False)
            read = lambda rows, is_batched: row(rows) if is_batched else rows
            own = jax.tree.map(read, operands, batched[2])
            new_carried, output = fn(jax.tree.map(row, carried), *own)
            # A row is written in place only when nothing reads the old one any more. Else XLA
            # copies all rows: so where the row is written must depend on the output.
            place, update = entry + zero_after(output), lax.dynamic_update_index_in_dim
            write = lambda at: lambda rows, row: update(rows, row, at, axis=0)
            carried = jax.tree.map(write(place), carried, new_carried)
            return carried, jax.tree.map(write(entry), outputs, output)

        result = lax.fori_loop(0, active.sum(), body, (carried, zeros(size)))
        return result, jax.tree.map(lambda _: True, result)

    return conditional(active, carried, operands)


def zero_after(tree: PyTree) -> jax.Array:
    """Zero, which XLA only knows when it has the floats in a tree. ``# shape=(), dtype=int32``"""
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating) and x.size]
    firsts = jnp.array([x.reshape(-1)[0].astype(jnp.float32) for x in leaves], jnp.float32)
    # Read as an integer, a magnitude is at least 0, that of NaN too: its highest bit is the sign.
    return jnp.minimum(lax.bitcast_convert_type(jnp.abs(firsts), jnp.int32), 0).sum(dtype=jnp.int32)


@custom_vmap
def for_all(flag: jax.Array) -> jax.Array:
    """``flag``, or under ``vmap`` whether it holds for all entries: for a ``lax.cond`` that skips
    work which no entry needs. With a flag for each entry it would become a select, and copy for
    each entry whatever the branches close over."""
    return flag


@for_all.def_vmap
def _for_all_rule(size, batched, flag):
    return (flag.all() if batched[0] else flag), False


@custom_vmap
def same_on_all(worker: jax.Array, tree: PyTree) -> PyTree:
    """``tree``; raises ValueError under ``vmap`` over workers where it depends on the worker."""
    return tree


@same_on_all.def_vmap
def _same_on_all_rule(size, batched, worker, tree):
    if batched[0] and any(jax.tree.leaves(batched[1])):
        why = "Expected params and everything in the optimiser state after the sasg_jax "
        why += "transformation to be the same on all workers, but a part depends on the worker. In "
        why += "sasg_jax.pipeline or optax.chain, put what sees a worker's own gradients before "
        why += "it. What optax.masked keeps from it is a worker's own, too: set that to zero, e.g. "
        raise ValueError(why + "by optax.partition with optax.set_to_zero().")
    return tree, batched[1]


def sum_rows(rows: jax.Array) -> jax.Array:
    """Sums over the leading axis, one row after another, so that all replicas get the same bits.
    (XLA's own reduction over it is tens of times slower on the CPU, in jaxlib 0.10.)"""
    return add_rows(rows[0], rows[1:])


def add_rows(total: jax.Array, rows: jax.Array) -> jax.Array:
    """Adds the rows of the leading axis to a total, one after another."""
    return lax.scan(lambda total, row: (total + row, None), total, rows, unroll=8)[0]


def refuse_collectives(fn: Callable[..., PyTree], axis_name: str) -> Callable[..., PyTree]:
    """``fn``, which when called raises ValueError if it uses collectives over ``axis_name``."""

    def checked(*args):
        closed, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
        if primitive := _find_collective(closed.jaxpr, axis_name):
            why = f"Expected a loss without collectives over axis {axis_name!r}, found "
            why += f"{primitive!r} (e.g. of BatchNorm(axis_name=...)), where not all workers "
            why += "evaluate it at once: they would wait for each other for ever. Let each worker "
            why += "keep its own statistics, or use a rule that does not compare, e.g. "
            raise ValueError(why + "sasg_jax.always(), without chunk_size.")
        outputs = jaxpr_as_fun(closed)(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape), outputs)

    return checked


def _find_collective(jaxpr: Any, axis_name: str) -> str | None:
    """The name of a primitive that communicates over ``axis_name``, if there is one."""
    has_equations = lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
    for eqn in jaxpr.eqns:
        axes = jax.tree.leaves([eqn.params.get("axes", ()), eqn.params.get("axis_name", ())])
        if axis_name in axes and eqn.primitive.name not in ("axis_index", "pvary"):
            return eqn.primitive.name
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=has_equations):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns") and (found := _find_collective(inner, axis_name)):
                return found
    return None
