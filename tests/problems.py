"""What several test modules share: methods, small problems, and one worker's round under a map."""

import contextlib
import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
from jax.sharding import PartitionSpec

import sasg_jax

M = 4
ROUNDS = 300
LEARNING_RATE = 0.1
DENSITY = 0.1
ALPHA = 0.5 * M / LEARNING_RATE
DRIVERS = ("vmap", "pmap", "shard_map")

# The grid, and both ways compressed.
METHODS: dict[str, Callable[..., optax.GradientTransformationExtraArgs]] = {
    "sgd": sasg_jax.sgd,
    "sparse_sgd": functools.partial(sasg_jax.sparse_sgd, density=DENSITY),
    "lasg": sasg_jax.lasg,
    "sasg": functools.partial(sasg_jax.sasg, density=DENSITY),
    "two_way": functools.partial(sasg_jax.sasg, density=DENSITY, downlink=sasg_jax.top_k(DENSITY)),
}
ADAPTIVE = ("lasg", "sasg", "two_way")
SPARSE = ("sparse_sgd", "sasg", "two_way")


# A classifier, as in the oracle -------------------------------------------------------------------


def mlp_loss(params, batch):
    """`oracle.mlp_loss` in jax."""
    images, labels = batch
    hidden = jax.nn.relu(images @ params["w1"] + params["b1"][None])
    log_probabilities = jax.nn.log_softmax(hidden @ params["w2"] + params["b2"][None])
    return -jnp.mean(jnp.take_along_axis(log_probabilities, labels[:, None], axis=1))


def mlp_params():
    return oracle.init_params(np.random.default_rng(0), 20, 16, 5)


@functools.cache
def mlp_batches(num_workers: int):
    return oracle.make_batches(0, ROUNDS, num_workers, 4, 20, 5)


@functools.cache
def mlp_step(num_workers: int, name: str, driver: str = "vmap") -> sasg_jax.TrainStep:
    """A training step of one of the `METHODS`, compiled once for all tests of a module."""
    tx = METHODS[name](LEARNING_RATE, num_workers=num_workers)
    return sasg_jax.make_train_step(
        mlp_loss, tx, num_workers=num_workers, driver=driver, donate=False
    )


# The smallest classifier: two tensors, so that a step is soon compiled ----------------------------


def softmax_loss(params, batch):
    """What `oracle.softmax_grad` is the gradient of."""
    images, labels = batch
    log_probabilities = jax.nn.log_softmax(images @ params["w"] + params["b"][None])
    return -jnp.mean(jnp.take_along_axis(log_probabilities, labels[:, None], axis=1))


def softmax_params():
    w = np.random.default_rng(0).normal(size=(12, 5))
    return {"b": np.zeros(5, np.float32), "w": 0.3 * w.astype(np.float32)}


@functools.cache
def softmax_batches(num_workers: int, rounds: int):
    """So noisy that rule (6) finds news in about half of the rounds."""
    return oracle.make_batches(1, rounds, num_workers, 4, 12, 5, noise=3.0)


# Quadratics: worker m's loss is ||params - centre_m||^2 / 2 ---------------------------------------


def quadratic_loss(params, centre):
    return sum(
        0.5 * jnp.sum(jnp.square(p.astype(jnp.float32) - c))
        for p, c in zip(jax.tree.leaves(params), jax.tree.leaves(centre), strict=True)
    )


def quadratic_params(dtype=jnp.float32):
    return {"b": jnp.zeros(6, dtype), "w": jnp.zeros((4, 6), dtype)}


def centres(num_workers: int = M, *, seed: int = 0, rounds: int | None = None):
    """A centre for each worker, shape=(M, ...); with ``rounds``, one for each round too."""
    rng = np.random.default_rng(seed)
    leading = (num_workers,) if rounds is None else (rounds, num_workers)
    return {
        "b": rng.normal(size=(*leading, 6)).astype(np.float32),
        "w": rng.normal(size=(*leading, 4, 6)).astype(np.float32),
    }


def at(batches, t: int):
    """The batch of round t."""
    return jax.tree.map(lambda x: x[t], batches)


# One worker's round under a map, as a user writes it ----------------------------------------------


