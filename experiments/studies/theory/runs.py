"""Runs that are watched in every round and on every worker."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import sasg_jax
from experiments.methods import METHODS
from experiments.studies.theory.problems import DIMENSION, EXAMPLES, Problem

BATCH_SIZE = 1  # the noisiest, and the one with the fewest directions: innovation is near its bound
DENSITY = 1 / 16
MAX_STALENESS = 10
HISTORY = 10
NUM_WORKERS = 8


class Observations(NamedTuple):
    """What was seen in a run. Maxima are over rounds and workers; where a method has nothing to be
    seen, e.g. no residual, they are zero. shape=(), and the dtype of the first six is float32.
    """

    gradient: Any  # mean over rounds of ‖∇f(w_t)‖²
    compression: Any  # max of ‖p − C(p)‖² / ‖p‖²
    residual: Any  # max of ‖e‖²
    stochastic: Any  # max of ‖g‖², that is G²
    auxiliary: Any  # max defect of (16), relative to what is added up
    innovation: Any  # max of ‖g − g'‖² / ‖w_t − w_s‖²
    uploads: Any  # dtype=int32
    free: Any  # times that a worker was free to stay silent. dtype=int32
    free_uploads: Any  # those in which it uploaded. dtype=int32


class Run(NamedTuple):
    """The same run with every seed."""

    problem: Problem
    method: str
    num_workers: int
    rounds: int
    learning_rate: float
    observed: Observations  # of arrays, shape=(seeds,)


Plan = list[tuple[int, int, float]]
"""The number of workers M, the number of rounds T and the learning rate γ of each run."""


def by_rounds(problem: Problem, rounds: Sequence[int]) -> Plan:
    """Theorem 1's runs: γ = c/√T for every T of ``rounds``."""
    return [(NUM_WORKERS, T, problem.rate / T**0.5) for T in rounds]


def by_workers(problem: Problem, workers: Sequence[int], rounds: int) -> Plan:
    """Remark 1's runs: γ = (c/2) √(M/T) for every M of ``workers``."""
    return [(M, rounds, problem.rate / 2 * (M / rounds) ** 0.5) for M in workers]


def make(problem: Problem, method: str, plan: Plan, seeds: Sequence[int], **how: Any) -> list[Run]:
    """``how`` is for :func:`watch`."""
    watched = {M: watch(problem, method, M, **how) for M, _, _ in plan}
    seen = [watched[M](rate, T, jnp.asarray(seeds)) for M, T, rate in plan]
    return [
        Run(problem, method, *setting, jax.tree.map(np.asarray, observed))
        for setting, observed in zip(plan, seen, strict=True)
    ]


def watch(
    problem: Problem,
    method: str,
    num_workers: int,
    *,
    stale_batch: Callable[[jax.Array], jax.Array] = lambda batch: batch,
) -> Callable[[Any, Any, jax.Array], Observations]:
    """Makes a jitted ``observations = watched(learning_rate, rounds, seeds)``, a run of each seed.

    ``stale_batch`` is the batch of the stale gradient, given that of the gradient. All but the same
    is a broken method, for a test to see it found out.
    """
    features = problem.features.reshape(num_workers, -1, DIMENSION)
    targets = problem.targets.reshape(num_workers, -1)
    grad = jax.grad(problem.loss)

    def watched(learning_rate, rounds, seed):
        tx = _optimizer(method, learning_rate, num_workers)
        opt_state = sasg_jax.stack_workers(tx.init(jnp.asarray(problem.start)), num_workers)
        axes = sasg_jax.worker_axes(opt_state)

        def worker_step(params, opt_state, features, targets, batch):
            def grad_on(batch):
                return lambda params: grad(params, features[batch], targets[batch])

            grads, stale_grad = grad_on(batch)(params), grad_on(stale_batch(batch))
            updates, opt_state = tx.update(grads, opt_state, params, grad_fn=stale_grad)
            return params + updates, opt_state, grads

        step = jax.vmap(worker_step, (None, axes, 0, 0, 0), (None, axes, 0), axis_name="workers")

        def one_round(t, carry):
            params, state, seen = carry
            batches = draw(seed, t, num_workers)
            new_params, new_state, g = step(params, state, features, targets, batches)
            now = _observe(
                problem, method, learning_rate, g, (params, state), (new_params, new_state), t
            )
            largest = [jnp.maximum(*pair) for pair in zip(seen[1:6], now[1:6], strict=True)]
            sums = [jnp.add(*pair) for pair in zip(seen[6:], now[6:], strict=True)]
            seen = Observations(seen.gradient + now.gradient, *largest, *sums)
            return new_params, new_state, seen

        nothing = Observations(*[jnp.zeros(())] * 6, *[jnp.zeros((), int)] * 3)
        start = jnp.asarray(problem.start), opt_state, nothing
        seen = jax.lax.fori_loop(0, rounds, one_round, start)[2]
        return seen._replace(gradient=seen.gradient / rounds)

    return jax.jit(jax.vmap(watched, in_axes=(None, None, 0)))


