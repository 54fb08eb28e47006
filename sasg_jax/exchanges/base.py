"""What an exchange is: how messages get from the workers to the server, and the step back.

It moves pytrees of arrays of static shapes. Whether a worker uploads is known to all, so that all
take the same branch of a ``lax.cond`` that holds the collective: a branch not taken moves nothing.
Under ``vmap`` all messages stand in one array, and an exchange has its own expression there.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from sasg_jax.numerics import PyTree


class Links(NamedTuple):
    """Bytes that each worker's link carries, in exact Python integers. Each of length M."""

    sent: list[int]
    received: list[int]


class Traffic(NamedTuple):
    """What a run has sent, in exact Python integers."""

    upload_bytes: int  # what the exchange moves of one message
    downlink_bytes: int  # what it moves of one step
    flag_bytes: int  # what says whether a worker uploads; 0 where all know
    uploads_by_worker: Sequence[int]  # length M
    rounds_by_uploads: Sequence[int]  # entry u: rounds in which u workers uploaded. length M + 1
    steps: int  # rounds in which the server sent a step
    downlink_flag_bytes: int = 0  # what says whether it does; 0 where it always does


class Needs(NamedTuple):
    """What a method needs of its exchange."""

    always: bool  # everybody uploads in every round
    linear: bool  # messages may be added before they are decoded
    mean_inside: bool  # the compressor takes means over workers in the middle of its work
    downlink: bool  # the step is compressed
    by_sender: bool = False  # each coordinate's mean is over those that sent it


def refuse_mean_inside(needs: Needs) -> str | None:
    """Why most exchanges cannot serve a method, or None."""
    why = "to be 'psum' for a compressor that takes means over workers in the middle"
    return why if needs.mean_inside else None


def refuse_downlink(needs: Needs) -> str | None:
    """Also where no step crosses the wire."""
    why = "to be 'server' or 'sharded' for downlink=...: it sends no step to compress"
    return why if needs.downlink else refuse_mean_inside(needs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exchange:
    """How messages travel: one file of :mod:`sasg_jax.exchanges` each.

    Args:
      refuses: ``reason = refuses(needs)``: why it cannot serve a method, as errors say it, or None.
      collect: ``rows = collect(message, flags, axis_name)``: messages with a leading axis over
        workers, where the server is. The rows of silent workers mean nothing. Without flags
        everybody sends. Where ``sums``, one row: the sum of all messages.
      tell: ``flags = tell(uploaded, axis_name)``: who uploads, known to all. shape=(M,), dtype=bool
      serve: ``memory, down = serve(fn, axis_name, *operands)``: ``fn(*operands)`` at the server.
      spread: ``down = spread(down, axis_name)``: what the server sends, on every worker.
      tell_down: ``sends = tell_down(sends, axis_name)``: whether a server sends, known to all, for
        methods that let it be silent. shape=(), dtype=bool
      mean: ``mean(tree, axis_name)``: the mean over workers, for compressors that need it."""

    name: str  # in arguments and errors
    collect: Callable[[PyTree, jax.Array | None, str], PyTree]
    moved_bytes: Callable[[PyTree], int]  # of shapes: what it makes of one message or step
    links: Callable[[Traffic], Links]  # what a run moves over each worker's link, flags aside
    tell: Callable[[jax.Array, str], jax.Array]
    flag_links: Callable[[int], Links]  # of M: what one round's tell moves
    refuses: Callable[[Needs], str | None] = refuse_mean_inside
    serve: Callable[..., tuple[PyTree, PyTree]] = lambda fn, axis_name, *operands: fn(*operands)
    spread: Callable[[PyTree, str], PyTree] = lambda down, axis_name: down
    tell_down: Callable[[jax.Array, str], jax.Array] | None = None
    downlink_flag_links: Callable[[int], Links] | None = None  # of M: what one tell_down moves
    mean: Callable[..., PyTree] | None = None
    sums: bool = False  # what it collects is the sum of the messages
    sharded: bool = False  # each worker serves its own shard, and has server memory of its own
    has_root: bool = False  # worker 0 alone gets the uploads
    forwards: bool = False  # in the paper's picture the server forwards uploads, not a step

    def all_links(self, traffic: Traffic) -> Links:
        """What a run moves over each worker's link, with flags."""
        size, rounds = len(traffic.uploads_by_worker), sum(traffic.rounds_by_uploads)

        def add(links: Links, flags: Links, times: int) -> Links:
            both = lambda moved, flag: [x + times * y for x, y in zip(moved, flag, strict=True)]
            return Links(*map(both, links, flags))

        links = add(self.links(traffic), self.flag_links(size), rounds * traffic.flag_bytes)
        if not traffic.downlink_flag_bytes:
            return links
        assert self.downlink_flag_links is not None
        return add(links, self.downlink_flag_links(size), rounds * traffic.downlink_flag_bytes)


def over_workers(on_devices: Any, simulated: Any, axis_name: str, message, *operands) -> PyTree:
    """``on_devices(message, *operands)``, a worker's view, which must not close over traced values;
    or under vmap over workers ``simulated(size, message, batched)``: it gets the messages of all,
    with a leading axis where ``batched``, and its result is the same on all workers."""
    call = custom_vmap(lambda worker, operands: on_devices(*operands))

    @call.def_vmap
    def rule(size, batched, worker, operands):
        worker_batched, operands_batched = batched
        if worker_batched:
            message = jax.tree.map(jnp.asarray, operands[0])
            result = simulated(size, message, operands_batched[0])
            return result, jax.tree.map(lambda _: False, result)

        # A vmap over something else, e.g. over seeds; the axis over workers stands before it.
        def simulated_each(num_workers, message, own):
            axes = jax.tree.map(lambda x, o: int(o) if x else None, operands_batched[0], own)
            one = lambda message: simulated(num_workers, message, own)
            return jax.vmap(one, in_axes=(axes,), axis_size=size)(message)

        axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, operands_batched)
        each = jax.vmap(on_devices, in_axes=axes, axis_size=size)
        result = over_workers(each, simulated_each, axis_name, *operands)
        return result, jax.tree.map(lambda _: True, result)

    return call(jax.lax.axis_index(axis_name), (message, *operands))
