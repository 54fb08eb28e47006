"""The parameters of the last rounds, kept once for all workers.

A worker compares its gradient with that at the parameters of its last upload. These are parameters
that all workers had, at most ``max_staleness`` rounds ago: where one device simulates many workers,
a ring of that length takes the place of a copy for each.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

PyTree = Any


def init_recent(params: PyTree, max_staleness: int) -> PyTree:
    """An empty ring.

    Its length is one less than ``max_staleness``, with a leading axis of that: a worker whose last
    upload is as far back as ``max_staleness`` uploads anyway, and asks for no parameters. With
    ``max_staleness`` 1, where nobody ever asks, it is ``()``.
    """
    if max_staleness == 1:
        return ()
    return jax.tree.map(lambda x: jnp.zeros((max_staleness - 1, *x.shape), x.dtype), params)


def read_recent(recent: PyTree, round: jax.Array) -> PyTree:
    """The parameters before round ``round``, of those that the ring still has.

    Args:
      recent: the ring.
      round: at most its length before the current one. ``# shape=(), dtype=int32``
    """

    def read(rows):
        return lax.dynamic_index_in_dim(rows, round % rows.shape[0], keepdims=False)

    return jax.tree.map(read, recent)


def write_recent(recent: PyTree, params: PyTree, round: jax.Array) -> PyTree:
    """Remembers the parameters before round ``round`` in place of the oldest."""

    def write(rows, row):
        return lax.dynamic_update_index_in_dim(rows, row, round % rows.shape[0], axis=0)

    return jax.tree.map(write, recent, params) if jax.tree.leaves(recent) else recent
