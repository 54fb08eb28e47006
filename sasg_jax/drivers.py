"""Drivers: one worker's round for all workers, simulated or on devices of their own.

Each is a function of a worker's round, and of a state in which a worker's own parts have a leading
axis over workers.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sasg_jax._checks import expected
from sasg_jax.control_flow import add_rows, refuse_collectives, same_on_all, zero_after
from sasg_jax.directions import Direction
from sasg_jax.states import ServerState, diagnostics
from sasg_jax.train_state import (
    INFO_OWNERS,
    RoundInfo,
    TrainState,
    evaluate,
    keep_if,
    mean_loss,
    owners,
)
from sasg_jax.transform import Transformation, check_present, join_simulated

PyTree = Any
WorkerRound = Callable[[TrainState, PyTree, Any], tuple[TrainState, RoundInfo]]
"""``state, info = worker_round(state, batch, present)``, one worker's view."""


def simulate(
    worker_round: WorkerRound,
    state: TrainState,
    batch: PyTree,
    present: jax.Array | None,
    *,
    num_workers: int,
    axis_name: str,
) -> tuple[TrainState, RoundInfo]:
    """All workers at once on one device, by ``jax.vmap``.

    Raises:
      ValueError: a part of the new state that is the same on all workers depends on the worker.
    """
    own = owners(state)

    def checked(state, batch, present):
        state, info = worker_round(state, batch, present)
        return map_shared(same_on_all, own, state), info

    axes = choose(own, 0, None)
    return jax.vmap(
        checked,
        in_axes=(axes, 0, None),
        out_axes=(axes, choose(INFO_OWNERS, 0, None)),
        axis_name=axis_name,
        axis_size=num_workers,
    )(state, batch, present)


def on_mesh(
    worker_round: WorkerRound,
    state: TrainState,
    batch: PyTree,
    present: jax.Array | None,
    *,
    mesh: Mesh,
) -> tuple[TrainState, RoundInfo]:
    """Each worker on a device of its own, by ``jax.shard_map``."""
    (axis_name,) = mesh.axis_names
    own = owners(state)

    def on_one_device(state, batch, present):
        # shard_map hands each worker a block with a leading axis of 1.
        state = map_own(lambda x: x[0], own, state)
        state, info = worker_round(state, jax.tree.map(lambda x: x[0], batch), present)
        expand = lambda x: x[None]
        return map_own(expand, own, state), map_own(expand, INFO_OWNERS, info)

    split, shared = PartitionSpec(axis_name), PartitionSpec()
    specs = choose(own, split, shared)
    return jax.shard_map(
        on_one_device,
        mesh=mesh,
        in_specs=(specs, split, shared),
        out_specs=(specs, choose(INFO_OWNERS, split, shared)),
        check_vma=False,
    )(state, batch, present)


def on_devices(
    worker_round: WorkerRound,
    state: TrainState,
    *,
    devices: Sequence[Any],
    axis_name: str,
    donate: bool,
) -> Callable[..., tuple[TrainState, RoundInfo]]:
    """As :func:`on_mesh` by ``jax.pmap``, which compiles by itself: for states like ``state``."""
    axes = choose(owners(state), 0, None)
    return jax.pmap(
        worker_round,
        axis_name=axis_name,
        in_axes=(axes, 0, None),
        out_axes=(axes, choose(INFO_OWNERS, 0, None)),
        donate_argnums=(0,) if donate else (),
        devices=devices,
    )


