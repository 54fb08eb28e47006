r"""How messages get from the workers to the server and back: the only module with collectives.

An exchange never looks inside a message: it moves pytrees of arrays of static shapes, packed into
one vector of words. All but ``sharded`` have the paper's mathematics and differ in who plays the
server and in what moves:

==========  ==============================  ===================================================
name        the server is                   what moves in a round
==========  ==============================  ===================================================
``server``  worker 0, the root              uploads to the root; the step from it to each worker
``relay``   every worker                    uploads to the root, which forwards them
``gather``  every worker                    all messages to all workers, if anybody uploads
``lazy``    every worker                    only uploads, to all workers
``sharded`` every worker, of 1/M            1/M of each message to each worker, if anybody
                                            uploads; each worker's part of the step to all
``psum``    nobody: no memory is needed     the sum of dense messages
==========  ==============================  ===================================================

Whether a worker uploads is known to all (one byte each), so that all take the same branch of a
``lax.cond`` that holds the collective: a branch not taken moves nothing. Under ``vmap`` the
workers' messages already stand in one array, and nothing need move: each exchange has there its own
expression of the same mathematics.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.flatten_util import ravel_pytree

from sasg_jax.control_flow import sum_rows, update_if

PyTree = Any


class Links(NamedTuple):
    """Bytes that each worker's link carries, in exact Python integers. Each of length M."""

    sent: list[int]
    received: list[int]


class Exchange(NamedTuple):
    """What the transformation needs of an exchange that has a server."""

    tell: Callable[[jax.Array, str], jax.Array]
    """``flags = tell(uploaded, axis_name)``: who uploads, known to all. shape=(M,), dtype=bool."""
    collect: Callable[[PyTree, jax.Array | None, str], PyTree]
    """``rows = collect(message, flags, axis_name)``: messages with a leading axis over workers,
    where the server is. The rows of silent workers mean nothing. Without flags everybody sends."""
    serve: Callable[..., tuple[PyTree, PyTree]]
    """``memory, down = serve(fn, axis_name, memory, *operands)``: runs ``fn(memory, *operands)``
    where the server is."""
    spread: Callable[[PyTree, str], PyTree]
    """``down = spread(down, axis_name)``: what the server sends, on every worker."""
    links: Callable[[int, int, list[int], list[int]], Links]
    """``links(upload_bytes, downlink_bytes, uploads_by_worker, rounds_by_uploads)``: what a run
    moves. ``rounds_by_uploads[u]`` is the number of rounds in which u workers uploaded."""
    flag_links: Callable[[int], Links]
    """``flag_links(M)``: what one round's ``tell`` moves."""
    sharded: bool = False
    """Whether each worker serves its own shard, so that server memory differs between workers."""


def psum(message: PyTree, axis_name: str) -> PyTree:
    """The sum of dense messages over workers; silent workers' messages are zeros.

    Half-precision messages are summed in float32, as the server's memory is.
    """

    def simulated(size, message, batched):
        return jax.tree.map(
            lambda x, is_batched: sum_rows(x) if is_batched else x * size, message, batched
        )

    def wide(x):
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))

    def on_devices(message):
        # One vector: a sum of every tensor by itself waits as often as there are tensors.
        vector, to_tree = ravel_pytree(message)
        return to_tree(lax.psum(vector, axis_name))

    total = _over_workers(on_devices, simulated, axis_name, jax.tree.map(wide, message))
    return jax.tree.map(lambda x, like: x.astype(like.dtype), total, message)


# Collectives with an expression of their own under vmap -------------------------------------------


