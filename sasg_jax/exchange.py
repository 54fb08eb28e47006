"""How messages get from the workers to the server: the only module with collectives.

An exchange never looks inside a message: it moves a pytree of arrays of static shapes.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from sasg_jax.control_flow import sum_rows

PyTree = Any

EXCHANGES = ("gather", "psum")


def gather(message: PyTree, uploaded: jax.Array, axis_name: str) -> tuple[PyTree, jax.Array]:
    """Every worker receives every message, and so plays the server for itself.

    All messages move, also those of silent workers, which are zeros.

    Args:
      message: this worker's message.
      uploaded: whether this worker uploads. ``# shape=(), dtype=bool``
      axis_name: the mapped axis over workers.

    Returns:
      All messages with a leading axis over workers, and the flags. ``# shape=(M,), dtype=bool``
    """
    return jax.tree.map(lambda x: lax.all_gather(x, axis_name), (message, uploaded))


def psum(message: PyTree, axis_name: str) -> PyTree:
    """The sum of dense messages over workers; silent workers' messages are zeros.

    Half-precision messages are summed in float32, as the server's memory is.
    """

    @custom_vmap
    def total(worker, x):
        del worker
        return lax.psum(x, axis_name)

    @total.def_vmap
    def simulated_total(size, batched, worker, x):
        worker_batched, x_batched = batched
        if not worker_batched:  # a vmap over something else, e.g. over seeds
            return jax.vmap(total, in_axes=(None, 0), axis_size=size)(worker, x), True
        return sum_rows(x) if x_batched else x * size, False

    def leaf(x):
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return total(lax.axis_index(axis_name), wide).astype(x.dtype)

    return jax.tree.map(leaf, message)
