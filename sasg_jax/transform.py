"""Worker, exchange and server put together as an optax gradient transformation.

    worker (compressor, upload rule)  →  exchange  →  server (memory, way down)

:func:`aggregate` stands before any optax optimiser; :mod:`sasg_jax.algorithms` adds the learning
rate inside the compressor, as the paper has it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sasg_jax import exchange as exchange_lib
from sasg_jax import server as server_lib
from sasg_jax import upload_rules
from sasg_jax._checks import (
    check_axis_name,
    check_choice,
    check_int,
    check_like,
    check_mapped_axis,
    check_params,
    expected,
)
from sasg_jax.compressors import Compressor, compress_with_feedback, identity, top_k
from sasg_jax.recent_params import read_recent, write_recent
from sasg_jax.server import ServerState
from sasg_jax.shards import one_shard, per_shard
from sasg_jax.upload_rules import UploadRule
from sasg_jax.worker import WorkerState, init_worker, squared_distance, squared_norm, worker_round

PyTree = Any


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class WireSizes:
    """What crosses between workers and server in a round, known before the first one.

    Static: it holds Python integers and no arrays, and travels in the state so that a ledger can
    be made from any optimiser state.
    """

    num_workers: int
    upload_bytes: int
    """One worker's message: values and indices."""
    upload_paper_bits: int
    """32 bits for every value of that message and nothing else, as in the paper's Table II."""
    flag_bytes: int
    """What one worker sends in every round to say whether it uploads."""
    downlink_bytes: int
    """What the server sends one worker in every round; 0 where it forwards uploads."""
    exchange: str
    """How messages travel, one of :data:`sasg_jax.exchange.EXCHANGES`."""


class AggregateState(NamedTuple):
    """State of :func:`aggregate` and of the complete optimisers."""

    worker: WorkerState
    server: ServerState
    wire: WireSizes
    link: PyTree = ()  # between the halves of a round made in chunks, see sasg_jax.chunks; else ()


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class WorkerHalf:
    """As a state's ``link``: make the worker's half of the round and leave a :class:`Posted`."""


class Posted(NamedTuple):
    """What a worker's half of a round leaves behind."""

    message: PyTree


class ServerHalf(NamedTuple):
    """As a state's ``link``: make the server's half of the round, of these messages."""

    rows: PyTree  # leading axis M; with the exchange "psum" their sum
    uploaded: jax.Array | None  # None where all always upload. shape=(M,), dtype=jnp.bool_


class Diagnostics(NamedTuple):
    """What happened in the last round.

    The shapes are those that one worker sees; in a state with stacked workers the fields marked
    "per worker" have a leading axis M.
    """

    uploaded: jax.Array  # per worker. dtype=jnp.bool_
    finite: jax.Array  # whether the gradient was; per worker. dtype=jnp.bool_
    staleness: jax.Array  # after the round, 1 = just uploaded; per worker. dtype=jnp.int32
    innovation: jax.Array  # ‖g - g'‖², 0 in a forced round; per worker. dtype=jnp.float32
    threshold: jax.Array  # right-hand side of (6). shape=(), dtype=jnp.float32


def aggregate(
    compressor: Compressor | None = None,
    upload_rule: UploadRule | None = None,
    *,
    num_workers: int,
    downlink: Compressor | None = None,
    exchange: str = "gather",
    share_stale_params: bool = False,
    axis_name: str = "workers",
) -> optax.GradientTransformationExtraArgs:
    """Replaces each worker's gradient by the server's mean of messages, before any optimiser.

    Stands where ``lax.pmean(grads, axis_name)`` stood::

        tx = optax.chain(sasg_jax.aggregate(num_workers=8), optax.adamw(3e-4))

    With an adaptive rule it compares the parameters between rounds, so α must be a number or D
    numbers: there is no learning rate that it could be a function of.

    Args:
      compressor: what a worker sends; ``top_k(0.01)`` by default.
      upload_rule: when it sends; :func:`sasg_jax.always` by default.
      num_workers: M, the size of the axis ``axis_name``.
      downlink: compressor of the way down, e.g. ``top_k(0.01)``; None sends it dense.
      exchange: how messages travel, see :mod:`sasg_jax.exchange`: ``"gather"``, ``"lazy"``,
        ``"server"``, ``"relay"`` or ``"sharded"``; ``"psum"`` for identity with always.
      share_stale_params: whether the parameters of the last ``max_staleness`` rounds are kept once,
        in place of a copy of those of its last upload for each worker. For an adaptive rule, with
        more workers on a device than that. ``stale_grads`` cannot be used then.
      axis_name: name of the mapped axis over workers.

    Returns:
      A transformation whose ``update(grads, state, params, *, grad_fn=None, stale_grads=None)``
      runs as one worker under ``jax.vmap``, ``jax.pmap`` or ``jax.shard_map``. An adaptive rule
      needs ``grad_fn(params)``, which evaluates the gradient on the same batch with the same
      randomness, or its value at ``state.worker.stale_params`` as ``stale_grads``. The updates are
      the same on all workers.

    Raises:
      ValueError: an argument is out of its range.
    """
    return make_transform(
        top_k(0.01) if compressor is None else compressor,
        upload_rules.always() if upload_rule is None else upload_rule,
        learning_rate=None,
        num_workers=num_workers,
        downlink=downlink,
        exchange=exchange,
        share_stale_params=share_stale_params,
        axis_name=axis_name,
    )


