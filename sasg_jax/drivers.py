"""Drivers: one worker's round for all workers, simulated or on devices of their own. In the state
that they take, a worker's own parts have a leading axis over workers.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sasg_jax._checks import expected, require
from sasg_jax.control_flow import add_rows, refuse_collectives, same_on_all, zero_after
from sasg_jax.directions import Direction
from sasg_jax.numerics import PyTree, wide
from sasg_jax.server import serve
from sasg_jax.state_axes import per_worker
from sasg_jax.states import ServerState, diagnostics
from sasg_jax.train_state import RoundInfo, TrainState, evaluate, keep_if, mean_loss
from sasg_jax.transform import Transformation, check_present

WorkerRound = Callable[[TrainState, PyTree, Any], tuple[TrainState, RoundInfo]]
"""``state, info = worker_round(state, batch, present)``, one worker's view."""


def simulate(worker_round: WorkerRound, state, batch, present, *, num_workers, axis_name):
    """All workers at once on one device, by ``jax.vmap``; ValueError where a part of the new state
    that is the same on all workers depends on the worker."""
    own = owners(state)

    def checked(state, batch, present):
        state, info = worker_round(state, batch, present)
        same = lambda x: same_on_all(lax.axis_index(axis_name), x)
        return jax.tree.map(lambda o, x: x if o else same(x), own, state), info

    axes = {"axis_name": axis_name, "axis_size": num_workers, **_split("axes", own, 0, None)}
    return jax.vmap(checked, **axes)(state, batch, present)


def on_mesh(worker_round: WorkerRound, state, batch, present, *, mesh: Mesh):
    """Each worker on a device of its own, by ``jax.shard_map``."""
    own, (axis_name,) = owners(state), mesh.axis_names

    def on_one_device(state, batch, present):
        # shard_map hands each worker a block with a leading axis of 1.
        first, expand = lambda x: x[0], lambda x: jnp.asarray(x)[None]
        state = map_own(first, own, state)
        state, info = worker_round(state, jax.tree.map(first, batch), present)
        return map_own(expand, own, state), map_own(expand, INFO_OWNERS, info)

    specs = _split("specs", own, PartitionSpec(axis_name), PartitionSpec())
    over = jax.shard_map(on_one_device, mesh=mesh, check_vma=False, **specs)
    return over(state, batch, present)


def on_devices(worker_round: WorkerRound, state, *, devices, axis_name: str, donate: bool):
    """As :func:`on_mesh` by ``jax.pmap``, which compiles by itself: for states like ``state``."""
    axes = {"axis_name": axis_name, "devices": devices, **_split("axes", owners(state), 0, None)}
    return jax.pmap(worker_round, donate_argnums=(0,) if donate else (), **axes)


