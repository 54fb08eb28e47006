"""A run goes on with another number of workers: who leaves hands over, and who joins begins."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from sasg_jax._checks import check_int, check_like, require
from sasg_jax.feedback import (
    AveragedReconstruction,
    MomentumResidual,
    Reconstruction,
    Residual,
)
from sasg_jax.numerics import PyTree
from sasg_jax.state_axes import for_each_worker, per_worker, stack_workers
from sasg_jax.states import (
    NEVER,
    AggregateState,
    ServerState,
    WorkerState,
    check_made_for,
    find_state,
)
from sasg_jax.train_state import TrainState

_HOLDS_BACK = Residual, MomentumResidual
_RECONSTRUCTS = Reconstruction, AveragedReconstruction


class _Change(NamedTuple):
    """Who goes on, by old numbers."""

    old: int  # M
    new: int  # M'
    stay: list[int]  # in their new order; after them come those who join
    leave: list[int]

    @property
    def joining(self) -> int:
        return self.new - len(self.stay)


def resize(
    state: TrainState,
    tx: optax.GradientTransformation,
    *,
    num_workers: int,
    stay: Sequence[int] | None = None,
) -> TrainState:
    r"""The state with which a run goes on when workers come and go, between two rounds.

    Args:
      state: of M workers, of any driver. In a loop of one's own, ``TrainState(params, opt_state)``
        with the state of :func:`sasg_jax.stack_workers`. It is left as it is.
      tx: the optimiser that goes on, made for the new number of workers, M', and else like the old
        one; learning rates and weights of rules may differ.
      num_workers: M', at least 1, and that of ``tx``.
      stay: the old numbers of the workers that go on, which become workers 0, 1, ... in this order;
        by default the first min(M, M'). Others leave, and as many as are missing join.

    Returns:
      The state of M' workers for a step made with ``tx``, in arrays of NumPy, as of a checkpoint;
      PRNG keys are arrays of JAX.

    Guarantees:
      - With M' = M and the same workers in the same order, all arrays have the same bits.
      - Residuals of those who leave are shared out equally over those who stay. Their sum is kept,
        entry by entry, but for half a unit in the last place of one worker's entry: 6e-8 of it in
        float32, 5e-4 in float16, 4e-3 in bfloat16.
      - With :func:`sasg_jax.reconstruction`, the server's sum is that over the present workers.
      - What all share goes on: parameters, the round, the rule's history, the server's residual,
        what stands after ours.

    The sum is kept, not the mean: what a worker holds back is its own gradients, and each counts in
    the round in which it is sent like those that are made then, 1/M' in place of 1/M. (To keep the
    mean, multiply the residuals by M'/M.)

    Who joins has no residual and no last message, and uploads in the first round in which it takes
    part, whatever the rule says. What is a model's, a direction's or before ours starts at the mean
    over the old workers, as in :func:`sasg_jax.mean_model_state`: so the inner AdamW of local steps
    has moments that fit its count, and its schedule goes on. Keys are new ones that no old worker
    has. Of a momentum in front of a residual who leaves hands over what it holds back, and no
    velocity. A compressor's memory is as before the first message, or where means in the middle
    make it the same on all, that.

    Past steps weigh in the threshold of rule (6) what they did when they were made, with 1/M²; that
    of the last round, which is measured in the next one, is taken with 1/M'².

    With the exchange ``"server"``, old worker 0's copy of the server's state counts, also if it
    leaves. With ``"sharded"``, the server's residual and sum are cut anew. Where M' is not M, what
    is about shards and not about entries starts anew: the memories of compressors, the rule of the
    way down, and last messages, so that all workers upload in the next round.

    Over several processes all must call it, with the old devices still there.

    ValueError for a state that was not made by such an optimiser, for feedback of one's own, or an
    argument out of range."""
    num_workers = check_int("num_workers", num_workers, minimum=1)
    old = find_state(state.opt_state).wire
    change = _plan(old.num_workers, num_workers, stay)
    own = TrainState(False, per_worker(state.opt_state), *(True,) * 3)
    rows = jax.tree.map(lambda o, part: jax.tree.map(lambda _: o, part), own, state)
    _check_rows(state, rows, change.old)
    state = jax.tree.map(_on_host, state)
    fresh = jax.tree.map(_on_host, tx.init(state.params))
    new = find_state(fresh).wire
    allowed = f"to be that of tx, {new.num_workers}"
    require(new.num_workers == num_workers, "num_workers", num_workers, allowed)
    check_made_for(new.method, old, but="num_workers")
    _check_structure(state.opt_state, fresh)

    def part(is_own, x, fresh):
        if isinstance(x, AggregateState):
            return AggregateState(_workers(change, x, fresh), _server(change, x, fresh), fresh.wire)
        return _like_the_mean(change, x) if is_own else x

    going_on = TrainState(
        state.params,
        jax.tree.map(part, own.opt_state, state.opt_state, fresh, is_leaf=_is_ours),
        _like_the_mean(change, state.model_state),
        _keys(change, state.keys),
        _like_the_mean(change, state.direction),
    )
    shapes = jax.eval_shape(lambda fresh: stack_workers(fresh, num_workers), fresh)
    check_like("state.opt_state", going_on.opt_state, shapes, "that of tx")
    return going_on


# Of the workers -----------------------------------------------------------------------------------


def _workers(change: _Change, old: AggregateState, fresh: AggregateState) -> WorkerState:
    """Ours on the workers; ``fresh`` is of one that has not begun."""
    start = lambda x, one: jax.tree.map(lambda x, row: _join(change, x, row), x, one)
    worker, one, wire = old.worker, fresh.worker, fresh.wire
    feedback, memory = worker.feedback, worker.compressor_memory
    if isinstance(feedback, _HOLDS_BACK):
        shared_out = jax.tree.map(lambda x: _hand_over(change, x), feedback.residual)
        feedback = feedback._replace(residual=shared_out)
    if _cuts_anew(change, fresh):  # it is a memory for each shard
        memory = jax.tree.map(lambda x: _copies(change.new, x), one.compressor_memory)
    else:
        first = jax.tree.map(lambda x: x[change.stay[0]], memory)
        memory = start(memory, first if wire.shares_memory else one.compressor_memory)
    must_upload = np.asarray(wire.max_staleness or NEVER, np.int32)
    staleness = _join(change, worker.staleness, must_upload)
    if _has_messages(old) and _cuts_anew(change, fresh):
        staleness = _copies(change.new, must_upload)
    rest = worker._replace(feedback=(), compressor_memory=(), staleness=())
    return start(rest, one._replace(feedback=(), compressor_memory=(), staleness=()))._replace(
        feedback=start(feedback, one.feedback), compressor_memory=memory, staleness=staleness
    )


def _hand_over(change: _Change, residual: np.ndarray) -> np.ndarray:
    """The workers' residuals, with what others who leave have held back."""
    if not change.leave:
        return residual  # -0.0 + 0 would be 0.0
    residual, most = residual.copy(), float(jnp.finfo(residual.dtype).max)
    gone = residual[change.leave].astype(np.float64).sum(0)
    share, rounded = gone / len(change.stay), np.zeros_like(gone)
    for worker in change.stay:
        # What one worker's entry cannot hold the next takes over.
        wanted = residual[worker].astype(np.float64) + share + rounded
        residual[worker] = np.clip(wanted, -most, most).astype(residual.dtype)
        rounded = wanted - residual[worker].astype(np.float64)
    return residual


def _join(change: _Change, x: Any, row: Any) -> Any:
    """``x`` (leading axis M) of those who stay, and ``row`` for each who joins, or a new key."""
    if _is_key(x):
        return jnp.concatenate([x[np.asarray(change.stay)], _new_keys(x, change.joining)])
    rows = np.broadcast_to(np.asarray(row, x.dtype), (change.joining, *x.shape[1:]))
    return np.concatenate([x[change.stay], rows])


def _like_the_mean(change: _Change, tree: PyTree) -> PyTree:
    """A worker's own, where one who joins starts as :func:`sasg_jax.mean_model_state` has it."""

    def mean(x):
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return x[0]
        return x.astype(np.promote_types(x.dtype, np.float64)).mean(0)

    return jax.tree.map(lambda x: _join(change, x, mean(x)), tree)


_JOINS = 0xFFFF_FFFE  # no round's number: the key of worker 0 folded by those is in use


def _new_keys(keys: jax.Array, count: int) -> jax.Array:
    """``count`` keys that follow from worker 0's and are none of ``keys``."""
    fold = jax.vmap(lambda key: jax.random.fold_in(key, np.uint32(_JOINS)))
    first = fold(keys[0].ravel()).reshape(keys[0].shape)
    found = for_each_worker(len(keys) + count)(first)  # of which some may have joined before
    data = lambda keys: [row.tobytes() for row in np.asarray(jax.random.key_data(keys))]
    known = set(data(keys))
    new = [i for i, row in enumerate(data(found)) if row not in known]
    return found[np.asarray(new[:count], int)]


def _keys(change: _Change, keys: PyTree) -> PyTree:
    """Of a train step, which may have them as integers."""
    if isinstance(keys, tuple) or _is_key(keys):
        return jax.tree.map(lambda x: _join(change, x, None), keys)
    typed = jax.random.wrap_key_data(keys)
    return np.asarray(jax.random.key_data(_join(change, typed, None)))


# Of the server ------------------------------------------------------------------------------------


def _server(change: _Change, old: AggregateState, fresh: AggregateState) -> ServerState:
    """The server's part of ours, with a leading axis over shards where there are some."""
    server, one = old.server, fresh.server
    is_sharded, anew = fresh.wire.exchange_object.sharded, _cuts_anew(change, fresh)
    memory = server.memory
    if isinstance(old.worker.feedback, _RECONSTRUCTS):
        without = lambda total, h: _without(change, total, h)
        memory = jax.tree.map(without, memory, old.worker.feedback.reconstruction)
    elif is_sharded:
        rows = lambda x, zeros: np.stack([_join(change, shard, zeros[0]) for shard in x])
        memory = memory if anew else jax.tree.map(rows, memory, one.memory)
    else:
        memory = jax.tree.map(lambda x, zeros: _join(change, x, zeros[0]), memory, one.memory)
    if not anew:
        return server._replace(memory=memory)
    begun = lambda tree: jax.tree.map(lambda x: _copies(change.new, x), tree)
    cut = lambda x, shard: _lay_out(x, (change.new, *shard.shape))
    of_entries = lambda x, shards: jax.tree.map(cut, x, shards)
    return server._replace(
        memory=begun(one.memory) if _has_messages(old) else of_entries(memory, one.memory),
        downlink_feedback=of_entries(server.downlink_feedback, one.downlink_feedback),
        downlink_memory=begun(one.downlink_memory),
        downlink_rule=begun(one.downlink_rule),
    )


def _without(change: _Change, total: np.ndarray, reconstructions: np.ndarray) -> np.ndarray:
    """The sum over workers, whole or in shards, without those who leave."""
    if not change.leave:
        return total
    gone = reconstructions[change.leave].astype(np.float64).sum(0)
    return (total.astype(np.float64) - _lay_out(gone, total.shape)).astype(total.dtype)


def _lay_out(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The entries in another shape, in their order; what pads shards at the end is of no use."""
    x, size = x.reshape(-1), math.prod(shape)
    return np.pad(x[:size], (0, max(0, size - x.size))).reshape(shape)


def _cuts_anew(change: _Change, fresh: AggregateState) -> bool:
    return fresh.wire.exchange_object.sharded and change.new != change.old


def _has_messages(ours: AggregateState) -> bool:
    """Whether the server's memory is of last messages."""
    is_sum = isinstance(ours.worker.feedback, _RECONSTRUCTS)
    return not is_sum and bool(jax.tree.leaves(ours.server.memory))


# Arrays -------------------------------------------------------------------------------------------


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _copies(count: int, x: Any) -> Any:
    copies = for_each_worker(count)(x)
    return copies if _is_key(x) else np.array(copies)


def _on_host(x: Any) -> Any:
    """A copy in this process, which no donation touches; of what each device has, worker 0's."""
    if not isinstance(x, jax.Array):
        return np.array(x)
    if _is_key(x):
        data = _on_host(jax.random.key_data(x))
        return jax.random.wrap_key_data(jnp.asarray(data), impl=jax.random.key_impl(x))
    if not x.is_fully_replicated:
        is_here = x.is_fully_addressable
        return np.array(x if is_here else multihost_utils.process_allgather(x, tiled=True))
    # The server's state differs where only worker 0 keeps it up.
    mesh: Any = getattr(x.sharding, "mesh", None)
    is_on_mesh = isinstance(mesh, Mesh)
    first = mesh.devices.flat[0] if is_on_mesh else min(x.devices(), key=lambda device: device.id)
    copies = {shard.device: shard.data for shard in x.addressable_shards}
    value = np.array(copies.get(first, x.addressable_shards[0].data))
    if x.is_fully_addressable:
        return value
    return np.array(multihost_utils.broadcast_one_to_all(value, is_source=first in copies))


# Checks -------------------------------------------------------------------------------------------


def _plan(old: int, new: int, stay: Any) -> _Change:
    require(stay is None or np.iterable(stay), "stay", stay, "to be a sequence of workers, or None")
    numbers = list(range(min(old, new)) if stay is None else stay)
    numbers = [check_int(f"stay[{i}]", number, minimum=0) for i, number in enumerate(numbers)]
    distinct = 0 < len(set(numbers)) == len(numbers) <= new and max(numbers) < old
    allowed = f"to be at least 1 and at most num_workers={new} different numbers below {old}"
    require(distinct, "stay", numbers, allowed)
    return _Change(old, new, numbers, sorted(set(range(old)) - set(numbers)))


def _check_rows(state: TrainState, rows: PyTree, num_workers: int) -> None:
    """A worker's own parts have an axis over workers; and ours is known how to hand over."""
    for (path, x), own in zip(
        jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(rows), strict=True
    ):
        if own and jnp.shape(x)[:1] != (num_workers,):
            why = f"Expected state{jax.tree_util.keystr(path)} to have a leading axis of "
            raise ValueError(why + f"{num_workers} workers, got shape {jnp.shape(x)}.")
    feedback = find_state(state.opt_state).worker.feedback
    known = isinstance(feedback, _HOLDS_BACK + _RECONSTRUCTS) or not jax.tree.leaves(feedback)
    allowed = "to be that of sasg_jax.residual, reconstruction or none, which is known how to share"
    require(known, "feedback of type", type(feedback).__name__, allowed)


def _check_structure(opt_state: PyTree, fresh: PyTree) -> None:
    """But for what was made for another number of workers."""
    wire = find_state(fresh).wire
    same_wire = lambda x: x._replace(wire=wire) if _is_ours(x) else x
    got = jax.tree.structure(jax.tree.map(same_wire, opt_state, is_leaf=_is_ours))
    if got != (want := jax.tree.structure(fresh)):
        why = "Expected a state that this optimiser has made, got one of another structure.\n"
        raise ValueError(why + f"  state.opt_state: {got}\n  tx.init(params): {want}")
    # The compressor's memory may be of shards, of another number.
    old, new = (find_state(x).worker._replace(compressor_memory=()) for x in (opt_state, fresh))
    check_like("state.opt_state.worker", jax.tree.map(lambda x: x[0], old), new, "that of tx")


_is_ours = lambda node: isinstance(node, AggregateState)