def make_transform(
    compressor: Compressor,
    rule: UploadRule,
    *,
    learning_rate: optax.ScalarOrSchedule | None,
    num_workers: int,
    downlink: Compressor | None,
    exchange: str,
    share_stale_params: bool,
    axis_name: str,
) -> optax.GradientTransformationExtraArgs:
    """The transformation behind :func:`aggregate` and :mod:`sasg_jax.algorithms`.

    With a learning rate γ (checked by the caller) it is a complete optimiser: workers compress
    γ g + e and the update is the negative step. Without, they compress g + e and the update is the
    mean itself.
    """
    num_workers = check_int("num_workers", num_workers, minimum=1)
    check_choice("exchange", exchange, exchange_lib.EXCHANGES)
    check_axis_name(axis_name)
    for name, value, kind in (
        ("compressor", compressor, Compressor),
        ("upload_rule", rule, UploadRule),
        ("downlink", downlink, (Compressor, type(None))),
    ):
        if not isinstance(value, kind):
            raise expected(name, value, f"to be made by sasg_jax.{_MAKERS[name]}")
    if exchange == "psum" and (rule.adaptive or not compressor.lossless):
        raise expected("exchange", exchange, "only for identity compression with always uploading")
    if exchange == "relay" and downlink is not None:
        raise expected("downlink", downlink, "to be None for exchange='relay', which sends no step")
    if share_stale_params and not rule.adaptive:
        raise expected(
            "share_stale_params", share_stale_params, "to be False where all always upload"
        )
    keep_params = rule.adaptive and not share_stale_params
    down = identity() if downlink is None else downlink
    # With one server the worker compresses for it, and decodes from it, the whole tree.
    num_shards = num_workers if exchange == "sharded" else 1
    up_link, down_link = (
        (compressor, down)
        if num_shards == 1
        else (per_shard(compressor, num_shards), per_shard(down, num_shards))
    )
    complete = learning_rate is not None
    if not complete and rule.adaptive and callable(rule.alpha):
        upload_rules.weights(rule, None)  # raises: alpha needs a learning rate

    def init(params: PyTree) -> Any:
        check_params(params)
        up_size, down_size = up_link.message_size(params), down_link.message_size(params)
        return AggregateState(
            worker=init_worker(up_link, rule, params, keep_params=keep_params),
            server=server_lib.init_server(
                compressor,
                rule,
                down,
                params,
                num_workers=num_workers,
                num_shards=num_shards,
                keep_params=rule.adaptive and not complete,
                share_stale_params=share_stale_params,
            ),
            wire=WireSizes(
                num_workers=num_workers,
                upload_bytes=up_size.bytes,
                upload_paper_bits=up_size.paper_bits,
                flag_bytes=int(rule.adaptive),
                downlink_bytes=0 if exchange == "relay" else down_size.bytes,
                exchange=exchange,
            ),
        )

    def update(
        updates: PyTree,
        state: Any,
        params: PyTree | None = None,
        *,
        grad_fn: Callable[[PyTree], PyTree] | None = None,
        stale_grads: PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, Any]:
        del extra_args
        grads = updates
        if share_stale_params and stale_grads is not None:
            raise ValueError(
                "Expected grad_fn in place of stale_grads with share_stale_params=True: where the "
                "stale parameters are shared, a worker's state has none of its own."
            )
        if params is None:
            raise ValueError(
                "Expected params to be passed to update(grads, state, params), got None."
            )
        half = state.link
        if half == ():
            check_mapped_axis(axis_name, num_workers)
            _check_not_summed(grads, axis_name)
        check_like("grads", grads, params)
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
        server = state.server
        gamma = learning_rate(server.round) if callable(learning_rate) else learning_rate
        gamma = None if gamma is None else jnp.asarray(gamma)

        history, threshold = server.history, server.threshold
        if rule.adaptive:
            if not complete:
                moved = squared_distance(params, server.previous_params)
                step_weights = upload_rules.weights(rule, None)
                history = upload_rules.record_step(history, step_weights, moved, num_workers)
            threshold, history = upload_rules.take_threshold(history)

        def stale_grads_fn(stale_params):
            if share_stale_params:
                uploaded_in = server.round - state.worker.staleness
                stale_params = read_recent(server.recent_params, uploaded_in)
            return _stale_grads(stale_params, params, grad_fn, stale_grads)

        worker, message = state.worker, None
        if not isinstance(half, ServerHalf):
            worker, message = worker_round(
                up_link,
                rule,
                state.worker,
                grads,
                params,
                stale_grads_fn=stale_grads_fn,
                learning_rate=jnp.ones(()) if gamma is None else gamma,
                threshold=threshold,
                round=server.round,
                keep_params=keep_params,
            )
        if isinstance(half, WorkerHalf):
            nothing = jax.tree.map(jnp.zeros_like, params)
            return nothing, AggregateState(worker, server, state.wire, Posted(message))

        memory = server.messages, server.downlink_residual, server.downlink_memory
        like = jax.eval_shape(lambda: params) if num_shards == 1 else one_shard(params, num_shards)
        serve = functools.partial(server_lib.server_round, compressor, down, like)
        if exchange == "psum":
            is_summed = isinstance(half, ServerHalf)
            total = half.rows if is_summed else exchange_lib.psum(message, axis_name)
            step = jax.tree.map(lambda x: x / num_workers, total)
            sent, *kept = compress_with_feedback(down, step, *memory[1:])
            memory = (), *kept
        elif isinstance(half, ServerHalf):
            memory, sent = serve(memory, half.rows, half.uploaded)
        else:
            served = exchange_lib.SERVED[exchange]
            flags = served.tell(worker.uploaded, axis_name) if rule.adaptive else None
            rows = served.collect(message, flags, axis_name)
            memory, sent = served.serve(serve, axis_name, memory, rows, flags)
            sent = served.spread(sent, axis_name)
        # What is sent without loss and in one piece is the step itself.
        whole = down.lossless and num_shards == 1
        step = sent if whole else down_link.decompress(sent, params)

        if rule.adaptive and complete:
            step_weights = upload_rules.weights(rule, gamma)
            moved = squared_norm(step)
            history = upload_rules.record_step(history, step_weights, moved, num_workers)
        new_server = ServerState(
            messages=memory[0],
            history=history,
            threshold=threshold,
            round=jnp.asarray(optax.safe_increment(server.round)),
            downlink_residual=memory[1],
            downlink_memory=memory[2],
            previous_params=params if rule.adaptive and not complete else (),
            recent_params=write_recent(server.recent_params, params, server.round),
        )
        new_updates = jax.tree.map(jnp.negative, step) if complete else step
        return new_updates, AggregateState(worker, new_server, state.wire)

    return optax.GradientTransformationExtraArgs(init, update)


