"""How messages travel: the same mathematics under vmap and on several devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from jax.sharding import AxisType, PartitionSpec
from problems import M

from sasg_jax.control_flow import stacked
from sasg_jax.exchanges import EXCHANGES, Links, Traffic
from sasg_jax.exchanges.base import over_workers

MESSAGE = {
    "values": np.random.default_rng(0).normal(size=(M, 5)).astype(np.float32),
    "indices": np.arange(M * 5, dtype=np.uint8).reshape(M, 5),
    "half": jnp.arange(M * 6, dtype=jnp.bfloat16).reshape(M, 2, 3),
    "short": np.arange(M, dtype=np.uint16).reshape(M, 1) + 300,
    # Bits that a sum or a comparison of floats would not keep.
    "odd": np.tile(np.array([-0.0, np.nan, 1e-45], np.float32), (M, 1)),
}
FLAGS = ["1111", "1011", "0101", "0010", "1000", "0000"]
SERVED = [name for name, exchange in EXCHANGES.items() if not exchange.sums]


# One worker's view under each map: what every worker returned, with a leading axis M --------------


def _on_workers(fn):
    return jax.vmap(fn, axis_name="workers")


def _pmapped(fn):
    return jax.pmap(fn, axis_name="workers", devices=jax.devices()[:M])


def _on_devices(fn):
    def on_one_device(*blocks):
        return jax.tree.map(lambda x: x[None], fn(*problems.at(blocks, 0)))

    mesh = jax.make_mesh((M,), ("workers",), axis_types=(AxisType.Auto,), devices=jax.devices()[:M])
    spec = PartitionSpec("workers")
    return jax.shard_map(on_one_device, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)


# pmap is a shard_map itself: the exchange with a root and the one with shards stand for all.
RUNS = [(name, driver) for name in SERVED for driver in (_on_workers, _on_devices)]
RUNS += [("server", _pmapped), ("sharded", _pmapped)]


@functools.cache
def _everything(name, driver):
    """All that an exchange does, compiled once."""
    exchange = EXCHANGES[name]

    def serve(memory, number):
        return memory + number, {"down": 10 * (memory + number)}

    def worker(message, flag, memory):
        flags = exchange.tell(flag, "workers")
        if not exchange.sharded:  # the same on all workers, and known to be
            memory = jax.lax.all_gather(memory, "workers")[0]
        new_memory, down = exchange.serve(serve, "workers", memory, jnp.float32(1))
        return {
            "flags": flags,
            "told": exchange.collect(message, flags, "workers"),
            "untold": exchange.collect(message, None, "workers"),
            "memory": new_memory,
            "down": exchange.spread(down, "workers")["down"],
        }

    mapped = driver(worker)
    return problems.one_at_a_time(mapped if driver is _pmapped else jax.jit(mapped))


def _message(exchange):
    if not exchange.sharded:
        return MESSAGE
    # A leading axis over shards, and every shard's message says whose it is.
    roll = lambda x: np.stack([np.roll(np.asarray(x), s, axis=-1) for s in range(M)], 1)
    return jax.tree.map(roll, MESSAGE)


def _bits(tree):
    return jax.tree.map(lambda x: np.asarray(x).tobytes(), tree)


@pytest.mark.parametrize(("name", "driver"), RUNS)
def test_messages_reach_the_server_and_its_answer_everybody(name, driver):
    """Bit for bit, for the servers that there are: worker 0, all of them, or one for each shard."""
    exchange = EXCHANGES[name]
    message = _message(exchange)
    memory = np.arange(M, dtype=np.float32)[:, None]
    servers = range(1 if name == "server" else M)
    for flags in FLAGS:
        flags = np.array([flag == "1" for flag in flags])
        got = jax.device_get(_everything(name, driver)(message, flags, memory))
        np.testing.assert_array_equal(got["flags"], np.tile(flags, (M, 1)))
        for server in servers:
            for rows, senders in (("told", np.flatnonzero(flags)), ("untold", range(M))):
                for sender in map(int, senders):
                    want = problems.at(message, sender)
                    want = problems.at(want, server) if exchange.sharded else want
                    arrived = problems.at(problems.at(got[rows], server), sender)
                    assert _bits(arrived) == _bits(want)
        if exchange.sharded:
            np.testing.assert_array_equal(got["memory"][:, 0], [1, 2, 3, 4])
            np.testing.assert_array_equal(got["down"][:, :, 0], [[10, 20, 30, 40]] * M)
        else:
            assert all(got["memory"][server, 0] == 1 for server in servers)
            np.testing.assert_array_equal(got["down"][:, 0], [10] * M)


@pytest.mark.parametrize("name", [name for name in SERVED if not EXCHANGES[name].sharded])
def test_simulated_rows_do_not_depend_on_the_worker(name):
    """vmap may return them as shared: that is how it checks that replicas agree."""
    collect = lambda m: EXCHANGES[name].collect(m, None, "workers")
    rows = jax.vmap(collect, out_axes=None, axis_name="workers")(MESSAGE)
    assert _bits(rows) == _bits(MESSAGE)


@pytest.mark.parametrize("name", SERVED)
def test_collect_under_a_vmap_over_seeds(name):
    exchange = EXCHANGES[name]
    x = np.arange(3 * M * M, dtype=np.float32).reshape(3, M, M, 1)  # seeds, workers, shards
    x = x if exchange.sharded else x[:, :, 0]
    collect = lambda m: exchange.collect({"x": m}, None, "workers")["x"]
    over_all_workers = jax.vmap(collect, axis_name="workers")
    rows = jax.vmap(over_all_workers)(x)
    inside = jax.vmap(jax.vmap(collect), in_axes=1, axis_name="workers")(x)
    for seed in range(3):
        np.testing.assert_array_equal(rows[seed], over_all_workers(x[seed]))
        if not exchange.sharded:  # whose all_to_all is vmap's own
            np.testing.assert_array_equal(inside[:, seed], rows[seed])


def test_over_workers_simulates_only_under_a_map_over_workers():
    """A vmap over something else repeats the collectives, and leaves what it closes over alone."""

    def on_devices(x, scale):
        return scale * jax.lax.psum(x, "workers")

    def simulated(size, x, batched):
        return -x.sum(0) if batched else -x * size  # the sign tells who made it

    def worker(x, scale):
        return over_workers(on_devices, simulated, "workers", x, scale)

    x = np.arange(8.0, dtype=np.float32).reshape(2, M)
    one = jax.vmap(worker, in_axes=(0, None), out_axes=None, axis_name="workers")
    assert one(x[0], 1.0) == -6
    np.testing.assert_array_equal(jax.vmap(one, in_axes=(0, None))(x, 1.0), [-6, -22])
    alike = jax.vmap(lambda own, x: worker(x, own), in_axes=(0, None), axis_name="workers")
    np.testing.assert_array_equal(alike(x[0], 3.0), [-12] * M)  # the same for all, once for each
    # Also inside of the map over workers.
    inside = jax.vmap(worker, in_axes=(0, None))
    np.testing.assert_array_equal(_on_devices(lambda x: inside(x, 2.0))(x.T), [[12, 44]] * M)
    simulated_inside = jax.vmap(
        lambda x: inside(x, 2.0), in_axes=1, out_axes=None, axis_name="workers"
    )
    np.testing.assert_array_equal(simulated_inside(x), [-6, -22])


def test_stacked_repeats_what_all_share():
    rows = stacked(3, {"a": jnp.arange(2), "b": jnp.ones((3, 2))}, {"a": False, "b": True})
    np.testing.assert_array_equal(rows["a"], [[0, 1]] * 3)
    np.testing.assert_array_equal(rows["b"], np.ones((3, 2)))


def test_all_links_add_the_flags_of_every_round():
    """Seven rounds with flags of two bytes, over what the exchange's own functions say."""
    exchange = dataclasses.replace(
        EXCHANGES["gather"],
        links=lambda traffic: Links([10, 20, 30], [1, 2, 3]),
        flag_links=lambda size: Links([size, 0, 1], [5, 6, 7]),
    )
    traffic = Traffic(
        upload_bytes=8,
        downlink_bytes=8,
        flag_bytes=2,
        uploads_by_worker=[1, 2, 3],
        rounds_by_uploads=[4, 0, 3, 0],
        steps=7,
    )
    assert exchange.all_links(traffic) == ([10 + 14 * 3, 20, 30 + 14], [1 + 70, 2 + 84, 3 + 98])
    assert exchange.all_links(traffic._replace(flag_bytes=0)) == ([10, 20, 30], [1, 2, 3])
