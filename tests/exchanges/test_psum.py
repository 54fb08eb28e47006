"""The sum of what everybody sends: wide, in order, the same bits everywhere."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from jax.sharding import AxisType, PartitionSpec
from problems import M

from sasg_jax.exchanges import Traffic
from sasg_jax.exchanges.psum import PSUM


def _sum(message):
    """The sum of the messages; its leading axis of one row off."""
    return problems.at(PSUM.collect(message, None, "workers"), 0)


def _mean(tree):
    assert PSUM.mean is not None
    return PSUM.mean(tree, "workers")


def _simulated(fn, *args):
    return jax.jit(jax.vmap(fn, out_axes=None, axis_name="workers"))(*args)


def _on_devices(fn, *args):
    """The result of every device, which must be one: its bits are looked at."""
    mesh = jax.make_mesh((M,), ("workers",), axis_types=(AxisType.Auto,), devices=jax.devices()[:M])
    mapped = jax.shard_map(
        lambda *blocks: fn(*problems.at(blocks, 0)),
        mesh=mesh,
        in_specs=PartitionSpec("workers"),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    result = problems.one_at_a_time(jax.jit(mapped))(*args)
    assert problems.same_on_all_devices(result)
    return jax.device_get(result)


DRIVERS = pytest.mark.parametrize("run", [_simulated, _on_devices])


@DRIVERS
def test_sums_over_workers(run):
    rng = np.random.default_rng(0)
    dense = {
        "x": rng.normal(size=(M, 5)).astype(np.float32),
        "scalar": rng.normal(size=M).astype(np.float32),
        "integers": rng.integers(0, 2**20, (M, 3)).astype(np.int32),
    }
    got = run(_sum, dense)
    want = {name: x.astype(np.float64).sum(0) for name, x in dense.items()}
    chex.assert_trees_all_close(got, want, atol=1e-6)
    chex.assert_trees_all_close(run(_mean, dense["x"]), want["x"] / M, atol=1e-6)


@DRIVERS
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_summed_in_float32(run, dtype):
    """In bfloat16 the ones would be rounded away, and in float16 the sum does not fit."""
    x = jnp.array({jnp.bfloat16: [256, 1, 1, 2], jnp.float16: [6e4, 6e4, 6e4, -4]}[dtype], dtype)
    exact = np.asarray(x, np.float64).sum()
    total = run(_sum, x)
    chex.assert_type(total, jnp.float32)
    assert float(total) == exact
    mean = run(_mean, x)
    chex.assert_type(mean, dtype)
    assert float(mean) == float(jnp.asarray(exact / M, dtype))


def test_what_all_workers_share_counts_once_for_each():
    fn = lambda m: _sum(jnp.float32(3)) + 0 * m
    assert jax.vmap(fn, axis_name="workers")(jnp.zeros(M)).tolist() == [3.0 * M] * M


def test_under_a_vmap_over_seeds():
    x = np.arange(12, dtype=np.float32).reshape(3, M)
    over_workers = jax.vmap(_sum, out_axes=None, axis_name="workers")
    np.testing.assert_array_equal(jax.vmap(over_workers)(x), x.sum(1))


def test_links_by_hand():
    """A ring sends every byte twice, but for the parts that start and end at the worker. Whoever
    uploads, all send: three rounds of 2 * 100 * 3/4."""
    traffic = Traffic(
        upload_bytes=100,
        downlink_bytes=7,
        flag_bytes=0,
        uploads_by_worker=[0, 3, 1, 2],
        rounds_by_uploads=[0, 1, 1, 1, 0],
        steps=3,
    )
    assert PSUM.links(traffic) == ([450] * M, [450] * M)


def test_half_precision_moves_as_float32():
    shapes = [jax.ShapeDtypeStruct((3,), t) for t in (jnp.bfloat16, jnp.float16, jnp.float32)]
    assert PSUM.moved_bytes(shapes) == 3 * 3 * 4
    assert PSUM.moved_bytes([jax.ShapeDtypeStruct((2,), jnp.float64)]) == 16