def _over_workers(
    on_devices: Callable[..., PyTree],
    simulated: Callable[[int, PyTree, PyTree], PyTree],
    axis_name: str,
    message: PyTree,
    *operands: PyTree,
) -> PyTree:
    """``on_devices(message, *operands)``, or under vmap over workers what ``simulated`` makes of
    the messages of all.

    Args:
      on_devices: the worker's view, with collectives. It must not close over traced values.
      simulated: ``simulated(size, message, batched)`` gets the messages of all workers, with a
        leading axis where ``batched``. Its result is the same on all workers.
      axis_name: the mapped axis over workers.
      message: a pytree of arrays.
      *operands: what else ``on_devices`` needs; a simulation does not.
    """

    @custom_vmap
    def call(worker, operands):
        del worker
        return on_devices(*operands)

    @call.def_vmap
    def rule(size, batched, worker, operands):
        worker_batched, operands_batched = batched
        if not worker_batched:  # a vmap over something else, e.g. over seeds
            axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, operands_batched)
            result = jax.vmap(call, in_axes=(None, axes), axis_size=size)(worker, operands)
            return result, jax.tree.map(lambda _: True, result)
        message = jax.tree.map(jnp.asarray, operands[0])
        result = simulated(size, message, operands_batched[0])
        return result, jax.tree.map(lambda _: False, result)

    return call(lax.axis_index(axis_name), (message, *operands))


def _stacked(size: int, tree: PyTree, batched: PyTree) -> PyTree:
    return jax.tree.map(
        lambda x, is_batched: x if is_batched else jnp.broadcast_to(x, (size, *x.shape)),
        tree,
        batched,
    )


def _collect_words(
    words_to_rows: Callable[[jax.Array, jax.Array | None, str], jax.Array],
) -> Callable[[PyTree, jax.Array | None, str], PyTree]:
    """Makes ``collect`` from a function of packed messages."""

    def collect(message, flags, axis_name):
        def on_devices(message, flags):
            shapes = jax.eval_shape(lambda: message)
            rows = words_to_rows(_pack(message), flags, axis_name)
            return jax.vmap(lambda row: _unpack(row, shapes))(rows)

        return _over_workers(on_devices, _stacked, axis_name, message, flags)

    return collect


def _pack(tree: PyTree) -> jax.Array:
    """All arrays of ``tree`` in one vector of 32-bit words, padded by at most three bytes."""
    wide, narrow = [], []
    for x in jax.tree.leaves(tree):
        is_wide = x.dtype.itemsize >= 4
        bits = lax.bitcast_convert_type(x.reshape(-1), jnp.uint32 if is_wide else jnp.uint8)
        (wide if is_wide else narrow).append(bits.reshape(-1))
    if narrow:
        octets = jnp.concatenate(narrow)
        octets = jnp.pad(octets, (0, -octets.size % 4)).reshape(-1, 4)
        wide.append(lax.bitcast_convert_type(octets, jnp.uint32))
    return jnp.concatenate(wide)


