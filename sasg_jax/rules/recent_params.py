"""The parameters of the last rounds, kept once for all workers: a ring of ``max_staleness`` rounds
in place of a copy for each worker of those of its last upload, which all had.
"""

import jax
import jax.numpy as jnp

from sasg_jax.numerics import PyTree


def init_recent(params: PyTree, max_staleness: int) -> PyTree:
    """An empty ring, with a leading axis of ``max_staleness - 1``: a worker whose last upload is as
    far back as ``max_staleness`` uploads anyway. () for 1, where nobody ever asks."""
    if max_staleness == 1:
        return ()
    return jax.tree.map(lambda x: jnp.zeros((max_staleness - 1, *x.shape), x.dtype), params)


def read_recent(recent: PyTree, round: jax.Array) -> PyTree:
    """The parameters before round ``round``, at most the ring's length before the current one."""
    read = lambda rows: jax.lax.dynamic_index_in_dim(rows, round % rows.shape[0], keepdims=False)
    return jax.tree.map(read, recent)


def write_recent(recent: PyTree, params: PyTree, round: jax.Array) -> PyTree:
    """Remembers the parameters before round ``round`` in place of the oldest."""
    update = jax.lax.dynamic_update_index_in_dim
    write = lambda rows, row: update(rows, row, round % rows.shape[0], axis=0)
    return jax.tree.map(write, recent, params) if jax.tree.leaves(recent) else recent
