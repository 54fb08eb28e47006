"""A ready training step: one per-worker function under vmap, pmap or shard_map."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sasg_jax import chunks
from sasg_jax._checks import check_axis_name, check_choice, check_int, expected
from sasg_jax.state_axes import per_worker, stack_workers
from sasg_jax.transform import WorkerHalf, diagnostics, find_state

PyTree = Any
Device = Any  # jax.Device


class TrainState(NamedTuple):
    """Everything that a run carries from round to round."""

    params: PyTree  # the same on all workers
    opt_state: PyTree  # optax state; a worker's own parts have a leading axis M
    model_state: PyTree  # e.g. BatchNorm statistics, leading axis M; () if there is none
    keys: PyTree  # a PRNG key for each worker, shape=(M,); () if there are none


class RoundInfo(NamedTuple):
    """What one round reports. M is the number of workers."""

    loss: jax.Array  # each worker's own, before the step. shape=(M,)
    uploaded: jax.Array  # shape=(M,), dtype=jnp.bool_
    finite: jax.Array  # whether the gradient was. shape=(M,), dtype=jnp.bool_
    staleness: jax.Array  # after the round, 1 = just uploaded. shape=(M,), dtype=jnp.int32
    innovation: jax.Array  # ‖g - g'‖², 0 in a forced round. shape=(M,), dtype=jnp.float32
    threshold: jax.Array  # right-hand side of (6). shape=(), dtype=jnp.float32
    aux: PyTree  # of loss_fn, leading axis M; () if there is none


class TrainStep(NamedTuple):
    """A training run's two functions, made by :func:`make_train_step`."""

    init: Callable[..., TrainState]
    """``state = init(params, model_state=(), key=None)``; ``model_state`` is one worker's."""
    step: Callable[[TrainState, PyTree], tuple[TrainState, RoundInfo]]
    """``state, info = step(state, batch)``, jitted. The old state is donated: do not use it again.

    Every leaf of ``batch`` has a leading axis of M."""