def simulate_in_chunks(
    direction: Direction,
    tx: optax.GradientTransformationExtraArgs,
    state: TrainState,
    batch: PyTree,
    present: jax.Array | None,
    *,
    num_workers: int,
    chunk_size: int,
    axis_name: str,
    pass_value: bool = False,
) -> tuple[TrainState, RoundInfo]:
    """All workers on one device, ``chunk_size`` at a time and the rest in the end.

    Only the gradients of a chunk are in memory: the workers' states stay where they are, and are
    read and written a chunk at a time. Then the server's half is made once.

    Raises:
      ValueError: the halves of ``tx`` cannot be run apart.
    """
    check_chunks(tx, chunk_size)
    assert isinstance(tx, Transformation)
    present = check_present(present, num_workers)
    evaluate_alone = refuse_collectives(direction.evaluate, axis_name)
    direction = dataclasses.replace(direction, evaluate=evaluate_alone)
    method, own_parts = tx.method, owners(state)
    to_one = map_own(lambda x: x[0], own_parts, state)
    own = keep_own_parts(own_parts, state)

    def one_worker(own, batch, index):
        state = fill_own_parts(own_parts, own, to_one)
        made, grad_fn = evaluate(direction, tx, state, batch)
        mine = True if present is None else present[index]
        opt_state, post = tx.worker_part(
            made.direction, state.opt_state, state.params, index, mine, grad_fn
        )
        info = RoundInfo(made.loss, *diagnostics(opt_state), made.aux)
        kept = keep_if(tx.find_ours(opt_state).worker.used, made, state)
        new_state = TrainState(params=state.params, opt_state=opt_state, **kept)
        return keep_own_parts(own_parts, new_state), info._replace(threshold=()), post.message

    def chunk(own, batch, indices):
        return jax.vmap(one_worker, axis_name=axis_name)(own, batch, indices)

    size = min(chunk_size, num_workers)
    workers = own, batch, jnp.arange(num_workers)
    part = lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype)
    _, infos, messages = jax.eval_shape(chunk, *jax.tree.map(part, workers))

    def rows(shape):
        return jnp.zeros((num_workers, *shape.shape[1:]), shape.dtype)

    # Messages that add up are added as they come.
    sums = method.exchange.sums
    collected = jax.tree.map(
        lambda s: (
            jnp.zeros(s.shape[1:], jnp.promote_types(s.dtype, jnp.float32)) if sums else rows(s)
        ),
        messages,
    )

    def run(carried, start, size):
        own, infos, collected = carried

        def read(x):
            return lax.dynamic_slice_in_dim(x, start, size)

        def write(rows, part):
            return lax.dynamic_update_slice_in_dim(rows, part, start, axis=0)

        new_own, info, message = chunk(*jax.tree.map(read, (own, *workers[1:])))
        if sums:
            add = lambda total, rows: add_rows(total, rows.astype(total.dtype))
            collected = jax.tree.map(add, collected, message)
        else:
            collected = jax.tree.map(write, collected, message)
        own, infos = jax.tree.map(write, (own, infos), (new_own, info))
        return own, infos, collected

    carried = own, jax.tree.map(rows, infos), collected
    chunks, rest = divmod(num_workers, size)
    carried = lax.fori_loop(0, chunks, lambda i, carried: run(carried, i * size, size), carried)
    if rest:
        carried = run(carried, chunks * size, rest)
    own, infos, collected = carried
    if sums:
        collected = jax.tree.map(lambda x: x[None], collected)

    opt_state = fill_own_parts(own_parts, own, to_one).opt_state  # its server's parts are right
    params = state.params
    # Otherwise the compiler may write the rule's memory before the last worker has read it, and
    # copies it all to be on the safe side.
    zero = zero_after(infos.loss)
    opt_state = jax.tree.map(
        lambda node: node._replace(round=node.round + zero) if _is_server(node) else node,
        opt_state,
        is_leaf=_is_server,
    )
    kept, down = join_simulated(
        method, tx.find_ours(opt_state).server, collected, infos.uploaded, present, params
    )
    there = True if present is None else present
    value = mean_loss(infos.loss, there, lambda tree: jax.tree.map(jnp.sum, tree))
    extra = {"value": value} if pass_value else {}
    updates, opt_state = tx.server_part(opt_state, kept, down, params, extra)
    ours = tx.find_ours(opt_state)
    new_state = TrainState(
        optax.apply_updates(params, updates), opt_state, to_one.model_state, to_one.keys
    )
    infos = infos._replace(
        threshold=ours.server.threshold, finite=infos.finite & ours.server.finite
    )
    return fill_own_parts(own_parts, own, new_state), infos


def _is_server(node: PyTree) -> bool:
    return isinstance(node, ServerState)


def check_chunks(tx: Any, chunk_size: int) -> None:
    """Raises ValueError where a round of ``tx`` cannot be made in chunks."""
    if not isinstance(tx, Transformation):
        raise expected(
            "chunk_size",
            chunk_size,
            "only for a transformation of sasg_jax whose halves can be run apart: put what stands "
            "around it into sasg_jax.pipeline in place of optax.chain",
        )
    if tx.method.exchange.sharded or tx.method.compressor.compress_mean is not None:
        raise expected(
            "chunk_size",
            chunk_size,
            "to be None where every worker is a server too (exchange='sharded'), and where the "
            "compressor takes means over all workers",
        )


# Parts by owner -----------------------------------------------------------------------------------


def choose(own_parts: PyTree, own: Any, shared: Any) -> PyTree:
    """``own`` for what belongs to one worker, else ``shared``."""
    return jax.tree.map(lambda is_own: own if is_own else shared, own_parts)


def map_own(fn: Callable[[jax.Array], Any], own_parts: PyTree, tree: PyTree) -> Any:
    """Applies ``fn`` to the arrays that belong to one worker."""
    return jax.tree.map(
        lambda is_own, part: jax.tree.map(fn, part) if is_own else part, own_parts, tree
    )


def map_shared(fn: Callable[[PyTree], PyTree], own_parts: PyTree, tree: PyTree) -> Any:
    """Applies ``fn`` to the parts that are the same on all workers."""
    return jax.tree.map(lambda is_own, part: part if is_own else fn(part), own_parts, tree)


def keep_own_parts(own_parts: PyTree, tree: PyTree) -> PyTree:
    """The parts that belong to one worker, and ``()`` in place of the others."""
    return jax.tree.map(lambda is_own, part: part if is_own else (), own_parts, tree)


def fill_own_parts(own_parts: PyTree, own: PyTree, tree: PyTree) -> Any:
    """Puts the parts that belong to one worker into a tree."""
    return jax.tree.map(lambda is_own, mine, part: mine if is_own else part, own_parts, own, tree)


def shardings(state: TrainState, mesh: Mesh) -> PyTree:
    """Where each array of a state lies when every worker has a device of its own."""
    (axis_name,) = mesh.axis_names
    split = NamedSharding(mesh, PartitionSpec(axis_name))
    shared = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(
        lambda is_own, part: jax.tree.map(lambda _: split if is_own else shared, part),
        owners(state),
        state,
    )


def mesh_of(devices: Sequence[Any], axis_name: str) -> Mesh:
    """One axis over workers."""
    return Mesh(np.asarray(devices), (axis_name,))
