r"""The paper's theory as numbers: its lemmas and rates, measured on the optimisers of sasg_jax.

There are two problems of known full gradient and smoothness constant L: ridge regression, which is
strongly convex, and logistic regression with the regulariser Σ x²/(1 + x²), which is smooth and not
convex. The examples are dealt out to the workers, and each draws its batches from its own.

Every run, whatever it is for, is watched in every round and on every worker:

- Lemma 1, ‖p − C(p)‖² ≤ (1 − δ) ‖p‖² with δ = k/d, of every p = γ g + e that SASG compresses, and
  besides of vectors made to come close to the bound or to reach it.
- Lemma 2, ‖e‖² ≤ 4(1 − δ)/δ² · γ² G². G² is the largest ‖g‖² of the run: the paper assumes bounded
  gradients, and those are the gradients there were. The bound is for the worst case, so a third
  problem, whose gradient is always a vector of ones, drives the residual up.
- Equation (16): v = w − (1/M) Σ e_m moves by −(γ/M) Σ g_m, where a silent worker contributes its
  last message in place of γ g_m. This is exact but for rounding.
- Smoothness: ‖g − g'‖² ≤ L² ‖w_t − w_s‖², with which the rule (6) can save uploads at all. It holds
  only with g and g' on the same batch.

The rates are of ‖∇f(w_t)‖², the squared norm of the full gradient, averaged over a run's rounds:

- Theorem 1: with γ = c/√T it is O(1/√T), for SASG as for SGD, so that its slope in a log-log
  picture is -1/2 or steeper. For SGD it must be -1/2 and no steeper, or the problems would be too
  easy to tell. SASG's constant may be larger: where a message stands for ``max_staleness``
  gradients, their mean has that many times the variance. No larger multiple of SGD is allowed.
- Remark 1 says that SASG scales well with the number of workers. We read it as SGD's linear
  speed-up: the mean of M gradients has an M-th of the variance, and with γ = c √(M/T) the bound
  is O(1/√(MT)). At a fixed T, the slope against M is -1/2 or steeper. (It is steeper for LASG and
  SASG, because the threshold of rule (6) falls with M: more workers upload more often.)
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import sasg_jax

DIMENSION = 64
EXAMPLES = 1024
BATCH_SIZE = 1  # the noisiest, and the one with the fewest directions: innovation is near its bound
DENSITY = 1 / 16
MAX_STALENESS = 10
HISTORY = 10
NUM_WORKERS = 8

# Tolerances, each with its reason. The first two are for sums in float32.
COMPRESSION_TOLERANCE = 1e-5
AUXILIARY_TOLERANCE = 2.0**-20  # 8 units in the last place: v is moved by about as many roundings
SLOPE_TOLERANCE = 0.1  # terms of higher order in γ, and the start, bend the line at small T
MOST_FREE_UPLOADS = 0.9  # a rule that works saves at least a tenth of the uploads that it may skip

METHODS = {
    "sgd": sasg_jax.sgd,
    "sparse": sasg_jax.sparse_sgd,
    "lasg": sasg_jax.lasg,
    "sasg": sasg_jax.sasg,
}
SPARSE = ("sparse", "sasg")
ADAPTIVE = ("lasg", "sasg")

Check = dict[str, Any]
Curve = dict[str, Any]


class Problem(NamedTuple):
    """f, the mean of a loss over all examples."""

    name: str
    loss: Callable[[Any, Any, Any], jax.Array]
    """``loss(params, features, targets)``, the mean over a batch of examples."""
    features: np.ndarray  # shape=(EXAMPLES, DIMENSION), dtype=float32
    targets: np.ndarray  # shape=(EXAMPLES,), dtype=float32
    start: np.ndarray  # w_0. shape=(DIMENSION,), dtype=float32
    smoothness: float
    """L: the gradient of every example, and so of every batch, is L-Lipschitz."""
    rate: float
    """c of γ = c/√T with :data:`NUM_WORKERS` workers, half of which is c of γ = c √(M/T)."""


def ridge_regression() -> Problem:
    """Squared errors plus x²/20: strongly convex."""
    rng = np.random.default_rng(0)
    features = _features(rng)
    targets = features @ rng.normal(size=DIMENSION) + rng.normal(size=EXAMPLES)

    def loss(params, features, targets):
        errors = features @ params - targets
        return 0.5 * jnp.mean(jnp.square(errors)) + 0.05 * jnp.sum(jnp.square(params))

    return Problem(
        name="ridge regression",
        loss=loss,
        features=features,
        targets=targets.astype(np.float32),
        start=np.zeros(DIMENSION, np.float32),
        smoothness=_largest_squared_norm(features) + 0.1,
        rate=0.4,
    )


def logistic_regression() -> Problem:
    """Logistic loss plus 0.1 x²/(1 + x²) for every parameter x: not convex where x² > 1/3."""
    rng = np.random.default_rng(1)
    features = _features(rng)
    probabilities = 1 / (1 + np.exp(-0.3 * features @ rng.normal(size=DIMENSION)))
    targets = np.where(rng.uniform(size=EXAMPLES) < probabilities, 1, -1)

    def loss(params, features, targets):
        squares = jnp.square(params)
        regulariser = 0.1 * jnp.sum(squares / (1 + squares))
        return jnp.mean(jnp.logaddexp(0.0, -targets * (features @ params))) + regulariser

    return Problem(
        name="non-convex logistic regression",
        loss=loss,
        features=features,
        targets=targets.astype(np.float32),
        start=1.5 * rng.normal(size=DIMENSION).astype(np.float32),
        # The second derivative of log(1 + exp(-z)) is at most 1/4, that of x²/(1 + x²) at most 2.
        smoothness=_largest_squared_norm(features) / 4 + 0.2,
        rate=2.4,
    )


def equal_gradients() -> Problem:
    """The sum of all parameters: its gradient is all ones, so that no entry is worth more."""
    return Problem(
        name="equal gradients",
        loss=lambda params, features, targets: jnp.sum(params),
        features=np.zeros((EXAMPLES, DIMENSION), np.float32),
        targets=np.zeros(EXAMPLES, np.float32),
        start=np.zeros(DIMENSION, np.float32),
        smoothness=0.0,
        rate=1.0,
    )


class Observations(NamedTuple):
    """What was seen in a run. Maxima are over rounds and workers; where a method has nothing to be
    seen, e.g. no residual, they are zero.
    """

    gradient: Any  # mean over rounds of ‖∇f(w_t)‖². shape=(), dtype=jnp.float32
    compression: Any  # max of ‖p − C(p)‖² / ‖p‖². shape=(), dtype=jnp.float32
    residual: Any  # max of ‖e‖². shape=(), dtype=jnp.float32
    stochastic: Any  # max of ‖g‖², that is G². shape=(), dtype=jnp.float32
    auxiliary: Any  # max defect of (16), relative to what is added up. shape=(), dtype=jnp.float32
    innovation: Any  # max of ‖g − g'‖² / ‖w_t − w_s‖². shape=(), dtype=jnp.float32
    uploads: Any  # shape=(), dtype=jnp.int32
    free: Any  # times that a worker was free to stay silent. shape=(), dtype=jnp.int32
    free_uploads: Any  # those in which it uploaded. shape=(), dtype=jnp.int32


class Run(NamedTuple):
    """The same run with every seed."""

    problem: Problem
    method: str
    num_workers: int
    rounds: int
    learning_rate: float
    observed: Observations  # of arrays, shape=(seeds,)


class Scale(NamedTuple):
    """How much is run."""

    methods: tuple[str, ...]
    rounds: tuple[int, ...]  # T of Theorem 1
    workers: tuple[int, ...]  # M of Remark 1
    workers_rounds: int  # T of Remark 1


FULL = Scale(tuple(METHODS), tuple(512 * 2**i for i in range(7)), (2, 4, 8, 16, 32, 64), 4096)
QUICK = Scale(("sgd", "sasg"), tuple(256 * 2**i for i in range(6)), (2, 8, 32), 1024)


def measure(
    *,
    seeds: Sequence[int] = (1, 2, 3),
    quick: bool = False,
    on_step: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, Any]:
    """Measures everything, for all four methods, or for SGD and SASG if ``quick``.

    Args:
      seeds: of the workers' batches; the problems are always the same.
      quick: runs :data:`QUICK` instead of :data:`FULL`.
      on_step: is told what was measured, and how many of how many such parts are done.

    Returns:
      A dictionary of what JSON knows: ``settings``; ``checks``, each with ``measured``, ``bound``,
      ``relation``, the absolute ``tolerance`` and whether it ``holds``; ``rate`` and ``workers``,
      for each problem and method the averaged squared gradient norm (``mean``, ``min`` and ``max``
      over seeds) against ``T`` and ``M``, with the ``slope`` of the logarithms.
    """
    scale = QUICK if quick else FULL
    problems = ridge_regression(), logistic_regression()
    pairs = [(problem, method) for problem in problems for method in scale.methods]
    parts = [
        *(
            (f"{method}, {problem.name}, against T", vary_rounds, problem, method, scale.rounds)
            for problem, method in pairs
        ),
        *(
            (
                f"{method}, {problem.name}, against M",
                functools.partial(vary_workers, rounds=scale.workers_rounds),
                problem,
                method,
                scale.workers,
            )
            for problem, method in pairs
        ),
        ("sparse, equal gradients", vary_rounds, equal_gradients(), "sparse", scale.rounds[:1]),
    ]
    families: list[list[Run]] = []
    for what, vary, problem, method, values in parts:
        families.append(vary(problem, method, values, seeds))
        on_step(what, len(families), len(parts))

    rates = [curve(runs, "T") for runs in families[: len(pairs)]]
    workers = [curve(runs, "M") for runs in families[len(pairs) : 2 * len(pairs)]]
    return {
        "settings": {
            "seeds": list(seeds),
            "dimension": DIMENSION,
            "examples": EXAMPLES,
            "batch_size": BATCH_SIZE,
            "density": DENSITY,
            "max_staleness": MAX_STALENESS,
            "history": HISTORY,
            "alpha": "0.5·M/γ",
            "rate": {
                "rounds": list(scale.rounds),
                "workers": NUM_WORKERS,
                "learning_rate": "c/√T",
            },
            "workers": {
                "rounds": scale.workers_rounds,
                "workers": list(scale.workers),
                "learning_rate": "c/2·√(M/T)",
            },
            "problems": {problem.name: _describe(problem) for problem in problems},
            "tolerances": {
                "compression": COMPRESSION_TOLERANCE,
                "auxiliary": AUXILIARY_TOLERANCE,
                "slope": SLOPE_TOLERANCE,
                "most_free_uploads": MOST_FREE_UPLOADS,
            },
        },
        "checks": [
            hard_vectors_check(),
            *constant_checks([run for runs in families for run in runs]),
            *rate_checks(rates),
            *workers_checks(workers),
        ],
        "rate": rates,
        "workers": workers,
    }


def violations(results: Mapping[str, Any]) -> list[str]:
    """A sentence for every check of :func:`measure` that does not hold."""
    words = {"<=": "at most", "within": "equal to"}
    return [
        f"{check['source']}, {check['method']} on {check['problem']}: {check['quantity']} is "
        f"{check['measured']:.4g}, and should be {words[check['relation']]} {check['bound']:.4g} "
        f"(tolerance {check['tolerance']:.2g})."
        for check in results["checks"]
        if not check["holds"]
    ]


# Runs ---------------------------------------------------------------------------------------------


def vary_rounds(
    problem: Problem, method: str, rounds: Sequence[int], seeds: Sequence[int], **how: Any
) -> list[Run]:
    """Theorem 1's runs: γ = c/√T for every T of ``rounds``. ``how`` is for :func:`watch`."""
    watched = watch(problem, method, NUM_WORKERS, **how)
    return [
        _run(watched, problem, method, NUM_WORKERS, T, problem.rate / T**0.5, seeds) for T in rounds
    ]


