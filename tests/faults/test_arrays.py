"""Arrays as people have them: theirs after the step, anywhere, of any type, twice in one tree."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from problems import M

import sasg_jax

DRIVERS = {
    "vmap": {},
    "chunks": {"chunk_size": 2},
    "shard_map": {"driver": "shard_map"},
    "pmap": {"driver": "pmap"},
}
ON_DEVICES = ("shard_map", "pmap")
SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)
ALL = np.ones(M, bool)
BATCH = np.array([[1.0, 2], [0, 1], [3, 3], [-1, 2]], np.float32)


def _loss(params, batch):
    leaves = jax.tree.leaves(params)
    return sum(jnp.sum((x.astype(jnp.float32) - batch.mean()) ** 2) for x in leaves)


def _loss_with_state(params, batch, *, model_state):
    return _loss(params, batch), jax.tree.map(lambda x: x + 1, model_state)


def _tx(**options):
    return sasg_jax.sasg(0.05, num_workers=M, density=0.5, history=1, **options)


@functools.cache
def _train_step(name):
    """With an optimiser after ours that keeps parameters, and a model state."""
    tx = sasg_jax.pipeline(
        sasg_jax.aggregate(sasg_jax.identity(), sasg_jax.innovation(3.0, history=1), num_workers=M),
        optax.contrib.dog(1.0),
    )
    return sasg_jax.make_train_step(
        _loss_with_state, tx, num_workers=M, has_model_state=True, **DRIVERS[name]
    )


# What is the caller's -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vmap", *ON_DEVICES])
def test_what_the_caller_has_is_still_there(name):
    """One array stands twice in the parameters, and in the model state."""
    x, y = jnp.ones(6), jnp.ones((2, 3))
    if name in ON_DEVICES:  # there already, where no copy need be made
        mesh = jax.sharding.Mesh(jax.devices()[:M], ("workers",))
        x, y = jax.device_put((x, y), jax.NamedSharding(mesh, jax.P()))
    train_step = _train_step(name)
    state = train_step.init({"x": x, "again": x, "y": y}, {"seen": x, "y": y})
    state, _ = train_step.step(state, BATCH, ALL)
    state, _ = train_step.step(state, BATCH, ALL)
    assert not x.is_deleted()
    assert not y.is_deleted()
    np.testing.assert_array_equal(x, np.ones(6))
    assert (state.params["x"] != 1).all()
    np.testing.assert_array_equal(state.params["x"], state.params["again"])


@pytest.mark.parametrize("share", [False, True])
def test_no_buffer_stands_twice_in_ones_own_loop(share):
    """One's own step may donate parameters and state: XLA refuses a buffer that is given twice."""
    params = {"x": jnp.ones(6), "y": jnp.ones((2, 3))}
    tx = sasg_jax.pipeline(optax.trace(0.9), _tx(share_stale_params=share), optax.ema(0.5))
    once = tx.init(params)
    for state in (once, sasg_jax.stack_workers(once, M)):
        buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((params, state))]
        assert len(buffers) > 12
        assert len(set(buffers)) == len(buffers)


# Where they are -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vmap", *ON_DEVICES])
def test_arrays_on_one_device(name):
    """Parameters, batches, presence and a restored state, each on some device."""
    given = (
        {"x": jnp.ones(6), "again": jnp.ones(6), "y": jnp.ones((2, 3))},
        {"seen": jnp.ones(6), "y": jnp.ones((2, 3))},
    )
    plain, train_step = _train_step("vmap"), _train_step(name)
    here, there = jax.devices()[2], jax.devices()[5 if name in ON_DEVICES else 2]
    expected, state = plain.init(*given), train_step.init(*jax.device_put(given, here))
    for where in (here, there):
        expected, _ = plain.step(expected, BATCH, ALL)
        state, _ = train_step.step(state, *jax.device_put((BATCH, ALL), where))
        state = jax.device_put(state, there)
    for name, x in expected.params.items():
        np.testing.assert_allclose(state.params[name], x, rtol=1e-5)


@pytest.mark.parametrize("name", DRIVERS)
@pytest.mark.parametrize("present", [np.ones(M, np.float32), np.ones((M, 1), bool)], ids=str)
def test_presence_of_another_kind_is_named(name, present):
    train_step = sasg_jax.make_train_step(_loss, _tx(), num_workers=M, **DRIVERS[name])
    with pytest.raises(ValueError, match=r"^Expected present to be of dtype bool and shape \(4,\)"):
        train_step.step(train_step.init(jnp.ones(3)), BATCH, present)


