"""Telling all workers who uploads: one byte each."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sasg_jax.control_flow import stacked
from sasg_jax.exchanges.base import Links, over_workers


def tell_all(uploaded: jax.Array, axis_name: str) -> jax.Array:
    """Tells every worker who uploads. ``# shape=(M,), dtype=bool`` In each step a worker hears from
    another one all that this one knows: ⌈log₂ M⌉ waits in place of the M - 1 of a ring."""

    def on_devices(uploaded):
        size = lax.axis_size(axis_name)
        known = uploaded.astype(jnp.uint8)[None]  # of this worker and those after it
        while known.size < size:
            distance = known.size
            to_those_before = [(m, (m - distance) % size) for m in range(size)]
            news = lax.ppermute(known[: size - distance], axis_name, to_those_before)
            known = jnp.concatenate([known, news])
        return jnp.roll(known, lax.axis_index(axis_name)).astype(bool)

    return over_workers(on_devices, stacked, axis_name, uploaded)


def tell_through_root(uploaded: jax.Array, axis_name: str) -> jax.Array:
    """As :func:`tell_all`, over worker 0: a worker sends one flag however many workers there are.
    (A message as small as a flag costs some 400 bytes on a TCP link, whichever way it goes.)"""

    def on_devices(uploaded):
        flag, size = uploaded.astype(jnp.uint8), lax.axis_size(axis_name)
        flags = [flag] + [lax.ppermute(flag, axis_name, [(m, 0)]) for m in range(1, size)]
        return from_root(jnp.stack(flags), axis_name).astype(bool)

    return over_workers(on_devices, stacked, axis_name, uploaded)


def from_root(x: jax.Array, axis_name: str) -> jax.Array:
    """Worker 0's integers ``x``, on every worker."""
    # Each worker receives zeros but from one of the sends, so the bits of all are or-ed.
    received = jnp.where(lax.axis_index(axis_name) == 0, x, 0)
    for worker in range(1, lax.axis_size(axis_name)):
        received |= lax.ppermute(x, axis_name, [(0, worker)])
    return received


# The two ways, as arguments of Exchange.
tell_all_links = lambda size: Links([size - 1] * size, [size - 1] * size)
tell_through_root_links = lambda n: Links([(n - 1) * n] + [1] * (n - 1), [n - 1] + [n] * (n - 1))
TO_ALL: Any = {"tell": tell_all, "flag_links": tell_all_links}
BY_ROOT: Any = {"tell": tell_through_root, "flag_links": tell_through_root_links, "has_root": True}