def vary_workers(
    problem: Problem, method: str, workers: Sequence[int], seeds: Sequence[int], *, rounds: int
) -> list[Run]:
    """Remark 1's runs: γ = (c/2) √(M/T) for every M of ``workers``."""
    return [
        _run(
            watch(problem, method, M),
            problem,
            method,
            M,
            rounds,
            problem.rate / 2 * (M / rounds) ** 0.5,
            seeds,
        )
        for M in workers
    ]


def watch(
    problem: Problem,
    method: str,
    num_workers: int,
    *,
    stale_batch: Callable[[jax.Array], jax.Array] = lambda batch: batch,
) -> Callable[[Any, Any, jax.Array], Observations]:
    """Makes a jitted ``observations = watched(learning_rate, rounds, seeds)``, a run of each seed.

    Args:
      problem: what is minimised.
      method: one of :data:`METHODS`.
      num_workers: M, a divisor of :data:`EXAMPLES`.
      stale_batch: the batch of the stale gradient, given that of the gradient. All but the same is
        a broken method, for a test to see it found out.
    """
    sparse, adaptive = method in SPARSE, method in ADAPTIVE
    compressor = sasg_jax.top_k(DENSITY) if sparse else sasg_jax.identity()
    decode = jax.vmap(lambda message: compressor.decompress(message, problem.start))
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

            grads = grad_on(batch)(params)
            updates, opt_state = tx.update(
                grads, opt_state, params, grad_fn=grad_on(stale_batch(batch))
            )
            return params + updates, opt_state, grads

        step = jax.vmap(
            worker_step,
            in_axes=(None, axes, 0, 0, 0),
            out_axes=(None, axes, 0),
            axis_name="workers",
        )

        def round_(t, carry):
            params, old, seen = carry
            batches = draw(seed, t, num_workers)
            new_params, new, g = step(params, old, features, targets, batches)

            uploaded = new.worker.uploaded
            old_residual = old.worker.residual if sparse else jnp.zeros_like(g)
            residual = new.worker.residual if sparse else jnp.zeros_like(g)
            part = learning_rate * g  # of the step of v
            compression = innovation = 0.0
            free = jnp.zeros(num_workers, bool)
            if adaptive:
                sent = part + old_residual
                left_out = _squared_norms(sent - decode(new.server.messages))
                compression = jnp.where(uploaded, left_out / _squared_norms(sent), 0)
                part = jnp.where(uploaded[:, None], part, decode(old.server.messages))
                moved = _squared_norms(params[None] - old.worker.stale_params)
                innovation = jnp.where(moved > 0, new.worker.innovation / moved, 0)
                free = (old.worker.staleness < MAX_STALENESS) & (t >= HISTORY)

            v, new_v = params - old_residual.mean(0), new_params - residual.mean(0)
            defect = _largest(new_v - v + part.mean(0))
            added_up = _largest(params) + _largest(old_residual) + _largest(part)
            full = grad(params, problem.features, problem.targets)
            seen = Observations(
                gradient=seen.gradient + _squared_norms(full),
                compression=jnp.maximum(seen.compression, _largest(compression)),
                residual=jnp.maximum(seen.residual, _largest(_squared_norms(residual))),
                stochastic=jnp.maximum(seen.stochastic, _largest(_squared_norms(g))),
                auxiliary=jnp.maximum(seen.auxiliary, defect / added_up),
                innovation=jnp.maximum(seen.innovation, _largest(innovation)),
                uploads=seen.uploads + uploaded.sum(),
                free=seen.free + free.sum(),
                free_uploads=seen.free_uploads + (free & uploaded).sum(),
            )
            return new_params, new, seen

        nothing = Observations(*[jnp.zeros(())] * 6, *[jnp.zeros((), int)] * 3)
        start = jnp.asarray(problem.start), opt_state, nothing
        seen = lax.fori_loop(0, rounds, round_, start)[2]
        return seen._replace(gradient=seen.gradient / rounds)

    return jax.jit(jax.vmap(watched, in_axes=(None, None, 0)))


