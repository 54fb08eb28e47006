"""Every worker hears from all who uploads, however many there are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from jax.sharding import AxisType, PartitionSpec

from sasg_jax.exchanges.flags import (
    from_root,
    tell_all,
    tell_all_links,
    tell_through_root,
    tell_through_root_links,
)

TELL = {"all": (tell_all, tell_all_links), "root": (tell_through_root, tell_through_root_links)}


def _on_devices(fn, size):
    """``fn`` for each worker on its own device; what every device returned, leading axis M."""
    devices = jax.devices()[:size]
    mesh = jax.make_mesh((size,), ("workers",), axis_types=(AxisType.Auto,), devices=devices)
    spec = PartitionSpec("workers")
    one = lambda x: fn(x[0])[None]
    mapped = jax.shard_map(one, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return problems.one_at_a_time(jax.jit(mapped))


@pytest.mark.parametrize("size", [1, 2, 5, 8])  # a power of two, and one that is not
@pytest.mark.parametrize("name", TELL)
def test_everybody_hears_of_everybody(name, size):
    tell = functools.partial(TELL[name][0], axis_name="workers")
    told = _on_devices(tell, size)
    rng = np.random.default_rng(size)
    for flags in (*np.eye(size, dtype=bool)[:3], *rng.integers(0, 2, (3, size)).astype(bool)):
        np.testing.assert_array_equal(told(flags), np.tile(flags, (size, 1)))
        simulated = jax.vmap(tell, out_axes=None, axis_name="workers")(flags)
        np.testing.assert_array_equal(simulated, flags)


def test_links_by_hand():
    """Among five, each sends one byte for each of the others, whoever passes it on; over the root
    each sends its own and hears five."""
    assert tell_all_links(5) == ([4] * 5, [4] * 5)
    assert tell_through_root_links(5) == ([4 * 5, 1, 1, 1, 1], [4, 5, 5, 5, 5])
    assert tell_all_links(1) == tell_through_root_links(1) == ([0], [0])


def test_from_root_brings_every_bit():
    """Also of integers whose other workers' bits are set."""
    fn = _on_devices(lambda x: from_root(x, "workers"), 3)
    x = jnp.array([[0x80000001, 0], [0xFFFFFFFF, 5], [7, 0xFFFFFFFF]], jnp.uint32)
    np.testing.assert_array_equal(fn(x), np.tile(x[0], (3, 1)))