class Run(NamedTuple):
    params: Any
    opt_state: Any


def start(tx, params, num_workers: int = M) -> Run:
    return Run(params, sasg_jax.stack_workers(tx.init(params), num_workers))


def map_workers(
    tx: Any,
    run: Run,
    *,
    driver: str = "vmap",
    num_workers: int = M,
    loss=quadratic_loss,
    axis_name: str = "workers",
    **extra_args: Any,
) -> Callable[[Run, Any], Run]:
    """``run = step(run, batch)``, jitted: tx.update under a map, with the axes of `state_axes`."""

    def is_masked(x):
        return isinstance(x, optax.MaskedNode)

    def worker_step(params, opt_state, batch):
        def grad_fn(p):
            # optax.masked hides some of the stale parameters.
            filled = jax.tree.map(
                lambda x, current: current if is_masked(x) else x, p, params, is_leaf=is_masked
            )
            return jax.grad(loss)(filled, batch)

        updates, opt_state = tx.update(
            grad_fn(params), opt_state, params, grad_fn=grad_fn, **extra_args
        )
        return optax.apply_updates(params, updates), opt_state

    if driver == "vmap":
        axes = sasg_jax.worker_axes(run.opt_state)
        mapped = jax.vmap(
            worker_step, in_axes=(None, axes, 0), out_axes=(None, axes), axis_name=axis_name
        )
    else:
        own = sasg_jax.per_worker(run.opt_state)
        specs = sasg_jax.worker_specs(run.opt_state, axis_name)

        def on_one_device(params, opt_state, batch):
            opt_state = jax.tree.map(lambda o, x: x[0] if o else x, own, opt_state)
            params, opt_state = worker_step(params, opt_state, at(batch, 0))
            return params, jax.tree.map(lambda o, x: x[None] if o else x, own, opt_state)

        mapped = jax.shard_map(
            on_one_device,
            mesh=jax.make_mesh(
                (num_workers,),
                (axis_name,),
                axis_types=(jax.sharding.AxisType.Auto,),
                devices=jax.devices()[:num_workers],
            ),
            in_specs=(PartitionSpec(), specs, PartitionSpec(axis_name)),
            out_specs=(PartitionSpec(), specs),
            check_vma=False,
        )

    step = jax.jit(lambda run, batch: Run(*mapped(run.params, run.opt_state, batch)))
    return step if driver == "vmap" else one_at_a_time(step)


def one_at_a_time(step: Callable[..., Any]) -> Callable[..., Any]:
    """Waits for every step of a multi-device run before the next.

    Collectives of several steps in flight can wait for each other for ever on the CPU, when there
    are fewer cores than devices.
    """
    return lambda *args: jax.block_until_ready(step(*args))


@contextlib.contextmanager
def compilations():
    """What XLA compiles meanwhile, in a list of what jax says of it."""
    messages: list[str] = []

    class Records(logging.Handler):
        def emit(self, record):
            if "Finished XLA compilation" in record.getMessage():
                messages.append(record.getMessage())

    logger, handler = logging.getLogger("jax"), Records()
    propagates = logger.propagate
    with jax.log_compiles():
        logger.addHandler(handler)
        logger.propagate = False
        try:
            yield messages
        finally:
            logger.removeHandler(handler)
            logger.propagate = propagates


def same_on_all_devices(tree: Any) -> bool:
    """Whether every device holds the same bits of every replicated array of ``tree``."""

    def same(x):
        shards = [np.asarray(shard.data).tobytes() for shard in x.addressable_shards]
        return len(shards) > 1 and len(set(shards)) == 1

    return all(map(same, jax.tree.leaves(tree)))


def to_numpy(tree: Any) -> Any:
    """A copy on the host that later donation cannot touch."""
    return jax.tree.map(lambda x: np.array(x), tree)


def scan_rounds(step: Callable[..., Any]) -> Callable[..., Any]:
    """``state, infos = run(state, rounds)``: all rounds in one compiled loop.

    Args:
      step: ``state, info = step(state, *round)``, e.g. that of a train step.
    """

    def run(state, rounds):
        return jax.lax.scan(lambda state, round: step(state, *round), state, rounds)

    return run