def draw(seed: Any, t: Any, num_workers: int) -> jax.Array:
    """Every worker's batch of round t: positions among its own examples, with replacement.

    Returns:
      ``# shape=(M, BATCH_SIZE), dtype=int32``
    """
    key = jax.random.fold_in(jax.random.key(seed), t)
    return jax.random.randint(key, (num_workers, BATCH_SIZE), 0, EXAMPLES // num_workers)


def _run(watched, problem, method, num_workers, rounds, learning_rate, seeds) -> Run:
    observed = watched(learning_rate, rounds, jnp.asarray(seeds))
    return Run(
        problem, method, num_workers, rounds, learning_rate, jax.tree.map(np.asarray, observed)
    )


def _optimizer(method: str, learning_rate: Any, num_workers: int) -> Any:
    density = {"density": DENSITY} if method in SPARSE else {}
    rule = {"max_staleness": MAX_STALENESS, "history": HISTORY} if method in ADAPTIVE else {}
    return METHODS[method](learning_rate, num_workers=num_workers, **density, **rule)


# Checks -------------------------------------------------------------------------------------------


def hard_vectors_check() -> Check:
    """Lemma 1 on vectors that are hard to compress, in float64."""
    ratios = []
    for density in (DENSITY, 0.25, 0.01):
        compressor = sasg_jax.top_k(density)
        for x in _hard_vectors():
            remainder = compressor.compress(jnp.asarray(x)).remainder
            left_out = np.square(np.asarray(remainder, np.float64)).sum()
            kept_fraction = max(1, int(density * x.size)) / x.size
            ratios.append(left_out / np.square(x.astype(np.float64)).sum() / (1 - kept_fraction))
    return _check(
        "Lemma 1",
        "hard vectors",
        "top k",
        "largest ‖x − C(x)‖² / ((1 − δ) ‖x‖²); equal entries reach 1",
        measured=max(ratios),
        relation="<=",
        bound=1,
        tolerance=1e-12,
    )


def constant_checks(runs: Sequence[Run]) -> list[Check]:
    """Lemmas 1 and 2, equation (16) and smoothness, over all runs of a problem and method."""
    checks = []
    for problem, method in dict.fromkeys((run.problem.name, run.method) for run in runs):
        chosen = [run for run in runs if (run.problem.name, run.method) == (problem, method)]

        def largest(quantity, chosen=chosen):
            return max(np.max(quantity(run.observed, run)) for run in chosen)

        check = functools.partial(_check, problem=problem, method=method, relation="<=")
        if method in SPARSE and method in ADAPTIVE:
            checks.append(
                check(
                    "Lemma 1",
                    quantity="largest ‖p − C(p)‖² / ‖p‖² against 1 − δ",
                    measured=largest(lambda seen, run: seen.compression),
                    bound=1 - DENSITY,
                    tolerance=COMPRESSION_TOLERANCE,
                )
            )
        if method in SPARSE:
            checks.append(
                check(
                    "Lemma 2",
                    quantity="largest ‖e‖² / (γ² G²) against 4(1 − δ)/δ²",
                    measured=largest(
                        lambda seen, run: seen.residual / seen.stochastic / run.learning_rate**2
                    ),
                    bound=4 * (1 - DENSITY) / DENSITY**2,
                )
            )
        checks.append(
            check(
                "equation (16)",
                quantity="largest defect of the step of v, relative to what is added up",
                measured=largest(lambda seen, run: seen.auxiliary),
                bound=0,
                tolerance=AUXILIARY_TOLERANCE,
            )
        )
        if method in ADAPTIVE:
            longest = max(chosen, key=lambda run: run.rounds)
            seen = longest.observed
            checks += [
                check(
                    "Assumption of smoothness",
                    quantity="largest ‖g − g'‖² / (L² ‖w_t − w_s‖²)",
                    measured=largest(lambda seen, run: seen.innovation / run.problem.smoothness**2),
                    bound=1,
                ),
                check(
                    "Assumption of smoothness",
                    name="upload rule",
                    quantity=f"part of the uploads made that rule (6) may skip, T = "
                    f"{longest.rounds:,}",
                    measured=seen.free_uploads.sum() / seen.free.sum(),
                    bound=MOST_FREE_UPLOADS,
                ),
            ]
    return checks


def rate_checks(curves: Sequence[Curve]) -> list[Check]:
    """Theorem 1 on curves against T."""
    checks = [_slope_check("Theorem 1", "T", curve) for curve in curves]
    means = {(curve["problem"], curve["method"]): np.array(curve["mean"]) for curve in curves}
    for problem, method in means:
        if method != "sgd" and (problem, "sgd") in means:
            checks.append(
                _check(
                    "Theorem 1",
                    problem,
                    method,
                    "largest multiple of SGD's averaged ‖∇f‖² at the same T",
                    name="multiple of SGD",
                    measured=np.max(means[problem, method] / means[problem, "sgd"]),
                    relation="<=",
                    bound=MAX_STALENESS,
                )
            )
    return checks


def workers_checks(curves: Sequence[Curve]) -> list[Check]:
    """Remark 1 on curves against M."""
    return [_slope_check("Remark 1", "M", curve) for curve in curves]


def curve(runs: Sequence[Run], along: str) -> Curve:
    """One problem's and method's averaged squared gradient norm against ``"T"`` or ``"M"``.

    Returns:
      A dictionary of what JSON knows. ``slope`` is that of the line fitted to the logarithms of
      ``mean`` and of the values along.
    """
    values = [run.rounds if along == "T" else run.num_workers for run in runs]
    seeds = np.array([run.observed.gradient for run in runs], np.float64)
    mean = seeds.mean(1)
    return {
        "problem": runs[0].problem.name,
        "method": runs[0].method,
        along: values,
        "learning_rate": [run.learning_rate for run in runs],
        "mean": mean.tolist(),
        "min": seeds.min(1).tolist(),
        "max": seeds.max(1).tolist(),
        "slope": _slope(np.log(values), np.log(mean)),
        "upload_fraction": [
            float(np.mean(run.observed.uploads) / (run.num_workers * run.rounds)) for run in runs
        ],
    }


def _slope_check(source: str, along: str, curve: Curve) -> Check:
    return _check(
        source,
        curve["problem"],
        curve["method"],
        f"slope of log averaged ‖∇f‖² against log {along}",
        measured=curve["slope"],
        relation="within" if curve["method"] == "sgd" else "<=",
        bound=-0.5,
        tolerance=SLOPE_TOLERANCE,
        name=f"slope against {along}",
    )


def _check(
    source: str,
    problem: str,
    method: str,
    quantity: str,
    *,
    measured: Any,
    bound: float,
    relation: str,
    tolerance: float = 0.0,
    name: str | None = None,
) -> Check:
    measured = float(measured)
    above = measured - bound
    holds = (abs(above) if relation == "within" else above) <= tolerance
    return {
        "name": name or source,
        "problem": problem,
        "method": method,
        "quantity": quantity,
        "measured": measured,
        "bound": float(bound),
        "relation": relation,
        "tolerance": tolerance,
        "holds": holds,
        "source": source,
    }


def _hard_vectors() -> list[np.ndarray]:
    """Equal entries, nearly equal ones, light and heavy tails. dtype=float32"""
    rng = np.random.default_rng(2)
    vectors = []
    for size in (1000, 777):
        vectors += [
            np.full(size, 0.3),
            rng.choice([-1.0, 1.0], size),
            1 + 1e-3 * rng.uniform(size=size),
            rng.normal(size=size),
            rng.standard_t(1, size=size),
            np.geomspace(1, 1e-6, size),
        ]
    return [x.astype(np.float32) for x in vectors]


# Small mathematics --------------------------------------------------------------------------------


def _features(rng: np.random.Generator) -> np.ndarray:
    """Independent features of unlike size: without error feedback the small ones are rarely sent.

    shape=(EXAMPLES, DIMENSION), dtype=float32
    """
    scales = np.geomspace(0.5, 1.5, DIMENSION)
    return (scales * rng.normal(size=(EXAMPLES, DIMENSION))).astype(np.float32)


def _largest_squared_norm(rows: np.ndarray) -> float:
    return float(np.square(rows.astype(np.float64)).sum(1).max())


def _squared_norms(x: Any) -> jax.Array:
    return jnp.sum(jnp.square(x), axis=-1)


def _largest(x: Any) -> jax.Array:
    return jnp.max(jnp.abs(x))


def _slope(x: np.ndarray, y: np.ndarray) -> float:
    centred = x - x.mean()
    return float(centred @ y / (centred @ centred))


def _describe(problem: Problem) -> dict[str, Any]:
    """``curvature`` is the least and the greatest of f at the start, negative if not convex."""
    hessian = jax.hessian(problem.loss)(problem.start, problem.features, problem.targets)
    curvature = np.linalg.eigvalsh(np.asarray(hessian, np.float64))
    return {
        "c": problem.rate,
        "smoothness": problem.smoothness,
        "curvature": [float(curvature[0]), float(curvature[-1])],
    }