def make_train_step(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation | optax.MultiSteps,
    *,
    num_workers: int,
    driver: str = "vmap",
    has_aux: bool = False,
    has_model_state: bool = False,
    has_key: bool = False,
    devices: Sequence[Device] | None = None,
    axis_name: str = "workers",
    chunk_size: int | None = None,
    donate: bool = True,
) -> TrainStep:
    """Makes the jitted step of a whole training run, simulated or on several devices.

    Args:
      loss_fn: one worker's loss, ``loss_fn(params, batch)``. With ``has_model_state`` it also gets
        ``model_state=``, and with ``has_key`` a fresh ``key=``, the same for the gradient at the
        current and at the stale parameters. It returns ``loss``, or ``(loss, aux)`` with
        ``has_aux``, ``(loss, new_model_state)`` with ``has_model_state``, and ``(loss,
        (new_model_state, aux))`` with both. It must not use collectives over ``axis_name``.
      tx: an optax optimiser that contains one transformation of ours.
      num_workers: M.
      driver: ``"vmap"`` simulates all workers on one device; ``"pmap"`` and ``"shard_map"`` run
        each on a device of its own.
      has_aux: whether ``loss_fn`` returns auxiliary values.
      has_model_state: whether the model has state, e.g. BatchNorm statistics. Every worker keeps
        its own; the pass at the stale parameters never writes it. See :func:`mean_model_state`.
      has_key: whether ``loss_fn`` needs random numbers.
      devices: the M devices of ``"pmap"`` and ``"shard_map"``; the first M by default.
      axis_name: the axis that ``tx`` was built with.
      chunk_size: how many of the simulated workers compute at a time; it divides M. Only their
        gradients are then in memory. None is all at once. See also ``share_stale_params`` of
        :func:`sasg_jax.sasg`.
      donate: whether ``step`` may reuse the memory of the state it is given.

    Raises:
      ValueError: an argument is out of its range, or there are too few devices. When the step is
        first called: a leading axis of ``batch`` is not M, ``tx`` contains no transformation of
        ours, or it carries state that differs between workers where it must not.
    """
    check_int("num_workers", num_workers, minimum=1)
    check_choice("driver", driver, ("vmap", "pmap", "shard_map"))
    check_axis_name(axis_name)
    if isinstance(tx, optax.MultiSteps):  # its own gradient_transformation() would drop grad_fn
        init_fn, update_fn = tx.init, cast(Any, tx.update)
        tx = optax.GradientTransformationExtraArgs(init_fn, update_fn)
    tx = optax.with_extra_args_support(tx)
    devices = _check_devices(driver, devices, num_workers)
    if chunk_size is not None:
        chunk_size = check_int("chunk_size", chunk_size, minimum=1)
        if driver != "vmap":
            raise expected("chunk_size", chunk_size, f"to be None for driver={driver!r}")

    def loss_parts(params, model_state, key, batch):
        extra = {"model_state": model_state} if has_model_state else {}
        extra |= {"key": key} if has_key else {}
        out = loss_fn(params, batch, **extra)
        new_model_state = aux = ()
        if has_model_state and has_aux:
            loss, (new_model_state, aux) = out
        elif has_model_state:
            loss, new_model_state = out
        elif has_aux:
            loss, aux = out
        else:
            loss = out
        return loss, (new_model_state, aux)

    value_and_grad = jax.value_and_grad(loss_parts, has_aux=True)

    def worker_step(state: TrainState, batch: PyTree) -> tuple[TrainState, RoundInfo]:
        """One worker's view of a round."""
        params, opt_state, model_state, key = state
        key, round_key = jax.random.split(key) if has_key else ((), ())
        (loss, (new_model_state, aux)), grads = value_and_grad(
            params, model_state, round_key, batch
        )

        def grad_fn(stale_params):
            stale_params = _fill_masked(stale_params, params)
            return value_and_grad(stale_params, model_state, round_key, batch)[1]

        updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
        state = TrainState(optax.apply_updates(params, updates), opt_state, new_model_state, key)
        return state, RoundInfo(loss, *diagnostics(opt_state), aux)

    def simulated(state: TrainState, batch: PyTree) -> tuple[TrainState, RoundInfo]:
        axes = _choose(_owners(state), 0, None)
        over_workers = jax.vmap(
            worker_step,
            in_axes=(axes, 0),
            out_axes=(axes, _choose(_INFO_OWNERS, 0, None)),
            axis_name=axis_name,
            axis_size=num_workers,
        )
        try:
            return over_workers(state, batch)
        except ValueError as error:
            if "out_axes" not in str(error):
                raise
            raise ValueError(
                "Expected params and everything in the optimiser state after the sasg_jax "
                "transformation to be the same on all workers, but a part depends on the worker. "
                "In optax.chain, put what sees a worker's own gradients before the sasg_jax "
                "transformation."
            ) from error

    def simulated_in_chunks(state: TrainState, batch: PyTree) -> tuple[TrainState, RoundInfo]:
        assert chunk_size is not None
        owners = _owners(state)
        own = _keep_own(owners, state)
        to_one = TrainState(*_map_own(lambda x: x[0], owners, state))

        def worker_half(own, batch):
            def one_worker(own, batch):
                state = TrainState(*_fill_own(owners, own, to_one))
                state = state._replace(opt_state=chunks.link(state.opt_state, WorkerHalf()))
                state, info = worker_step(state, batch)
                message = find_state(state.opt_state).link.message
                state = state._replace(opt_state=chunks.link(state.opt_state, ()))
                return _keep_own(owners, state), info._replace(threshold=()), message

            return jax.vmap(one_worker, axis_name=axis_name)(own, batch)

        made = chunks.make_round(
            tx, worker_half, own, batch, state.params, to_one.opt_state, chunk_size=chunk_size
        )
        shared = TrainState(made.params, made.opt_state, state.model_state, state.keys)
        threshold = find_state(made.opt_state).server.threshold
        return _fill_own(owners, made.own, shared), made.infos._replace(threshold=threshold)

    def check(state: TrainState, batch: PyTree) -> None:
        for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
            if jnp.shape(leaf)[:1] != (num_workers,):
                raise ValueError(
                    f"Expected batch{jax.tree_util.keystr(path)} to have a leading axis of "
                    f"num_workers={num_workers}, got shape {jnp.shape(leaf)}."
                )
        if driver != "vmap" or chunk_size is not None:
            # vmap refuses to return as shared what depends on the worker. The others would return
            # one worker's, and replicas would drift apart.
            jax.eval_shape(simulated, state, batch)

    def init(params: PyTree, model_state: PyTree = (), key: jax.Array | None = None) -> TrainState:
        if has_key != (key is not None):
            raise expected("key", key, f"to be {'a PRNG key' if has_key else 'None'} here")
        if has_model_state != bool(jax.tree.leaves(model_state)):
            raise ValueError(
                f"Expected model_state to {'hold arrays' if has_model_state else 'be empty'}, as "
                f"has_model_state={has_model_state}."
            )

        def stack(x):
            return jnp.broadcast_to(x, (num_workers, *jnp.shape(x)))

        def make(params, model_state, key):
            return TrainState(
                params=jax.tree.map(jnp.array, params),  # copies: the step donates its state
                opt_state=stack_workers(tx.init(params), num_workers),
                model_state=jax.tree.map(stack, model_state) if has_model_state else (),
                keys=() if key is None else jax.random.split(key, num_workers),
            )

        if driver == "vmap":
            return make(params, model_state, key)
        # Every part where the step leaves it, so that the step is compiled once; each process
        # makes those of its own devices.
        shapes = jax.eval_shape(make, params, model_state, key)
        shardings = _shardings(shapes, _mesh(devices, axis_name))
        return jax.jit(make, out_shardings=shardings)(params, model_state, key)

    donated = (0,) if donate else ()

    if driver == "vmap":

        def vmapped_step(state, batch):
            check(state, batch)
            if chunk_size is None:
                return simulated(state, batch)
            chunks.check_chunks(state.opt_state, num_workers, chunk_size)
            return simulated_in_chunks(state, batch)

        return TrainStep(init, jax.jit(vmapped_step, donate_argnums=donated))

    if driver == "shard_map":

        def sharded_step(state, batch):
            check(state, batch)
            owners = _owners(state)

            def on_one_device(state, batch):
                # shard_map hands each worker a block with a leading axis of 1.
                state = _map_own(lambda x: x[0], owners, state)
                state, info = worker_step(state, jax.tree.map(lambda x: x[0], batch))
                expand = lambda x: x[None]
                return _map_own(expand, owners, state), _map_own(expand, _INFO_OWNERS, info)

            split, shared = PartitionSpec(axis_name), PartitionSpec()
            specs = _choose(owners, split, shared)
            return jax.shard_map(
                on_one_device,
                mesh=_mesh(devices, axis_name),
                in_specs=(specs, split),
                out_specs=(specs, _choose(_INFO_OWNERS, split, shared)),
                check_vma=False,
            )(state, batch)

        return TrainStep(init, jax.jit(sharded_step, donate_argnums=donated))

    mapped: dict[Any, Callable[..., Any]] = {}  # by the structure of what it is called with

    def pmapped_step(state, batch):
        check_key = jax.tree.structure((state, batch)), _shapes((state, batch))
        if check_key not in mapped:
            check(state, batch)
            axes = _choose(_owners(state), 0, None)
            mapped[check_key] = jax.pmap(
                worker_step,
                axis_name=axis_name,
                in_axes=(axes, 0),
                out_axes=(axes, _choose(_INFO_OWNERS, 0, None)),
                donate_argnums=donated,
                devices=devices,
            )
        return mapped[check_key](state, batch)

    return TrainStep(init, pmapped_step)


