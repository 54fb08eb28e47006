"""A ready training step: one worker's round, under the driver that is asked for."""

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from sasg_jax import _checks, drivers
from sasg_jax._checks import require
from sasg_jax.directions import Direction, as_direction
from sasg_jax.numerics import PyTree
from sasg_jax.state_axes import MULTI_STEPS, for_each_worker, stack_workers
from sasg_jax.states import find_state
from sasg_jax.train_state import TrainState, worker_round


class TrainStep(NamedTuple):
    """A training run's two functions, made by :func:`make_train_step`."""

    init: Callable[..., TrainState]
    """``state = init(params, model_state=(), key=None)``; ``model_state`` is one worker's."""
    step: Any
    """``state, info = step(state, batch, present=None)``, jitted. The old state is donated: do not
    use it again. Every leaf of ``batch`` has a leading axis of M, and then those that the direction
    has: of its steps, and of what it accumulates. ``present``: who takes part, shape=(M,),
    dtype=bool; None is all."""


def make_train_step(
    loss_fn: Callable[..., Any] | Direction,
    tx: optax.GradientTransformation,
    *,
    num_workers: int,
    driver: str = "vmap",
    has_aux: bool = False,
    has_model_state: bool = False,
    has_key: bool = False,
    devices: Sequence[Any] | None = None,
    axis_name: str = "workers",
    chunk_size: int | None = None,
    donate: bool = True,
    pass_value: bool = False,
) -> TrainStep:
    """Makes the jitted step of a whole training run, simulated or on several devices.

    Args:
      loss_fn: one worker's loss, ``loss_fn(params, batch)``, as for :func:`sasg_jax.gradient`, or a
        direction made of it; without collectives over ``axis_name`` where workers may be silent.
      tx, num_workers: an optax optimiser that contains one transformation of ours, and M.
      driver: ``"vmap"`` simulates all workers on one device; ``"shard_map"`` and ``"pmap"`` run
        each on a device of its own, the former also over several processes.
      has_aux, has_model_state, has_key: as for :func:`sasg_jax.gradient`, where ``loss_fn`` is a
        function. Every worker keeps a model state of its own; a round in which its direction counts
        for nothing and the pass at stale parameters never write it. See :func:`mean_model_state`.
      devices: the M devices of ``"pmap"`` and ``"shard_map"``; the first M by default.
      axis_name: the axis that ``tx`` was built with.
      chunk_size: how many of the simulated workers compute at a time; only their gradients are in
        memory. None is all at once. See also ``share_stale_params`` of :func:`sasg_jax.sasg`.
      donate: whether ``step`` may reuse the memory of the state it is given.
      pass_value: whether ``tx`` needs ``value=``, the loss: it gets the mean over workers that take
        part and have a finite one, a sum of 8 bytes that the ledger does not count.

    ValueError for an argument out of range, or too few devices; when the step is first called, for
    a leading axis of ``batch`` that is not M, a ``tx`` without one of ours, or with state that
    differs between workers where it must not."""
    num_workers = _checks.check_int("num_workers", num_workers, minimum=1)
    _checks.check_choice("driver", driver, ("vmap", "pmap", "shard_map"))
    _checks.check_axis_name(axis_name)
    _checks.check_bool("donate", donate)
    _checks.check_bool("pass_value", pass_value)
    has = {"has_aux": has_aux, "has_model_state": has_model_state, "has_key": has_key}
    direction = as_direction(loss_fn, **has)
    if isinstance(tx, optax.MultiSteps):
        raise ValueError(MULTI_STEPS)
    tx = optax.with_extra_args_support(tx)
    devices = _check_devices(driver, devices, num_workers)
    if chunk_size is not None:
        chunk_size = _checks.check_int("chunk_size", chunk_size, minimum=1)
        require(driver == "vmap", "chunk_size", chunk_size, f"to be None for driver={driver!r}")
        drivers.check_chunks(tx, chunk_size)

    how = {"axis_name": axis_name, "pass_value": pass_value}

    def one_worker(*state_batch_and_present):
        try:
            return worker_round(direction, tx, *state_batch_and_present, **how)
        except TypeError as error:
            note = "If the optimiser needs value=..., say pass_value=True. None has value_fn."
            if not pass_value and "'value'" in str(error):
                error.add_note(note)
            raise

    over = {"num_workers": num_workers, "axis_name": axis_name}
    simulated = functools.partial(drivers.simulate, one_worker, **over)
    mesh = Mesh(np.asarray(devices), (axis_name,)) if driver != "vmap" else None
    run = simulated if mesh is None else functools.partial(drivers.on_mesh, one_worker, mesh=mesh)
    if chunk_size is not None:
        chunks = functools.partial(drivers.simulate_in_chunks, chunk_size=chunk_size, **how)
        run = functools.partial(chunks, direction, tx)

    def check(state, batch, present):
        made_for = find_state(state.opt_state).wire.num_workers
        allowed = f"to be that of the state, {made_for}"
        require(made_for == num_workers, "num_workers", num_workers, allowed)
        _check_batch(batch, num_workers, direction)
        if driver != "vmap":
            # The simulation refuses to return as shared what depends on the worker. On devices it
            # would be one worker's, and replicas would drift apart.
            shape = lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))
            jax.eval_shape(simulated, *jax.tree.map(shape, (state, batch, present)))

    def init(params: PyTree, model_state: PyTree = (), key: jax.Array | None = None) -> TrainState:
        _check_init(direction, driver, params, model_state, key)
        given = _checks.as_params(params), model_state if direction.has_model_state else (), key

        def make(params, model_state, key):
            own = model_state, direction.init(params)
            stacked = jax.tree.map(for_each_worker(num_workers), own)
            keys = () if key is None else jax.random.split(key, num_workers)
            opt_state = stack_workers(tx.init(params), num_workers)
            state = TrainState(params, opt_state, stacked[0], keys, stacked[1])
            # The step donates them. What has just been stacked is nobody else's.
            copy = lambda own, part: part if own else jax.tree.map(jnp.copy, part)
            return jax.tree.map(copy, drivers.owners(state), state)

        if mesh is None:
            return make(*jax.tree.map(_on_one_device, given))
        if jax.process_count() > 1:
            _check_same_everywhere(given, mesh)
        # Every part where the step leaves it, so that the step is compiled once; each process
        # makes those of its own devices.
        given = jax.tree.map(_to_host, given)
        where = drivers.shardings(jax.eval_shape(make, *given), mesh)
        return jax.jit(make, out_shardings=where)(*given)

    def step(state, batch, present=None):
        check(state, batch, present)
        return run(state, batch, present)

    mapped: dict[Any, Any] = {}  # by the structure of what it is called with

    def mapped_step(state, batch, present=None):
        arguments = state, batch, present
        known = jax.tree.structure(arguments), tuple(map(jnp.shape, jax.tree.leaves(arguments)))
        if known not in mapped:
            check(*arguments)
            how = {"devices": devices, "axis_name": axis_name, "donate": donate}
            mapped[known] = drivers.on_devices(one_worker, arguments[0], **how)
        return mapped[known](*arguments)

    jitted = jax.jit(step, donate_argnums=(0,) if donate else ())
    return TrainStep(init, _Step(mapped_step if driver == "pmap" else jitted, mesh))


