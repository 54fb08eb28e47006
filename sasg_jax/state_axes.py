"""Which parts of an optax state belong to one worker, and which are the same on all.

Of ours, a worker's is what is in :class:`sasg_jax.WorkerState`, and what the ``"sharded"`` exchange
keeps of a shard. In ``sasg_jax.pipeline``, ``optax.chain`` and ``optax.named_chain``, what stands
before ours sees each worker's own gradients and is the worker's; what stands after ours sees the
same updates everywhere. ``optax.masked`` and ``optax.inject_hyperparams`` add nothing that differs.
"""

import collections
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from sasg_jax._checks import check_int
from sasg_jax.numerics import PyTree
from sasg_jax.states import AggregateState, PipelineState, ServerState, WorkerState, find_state

MULTI_STEPS = (
    "Expected a transformation without optax.MultiSteps around it, which would exchange at every "
    "small step. Accumulate before: make_train_step(sasg_jax.gradient(loss_fn, accumulate=k), tx)."
)


def per_worker(opt_state: PyTree) -> PyTree:
    """Tells for every leaf whether it belongs to one worker: a tree of bools like ``opt_state``.
    ValueError unless that has exactly one state of ours, and nothing that cannot run under a map
    over workers: ``optax.MultiSteps``, ``optax.apply_if_finite``, ``optax.partition`` beside ours.

    >>> import jax.numpy as jnp, optax, sasg_jax
    >>> tx = optax.chain(sasg_jax.aggregate(num_workers=2), optax.trace(0.9))
    >>> ours, momentum = per_worker(tx.init(jnp.zeros(3)))
    >>> ours.worker.feedback.residual, ours.server.round, momentum.trace
    (True, False, False)
    """
    find_state(opt_state)
    return _mark(opt_state)


def worker_axes(opt_state: PyTree) -> PyTree:
    """Axes of the state for ``jax.vmap`` and ``jax.pmap``, in and out: 0 for a worker's own parts,
    else None. Raises as :func:`per_worker`."""
    return jax.tree.map(lambda own: 0 if own else None, per_worker(opt_state))


def worker_specs(opt_state: PyTree, axis_name: str = "workers") -> PyTree:
    """Partition specs of the state for ``jax.shard_map``: split over workers, or replicated. Raises
    as :func:`per_worker`."""
    split, replicated = PartitionSpec(axis_name), PartitionSpec()
    return jax.tree.map(lambda own: split if own else replicated, per_worker(opt_state))


def stack_workers(opt_state: PyTree, num_workers: int) -> PyTree:
    """Of one worker's state, as ``tx.init`` makes it, the state of all: with a leading axis of
    ``num_workers`` on a worker's own parts. Of a PRNG key in them each gets a key of its own."""
    check_int("num_workers", num_workers, minimum=1)
    copies = for_each_worker(num_workers)
    stack = lambda own, x: copies(x) if own else jnp.asarray(x)
    return jax.tree.map(stack, per_worker(opt_state), opt_state)


def for_each_worker(num_workers: int) -> Callable[[Any], jax.Array]:
    """Makes of an array a copy for each worker; of a PRNG key, a key of its own for each."""

    def copies(x):
        x = jnp.asarray(x, jnp.result_type(x))  # a weak type would change in the first round
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            fold = lambda worker: jax.vmap(lambda key: jax.random.fold_in(key, worker))(x.ravel())
            return jax.vmap(fold)(jnp.arange(num_workers)).reshape(num_workers, *x.shape)
        return jnp.broadcast_to(x, (num_workers, *x.shape))

    return copies


def keep_own(opt_state: PyTree, old: PyTree, used: jax.Array) -> PyTree:
    """Takes back what a round did to a worker's own parts around ours, unless ``used``: whether the
    worker's direction counted. ``opt_state`` and ``old`` are its states after and before."""
    is_ours = lambda node: isinstance(node, AggregateState)
    choose = lambda own, new, before: jnp.where(used, new, before) if own else new
    marks = jax.tree.map(lambda x: not is_ours(x) and x, per_worker(opt_state), is_leaf=is_ours)
    return jax.tree.map(choose, marks, opt_state, old)


def _mark(node: PyTree) -> PyTree:
    if isinstance(node, WorkerState):
        return _fill(node, True)
    if isinstance(node, AggregateState) and node.wire.exchange_object.sharded:
        # Each worker is the server of one shard, and only it has what is kept of that shard.
        names = "memory", "downlink_feedback", "downlink_memory", "downlink_rule"
        own = {name: _fill(getattr(node.server, name), True) for name in names}
        server = _fill(node.server, False)._replace(**own)
        return _mark_children(node)._replace(server=server)
    if isinstance(node, ServerState) or not _contains_ours(node):
        return _fill(node, False)
    if isinstance(node, PipelineState):
        return _mark_children(node)._replace(before=_fill(node.before, True))
    _refuse(node)
    if type(node) is tuple:  # optax.chain
        return tuple(_mark_chain(node))
    if type(node) is collections.OrderedDict:  # optax.named_chain
        marked = _mark_chain(list(node.values()))
        return collections.OrderedDict(zip(node, marked, strict=True))
    return _mark_children(node)


def _refuse(node: PyTree) -> None:
    """Raises ValueError for what cannot stand around ours."""
    if isinstance(node, optax.MultiStepsState):
        raise ValueError(MULTI_STEPS)
    if isinstance(node, optax.ApplyIfFiniteState):
        why = "Expected a transformation without optax.apply_if_finite around it: workers would "
        why += "skip different steps and wait for each other for ever. A gradient that is not "
        raise ValueError(why + "finite is refused by sasg_jax itself.")
    if isinstance(node, optax.transforms.PartitionState):
        for label, inner in node.inner_states.items():
            if not _contains_ours(inner) and jax.tree.leaves(inner):
                why = "Expected optax.partition to have no optimiser beside sasg_jax, got one for "
                why += f"label {label!r}: each worker would step there with its own gradient. Put "
                raise ValueError(why + "it after ours: pipeline(aggregate(...), partition(...)).")


def _mark_chain(nodes: Any) -> list[PyTree]:
    ours = next(i for i, child in enumerate(nodes) if _contains_ours(child))
    return [_fill(child, True) if i < ours else _mark(child) for i, child in enumerate(nodes)]


def _mark_children(node: PyTree) -> PyTree:
    children, treedef = jax.tree.flatten(node, is_leaf=lambda x: x is not node)
    return treedef.unflatten([_mark(child) for child in children])


_fill = lambda node, own: jax.tree.map(lambda _: own, node)


def _contains_ours(node: PyTree) -> bool:
    is_ours = lambda x: isinstance(x, (AggregateState, WorkerState, ServerState))
    return any(map(is_ours, jax.tree.leaves(node, is_leaf=is_ours)))
