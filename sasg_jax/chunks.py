"""A simulated round in which the workers' half is made chunk by chunk.

``vmap`` over all workers holds every worker's gradients at once. Here only those of a chunk are in
memory: the workers' states stay where they are, and are read and written a chunk at a time. The
workers' half of a round ends, and the server's begins, inside ``tx.update``: the ``link`` in its
state tells it which half to make.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from sasg_jax.control_flow import add_rows, zero_after
from sasg_jax.transform import AggregateState, ServerHalf, find_state

PyTree = Any


class ChunkedRound(NamedTuple):
    """What a round leaves behind, as :func:`make_round` makes it."""

    own: PyTree
    """The workers' own parts of the state, leading axis M; ``()`` elsewhere."""
    infos: PyTree
    """What the workers report, leading axis M."""
    params: PyTree
    opt_state: PyTree
    """The optimiser state, of which the parts that are the same for all workers are right."""


def make_round(
    tx: optax.GradientTransformationExtraArgs,
    worker_half: Callable[[PyTree, PyTree], tuple[PyTree, PyTree, PyTree]],
    own: PyTree,
    batch: PyTree,
    params: PyTree,
    opt_state: PyTree,
    *,
    chunk_size: int,
) -> ChunkedRound:
    """Makes a round of all workers.

    Args:
      tx: the optimiser.
      worker_half: ``own, info, message = worker_half(own, batch)`` of the workers of one chunk.
      own: the workers' own parts of the state, leading axis M.
      batch: leading axis M.
      params: w_t.
      opt_state: the optimiser state of one worker.
      chunk_size: how many workers a chunk has; it divides M.
    """
    wire = find_state(opt_state).wire
    is_summed = wire.exchange == "psum"
    part = lambda x: jax.ShapeDtypeStruct((chunk_size, *x.shape[1:]), x.dtype)
    _, infos, messages = jax.eval_shape(worker_half, *jax.tree.map(part, (own, batch)))

    def rows(shape):
        return jnp.zeros((wire.num_workers, *shape.shape[1:]), shape.dtype)

    # Dense messages that everybody sends are added up as they come.
    collected = (
        jax.tree.map(lambda s: jnp.zeros(s.shape[1:], _wide(s)), messages)
        if is_summed
        else jax.tree.map(rows, messages)
    )

    def one_chunk(chunk, carried):
        own, infos, collected = carried
        start = chunk * chunk_size

        def read(x):
            return lax.dynamic_slice_in_dim(x, start, chunk_size)

        def write(rows, part):
            return lax.dynamic_update_slice_in_dim(rows, part, start, axis=0)

        new_own, info, message = worker_half(*jax.tree.map(read, (own, batch)))
        if is_summed:
            wide = jax.tree.map(lambda x: x.astype(_wide(x)), message)
            collected = jax.tree.map(add_rows, collected, wide)
        else:
            collected = jax.tree.map(write, collected, message)
        own, infos = jax.tree.map(write, (own, infos), (new_own, info))
        return own, infos, collected

    carried = own, jax.tree.map(rows, infos), collected
    num_chunks = wire.num_workers // chunk_size
    own, infos, collected = lax.fori_loop(0, num_chunks, one_chunk, carried)

    if is_summed:
        collected = jax.tree.map(lambda x, s: x.astype(s.dtype), collected, messages)
    uploaded = infos.uploaded if wire.flag_bytes else None
    no_grads = jax.tree.map(jnp.zeros_like, params)
    # Otherwise the compiler may write the recent parameters before the last worker has read them,
    # and copies them all to be on the safe side.
    zero = zero_after(infos.loss)
    updates, opt_state = tx.update(
        no_grads,
        link(opt_state, ServerHalf(collected, uploaded), rounds_later=zero),
        params,
        grad_fn=lambda params: no_grads,
    )
    return ChunkedRound(own, infos, optax.apply_updates(params, updates), link(opt_state, ()))


def link(opt_state: PyTree, half: Any, rounds_later: Any = 0) -> PyTree:
    """The state with which ``tx.update`` makes only one half of a round, or ``()``: all of it."""

    def change(node):
        if not isinstance(node, AggregateState):
            return node
        server = node.server._replace(round=node.server.round + rounds_later)
        return node._replace(server=server, link=half)

    return jax.tree.map(change, opt_state, is_leaf=lambda node: isinstance(node, AggregateState))


def check_chunks(opt_state: PyTree, num_workers: int, chunk_size: int) -> None:
    """Raises ValueError where a round cannot be made in chunks."""
    problem = ""
    is_multi = lambda node: isinstance(node, optax.MultiStepsState)
    if num_workers % chunk_size:
        problem = f"to divide num_workers={num_workers}"
    elif find_state(opt_state).wire.exchange == "sharded":
        problem = "to be None for exchange='sharded', where every worker is a server too"
    elif any(map(is_multi, jax.tree.leaves(opt_state, is_leaf=is_multi))):
        problem = "to be None with optax.MultiSteps, which makes a round or none"
    if problem:
        raise ValueError(f"Expected chunk_size={chunk_size} {problem}.")


def _wide(x: Any) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)