class _Step:
    """A jitted step that also takes what lies on one device, or on the host, where it runs on
    several: a state is put where the step leaves it, so that the step is compiled once."""

    def __init__(self, jitted: Any, mesh: Mesh | None):
        self._jitted, self._mesh = jitted, mesh

    def __call__(self, state: TrainState, batch: PyTree, present: Any = None) -> Any:
        try:
            return self._jitted(*self._place(state, batch, present))
        except (TypeError, ValueError) as error:
            # What is wrong is said last, not that JAX has hidden some frames.
            notes = getattr(error, "__notes__", [])
            error.__notes__ = [note for note in notes if "JAX has removed" not in note]
            raise

    def lower(self, state: TrainState, batch: PyTree, present: Any = None) -> Any:
        return self._jitted.lower(*self._place(state, batch, present))

    def _place(self, state: TrainState, batch: PyTree, present: Any) -> tuple[Any, ...]:
        last = () if present is None else (present,)  # what is lowered takes what it was given
        if (mesh := self._mesh) is None:
            return state, batch, *last
        devices = set(mesh.devices.flat)
        on_one = lambda x: isinstance(x.sharding, SingleDeviceSharding)
        is_elsewhere = lambda x: _is_tied(x) and (on_one(x) or x.sharding.device_set != devices)
        put = lambda x, sharding: jax.device_put(x, sharding) if is_elsewhere(x) else x
        is_loose = lambda x: is_elsewhere(x) or isinstance(x, np.ndarray) or _is_free(x)
        if any(map(is_loose, jax.tree.leaves(state))):
            # A copy, as the step may donate it: an array of NumPy is somebody else's.
            copy = functools.partial(jax.device_put, may_alias=False)
            place = lambda x, sharding: copy(x, sharding) if is_loose(x) else x
            state = jax.tree.map(place, state, drivers.shardings(state, mesh))
        split = NamedSharding(mesh, PartitionSpec(*mesh.axis_names))
        batch = jax.tree.map(lambda x: put(x, split), batch)
        return state, batch, *(put(x, NamedSharding(mesh, PartitionSpec())) for x in last)