def _observe(problem, method, learning_rate, g, before, after, t) -> Observations:
    """What is seen in round t, given every worker's gradient and parameters and state around it."""
    (params, old), (new_params, new) = before, after
    sparse, adaptive = METHODS[method].sparse, METHODS[method].alpha
    old_residual = old.worker.feedback.residual if sparse else jnp.zeros_like(g)
    residual = new.worker.feedback.residual if sparse else jnp.zeros_like(g)
    uploaded = new.worker.uploaded
    part = learning_rate * g  # of the step of v
    compression = innovation = 0.0
    free = jnp.zeros(len(g), bool)
    if adaptive:
        compressor = sasg_jax.top_k(DENSITY) if sparse else sasg_jax.identity()
        decode = jax.vmap(lambda message: compressor.decompress(message, problem.start))
        sent = part + old_residual
        left_out = _squared_norms(sent - decode(new.server.memory))
        compression = jnp.where(uploaded, left_out / _squared_norms(sent), 0)
        part = jnp.where(uploaded[:, None], part, decode(old.server.memory))
        moved = _squared_norms(params[None] - old.worker.rule.stale_params)
        innovation = jnp.where(moved > 0, new.worker.innovation / moved, 0)
        free = (old.worker.staleness < MAX_STALENESS) & (t >= HISTORY)
    v, new_v = params - old_residual.mean(0), new_params - residual.mean(0)
    defect = _largest(new_v - v + part.mean(0))
    full = jax.grad(problem.loss)(params, problem.features, problem.targets)
    return Observations(
        gradient=_squared_norms(full),
        compression=_largest(compression),
        residual=_largest(_squared_norms(residual)),
        stochastic=_largest(_squared_norms(g)),
        auxiliary=defect / (_largest(params) + _largest(old_residual) + _largest(part)),
        innovation=_largest(innovation),
        uploads=uploaded.sum(),
        free=free.sum(),
        free_uploads=(free & uploaded).sum(),
    )


def draw(seed: Any, t: Any, num_workers: int) -> jax.Array:
    """Every worker's batch of round t: positions among its own examples, with replacement.

    shape=(M, BATCH_SIZE), dtype=int32
    """
    key = jax.random.fold_in(jax.random.key(seed), t)
    return jax.random.randint(key, (num_workers, BATCH_SIZE), 0, EXAMPLES // num_workers)


def _optimizer(method: str, learning_rate: Any, num_workers: int) -> Any:
    row = METHODS[method]
    density = {"density": DENSITY} if row.sparse else {}
    rule = {"max_staleness": MAX_STALENESS, "history": HISTORY} if row.alpha else {}
    make = getattr(sasg_jax, row.maker)
    return make(learning_rate, num_workers=num_workers, **density, **rule)


def _squared_norms(x: Any) -> jax.Array:
    return jnp.sum(jnp.square(x), axis=-1)


def _largest(x: Any) -> jax.Array:
    return jnp.max(jnp.abs(x))