def _unpack(words: jax.Array, shapes: PyTree) -> PyTree:
    """The inverse of :func:`_pack`."""
    leaves, treedef = jax.tree.flatten(shapes)
    num_wide = sum(s.size * s.dtype.itemsize // 4 for s in leaves if s.dtype.itemsize >= 4)
    octets = lax.bitcast_convert_type(words[num_wide:], jnp.uint8).reshape(-1)
    taken = {True: 0, False: 0}

    def take(s):
        is_wide = s.dtype.itemsize >= 4
        unit, source = (4, words) if is_wide else (1, octets)
        per_entry = s.dtype.itemsize // unit
        start, count = taken[is_wide], s.size * per_entry
        taken[is_wide] = start + count
        shape = (s.size, per_entry) if per_entry > 1 else (s.size,)
        bits = source[start : start + count].reshape(shape)
        return lax.bitcast_convert_type(bits, s.dtype).reshape(s.shape)

    return treedef.unflatten([take(s) for s in leaves])


def packed_bytes(message_bytes: int) -> int:
    """The size of a message of ``message_bytes`` once it is packed into words."""
    return -(-message_bytes // 4) * 4


# Flags --------------------------------------------------------------------------------------------


def _tell_all(uploaded: jax.Array, axis_name: str) -> jax.Array:
    """Tells every worker who uploads. ``# shape=(M,), dtype=bool``

    In each step a worker hears from another one all that this one knows, so that a few steps tell
    everything: ⌈log₂ M⌉ waits in place of the M - 1 of a ring.
    """

    def on_devices(uploaded):
        size = lax.axis_size(axis_name)
        known = uploaded.astype(jnp.uint8)[None]  # of this worker and those after it
        while known.size < size:
            distance = known.size
            to_those_before = [(m, (m - distance) % size) for m in range(size)]
            news = lax.ppermute(known[: size - distance], axis_name, to_those_before)
            known = jnp.concatenate([known, news])
        return jnp.roll(known, lax.axis_index(axis_name)).astype(bool)

    return _over_workers(on_devices, _stacked, axis_name, uploaded)


def _tell_through_root(uploaded: jax.Array, axis_name: str) -> jax.Array:
    """As :func:`_tell_all`, over worker 0: a worker sends one flag however many workers there are.

    A message as small as a flag costs some 400 bytes on a TCP link, whichever way it goes.
    """

    def on_devices(uploaded):
        flag = uploaded.astype(jnp.uint8)
        size = lax.axis_size(axis_name)
        flags = [flag] + [lax.ppermute(flag, axis_name, [(m, 0)]) for m in range(1, size)]
        return _from_root(jnp.stack(flags), axis_name).astype(bool)

    return _over_workers(on_devices, _stacked, axis_name, uploaded)


def _tell_all_links(size: int) -> Links:
    return Links([size - 1] * size, [size - 1] * size)


def _tell_through_root_links(size: int) -> Links:
    others = size - 1
    return Links([others * size, *[1] * others], [others, *[size] * others])


def _from_root(x: jax.Array, axis_name: str) -> jax.Array:
    """Worker 0's integers ``x``, on every worker."""
    # Each worker receives zeros but from one of the sends, so the bits of all are or-ed.
    received = jnp.where(lax.axis_index(axis_name) == 0, x, 0)
    for worker in range(1, lax.axis_size(axis_name)):
        received |= lax.ppermute(x, axis_name, [(0, worker)])
    return received


# Every worker plays the server --------------------------------------------------------------------


def _gather_rows(words, flags, axis_name):
    def everything(words):
        return lax.all_gather(words, axis_name)

    if flags is None:
        return everything(words)
    return lax.cond(flags.any(), everything, lambda words: _no_rows(words, flags.size), words)


def _lazy_rows(words, flags, axis_name):
    if flags is None:
        return _gather_rows(words, None, axis_name)
    worker = lax.axis_index(axis_name)
    slot_of_worker = jnp.cumsum(flags) - 1

    def through_slots(count):
        """Sums ``count`` slots, of which each is zero on all workers but the one that fills it."""

        def rows():
            mine = (jnp.arange(count) == slot_of_worker[worker]) & flags[worker]
            slots = lax.psum(jnp.where(mine[:, None], words[None], 0), axis_name)
            return slots[jnp.clip(slot_of_worker, 0, count - 1)]

        return rows

    size = flags.size
    branches = [lambda: _no_rows(words, size)]
    branches += [through_slots(count) for count in range(1, _most_slots(size) + 1)]
    branches += [lambda: lax.all_gather(words, axis_name)]
    return lax.switch(jnp.minimum(flags.sum(), len(branches) - 1), branches)


def _most_slots(num_workers: int) -> int:
    """The largest number of uploads for which a sum of slots moves less than a gather.

    A sum over M workers sends 2 (M-1)/M slots for each slot, and a gather sends M-1 messages.
    """
    return (num_workers - 1) // 2


def _no_rows(words, size):
    return jnp.zeros((size, *words.shape), words.dtype)


def _serve_everywhere(fn, axis_name, memory, *operands):
    del axis_name
    return fn(memory, *operands)


def _spread_nothing(down, axis_name):
    del axis_name
    return down


def _gather_links(upload_bytes, downlink_bytes, uploads_by_worker, rounds_by_uploads):
    del downlink_bytes
    size = len(uploads_by_worker)
    moved = sum(rounds_by_uploads[1:]) * (size - 1) * packed_bytes(upload_bytes)
    return Links([moved] * size, [moved] * size)


def _lazy_links(upload_bytes, downlink_bytes, uploads_by_worker, rounds_by_uploads):
    size, most = len(uploads_by_worker), _most_slots(len(uploads_by_worker))
    slots = sum(count * rounds for count, rounds in enumerate(rounds_by_uploads[: most + 1]))
    gathers = sum(rounds_by_uploads[most + 1 :])
    message = packed_bytes(upload_bytes)
    # A ring sum sends every part of the vector twice, but for the parts that start and end there.
    moved = 2 * slots * message * (size - 1) // size + gathers * (size - 1) * message
    return Links([moved] * size, [moved] * size)


# Worker 0 is the server ---------------------------------------------------------------------------


def _rows_at_root(words, flags, axis_name):
    def send(worker):
        def to_root(words):
            return lax.ppermute(words, axis_name, [(worker, 0)])

        if flags is None:
            return to_root(words)
        return lax.cond(flags[worker], to_root, jnp.zeros_like, words)

    return jnp.stack([words] + [send(worker) for worker in range(1, lax.axis_size(axis_name))])


def _serve_at_root(fn, axis_name, memory, *operands):
    def on_devices(served):
        memory, operands = served
        down = jax.eval_shape(fn, memory, *operands)[1]

        def nothing(memory):
            return memory, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), down)

        at_root = lax.axis_index(axis_name) == 0
        return lax.cond(at_root, lambda memory: fn(memory, *operands), nothing, memory)

    def simulated(size, served, batched):
        del size, batched
        memory, operands = served
        return fn(memory, *operands)

    return _over_workers(on_devices, simulated, axis_name, (memory, operands))


