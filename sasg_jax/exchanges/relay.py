"""``relay``: uploads to worker 0, which forwards each; every worker plays the server."""

import jax.numpy as jnp
from jax import lax

from sasg_jax.exchanges.base import Links, refuse_downlink
from sasg_jax.exchanges.flags import BY_ROOT
from sasg_jax.exchanges.packing import packed
from sasg_jax.exchanges.server import rows_at_root


def _rows_by_relay(words, flags, axis_name):
    size, worker = lax.axis_size(axis_name), lax.axis_index(axis_name)
    rows = rows_at_root(words, flags, axis_name)
    flags = jnp.ones(size, bool) if flags is None else flags
    order = jnp.argsort(~flags, stable=True)  # those that uploaded first

    def forward(slot, rows):
        origin = order[slot]
        row = lax.dynamic_index_in_dim(rows, origin, keepdims=False)
        received = jnp.where(worker == 0, row, 0)
        for target in range(1, size):
            to_target = lambda row, target=target: lax.ppermute(row, axis_name, [(0, target)])
            received |= lax.cond(origin != target, to_target, jnp.zeros_like, row)
        row = jnp.where(worker == origin, words, received)
        return lax.dynamic_update_index_in_dim(rows, row, origin, axis=0)

    return lax.fori_loop(0, flags.sum(), forward, rows)


def _links(traffic):
    message, total = traffic.upload_bytes, sum(traffic.uploads_by_worker)
    root, *others = traffic.uploads_by_worker
    forwarded = root * len(others) + sum(others) * (len(others) - 1)
    sent = [forwarded * message, *(uploads * message for uploads in others)]
    return Links(sent, [sum(others) * message, *((total - x) * message for x in others)])


RELAY = packed(
    _rows_by_relay, name="relay", refuses=refuse_downlink, links=_links, forwards=True, **BY_ROOT
)