def simulate_in_chunks(
    direction: Direction, tx: Any, state, batch, present, *, chunk_size, axis_name, pass_value=False
) -> tuple[TrainState, RoundInfo]:
    """All workers on one device, ``chunk_size`` at a time and the rest in the end: only a chunk's
    gradients are in memory, and the workers' states are read and written a chunk at a time. Then
    the server's half is made once. ValueError where the halves of ``tx`` cannot be run apart."""
    check_chunks(tx, chunk_size)
    method, own_parts = tx.method, owners(state)
    num_workers = method.num_workers
    present = check_present(present, num_workers)
    alone = refuse_collectives(direction.evaluate, axis_name)
    direction = dataclasses.replace(direction, evaluate=alone)
    keep_own = lambda state: jax.tree.map(lambda o, x: x if o else (), own_parts, state)
    pick = lambda o, mine, x: mine if o else x
    fill_own = lambda own, state: jax.tree.map(pick, own_parts, own, state)
    one = map_own(lambda x: x[0], own_parts, state)  # whose shared parts are right

    def one_worker(own, batch, index):
        state = fill_own(own, one)
        mine = True if present is None else present[index]
        made, grad_fn = evaluate(direction, tx, state, batch, index, mine)
        given = made.direction, state.opt_state, state.params
        opt_state, post = tx.worker_part(*given, index, mine, grad_fn)
        info = RoundInfo(made.loss, *diagnostics(opt_state), made.aux)
        used = tx.find_ours(opt_state).worker.used
        new_state = keep_if(used, made, state)._replace(opt_state=opt_state)
        return keep_own(new_state), info._replace(threshold=(), sent_down=()), post.message

    chunk = jax.vmap(one_worker, axis_name=axis_name)
    size = min(chunk_size, num_workers)
    workers = keep_own(state), batch, jnp.arange(num_workers)
    part = lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype)
    _, infos, messages = jax.eval_shape(chunk, *jax.tree.map(part, workers))
    rows = lambda s: jnp.zeros((num_workers, *s.shape[1:]), s.dtype)
    sums = method.exchange.sums  # messages that add up are added as they come
    total = lambda s: jnp.zeros(s.shape[1:], wide(s.dtype))
    collected = jax.tree.map(total if sums else rows, messages)

    def run(carried, start, size):
        own, infos, collected = carried
        read = lambda x: lax.dynamic_slice_in_dim(x, start, size)
        write = lambda rows, part: lax.dynamic_update_slice_in_dim(rows, part, start, axis=0)
        add = lambda total, rows: add_rows(total, rows.astype(total.dtype))
        new_own, info, message = chunk(*jax.tree.map(read, (own, *workers[1:])))
        own, infos = jax.tree.map(write, (own, infos), (new_own, info))
        return own, infos, jax.tree.map(add if sums else write, collected, message)

    carried = workers[0], jax.tree.map(rows, infos), collected
    chunks, rest = divmod(num_workers, size)
    carried = lax.fori_loop(0, chunks, lambda i, carried: run(carried, i * size, size), carried)
    own, infos, collected = run(carried, chunks * size, rest) if rest else carried
    if sums:
        collected = jax.tree.map(lambda x: x[None], collected)

    # Otherwise the compiler may write the rule's memory before the last worker has read it, and
    # copies it all to be on the safe side.
    zero = zero_after(infos.loss)
    is_server = lambda node: isinstance(node, ServerState)
    later = lambda node: node._replace(round=node.round + zero) if is_server(node) else node
    opt_state = jax.tree.map(later, fill_own(own, one).opt_state, is_leaf=is_server)
    server = tx.find_ours(opt_state).server
    flags = infos.uploaded if method.tells else present
    kept, down = serve(method, server, collected, flags, state.params)
    there = True if present is None else present
    value = mean_loss(infos.loss, there, lambda tree: jax.tree.map(jnp.sum, tree))
    extra = {"value": value} if pass_value else {}
    updates, opt_state = tx.server_part(opt_state, kept, down, state.params, extra)
    server = tx.find_ours(opt_state).server
    params = optax.apply_updates(state.params, updates)
    new_state = fill_own(own, one._replace(params=params, opt_state=opt_state))
    of_server = {"threshold": server.threshold, "sent_down": server.sent_down}
    return new_state, infos._replace(finite=infos.finite & server.finite, **of_server)


def check_chunks(tx: Any, chunk_size: int) -> None:
    """Raises ValueError where a round of ``tx`` cannot be made in chunks."""
    if not isinstance(tx, Transformation):
        allowed = "only for a transformation of sasg_jax whose halves can be run apart: put what "
        allowed += "stands around it into sasg_jax.pipeline in place of optax.chain"
        raise expected("chunk_size", chunk_size, allowed)
    apart = not tx.method.exchange.sharded and tx.method.compressor.compress_mean is None
    allowed = "to be None where every worker is a server too (exchange='sharded'), and where the "
    require(apart, "chunk_size", chunk_size, allowed + "compressor takes means over all workers")


def owners(state: TrainState) -> PyTree:
    """Whether each part of the state belongs to one worker; a prefix of the state."""
    return TrainState(False, per_worker(state.opt_state), True, True, True)


# Which parts of a round's report belong to one worker.
_OF_SERVER = "threshold", "sent_down"
INFO_OWNERS: Any = RoundInfo._make(name not in _OF_SERVER for name in RoundInfo._fields)


def _split(what: str, own_parts: PyTree, own: Any, shared: Any) -> Any:
    """In and out of a round: ``own`` for what is one worker's, else ``shared``."""
    choose = lambda parts: jax.tree.map(lambda is_own: own if is_own else shared, parts)
    state, info = choose(own_parts), choose(INFO_OWNERS)
    return {f"in_{what}": (state, own, shared), f"out_{what}": (state, info)}


def map_own(fn: Callable[[jax.Array], Any], own_parts: PyTree, tree: PyTree) -> Any:
    """Applies ``fn`` to the arrays that belong to one worker."""
    return jax.tree.map(lambda o, part: jax.tree.map(fn, part) if o else part, own_parts, tree)


def shardings(state: TrainState, mesh: Mesh) -> PyTree:
    """Where each array of a state lies when every worker has a device of its own."""
    split = NamedSharding(mesh, PartitionSpec(*mesh.axis_names))
    shared = NamedSharding(mesh, PartitionSpec())
    where = lambda o, part: jax.tree.map(lambda _: split if o else shared, part)
    return jax.tree.map(where, owners(state), state)
