"""``lazy``: only uploads, to all workers; every worker plays the server."""

import bisect

import jax.numpy as jnp
from jax import lax

from sasg_jax.exchanges.base import Links, refuse_downlink
from sasg_jax.exchanges.flags import TO_ALL
from sasg_jax.exchanges.gather import gather_rows, no_rows
from sasg_jax.exchanges.packing import packed


def _lazy_rows(words, flags, axis_name):
    if flags is None:
        return gather_rows(words, None, axis_name)
    size, worker = flags.size, lax.axis_index(axis_name)
    counts = _slot_counts(size)
    slot_of_worker = jnp.cumsum(flags) - 1

    def through_slots(count):
        """Sums ``count`` slots, of which each is zero on all workers but the one that fills it."""

        def rows():
            mine = (jnp.arange(count) == slot_of_worker[worker]) & flags[worker]
            slots = lax.psum(jnp.where(mine[:, None], words[None], 0), axis_name)
            return slots[jnp.clip(slot_of_worker, 0, count - 1)]

        return rows

    branches = [lambda: no_rows(words, size)]
    branches += [through_slots(count) for count in counts[1:]]
    branches += [lambda: lax.all_gather(words, axis_name)]
    return lax.switch(jnp.searchsorted(jnp.asarray(counts), flags.sum()), branches)


def _slot_counts(num_workers: int) -> list[int]:
    """Slots of the branches, of which the first that holds all uploads is taken: while a sum (2
    (M-1)/M messages a slot) moves less than a gather (M-1). Few: branches take time to compile."""
    most = (num_workers - 1) // 2
    counts = list(range(min(most, 16) + 1))
    while counts[-1] < most:
        counts.append(min(most, counts[-1] * 9 // 8))
    return counts


def _links(traffic):
    size, rounds = len(traffic.uploads_by_worker), traffic.rounds_by_uploads
    counts = _slot_counts(size)
    most = counts[-1]
    slots = sum(counts[bisect.bisect_left(counts, u)] * rounds[u] for u in range(most + 1))
    # A ring sum sends every part of the vector twice, but for the parts that start and end there.
    moved = 2 * slots * traffic.upload_bytes * (size - 1) // size
    moved += sum(rounds[most + 1 :]) * (size - 1) * traffic.upload_bytes
    return Links([moved] * size, [moved] * size)


LAZY = packed(_lazy_rows, name="lazy", refuses=refuse_downlink, links=_links, **TO_ALL)