def diagnostics(opt_state: PyTree) -> Diagnostics:
    """Reads what happened in the last round from any optax state that contains ours.

    Raises:
      ValueError: the state does not contain exactly one :class:`AggregateState`.
    """
    state = find_state(opt_state)
    return Diagnostics(
        uploaded=state.worker.uploaded,
        finite=state.worker.finite,
        staleness=state.worker.staleness,
        innovation=state.worker.innovation,
        threshold=state.server.threshold,
    )


def find_state(opt_state: PyTree) -> AggregateState:
    """Returns the one :class:`AggregateState` inside an optax state.

    Raises:
      ValueError: there is none, or more than one.
    """
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, AggregateState))
    found = [node for node in nodes if isinstance(node, AggregateState)]
    if len(found) != 1:
        raise ValueError(
            "Expected the optimiser state to contain exactly one state of sasg_jax (made by "
            f"sasg_jax.sasg, aggregate, ...), found {len(found)}."
        )
    return found[0]


_MAKERS = {
    "compressor": "top_k or sasg_jax.identity",
    "upload_rule": "innovation or sasg_jax.always",
    "downlink": "top_k or sasg_jax.identity, or to be None",
}


def _stale_grads(stale_params, params, grad_fn, stale_grads):
    """g', on the leaves that the transformation sees."""
    if stale_grads is None:
        if grad_fn is None:
            raise TypeError(
                "update() of an adaptive upload rule needs grad_fn=..., a function of the "
                "parameters that evaluates the gradient on the same batch with the same "
                "randomness, or that gradient at the stale parameters as stale_grads=..."
            )
        stale_grads = grad_fn(stale_params)
    if _find_masked(params) and not _find_masked(stale_grads):
        # optax.masked hides leaves of params that grad_fn gives a gradient for.
        stale_grads = jax.tree.map(
            lambda p, g: p if _is_masked(p) else g, params, stale_grads, is_leaf=_is_masked
        )
    check_like("stale_grads", stale_grads, params)
    return stale_grads


def _is_masked(node: PyTree) -> bool:
    return isinstance(node, optax.MaskedNode)


def _find_masked(tree: PyTree) -> bool:
    return any(map(_is_masked, jax.tree.leaves(tree, is_leaf=_is_masked)))


def _check_not_summed(grads: PyTree, axis_name: str) -> None:
    """Raises where shard_map has already summed the gradients over workers, silently.

    With check_vma=True, the gradient with respect to replicated parameters does not vary over the
    axis: it is the sum over workers, not this worker's own.
    """

    def varies(x):
        return axis_name in jax.typeof(x).manual_axis_type.varying

    if varies(jax.lax.axis_index(axis_name)) and not all(map(varies, jax.tree.leaves(grads))):
        raise ValueError(
            "Expected grads to be this worker's own, got gradients that jax.shard_map has summed "
            f"over axis {axis_name!r}. Pass check_vma=False to jax.shard_map."
        )
