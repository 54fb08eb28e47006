"""What was seen in runs, beside what the theory allows."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

import sasg_jax
from experiments.methods import METHODS
from experiments.studies.theory.runs import DENSITY, MAX_STALENESS, Run

# Each tolerance with its reason. The first two are for sums in float32.
COMPRESSION_TOLERANCE = 1e-5
AUXILIARY_TOLERANCE = 2.0**-20  # 8 units in the last place: v is moved by about as many roundings
SLOPE_TOLERANCE = 0.1  # terms of higher order in γ, and the start, bend the line at small T
MOST_FREE_UPLOADS = 0.9  # a rule that works saves at least a tenth of the uploads that it may skip
TOLERANCES = {
    "compression": COMPRESSION_TOLERANCE,
    "auxiliary": AUXILIARY_TOLERANCE,
    "slope": SLOPE_TOLERANCE,
    "most_free_uploads": MOST_FREE_UPLOADS,
}

Check = dict[str, Any]
Curve = dict[str, Any]


def hard_vectors_check() -> Check:
    """Lemma 1 on vectors that are hard to compress, in float64."""
    ratios = []
    for density in (DENSITY, 0.25, 0.01):
        compressor = sasg_jax.top_k(density)
        for x in _hard_vectors():
            remainder = compressor.compress(jnp.asarray(x), ((),), None).remainder
            left_out = np.square(np.asarray(remainder, np.float64)).sum()
            kept_fraction = max(1, int(density * x.size)) / x.size
            ratios.append(left_out / np.square(x.astype(np.float64)).sum() / (1 - kept_fraction))
    quantity = "largest ‖x − C(x)‖² / ((1 − δ) ‖x‖²); equal entries reach 1"
    return _check("Lemma 1", "hard vectors", "top k", quantity, max(ratios), 1, tolerance=1e-12)


def constant_checks(runs: Sequence[Run]) -> list[Check]:
    """Lemmas 1 and 2, equation (16) and smoothness, over all runs of a problem and method."""
    by_pair: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        by_pair.setdefault((run.problem.name, run.method), []).append(run)
    return [check for pair, chosen in by_pair.items() for check in _constants(*pair, chosen)]


def _constants(problem: str, method: str, runs: Sequence[Run]) -> Iterator[Check]:
    sparse, adaptive, of = METHODS[method].sparse, METHODS[method].alpha, (problem, method)
    largest = lambda measure: max(np.max(measure(run.observed, run)) for run in runs)
    if sparse and adaptive:
        quantity = "largest ‖p − C(p)‖² / ‖p‖² against 1 − δ"
        measured, tolerance = largest(lambda seen, run: seen.compression), COMPRESSION_TOLERANCE
        yield _check("Lemma 1", *of, quantity, measured, 1 - DENSITY, tolerance=tolerance)
    if sparse:
        quantity = "largest ‖e‖² / (γ² G²) against 4(1 − δ)/δ²"
        measured = largest(lambda seen, run: seen.residual / seen.stochastic / run.learning_rate**2)
        yield _check("Lemma 2", *of, quantity, measured, 4 * (1 - DENSITY) / DENSITY**2)
    quantity = "largest defect of the step of v, relative to what is added up"
    measured = largest(lambda seen, run: seen.auxiliary)
    yield _check("equation (16)", *of, quantity, measured, 0, tolerance=AUXILIARY_TOLERANCE)
    if adaptive:
        quantity = "largest ‖g − g'‖² / (L² ‖w_t − w_s‖²)"
        measured = largest(lambda seen, run: seen.innovation / run.problem.smoothness**2)
        yield _check("Assumption of smoothness", *of, quantity, measured, 1)
        longest = max(runs, key=lambda run: run.rounds)
        quantity = f"part of the uploads made that rule (6) may skip, T = {longest.rounds:,}"
        measured = longest.observed.free_uploads.sum() / longest.observed.free.sum()
        bound, name = MOST_FREE_UPLOADS, "upload rule"
        yield _check("Assumption of smoothness", *of, quantity, measured, bound, name=name)


def rate_checks(curves: Sequence[Curve]) -> list[Check]:
    """Theorem 1 on curves against T."""
    checks = [_slope_check("Theorem 1", "T", curve) for curve in curves]
    means = {(curve["problem"], curve["method"]): np.array(curve["mean"]) for curve in curves}
    quantity = "largest multiple of SGD's averaged ‖∇f‖² at the same T"
    for (problem, method), mean in means.items():
        if method != "sgd" and (problem, "sgd") in means:
            multiple, name = np.max(mean / means[problem, "sgd"]), "multiple of SGD"
            given = problem, method, quantity, multiple, MAX_STALENESS
            checks.append(_check("Theorem 1", *given, name=name))
    return checks


def workers_checks(curves: Sequence[Curve]) -> list[Check]:
    """Remark 1 on curves against M."""
    return [_slope_check("Remark 1", "M", curve) for curve in curves]


def curve(runs: Sequence[Run], along: str) -> Curve:
    """One problem's and method's averaged squared gradient norm against ``"T"`` or ``"M"``.

    ``slope`` is that of the line fitted to the logarithms of ``mean`` and of the values along.
    """
    values = [run.rounds if along == "T" else run.num_workers for run in runs]
    seeds = np.array([run.observed.gradient for run in runs], np.float64)
    fractions = [np.mean(run.observed.uploads) / (run.num_workers * run.rounds) for run in runs]
    x, mean = np.log(values), seeds.mean(1)
    centred = x - x.mean()
    return {
        "problem": runs[0].problem.name,
        "method": runs[0].method,
        along: values,
        "learning_rate": [run.learning_rate for run in runs],
        "mean": mean.tolist(),
        "min": seeds.min(1).tolist(),
        "max": seeds.max(1).tolist(),
        "slope": float(centred @ np.log(mean) / (centred @ centred)),
        "upload_fraction": [float(fraction) for fraction in fractions],
    }


def _slope_check(source: str, along: str, curve: Curve) -> Check:
    quantity, name = f"slope of log averaged ‖∇f‖² against log {along}", f"slope against {along}"
    relation = "within" if curve["method"] == "sgd" else "<="
    given = curve["problem"], curve["method"], quantity, curve["slope"], -0.5
    return _check(source, *given, relation=relation, tolerance=SLOPE_TOLERANCE, name=name)


def _check(
    source, problem, method, quantity, measured, bound, *, relation="<=", tolerance=0.0, name=None
) -> Check:
    above = float(measured) - bound
    return {
        "name": name or source,
        "problem": problem,
        "method": method,
        "quantity": quantity,
        "measured": float(measured),
        "bound": float(bound),
        "relation": relation,
        "tolerance": tolerance,
        "holds": (abs(above) if relation == "within" else above) <= tolerance,
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
