"""How messages travel: the same mathematics under vmap and on several devices."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from jax.sharding import AxisType, PartitionSpec
from problems import M

from sasg_jax import exchange

MESSAGE = {
    "values": np.random.default_rng(0).normal(size=(M, 5)).astype(np.float32),
    "indices": np.arange(M * 5, dtype=np.uint8).reshape(M, 5),
}
UPLOADED = np.array([True, False, True, True])


def _on_devices(fn, *args):
    """``fn`` for each worker on its own device; what every device returned, leading axis M."""

    def on_one_device(*blocks):
        result = fn(*problems.at(blocks, 0))
        return jax.tree.map(lambda x: x[None], result)

    mesh = jax.make_mesh((M,), ("workers",), axis_types=(AxisType.Auto,), devices=jax.devices()[:M])
    spec = PartitionSpec("workers")
    mapped = jax.shard_map(on_one_device, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return problems.one_at_a_time(jax.jit(mapped))(*args)


def _on_workers(fn, *args):
    return jax.jit(jax.vmap(fn, axis_name="workers"))(*args)


def _pmapped(fn, *args):
    return jax.pmap(fn, axis_name="workers", devices=jax.devices()[:M])(*args)


DRIVERS = pytest.mark.parametrize("run", [_on_workers, _pmapped, _on_devices])


@DRIVERS
def test_gather_hands_every_worker_every_message(run):
    got = run(lambda message, flag: exchange.gather(message, flag, "workers"), MESSAGE, UPLOADED)
    for worker in range(M):
        chex.assert_trees_all_equal(problems.at(got, worker), (MESSAGE, UPLOADED))


@DRIVERS
def test_psum_sums_over_workers(run):
    dense = {"x": MESSAGE["values"], "scalar": MESSAGE["values"][:, 0]}
    got = run(lambda message: exchange.psum(message, "workers"), dense)
    want = jax.tree.map(lambda x: x.sum(0, dtype=np.float64), dense)
    for worker in range(M):
        chex.assert_trees_all_close(problems.at(got, worker), want, atol=1e-6)
    for x in jax.tree.leaves(got):  # every replica has the same bits
        assert len({np.asarray(row).tobytes() for row in x}) == 1


@DRIVERS
def test_psum_of_half_precision_is_taken_in_float32(run):
    """256 + 1 + 1 + 2 is 260; in bfloat16 the ones would be rounded away."""
    x = jnp.array([256, 1, 1, 2], jnp.bfloat16)
    got = run(lambda x: exchange.psum(x, "workers"), x)
    chex.assert_type(got, jnp.bfloat16)
    assert got.tolist() == [260.0] * M


def test_psum_of_what_all_workers_share():
    """Under vmap a value that does not depend on the worker still counts once for each."""
    got = _on_workers(lambda m: exchange.psum(jnp.float32(3), "workers") + 0 * m, jnp.zeros(M))
    assert got.tolist() == [3.0 * M] * M


def test_simulated_psum_does_not_depend_on_the_worker():
    """vmap may return it as shared: that is how it checks that replicas agree."""
    fn = jax.vmap(lambda x: exchange.psum(x, "workers"), out_axes=None, axis_name="workers")
    np.testing.assert_array_equal(fn(jnp.arange(4.0)), 6.0)


def test_psum_under_a_vmap_over_seeds():
    x = np.arange(12, dtype=np.float32).reshape(3, M)
    over_workers = jax.vmap(
        lambda x: exchange.psum(x, "workers"), out_axes=None, axis_name="workers"
    )
    np.testing.assert_array_equal(jax.vmap(over_workers)(x), x.sum(1))
