"""``server``: uploads to worker 0, the root, and the step from it to each worker."""

import jax
import jax.numpy as jnp
from jax import lax

from sasg_jax.exchanges.base import Links, over_workers
from sasg_jax.exchanges.flags import BY_ROOT, from_root
from sasg_jax.exchanges.packing import pack, packed, unpack


def rows_at_root(words, flags, axis_name):
    """All uploads, on worker 0."""

    def send(worker):
        to_root = lambda words: lax.ppermute(words, axis_name, [(worker, 0)])
        if flags is None:
            return to_root(words)
        return lax.cond(flags[worker], to_root, jnp.zeros_like, words)

    return jnp.stack([words] + [send(worker) for worker in range(1, lax.axis_size(axis_name))])


def _serve(fn, axis_name, *served):
    def on_devices(served):
        down = jax.eval_shape(fn, *served)[1]
        zeros = lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), down)
        nothing = lambda memory, *operands: (memory, zeros())
        return lax.cond(lax.axis_index(axis_name) == 0, fn, nothing, *served)

    return over_workers(on_devices, lambda size, served, batched: fn(*served), axis_name, served)


def _spread(down, axis_name):
    on_devices = lambda down: unpack(from_root(pack(down), axis_name), down)
    return over_workers(on_devices, lambda size, down, batched: down, axis_name, down)


def _links(traffic):
    down = traffic.steps * traffic.downlink_bytes
    up = [uploads * traffic.upload_bytes for uploads in traffic.uploads_by_worker[1:]]
    return Links([len(up) * down, *up], [sum(up), *(down for _ in up)])


def _tell_down(sends, axis_name):
    on_devices = lambda sends: from_root(sends.astype(jnp.uint8), axis_name).astype(bool)
    return over_workers(on_devices, lambda size, sends, batched: sends, axis_name, sends)


SERVER = packed(
    rows_at_root,
    name="server",
    links=_links,
    serve=_serve,
    spread=_spread,
    tell_down=_tell_down,
    downlink_flag_links=lambda n: Links([n - 1] + [0] * (n - 1), [0] + [1] * (n - 1)),
    **BY_ROOT,
)
