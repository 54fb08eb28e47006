"""``psum``: the sum of messages that everybody sends; nobody need be the server."""

import jax
from jax.flatten_util import ravel_pytree

from sasg_jax.control_flow import sum_rows
from sasg_jax.exchanges.base import Exchange, Links, Needs, over_workers
from sasg_jax.exchanges.flags import TO_ALL
from sasg_jax.numerics import PyTree, wide


def _sum(message: PyTree, axis_name: str) -> PyTree:
    """The sum over workers, in at least float32: that of numbers in half precision may not fit."""

    def simulated(size, message, batched):
        add = lambda x, is_batched: sum_rows(x) if is_batched else x * size
        return jax.tree.map(add, message, batched)

    def on_devices(message):
        # One vector of each type: a sum of every tensor by itself would wait as often.
        leaves, treedef = jax.tree.flatten(message)
        summed = list(leaves)
        for dtype in dict.fromkeys(x.dtype for x in leaves):  # in one order in all processes
            places = [i for i, x in enumerate(leaves) if x.dtype == dtype]
            vector, to_leaves = ravel_pytree([leaves[i] for i in places])
            for i, x in zip(places, to_leaves(jax.lax.psum(vector, axis_name)), strict=True):
                summed[i] = x
        return treedef.unflatten(summed)

    message = jax.tree.map(lambda x: x.astype(wide(x.dtype)), message)
    return over_workers(on_devices, simulated, axis_name, message)


def _mean(tree: PyTree, axis_name: str) -> PyTree:
    divide = lambda total, x: (total / jax.lax.axis_size(axis_name)).astype(x.dtype)
    return jax.tree.map(divide, _sum(tree, axis_name), tree)


def _refuses(needs: Needs) -> str | None:
    if needs.downlink:
        return "to be 'server' or 'sharded' for downlink=...: a sum sends no step to compress"
    if needs.by_sender:
        return "to be another for mean='senders': a sum does not tell how many sent a coordinate"
    why = "to be another where a worker may be silent or messages do not add up: a sum moves "
    why += "silent workers' zeros, and needs a linear compressor, e.g. sasg_jax.identity()"
    return None if needs.always and (needs.linear or needs.mean_inside) else why


def _links(traffic):
    size, rounds = len(traffic.uploads_by_worker), sum(traffic.rounds_by_uploads)
    moved = 2 * rounds * traffic.upload_bytes * (size - 1) // size  # a ring sum
    return Links([moved] * size, [moved] * size)


def _collect(message, flags, axis_name):  # the messages of silent workers are zeros
    return jax.tree.map(lambda x: x[None], _sum(message, axis_name))


_bytes = lambda x: x.size * wide(x.dtype).itemsize
PSUM = Exchange(
    name="psum",
    refuses=_refuses,
    collect=_collect,
    moved_bytes=lambda shapes: sum(map(_bytes, jax.tree.leaves(shapes))),
    links=_links,
    mean=_mean,
    sums=True,
    **TO_ALL,
)