def test_parameters_whose_copies_differ_start_as_one():
    """Replicas that have drifted apart on the devices of one process are no start."""
    mesh = jax.sharding.Mesh(jax.devices()[:M], ("workers",))
    drifted = jax.jit(
        jax.shard_map(
            lambda: jnp.full(3, jax.lax.axis_index("workers"), jnp.float32),
            mesh=mesh,
            in_specs=(),
            out_specs=jax.P(),
            check_vma=False,
        )
    )()
    assert not problems.same_on_all_devices(drifted)
    train_step = sasg_jax.make_train_step(_loss, _tx(), num_workers=M, driver="shard_map")
    assert problems.same_on_all_devices(train_step.init({"x": drifted}).params)


@pytest.mark.parametrize(
    ("driver", "kind"),
    [
        ("vmap", jax.sharding.AxisType.Explicit),
        ("vmap", jax.sharding.AxisType.Auto),
        ("shard_map", jax.sharding.AxisType.Explicit),
        ("pmap", jax.sharding.AxisType.Explicit),
    ],
)
def test_a_mesh_that_is_set_around_is_named(driver, kind):
    train_step = sasg_jax.make_train_step(_loss, _tx(), num_workers=M, driver=driver)
    mesh = jax.make_mesh((M,), ("workers",), axis_types=(kind,))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"^Expected no mesh of jax.set_mesh"):
        train_step.init({"x": jnp.ones(3)})


@pytest.mark.slow
def test_a_mesh_for_the_compiler_may_be_set_around_devices():
    train_step = sasg_jax.make_train_step(_loss, _tx(), num_workers=M, driver="shard_map")
    mesh = jax.make_mesh((M,), ("workers",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        _, info = train_step.step(train_step.init({"x": jnp.ones(3)}), BATCH)
    assert info.uploaded.all()


# Of what type they are ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chunks", *map(SLOW, ("vmap", "shard_map"))])
def test_numbers_of_python_and_numpy(name):
    """They are 32-bit arrays of no weak type from the start: a step is compiled once."""
    way = sasg_jax.local_steps(
        _loss_with_state, optax.inject_hyperparams(optax.sgd)(0.1), steps=1, has_model_state=True
    )
    tx = sasg_jax.pipeline(optax.inject_hyperparams(optax.clip)(1.0), _tx(exchange="gather"))
    train_step = sasg_jax.make_train_step(way, tx, num_workers=M, **DRIVERS[name])
    params = {
        "python": 1.0,
        "scalar64": np.float64(2),
        "scalar32": np.float32(3),
        "array64": np.zeros(3),
        "weak": jnp.asarray(1.0),
    }
    model_state = {"count": 0, "mean": 0.5, "array64": np.zeros(2), "integer64": np.int64(3)}
    state = train_step.init(params, model_state)
    wire = sasg_jax.Ledger(state.opt_state).to_dict()["wire"]
    assert wire["upload_bytes"] == 5 * (4 + 1)  # one of three entries, and the four scalars
    assert wire["downlink_bytes"] == 7 * 4
    places = jax.tree.map(lambda x: (jax.typeof(x), x.sharding), state)
    assert {x.dtype.itemsize for x in jax.tree.leaves((state.params, state.model_state))} == {4}
    state, _ = train_step.step(state, BATCH[:, None])
    assert jax.tree.map(lambda x: (jax.typeof(x), x.sharding), state) == places


def test_numpy_scalars_as_settings():
    """They count as the numbers that they are."""
    settings = {"num_workers": 4, "density": 0.5, "alpha": 2.0, "history": 3, "max_staleness": 5}
    types = np.int64, np.float64, np.float32, np.int8, np.uint16
    scalars: dict = {
        name: kind(value) for kind, (name, value) in zip(types, settings.items(), strict=True)
    }
    rate: Any = np.float32(0.5)
    tx = sasg_jax.sasg(rate, **scalars)
    assert tx.method.settings == sasg_jax.sasg(0.5, **settings).method.settings
    assert tx.method.learning_rate == 0.5


@pytest.mark.parametrize(("dtype", "name"), [("float64", "vmap"), SLOW("float32", "chunks")])
def test_with_64_bits_enabled(dtype, name):
    """No part of the state changes its type, and the bytes are those of what is sent."""
    with jax.enable_x64(True):
        train_step = sasg_jax.make_train_step(_loss, _tx(), num_workers=M, **DRIVERS[name])
        state = train_step.init({"x": jnp.ones(6, dtype)})
        types = jax.tree.map(jax.typeof, state)
        ledger = sasg_jax.Ledger(state.opt_state)
        state, infos = problems.scan_rounds(train_step.step)(state, (np.stack([BATCH] * 12),))
        ledger.record(np.asarray(infos.uploaded))
        assert jax.tree.map(jax.typeof, state) == types
        assert state.params["x"].dtype == dtype
        message = 3 * (np.dtype(dtype).itemsize + 1)
        assert ledger.uplink_bytes == ledger.uploads * message + 12 * M
