"""The theory's numbers hold, are what a plain NumPy loop sees, and find broken methods out."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import sasg_jax
from experiments.studies import theory
from experiments.studies.theory import checks, problems, runs
from sasg_jax.compressors import Compressed

PROBLEMS = {"ridge": problems.ridge_regression, "logistic": problems.logistic_regression}
NAMES = {name: make().name for name, make in PROBLEMS.items()}
QUICK = theory.Scale(("sgd", "sasg"), tuple(256 * 2**i for i in range(6)), (2, 8, 32), 1024)


@pytest.fixture(scope="module")
def steps():
    return []


@pytest.fixture(scope="module")
def results(steps):
    """Of runs that were not made, but in which all that can be seen is 1."""

    def make(problem, method, plan, seeds):
        observed = runs.Observations._make([np.ones(len(seeds))] * len(runs.Observations._fields))
        return [runs.Run._make((problem, method, *setting, observed)) for setting in plan]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "make", make)
        return theory.measure(on_step=lambda what, done, total: steps.append((done, total)))


@pytest.fixture(scope="module")
def long_results():
    return theory.measure(seeds=(1,), scale=QUICK)


# The methods as they are --------------------------------------------------------------------------


@pytest.mark.slow
def test_correct_methods_violate_nothing(long_results):
    assert [check for check in long_results["checks"] if not check["holds"]] == []


def test_lemmas_hold_from_the_first_round():
    problem = problems.logistic_regression()
    made = runs.make(problem, "sasg", runs.by_rounds(problem, (32,)), (1,))
    holds = {check["name"]: check["holds"] for check in checks.constant_checks(made)}
    del holds["upload rule"]  # which has to save something in the long run
    names = {"Lemma 1", "Lemma 2", "equation (16)", "Assumption of smoothness"}
    assert holds == dict.fromkeys(names, True)


def checked(results):
    return {(check["source"], check["problem"], check["method"]) for check in results["checks"]}


def test_every_part_of_the_theory_is_checked(results):
    for problem in NAMES.values():
        for source in ("equation (16)", "Theorem 1", "Remark 1"):
            for method in ("sgd", "sparse", "lasg", "sasg"):
                assert (source, problem, method) in checked(results)
        for source in ("Lemma 1", "Lemma 2", "Assumption of smoothness"):
            assert (source, problem, "sasg") in checked(results)
    assert ("Lemma 1", "hard vectors", "top k") in checked(results)
    assert ("Lemma 2", "equal gradients", "sparse") in checked(results)
    names = [check["name"] for check in results["checks"]]
    assert names.count("multiple of SGD") == 6


def test_results_are_json(results):
    assert json.loads(json.dumps(results, allow_nan=False)) == results


def test_steps_are_reported(results, steps):
    total = len(steps)
    assert total > 1
    assert steps == [(done, total) for done in range(1, total + 1)]


def test_curves_are_as_wide_as_the_settings_say(results):
    assert len(results["rate"]) == len(results["workers"]) == 8
    settings = results["settings"]
    assert all(curve["T"] == settings["rate"]["rounds"] for curve in results["rate"])
    assert all(curve["M"] == settings["workers"]["workers"] for curve in results["workers"])


def test_full_scale_is_what_the_paper_speaks_of():
    assert theory.FULL.workers == (2, 4, 8, 16, 32, 64)
    for scale in (theory.FULL, QUICK):
        assert scale.rounds[-1] >= 32 * scale.rounds[0]
        assert len(scale.rounds) >= 5
    assert theory.FULL.methods == ("sgd", "sparse", "lasg", "sasg")


def test_equal_entries_reach_the_bound_of_lemma_1():
    check = checks.hard_vectors_check()
    assert check["holds"]
    assert check["measured"] == pytest.approx(1, abs=1e-12)


def test_lemma_2_where_the_gradient_is_always_ones():
    # 4 of 64 entries are sent in a round, those that have waited longest. Just after, 4 entries
    # have waited 0 rounds, 4 one round, and so on up to 15.
    problem = problems.equal_gradients()
    watched = runs.make(problem, "sparse", runs.by_rounds(problem, (256,)), (1,))
    (check,) = [c for c in checks.constant_checks(watched) if c["source"] == "Lemma 2"]
    assert check["measured"] == pytest.approx(4 * sum(i**2 for i in range(16)) / 64, rel=1e-4)
    assert check["bound"] == 960


def test_curve_of_known_runs():
    problem = problems.ridge_regression()
    nothing = runs.Observations(*[np.zeros(2)] * 9)

    def run(rounds, workers, gradient, uploads):
        observed = nothing._replace(gradient=np.array(gradient), uploads=np.array(uploads))
        return runs.Run(problem, "sasg", workers, rounds, 0.5, observed)

    # A line of slope -1/2 in the means of two seeds, and one of slope -1.
    by_rounds = [run(T, 8, [8 / T**0.5, 12 / T**0.5], [4 * T, 8 * T]) for T in (4, 64, 256)]
    assert checks.curve(by_rounds, "T") == {
        "problem": "ridge regression",
        "method": "sasg",
        "T": [4, 64, 256],
        "learning_rate": [0.5] * 3,
        "mean": [5, 1.25, 0.625],
        "min": [4, 1, 0.5],
        "max": [6, 1.5, 0.75],
        "slope": pytest.approx(-0.5),
        "upload_fraction": [0.75] * 3,
    }
    by_workers = [run(10, M, [1 / M, 1 / M], [10 * M] * 2) for M in (2, 4)]
    curve = checks.curve(by_workers, "M")
    assert (curve["M"], curve["slope"]) == ([2, 4], pytest.approx(-1))


def test_checks_of_known_curves():
    def curve(method, slope, mean):
        return {"problem": "p", "method": method, "slope": slope, "mean": mean}

    def holding(curves):
        return [(check["name"], check["method"], check["holds"]) for check in curves]

    steep, flat = curve("sgd", -0.61, [1.0, 0.1]), curve("sasg", -0.39, [2.0, 1.1])
    assert holding(checks.rate_checks([steep, flat])) == [
        ("slope against T", "sgd", False),
        ("slope against T", "sasg", False),
        ("multiple of SGD", "sasg", False),
    ]
    fine, steep = curve("sgd", -0.59, [1.0, 0.1]), curve("sasg", -0.7, [2.0, 0.9])
    assert holding(checks.rate_checks([fine, steep])) == [
        ("slope against T", "sgd", True),
        ("slope against T", "sasg", True),
        ("multiple of SGD", "sasg", True),
    ]
    assert holding(checks.workers_checks([flat, steep])) == [
        ("slope against M", "sasg", False),
        ("slope against M", "sasg", True),
    ]


# The problems -------------------------------------------------------------------------------------


def numpy_grad(problem, params, rows):
    """The mean gradient over the examples ``rows``, float64."""
    a, b, w = (np.asarray(x, np.float64) for x in (problem.features, problem.targets, params))
    a, b = a[rows], b[rows]
    if problem.name == NAMES["ridge"]:
        return (a.T @ (a @ w - b)) / len(b) + 0.1 * w
    pull = -b / (1 + np.exp(b * (a @ w)))
    return (a.T @ pull) / len(b) + 0.1 * 2 * w / (1 + w**2) ** 2


@pytest.mark.parametrize("name", PROBLEMS)
def test_gradients_and_smoothness_constants(name):
    problem, rng = PROBLEMS[name](), np.random.default_rng(3)
    largest = 0.0
    for _ in range(300):
        i = rng.integers(problems.EXAMPLES, size=1)
        if rng.uniform() < 0.5:  # the example with the largest constant of its own
            i = np.square(problem.features).sum(1).argmax(keepdims=True)
        # A short move along the example's features, from where its curvature is largest.
        a = problem.features[i[0]].astype(np.float64)
        w = np.zeros(problems.DIMENSION) if name == "logistic" else rng.normal(size=a.shape)
        moved = w + 1e-3 * a
        change = numpy_grad(problem, moved, i) - numpy_grad(problem, w, i)
        largest = max(largest, np.linalg.norm(change) / np.linalg.norm(moved - w))
    assert 0.99 * problem.smoothness < largest < (1 + 1e-7) * problem.smoothness

    everything = slice(None)
    grad = jax.grad(problem.loss)(problem.start, problem.features, problem.targets)
    np.testing.assert_allclose(
        grad, numpy_grad(problem, problem.start, everything), rtol=1e-4, atol=1e-5
    )


def test_one_problem_is_strongly_convex_and_the_other_not_convex(results):
    described = results["settings"]["problems"]
    ridge, logistic = (described[NAMES[name]]["curvature"] for name in PROBLEMS)
    features = problems.ridge_regression().features.astype(np.float64)
    eigenvalues = np.linalg.eigvalsh(features.T @ features / problems.EXAMPLES) + 0.1
    np.testing.assert_allclose(ridge, [eigenvalues[0], eigenvalues[-1]], rtol=1e-4)
    assert ridge[0] > 0.1
    assert logistic[0] < -0.01


# What is seen in a run, against the NumPy oracle --------------------------------------------------


METHODS = {
    "sgd": (None, None),
    "sparse": (runs.DENSITY, None),
    "lasg": (None, 0.5),
    "sasg": (runs.DENSITY, 0.5),
}


@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(*pair, marks=[] if pair == ("logistic", "sasg") else pytest.mark.slow)
        for pair in itertools.product(PROBLEMS, METHODS)
    ],
)
def test_observations_are_what_the_oracle_sees(name, method):
    density, alpha = METHODS[method]
    T, M, seed, gamma = 40, 4, 5, {"ridge": 0.01, "logistic": 0.06}[name]
    problem = PROBLEMS[name]()
    seen = jax.tree.map(lambda x: x[0], runs.watch(problem, method, M)(gamma, T, jnp.array([seed])))

    share = problems.EXAMPLES // M
    rows = [share * np.arange(M)[:, None] + runs.draw(seed, t, M) for t in range(T)]

    def grad(m, t, params):
        return {"w": numpy_grad(problem, params["w"], rows[t][m]).astype(np.float32)}

    def run(rounds):
        return oracle.train(
            grad,
            {"w": problem.start},
            num_workers=M,
            rounds=rounds,
            learning_rate=gamma,
            density=density,
            alpha=None if alpha is None else lambda gamma: alpha * M / gamma,
        )

    trace = run(T)
    path = [np.float64(params["w"]) for params in trace.params_history]
    full = [np.sum(numpy_grad(problem, w, slice(None)) ** 2) for w in path[:T]]
    noisy = [
        oracle.squared_norm(grad(m, t, trace.params_history[t])) for t in range(T) for m in range(M)
    ]
    assert seen.gradient == pytest.approx(np.mean(full), rel=1e-4)
    assert seen.stochastic == pytest.approx(max(noisy), rel=1e-4)
    assert seen.uploads == trace.uploaded.sum()
    assert seen.auxiliary < 1e-6

    # A run's residuals as a round begins are those at the end of a shorter run.
    residuals = [[e["w"] for e in run(t).residuals] for t in range(T)]
    residuals.append([e["w"] for e in trace.residuals])
    largest = np.square(residuals).sum(-1).max()
    assert seen.residual == pytest.approx(0 if density is None else largest, rel=1e-3)

    if alpha is None:
        assert (seen.innovation, seen.free) == (0, 0)
        return
    free = (trace.staleness < 10) & (np.arange(T)[:, None] >= 10)
    assert seen.free == free.sum() > 0
    assert seen.free_uploads == (free & trace.uploaded).sum()
    ratios = [
        trace.innovation[t, m] / np.sum((path[t] - path[t - trace.staleness[t, m]]) ** 2)
        for t, m in zip(*np.nonzero(free), strict=True)
    ]
    assert seen.innovation == pytest.approx(max(ratios), rel=1e-2)
    if density is not None:
        ratios = []
        for t, m in zip(*np.nonzero(trace.uploaded), strict=True):
            sent = gamma * grad(m, t, trace.params_history[t])["w"] + residuals[t][m]
            ratios.append(np.sum(residuals[t + 1][m] ** 2) / np.sum(sent**2))
        assert seen.compression == pytest.approx(max(ratios), rel=1e-3)


# Broken methods -----------------------------------------------------------------------------------


def broken_checks(**how):
    """Every check of SASG that does not hold, of those that are made of the runs of Theorem 1."""
    found = []
    for make in PROBLEMS.values():
        problem = make()
        plan = runs.by_rounds(problem, QUICK.rounds)
        watched = runs.make(problem, "sasg", plan, (1,), **how)
        found += checks.constant_checks(watched) + checks.rate_checks([checks.curve(watched, "T")])
    return [check for check in found if not check["holds"]]


def on_both(*names):
    return {(name, problem) for name in names for problem in NAMES.values()}


def names_and_problems(found):
    return {(check["name"], check["problem"]) for check in found}


@pytest.mark.slow
def test_without_error_feedback(monkeypatch):
    top_k = sasg_jax.top_k

    def forgetful(density, **kwargs):
        compressor = top_k(density, **kwargs)

        def compress(tree, memory, key):
            made = compressor.compress(tree, memory, key)
            return made._replace(remainder=jax.tree.map(jnp.zeros_like, tree))

        return dataclasses.replace(compressor, compress=compress)

    monkeypatch.setattr("sasg_jax.algorithms.top_k", forgetful)
    broken = broken_checks()
    assert names_and_problems(broken) == on_both("equation (16)", "slope against T")
    for check in broken:
        if check["name"] == "equation (16)":
            assert check["measured"] > 1000 * check["tolerance"]
        else:
            assert check["measured"] > -0.5 + 1.3 * check["tolerance"]


@pytest.mark.slow
def test_wrong_batch_in_the_stale_gradient():
    broken = broken_checks(stale_batch=lambda batch: batch ^ 1)  # the example beside it
    assert names_and_problems(broken) == on_both("Assumption of smoothness", "upload rule")
    for check in broken:
        if check["name"] == "upload rule":
            assert check["measured"] > 0.95
        else:
            assert check["measured"] > 10


@pytest.fixture
def first_k():
    """A compressor that sends the first entries instead of the largest."""
    top_k = sasg_jax.top_k

    def first_k(density, **kwargs):
        def compress(x, memory, key):
            message, _, memory = top_k(density, **kwargs).compress(x, memory, key)
            indices = jnp.arange(message[0].indices.size)
            first = message[0]._replace(
                values=x[indices], indices=indices.astype(message[0].indices.dtype)
            )
            return Compressed((first,), x.at[indices].set(0), memory)

        return dataclasses.replace(top_k(density, **kwargs), compress=compress)

    return first_k


@pytest.mark.slow
def test_first_entries_instead_of_the_largest(first_k, monkeypatch):
    monkeypatch.setattr("sasg_jax.algorithms.top_k", first_k)
    broken = broken_checks()
    assert names_and_problems(broken) == on_both("Lemma 1", "Lemma 2", "slope against T")


def test_hard_vectors_find_the_first_entries_out(first_k, monkeypatch):
    monkeypatch.setattr(sasg_jax, "top_k", first_k)
    assert not checks.hard_vectors_check()["holds"]
