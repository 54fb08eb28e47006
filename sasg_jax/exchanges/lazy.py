"""``lazy``: only uploads, to all workers; every worker plays the server."""

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
    slot_of_worker = jnp.cumsum(flags) - 1

    def through_slots(count):
        """Sums ``count`` slots, of which each is zero on all workers but the one that fills it."""

        def rows():
            mine = (jnp.arange(count) == slot_of_worker[worker]) & flags[worker]
            slots = lax.psum(jnp.where(mine[:, None], words[None], 0), axis_name)
            return slots[jnp.clip(slot_of_worker, 0, count - 1)]

        return rows

    branches = [lambda: no_rows(words, size)]
    branches += [through_slots(count) for count in range(1, _most_slots(size) + 1)]
    branches += [lambda: lax.all_gather(words, axis_name)]
    return lax.switch(jnp.minimum(flags.sum(), len(branches) - 1), branches)


# The largest number of uploads for which a sum of slots moves less than a gather: a sum over M
# workers sends 2 (M-1)/M slots for each slot, and a gather sends M-1 messages.
_most_slots = lambda num_workers: (num_workers - 1) // 2


def _links(traffic):
    size, rounds = len(traffic.uploads_by_worker), traffic.rounds_by_uploads
    most = _most_slots(size)
    slots = sum(count * rounds for count, rounds in enumerate(rounds[: most + 1]))
    # A ring sum sends every part of the vector twice, but for the parts that start and end there.
    moved = 2 * slots * traffic.upload_bytes * (size - 1) // size
    moved += sum(rounds[most + 1 :]) * (size - 1) * traffic.upload_bytes
    return Links([moved] * size, [moved] * size)


LAZY = packed(_lazy_rows, name="lazy", refuses=refuse_downlink, links=_links, **TO_ALL)