def _check_init(direction: Direction, driver: str, params, model_state, key) -> None:
    if not jax.tree.leaves(params):
        raise ValueError(f"Expected params to hold at least one array, got {params!r}.")
    allowed = f"to be {'a PRNG key' if direction.has_key else 'None'} here"
    require(direction.has_key == (key is not None), "key", key, allowed)
    if (has := direction.has_model_state) != bool(jax.tree.leaves(model_state)):
        what = "hold arrays" if has else "be empty"
        raise ValueError(f"Expected model_state to {what}, as has_model_state={has}.")
    kinds = jax.sharding.get_abstract_mesh().axis_types
    if kinds and (driver == "vmap" or jax.sharding.AxisType.Explicit in kinds):
        why = f"Expected no mesh of jax.set_mesh around a step with driver={driver!r}, which says "
        raise ValueError(why + f"itself where its arrays lie, got one with axes of {kinds}.")


def _check_batch(batch: PyTree, num_workers: int, direction: Direction) -> None:
    own = {"steps": direction.steps, "accumulate": direction.accumulate}
    own = {name: size for name, size in own.items() if size is not None}
    leading = num_workers, *own.values()
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        if jnp.shape(leaf)[: len(leading)] != leading:
            rest = "".join(f", and then one of {name}={size}" for name, size in own.items())
            why = f"Expected batch{jax.tree_util.keystr(path)} to have a leading axis of "
            raise ValueError(why + f"num_workers={num_workers}{rest}, got shape {jnp.shape(leaf)}.")


def _is_tied(x: Any) -> bool:
    """Whether it is an array that lies on devices that someone has chosen."""
    return isinstance(x, jax.Array) and not isinstance(x, Tracer) and x.committed


def _is_free(x: Any) -> bool:
    """Whether it is an array that lies where nobody has chosen."""
    return isinstance(x, jax.Array) and not isinstance(x, Tracer) and not x.committed


def _on_one_device(x: Any) -> Any:
    """An array that lies on several devices, e.g. over an explicit mesh, on the first of them."""
    if not _is_tied(x) or isinstance(x.sharding, SingleDeviceSharding):
        return x
    first = min(x.sharding.addressable_devices, key=lambda device: device.id)
    return jax.device_put(x, SingleDeviceSharding(first))


def _to_host(x: Any) -> Any:
    """An array that a computation on any devices takes: one of one device would tie it there."""
    if not _is_tied(x) or not x.is_fully_addressable:
        return x
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = jnp.asarray(np.asarray(jax.random.key_data(x)))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    return np.asarray(x)


def _check_same_everywhere(tree: PyTree, mesh: Mesh) -> None:
    """Raises ValueError, in every process, where processes start from different values."""
    digest = hashlib.sha256()
    for x in jax.tree.leaves(tree):
        if jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            x = np.asarray(x)
            digest.update(f"{x.shape} {x.dtype}".encode() + x.tobytes())
    mine = np.frombuffer(digest.digest(), np.int32)
    # A row for each device: processes may have different numbers of them.
    devices, split = list(mesh.devices.flat), NamedSharding(mesh, PartitionSpec(*mesh.axis_names))
    shape = len(devices), mine.size
    rows = jax.make_array_from_callback(shape, split, lambda index: mine[None])
    rows = np.asarray(multihost_utils.process_allgather(rows, tiled=True))
    processes = np.array([device.process_index for device in devices])
    others = sorted(set(processes[(rows != rows[0]).any(1)].tolist()))
    if others:
        why = "Expected params, model_state and key to be the same in all processes, but those of "
        why += f"process {', '.join(map(str, others))} differ from those of process "
        raise ValueError(why + f"{processes[0]}. Initialise them from the same seed.")


def _check_devices(driver: str, devices: Any, num_workers: int) -> Sequence[Any]:
    if driver == "vmap":
        require(devices is None, "devices", devices, "to be None for driver='vmap'")
        return ()
    alone, allowed = jax.process_count() == 1, "to be 'shard_map' where there are several processes"
    require(driver != "pmap" or alone, "driver", driver, allowed)
    given = jax.devices()[:num_workers] if devices is None else list(devices)
    if len(given) != num_workers:
        why = f"Expected one device for each of num_workers={num_workers}, got {len(given)}. On CPU"
        flag = f"--xla_force_host_platform_device_count={num_workers}"
        raise ValueError(why + f", start with XLA_FLAGS={flag} in the environment.")
    return given
