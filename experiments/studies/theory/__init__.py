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

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from experiments.methods import PAPER_METHODS
from experiments.studies.theory import checks, problems, runs


class Scale(NamedTuple):
    """How much is run."""

    methods: tuple[str, ...]
    rounds: tuple[int, ...]  # T of Theorem 1
    workers: tuple[int, ...]  # M of Remark 1
    workers_rounds: int  # T of Remark 1


FULL = Scale(PAPER_METHODS, tuple(512 * 2**i for i in range(7)), (2, 4, 8, 16, 32, 64), 4096)


def measure(
    *,
    seeds: Sequence[int] = (1, 2, 3),
    scale: Scale = FULL,
    on_step: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, Any]:
    """Measures everything, with these seeds of the workers' batches.

    ``on_step`` is told what was measured, and how many of how many such parts are done. Returns a
    dictionary of what JSON knows: ``settings``; ``checks``; ``rate`` and ``workers``, for each
    problem and method the curve against ``T`` and ``M`` (:mod:`experiments.studies.theory.checks`).
    """
    both = problems.ridge_regression(), problems.logistic_regression()
    pairs = [(problem, method) for problem in both for method in scale.methods]
    found, rates, workers = [], [], []
    for done, (problem, method) in enumerate(pairs, 1):
        along_T = runs.by_rounds(problem, scale.rounds)
        along_M = runs.by_workers(problem, scale.workers, scale.workers_rounds)
        made = runs.make(problem, method, along_T + along_M, seeds)
        rates.append(checks.curve(made[: len(along_T)], "T"))
        workers.append(checks.curve(made[len(along_T) :], "M"))
        found += made
        on_step(f"{method}, {problem.name}", done, len(pairs))
    hardest = problems.equal_gradients()
    found += runs.make(hardest, "sparse", runs.by_rounds(hardest, scale.rounds[:1]), seeds)
    rate = {"rounds": list(scale.rounds), "workers": runs.NUM_WORKERS}
    speed_up = {"rounds": scale.workers_rounds, "workers": list(scale.workers)}
    return {
        "settings": {
            "seeds": list(seeds),
            "dimension": problems.DIMENSION,
            "examples": problems.EXAMPLES,
            "batch_size": runs.BATCH_SIZE,
            "density": runs.DENSITY,
            "max_staleness": runs.MAX_STALENESS,
            "history": runs.HISTORY,
            "alpha": "0.5·M/γ",
            "rate": {**rate, "learning_rate": "c/√T"},
            "workers": {**speed_up, "learning_rate": "c/2·√(M/T)"},
            "problems": {problem.name: problems.describe(problem) for problem in both},
            "tolerances": checks.TOLERANCES,
        },
        "checks": [
            checks.hard_vectors_check(),
            *checks.constant_checks(found),
            *checks.rate_checks(rates),
            *checks.workers_checks(workers),
        ],
        "rate": rates,
        "workers": workers,
    }
