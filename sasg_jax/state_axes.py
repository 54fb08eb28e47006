"""Which parts of an optax state belong to one worker, and which are the same on all.

Under a map over workers every part of an optimiser state that differs between workers needs an axis
over them. These helpers find those parts in any optax state that contains ours:

- ours are the residual, stale parameters and counters of :class:`sasg_jax.WorkerState`; the
  server's state is the same everywhere, but for what the ``"sharded"`` exchange keeps of a shard;
- in ``optax.chain``, what stands before ours sees each worker's own gradients and belongs to the
  worker; what stands after ours sees the same updates everywhere;
- ``optax.MultiSteps`` accumulates each worker's own gradients;
- ``optax.masked`` and ``optax.inject_hyperparams`` add nothing that differs.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from sasg_jax._checks import check_int
from sasg_jax.server import ServerState
from sasg_jax.transform import AggregateState, find_state
from sasg_jax.worker import WorkerState

PyTree = Any


def per_worker(opt_state: PyTree) -> PyTree:
    """Tells for every leaf whether it belongs to one worker.

    Returns:
      A tree like ``opt_state`` with a bool at every leaf.

    Raises:
      ValueError: the state does not contain exactly one state of ours, or it contains what cannot
        run under a map over workers (``optax.MultiSteps`` with ``should_skip_update_fn``).

    >>> import jax.numpy as jnp, optax, sasg_jax
    >>> tx = optax.chain(sasg_jax.aggregate(num_workers=2), optax.trace(0.9))
    >>> ours, momentum = per_worker(tx.init(jnp.zeros(3)))
    >>> ours.worker.residual, ours.server.round, momentum.trace
    (True, False, False)
    """
    find_state(opt_state)
    return _mark(opt_state)


def worker_axes(opt_state: PyTree) -> PyTree:
    """Axes of the state for ``jax.vmap`` and ``jax.pmap``: 0 for a worker's own parts, else None.

    For ``in_axes`` and ``out_axes`` alike. Raises as :func:`per_worker`.
    """
    return jax.tree.map(lambda own: 0 if own else None, per_worker(opt_state))


def worker_specs(opt_state: PyTree, axis_name: str = "workers") -> PyTree:
    """Partition specs of the state for ``jax.shard_map``: split over workers, or replicated.

    Raises as :func:`per_worker`.
    """
    split, replicated = PartitionSpec(axis_name), PartitionSpec()
    return jax.tree.map(lambda own: split if own else replicated, per_worker(opt_state))


def stack_workers(opt_state: PyTree, num_workers: int) -> PyTree:
    """Gives every worker its own copy of its parts: one worker's state, as ``tx.init`` makes it,
    becomes the state of all, with a leading axis of ``num_workers`` on those parts.
    """
    check_int("num_workers", num_workers, minimum=1)

    def stack(own, x):
        return jnp.broadcast_to(x, (num_workers, *jnp.shape(x))) if own else jnp.asarray(x)

    return jax.tree.map(stack, per_worker(opt_state), opt_state)


def _mark(node: PyTree) -> PyTree:
    if isinstance(node, WorkerState):
        return _fill(node, True)
    if isinstance(node, AggregateState) and node.wire.exchange == "sharded":
        return _mark_children(node)._replace(server=_mark_shards(node.server))
    if isinstance(node, ServerState) or not _contains_ours(node):
        return _fill(node, False)
    if isinstance(node, optax.MultiStepsState):
        if jax.tree.leaves(node.skip_state):
            raise ValueError(
                "Expected optax.MultiSteps without should_skip_update_fn: workers would skip "
                "different steps and wait for each other for ever. A gradient that is not finite "
                "is refused by sasg_jax itself."
            )
        marked = _mark_children(node)
        return marked._replace(acc_grads=_fill(node.acc_grads, True))
    if type(node) is tuple:  # optax.chain
        ours = next(i for i, child in enumerate(node) if _contains_ours(child))
        before = tuple(_fill(child, True) for child in node[:ours])
        return before + tuple(_mark(child) for child in node[ours:])
    return _mark_children(node)


def _mark_shards(server: ServerState) -> PyTree:
    """Each worker is the server of one shard, and only it has what is kept of that shard."""
    return _fill(server, False)._replace(
        messages=_fill(server.messages, True),
        downlink_residual=_fill(server.downlink_residual, True),
        downlink_memory=_fill(server.downlink_memory, True),
    )


def _mark_children(node: PyTree) -> PyTree:
    children, treedef = jax.tree.flatten(node, is_leaf=lambda x: x is not node)
    return treedef.unflatten([_mark(child) for child in children])


def _fill(node: PyTree, own: bool) -> PyTree:
    return jax.tree.map(lambda _: own, node)


def _contains_ours(node: PyTree) -> bool:
    kinds = (AggregateState, WorkerState, ServerState)
    nodes = jax.tree.leaves(node, is_leaf=lambda x: isinstance(x, kinds))
    return any(isinstance(x, kinds) for x in nodes)