def _spread_from_root(down, axis_name):
    def on_devices(down):
        return _unpack(_from_root(_pack(down), axis_name), jax.eval_shape(lambda: down))

    return _over_workers(on_devices, lambda size, down, batched: down, axis_name, down)


def _server_links(upload_bytes, downlink_bytes, uploads_by_worker, rounds_by_uploads):
    up = [uploads * packed_bytes(upload_bytes) for uploads in uploads_by_worker[1:]]
    down = sum(rounds_by_uploads) * packed_bytes(downlink_bytes)
    return Links([len(up) * down, *up], [sum(up), *(down for _ in up)])


def _rows_by_relay(words, flags, axis_name):
    size = lax.axis_size(axis_name)
    rows = _rows_at_root(words, flags, axis_name)
    if flags is None:
        flags = jnp.ones(size, bool)
    order = jnp.argsort(~flags, stable=True)  # those that uploaded first
    worker = lax.axis_index(axis_name)

    def forward(slot, rows):
        origin = order[slot]
        row = lax.dynamic_index_in_dim(rows, origin, keepdims=False)
        received = jnp.where(worker == 0, row, 0)
        for target in range(1, size):
            received |= lax.cond(
                origin != target,
                lambda row, target=target: lax.ppermute(row, axis_name, [(0, target)]),
                jnp.zeros_like,
                row,
            )
        row = jnp.where(worker == origin, words, received)
        return lax.dynamic_update_index_in_dim(rows, row, origin, axis=0)

    return lax.fori_loop(0, flags.sum(), forward, rows)


def _relay_links(upload_bytes, downlink_bytes, uploads_by_worker, rounds_by_uploads):
    del downlink_bytes, rounds_by_uploads
    message, total = packed_bytes(upload_bytes), sum(uploads_by_worker)
    root, others = uploads_by_worker[0], uploads_by_worker[1:]
    forwarded = root * len(others) + sum(others) * (len(others) - 1)
    return Links(
        [forwarded * message, *(uploads * message for uploads in others)],
        [sum(others) * message, *((total - uploads) * message for uploads in others)],
    )


# Every worker is the server of its shard ----------------------------------------------------------


def _collect_shards(message, flags, axis_name):
    """``message`` has a leading axis over shards; shard m goes to worker m."""
    shapes = _without_leading_axis(message)

    def send(words):
        return lax.all_to_all(words, axis_name, split_axis=0, concat_axis=0)

    words = jax.vmap(_pack)(message)
    any_upload = True if flags is None else flags.any()
    rows = lax.cond(any_upload, send, jnp.zeros_like, words)
    return jax.vmap(lambda row: _unpack(row, shapes))(rows)


