"""``sharded``: every worker is the server of 1/M of each tensor, to which 1/M of each message goes
if anybody uploads, and its part of the step to all. Selection is within each shard.
"""

import jax
import jax.numpy as jnp
from jax import lax

from sasg_jax.control_flow import update_if
from sasg_jax.exchanges.base import Exchange, Links
from sasg_jax.exchanges.flags import TO_ALL, tell_all, tell_all_links
from sasg_jax.exchanges.packing import pack, packed_bytes, unpack_rows
from sasg_jax.exchanges.shards import first


def _collect_shards(message, flags, axis_name):
    """``message`` has a leading axis over shards; shard m goes to worker m."""
    send = lambda words: lax.all_to_all(words, axis_name, split_axis=0, concat_axis=0)
    any_upload = True if flags is None else flags.any()
    rows = lax.cond(any_upload, send, jnp.zeros_like, jax.vmap(pack)(message))
    return unpack_rows(rows, jax.eval_shape(first, message))


def _serve_shard(fn, axis_name, memory, *operands):
    return update_if(jnp.asarray(True), fn, memory, *operands)


def _spread_shards(down, axis_name):
    """What each worker sends of its shard, with a leading axis over shards."""
    return unpack_rows(lax.all_gather(pack(down), axis_name), down)


def _links(traffic):
    size, rounds = len(traffic.uploads_by_worker), traffic.rounds_by_uploads
    moved = sum(rounds[1:]) * traffic.upload_bytes + traffic.steps * traffic.downlink_bytes
    return Links([(size - 1) * moved] * size, [(size - 1) * moved] * size)


SHARDED = Exchange(
    name="sharded",
    collect=_collect_shards,
    moved_bytes=lambda shapes: packed_bytes(jax.eval_shape(first, shapes)),
    links=_links,
    serve=_serve_shard,
    spread=_spread_shards,
    tell_down=lambda sends, axis_name: tell_all(sends, axis_name).any(),
    downlink_flag_links=tell_all_links,
    sharded=True,
    **TO_ALL,
)
