"""``gather``: all messages to all workers, if anybody uploads; every worker plays the server."""

import jax.numpy as jnp
from jax import lax

from sasg_jax.exchanges.base import Links, refuse_downlink
from sasg_jax.exchanges.flags import TO_ALL
from sasg_jax.exchanges.packing import packed


def gather_rows(words, flags, axis_name):
    everything = lambda words: lax.all_gather(words, axis_name)
    if flags is None:
        return everything(words)
    return lax.cond(flags.any(), everything, lambda words: no_rows(words, flags.size), words)


no_rows = lambda words, size: jnp.zeros((size, *words.shape), words.dtype)  # nobody uploads


def _links(traffic):
    size = len(traffic.uploads_by_worker)
    moved = sum(traffic.rounds_by_uploads[1:]) * (size - 1) * traffic.upload_bytes
    return Links([moved] * size, [moved] * size)


GATHER = packed(gather_rows, name="gather", refuses=refuse_downlink, links=_links, **TO_ALL)
