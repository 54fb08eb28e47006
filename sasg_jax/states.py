"""What is carried from round to round, split by who owns it, and how to find it again."""

import dataclasses
import sys
from typing import Any, NamedTuple

import jax

from sasg_jax.exchanges import EXCHANGES, Exchange
from sasg_jax.numerics import PyTree

NEVER = 2**30
"""The staleness of a worker that has joined a run whose rule has no bound: at it, one uploads."""


class WorkerState(NamedTuple):
    """What one worker carries from round to round. Differs between workers."""

    feedback: PyTree  # of sasg_jax.feedback, e.g. Residual(residual)
    compressor_memory: PyTree  # of Compressor.init_memory, mostly without arrays
    rule: PyTree  # of Rule.init_worker, mostly without arrays
    staleness: jax.Array  # rounds since the last upload, τ = t - s. shape=(), dtype=jnp.int32
    uploaded: jax.Array  # in the last round. shape=(), dtype=jnp.bool_
    used: jax.Array  # whether its last direction was sent or kept. shape=(), dtype=jnp.bool_
    finite: jax.Array  # whether nothing was refused in the last round. shape=(), dtype=jnp.bool_
    innovation: jax.Array  # what the rule measured last. shape=(), dtype=jnp.float32


class DownlinkRule(NamedTuple):
    """What the rule of the way down keeps, for which the server is the one worker."""

    memory: PyTree  # of Rule.init_worker
    shared: PyTree  # of Rule.init_shared
    staleness: jax.Array  # rounds since a step was sent. shape=(), dtype=jnp.int32


class ServerState(NamedTuple):
    """What the server carries from round to round, the same on all workers. But ``memory``,
    ``downlink_feedback``, ``downlink_memory`` and ``downlink_rule`` are where the exchange has the
    server: with ``"sharded"`` each worker has those of its own shard, and with ``"server"`` only
    those of worker 0 are kept up."""

    memory: PyTree  # last messages, leading axis M; or the sum of reconstructions; mostly ()
    downlink_feedback: PyTree  # as WorkerState.feedback; () for a dense way down
    downlink_memory: PyTree  # of Compressor.init_memory, mostly without arrays
    downlink_rule: PyTree  # DownlinkRule; () where a step is sent in every round
    rule: PyTree  # of Rule.init_shared, e.g. StepHistory
    finite: jax.Array  # whether the last step was. shape=(), dtype=jnp.bool_
    sent_down: jax.Array  # whether it was sent at once. shape=(), dtype=jnp.bool_
    threshold: jax.Array  # of the last round. shape=(), dtype=jnp.float32
    round: jax.Array  # rounds made, t. shape=(), dtype=jnp.int32


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Wire:
    """What crosses between workers and server in a round, known before the first one: static, and
    in the state so that a ledger can be made from any optimiser state."""

    num_workers: int
    upload_bytes: int  # one worker's message: values and indices
    upload_paper_bits: int  # 32 bits for every value of it and nothing else: the paper's Table II
    flag_bytes: int  # to say whether a worker uploads, each and every round; 0 where all know
    downlink_bytes: int  # what the server sends one worker in a round; 0 where it forwards uploads
    moved_upload_bytes: int  # what the exchange makes of one message
    moved_downlink_bytes: int  # what the exchange makes of one step
    max_staleness: int  # rounds after which a rule that looks at something forces an upload; or 0
    downlink_flag_bytes: int  # to say whether the server sends a step; 0 where it always does
    exchange: str
    method: tuple[tuple[str, str], ...] = ()  # the parts of the method that the state is made for
    shares_memory: bool = False  # whether the compressor's memory is the same on all workers
    custom_exchange: Exchange | None = None  # where it is none of sasg_jax.exchanges.EXCHANGES

    @property
    def exchange_object(self) -> Exchange:
        return self.custom_exchange or EXCHANGES[self.exchange]


class AggregateState(NamedTuple):
    """State of :func:`sasg_jax.aggregate` and of the complete optimisers."""

    worker: WorkerState
    server: ServerState
    wire: Wire


class PipelineState(NamedTuple):
    """State of :func:`sasg_jax.pipeline`: three parts with three owners."""

    before: PyTree  # each worker's own
    aggregate: AggregateState
    after: PyTree  # the same on all workers


class Diagnostics(NamedTuple):
    """What happened in the last round. In a state with stacked workers, all but the last two have
    a leading axis M."""

    uploaded: jax.Array  # shape=(), dtype=jnp.bool_
    finite: jax.Array  # whether nothing was refused. shape=(), dtype=jnp.bool_
    staleness: jax.Array  # after the round, 1 = just uploaded. shape=(), dtype=jnp.int32
    innovation: jax.Array  # what the rule measured, ‖g - g'‖² for (6), or 0. dtype=jnp.float32
    threshold: jax.Array  # with what it was compared. shape=(), dtype=jnp.float32
    sent_down: jax.Array  # whether the server sent a step. shape=(), dtype=jnp.bool_


def diagnostics(opt_state: PyTree) -> Diagnostics:
    """Reads what happened in the last round from any optax state that contains ours, once; raises
    ValueError from others."""
    worker, server, _ = find_state(opt_state)
    finite = worker.finite & server.finite
    report = worker.uploaded, finite, worker.staleness, worker.innovation
    return Diagnostics(*report, server.threshold, server.sent_down)


def find_state(opt_state: PyTree) -> AggregateState:
    """The one :class:`AggregateState` inside an optax state; ValueError unless there is one."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, AggregateState))
    found = [node for node in nodes if isinstance(node, AggregateState)]
    if len(found) != 1:
        why = "Expected the optimiser state to contain exactly one state of sasg_jax (made by "
        why += f"sasg_jax.sasg, aggregate, ...), found {len(found)}. One transformation serves the "
        raise ValueError(why + "whole tree: put optax.partition and the like after it.")
    return found[0]


def check_made_for(settings: Any, wire: Wire, *, but: str | None = None) -> None:
    """Raises ValueError for a state of another method than that of ``settings``, ``but`` for one of
    them that may differ."""
    made_for = dict(wire.method)
    for name, value in settings:
        if name != but and made_for.get(name) != value:
            why = f"Expected a state that this optimiser has made: it has {name}={value}, and the "
            why += f"state is of one with {name}={made_for.get(name)}. Make a state with tx.init."
            raise ValueError(why)


def register_with_flax() -> None:
    """Lets flax, where it has been imported, save a state, whose static part it would not know."""
    if serialization := sys.modules.get("flax.serialization"):
        to_dict, from_dict = lambda wire: {}, lambda wire, saved: wire
        serialization.register_serialization_state(Wire, to_dict, from_dict, override=True)
