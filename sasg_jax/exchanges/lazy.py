"""``lazy``: only uploads, to all workers; every worker plays the server."""

import jax.numpy as jnp
from jax import lax

from sasg_jax.exchanges.base import Exchange, Links, refuse_downlink
from sasg_jax.exchanges.flags import tell_all, tell_all_links
from sasg_jax.exchanges.gather import gather_rows, no_rows
from sasg_jax.exchanges.packing import collect_words, packed_bytes


def _lazy_rows(words, flags, axis_name):
    if flags is None:
        return gather_rows(words, None, axis_name)
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
    branches = [lambda: no_rows(words, size)]
    branches += [through_slots(count) for count in range(1, _most_slots(size) + 1)]
    branches += [lambda: lax.all_gather(words, axis_name)]
    return lax.switch(jnp.minimum(flags.sum(), len(branches) - 1), branches)


def _most_slots(num_workers: int) -> int:
    """The largest number of uploads for which a sum of slots moves less than a gather.

    A sum over M workers sends 2 (M-1)/M slots for each slot, and a gather sends M-1 messages.
    """
    return (num_workers - 1) // 2


def _links(traffic):
    rounds = traffic.rounds_by_uploads
    size, most = len(traffic.uploads_by_worker), _most_slots(len(traffic.uploads_by_worker))
    slots = sum(count * rounds for count, rounds in enumerate(rounds[: most + 1]))
    gathers = sum(rounds[most + 1 :])
    # A ring sum sends every part of the vector twice, but for the parts that start and end there.
    moved = 2 * slots * traffic.upload_bytes * (size - 1) // size
    moved += gathers * (size - 1) * traffic.upload_bytes
    return Links([moved] * size, [moved] * size)


LAZY = Exchange(
    name="lazy",
    refuses=refuse_downlink,
    collect=collect_words(_lazy_rows),
    moved_bytes=packed_bytes,
    links=_links,
    tell=tell_all,
    flag_links=tell_all_links,
)