def _serve_shard(fn, axis_name, memory, *operands):
    del axis_name
    return update_if(jnp.asarray(True), fn, memory, *operands)


def _spread_shards(down, axis_name):
    """What each worker sends of its shard, with a leading axis over shards."""
    shapes = jax.eval_shape(lambda: down)
    rows = lax.all_gather(_pack(down), axis_name)
    return jax.vmap(lambda row: _unpack(row, shapes))(rows)


def _without_leading_axis(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), tree)


def _sharded_links(upload_bytes, downlink_bytes, uploads_by_worker, rounds_by_uploads):
    size = len(uploads_by_worker)
    up = sum(rounds_by_uploads[1:]) * packed_bytes(upload_bytes // size)
    down = sum(rounds_by_uploads) * packed_bytes(downlink_bytes // size)
    return Links([(size - 1) * (up + down)] * size, [(size - 1) * (up + down)] * size)


# Without a server ---------------------------------------------------------------------------------


def _psum_links(upload_bytes, downlink_bytes, uploads_by_worker, rounds_by_uploads):
    del downlink_bytes
    size = len(uploads_by_worker)
    moved = 2 * sum(rounds_by_uploads) * upload_bytes * (size - 1) // size  # a ring sum
    return Links([moved] * size, [moved] * size)


_AMONG_ALL = {"tell": _tell_all, "flag_links": _tell_all_links}
_THROUGH_ROOT = {"tell": _tell_through_root, "flag_links": _tell_through_root_links}
_EVERYWHERE = {"serve": _serve_everywhere, "spread": _spread_nothing}

SERVED: dict[str, Exchange] = {
    "gather": Exchange(
        collect=_collect_words(_gather_rows), links=_gather_links, **_AMONG_ALL, **_EVERYWHERE
    ),
    "lazy": Exchange(
        collect=_collect_words(_lazy_rows), links=_lazy_links, **_AMONG_ALL, **_EVERYWHERE
    ),
    "relay": Exchange(
        collect=_collect_words(_rows_by_relay), links=_relay_links, **_THROUGH_ROOT, **_EVERYWHERE
    ),
    "server": Exchange(
        collect=_collect_words(_rows_at_root),
        serve=_serve_at_root,
        spread=_spread_from_root,
        links=_server_links,
        **_THROUGH_ROOT,
    ),
    "sharded": Exchange(
        collect=_collect_shards,
        serve=_serve_shard,
        spread=_spread_shards,
        links=_sharded_links,
        **_AMONG_ALL,
        sharded=True,
    ),
}
EXCHANGES = (*SERVED, "psum")


def links(
    name: str,
    *,
    upload_bytes: int,
    downlink_bytes: int,
    flag_bytes: int,
    uploads_by_worker: Sequence[int],
    rounds_by_uploads: Sequence[int],
) -> Links:
    """What a run moves over each worker's link.

    Args:
      name: one of :data:`EXCHANGES`.
      upload_bytes: of one message.
      downlink_bytes: of what a server sends one worker in a round.
      flag_bytes: of what says whether a worker uploads; 0 where all always do.
      uploads_by_worker: ``# length M``
      rounds_by_uploads: entry u is the number of rounds in which u workers uploaded.
        ``# length M + 1``
    """
    uploads, rounds = list(uploads_by_worker), list(rounds_by_uploads)
    if name == "psum":
        return _psum_links(upload_bytes, downlink_bytes, uploads, rounds)
    messages = SERVED[name].links(upload_bytes, downlink_bytes, uploads, rounds)
    flags = SERVED[name].flag_links(len(uploads))
    flags_per_link = flag_bytes * sum(rounds)
    return Links(
        *(
            [moved + flags_per_link * flag for moved, flag in zip(*sides, strict=True)]
            for sides in zip(messages, flags, strict=True)
        )
    )