def mean_model_state(model_state: PyTree) -> PyTree:
    """The mean over workers of their model states, for evaluation and checkpoints.

    Integer leaves, e.g. counters, are taken from worker 0. The bytes that this moves between
    workers are counted by :meth:`sasg_jax.Ledger.record_model_state`.
    """

    def mean(x):
        return x.mean(0) if jnp.issubdtype(x.dtype, jnp.inexact) else x[0]

    return jax.tree.map(mean, model_state)


# Which parts of a round's report belong to one worker: all but the threshold.
_INFO_OWNERS: PyTree = RoundInfo(
    **{name: name != "threshold" for name in RoundInfo._fields}  # pyright: ignore
)


def _owners(state: TrainState) -> PyTree:
    """Whether each part of the state belongs to one worker; a prefix of the state."""
    opt_state = per_worker(state.opt_state)
    return TrainState(params=False, opt_state=opt_state, model_state=True, keys=True)


def _choose(owners: PyTree, own: Any, shared: Any) -> PyTree:
    return jax.tree.map(lambda is_own: own if is_own else shared, owners)


def _map_own(fn: Callable[[jax.Array], jax.Array], owners: PyTree, tree: PyTree) -> PyTree:
    """Applies ``fn`` to the arrays that belong to one worker."""
    return jax.tree.map(
        lambda is_own, part: jax.tree.map(fn, part) if is_own else part, owners, tree
    )


def _keep_own(owners: PyTree, tree: PyTree) -> PyTree:
    """The parts that belong to one worker, and ``()`` in place of the others."""
    return jax.tree.map(lambda is_own, part: part if is_own else (), owners, tree)


def _fill_own(owners: PyTree, own: PyTree, tree: PyTree) -> PyTree:
    """Puts the parts that belong to one worker into a tree."""
    return jax.tree.map(lambda is_own, mine, part: mine if is_own else part, owners, own, tree)


def _fill_masked(tree: PyTree, params: PyTree) -> PyTree:
    """Puts the current parameters where ``optax.masked`` has hidden them from the stale ones."""
    return jax.tree.map(
        lambda x, p: p if isinstance(x, optax.MaskedNode) else x,
        tree,
        params,
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )


def _shapes(tree: PyTree) -> tuple[Any, ...]:
    return tuple(jnp.shape(leaf) for leaf in jax.tree.leaves(tree))


def _mesh(devices: Sequence[Device], axis_name: str) -> Mesh:
    return Mesh(np.asarray(devices), (axis_name,))


def _shardings(state: TrainState, mesh: Mesh) -> PyTree:
    (axis_name,) = mesh.axis_names
    split = NamedSharding(mesh, PartitionSpec(axis_name))
    shared = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(
        lambda is_own, part: jax.tree.map(lambda _: split if is_own else shared, part),
        _owners(state),
        state,
    )


def _check_devices(
    driver: str, devices: Sequence[Device] | None, num_workers: int
) -> Sequence[Device]:
    if driver == "vmap":
        if devices is not None:
            raise expected("devices", devices, "to be None for driver='vmap'")
        return ()
    given = jax.devices()[:num_workers] if devices is None else list(devices)
    if len(given) != num_workers:
        raise ValueError(
            f"Expected one device for each of num_workers={num_workers}, got {len(given)}. On the "
            "CPU, set the environment variable "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={num_workers} before starting."
        )
    return given
