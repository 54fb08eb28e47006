"""The rules of LAG, CSGD and LAQ beside loops written from the papers' formulas: for the sum of M
losses at a rate α, of which the library's mean at γ = α M is the same."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recipes

import sasg_jax

ROUNDS, RATE, HISTORY = 40, 0.1, 4


def quantised(x, bits):
    """LAQ's, around zero: of what is new. The radius is that of the whole vector."""
    radius = np.abs(x).max()
    if radius == 0:
        return x
    delta = radius / (2**bits - 1)
    return -radius + 2 * delta * np.floor((x + radius + delta) / (2 * delta))


def _loop(given, xi, *, sigma=None, bits=None, errors=3.0, cap=None, present=None):
    """w ← w - α Σ h, where h is what arrived last, and S is Σ ‖Δw‖² over the last D steps."""
    rounds, M = given.targets.shape[:2]
    alpha = RATE / M
    w, path = recipes.start(), [recipes.start()]
    h, error, last = np.zeros((M, recipes.SIZE)), np.zeros(M), np.full(M, -(cap or 1))
    uploaded, compare = np.zeros((rounds, M), bool), recipes.compared()
    for t in range(rounds):
        steps = list(zip(path[1:], path, strict=False))[-HISTORY:]
        S = sum(recipes.squared(new - old) for new, old in steps)
        bound = xi * S / (alpha**2 * M**2) + (0 if sigma is None else sigma(t) / M**2)
        for m in range(M):
            g = given.grad(t, m, w)
            if not np.isfinite(g).all() or (present is not None and not present[t, m]):
                continue
            news = g - h[m] if bits is None else quantised(g - h[m], bits)
            slack, now = 0, 0.0
            if bits is not None:
                now = recipes.squared(g - h[m] - news)
                slack = errors * (now + error[m])
            forced = cap is not None and t - last[m] >= cap
            if forced or compare(recipes.squared(news), bound + slack):
                h[m], uploaded[t, m], last[m] = h[m] + news, True, t
                error[m] = now
        w = w - alpha * h.sum(0)
        path.append(w)
    return np.array(path), uploaded, compare


def _check(run, want, *, rates=(0.15, 0.85), tolerance=1e-4):
    path, uploaded, compare = want
    assert compare.margin > 2e-4  # nothing hangs on rounding
    assert rates[0] < uploaded.mean() < rates[1]
    np.testing.assert_array_equal(run.uploaded, uploaded)
    recipes.assert_same_path(run, path, tolerance=tolerance)


@pytest.mark.parametrize(
    ("num_workers", "xi", "cap"), [(1, 0.001, None), (4, 0.02, 6), (4, 0.01, None)]
)
def test_lag(num_workers, xi, cap):
    given = recipes.data(num_workers, ROUNDS)
    tx = sasg_jax.lag(RATE, num_workers=num_workers, xi=xi, history=HISTORY, max_staleness=cap)
    _check(recipes.run(tx, given), _loop(given, xi, cap=cap))


def test_the_rate_may_be_inside():
    """Then both sides are γ² times as large, and the slack is made so."""
    given, sigma = recipes.data(4, ROUNDS), lambda t: 0.5 * 0.9**t
    mine = lambda t: sigma(t) / 4**2
    rule = sasg_jax.lag_rule(0.01, history=HISTORY, slack=mine)
    tx = sasg_jax.compressed_sgd(RATE, sasg_jax.identity(), rule, num_workers=4)
    _check(recipes.run(tx, given), _loop(given, 0.01, sigma=sigma))


def test_csgd():
    """The batch grows, so that its noise shrinks as the slack does; who is absent or refused is as
    stale as ever."""
    given = recipes.data(4, ROUNDS, noise=0.3)
    shrinking = 0.9 ** (np.arange(ROUNDS)[:, None, None] / 2)
    still = recipes.data(4, ROUNDS)
    given = recipes.Data(
        still.rows + (given.rows - still.rows) * shrinking[..., None].astype(np.float32),
        still.targets + (given.targets - still.targets) * shrinking.astype(np.float32),
    )
    present = np.random.default_rng(1).random((ROUNDS, 4)) < 0.8
    given.targets[[0, 5, 12], [0, 2, 3], 0] = np.nan
    sigma = lambda t: 2.0 * 0.9**t
    tx = sasg_jax.csgd(
        RATE, num_workers=4, xi=0.02, history=HISTORY, slack=lambda t: sigma(t) / 4**2
    )
    run = recipes.run(tx, given, present=present)
    _check(run, _loop(given, 0.02, sigma=sigma, present=present))
    np.testing.assert_array_equal(run.finite, ~(np.isnan(given.targets).any(2) & present))


@pytest.mark.parametrize(
    ("num_workers", "xi", "bits", "errors"),
    [(1, 0.001, 4, 3.0), (4, 0.01, 4, 3.0), (4, 0.02, 3, 1.5)],
)
def test_laq(num_workers, xi, bits, errors):
    given = recipes.data(num_workers, ROUNDS)
    how = {"xi": xi, "history": HISTORY, "max_staleness": 9, "errors": errors}
    tx = sasg_jax.laq(RATE, num_workers=num_workers, bits=bits, **how)
    want = _loop(given, xi, bits=bits, errors=errors, cap=9)
    _check(recipes.run(tx, given), want, tolerance=1e-3)


# LAG's own figure ---------------------------------------------------------------------------------


def test_few_uploads_for_the_rounds_of_gradient_descent():
    """Least squares of nine workers with smoothness (1.3^(m-1) + 1)², as its authors have it: to
    1e-6 of the first gap in no more rounds (± 5 %), with a fifth of the uploads or less."""
    rng, size, M, rounds = np.random.default_rng(0), recipes.SIZE, 9, 400
    rows = rng.normal(size=(M, 20, size)) * np.logspace(0, -0.8, size)
    norms = np.array([np.linalg.norm(a.T @ a / 20, 2) for a in rows])
    rows *= np.sqrt((1.3 ** np.arange(M) + 1) ** 2 / norms)[:, None, None]
    targets = rows @ rng.normal(size=size) + 0.5 * rng.normal(size=(M, 20))
    repeat = lambda x: np.broadcast_to(x.astype(np.float32), (rounds, *x.shape))
    given = recipes.Data(repeat(rows), repeat(targets))
    hessian = np.einsum("mni,mnj->ij", rows, rows) / (20 * M)
    best = np.linalg.solve(hessian, np.einsum("mni,mn->i", rows, targets) / (20 * M))
    gap = lambda w: (w - best) @ hessian @ (w - best)
    rate = 1 / np.linalg.norm(hessian, 2)

    def first(path):
        return next(t for t, w in enumerate(path) if gap(w) < 1e-6 * gap(path[0]))

    w, path = recipes.start(), [recipes.start()]
    for _ in range(rounds):
        w = w - rate * hessian @ (w - best)
        path.append(w)
    run = recipes.run(sasg_jax.lag(float(rate), num_workers=M), given)
    there = first(run.path)
    assert 40 < first(path) < rounds
    assert there <= 1.05 * first(path)
    assert run.uploaded[:there].sum() < 0.2 * M * first(path)


# What is compared ---------------------------------------------------------------------------------


def _decide(rule, lacks, threshold, **other):
    tree = jax.tree.map(lambda p: jnp.full_like(p, lacks), recipes.params())
    return rule.decide(recipes.view(tree, pending=tree, threshold=threshold, **other))


def test_what_equals_the_threshold_is_silent():
    for rule in (sasg_jax.lag_rule(), sasg_jax.laq_rule()):
        rest = jax.tree.map(jnp.zeros_like, recipes.params())
        how = {"memory": jnp.float32(0), "remainder": lambda rest=rest: rest}
        assert not _decide(rule, 1.0, 5.0, **how).upload
        assert _decide(rule, 1.0, np.nextafter(np.float32(5), np.float32(4)), **how).upload
        assert _decide(rule, jnp.nan, 1e30, **how).upload
        assert _decide(rule, 1.0, 5.0, **how, forced=jnp.asarray(True)).upload


def test_rounding_alone_is_no_news():
    """5 · 2² = 20 are carried; what was left out now, 5, and what was by the last, 1, are told off
    three times. A silent worker still remembers the last."""
    rule, rest = sasg_jax.laq_rule(), jax.tree.map(jnp.ones_like, recipes.params())
    decide = functools.partial(_decide, rule, 3.0, memory=jnp.float32(1), remainder=lambda: rest)
    assert (decide(1.0).upload, decide(1.0).measured, decide(1.0).memory) == (True, 2, 5)
    assert (decide(2.0).upload, decide(2.0).memory) == (False, 1)


def test_thresholds_by_hand():
    """ξ times the last D steps, in the unit of γ g."""
    step = lambda x: jax.tree.map(lambda p: jnp.full_like(p, x), recipes.params())
    for rule in (sasg_jax.lag_rule(0.5, history=2), sasg_jax.laq_rule(0.5, history=2)):
        steps, now = rule.init_shared(recipes.params()), recipes.view(None, rate=0.1).round
        seen = []
        for size in (1.0, 2.0, 3.0, 1e30):
            seen.append(float(rule.begin(steps, now)[0]))
            steps = rule.end(steps, now, step(size))
        np.testing.assert_allclose([*seen, rule.begin(steps, now)[0]], [0, 2.5, 12.5, 32.5, 22.5])


def test_names_and_bad_arguments():
    make = sasg_jax.lag_rule
    assert make().name == "lag_rule(history=10)"
    assert make(history=3, max_staleness=7).name == "lag_rule(history=3, max_staleness=7)"
    assert sasg_jax.laq_rule().name == "laq_rule(history=10, max_staleness=100)"
    for rule in (make, sasg_jax.laq_rule):
        with pytest.raises(ValueError, match=r"^Expected xi=-1 to be a finite number of at least"):
            rule(-1)
        with pytest.raises(ValueError, match=r"^Expected history=0 to be an integer"):
            rule(history=0)
        with pytest.raises(ValueError, match=r"^Expected max_staleness=0 to be an integer"):
            rule(max_staleness=0)
    with pytest.raises(ValueError, match=r"^Expected slack=nan to be a finite number of at least"):
        make(slack=math.nan)
    with pytest.raises(ValueError, match=r"^Expected errors=-1 to be a finite number of at least"):
        sasg_jax.laq_rule(errors=-1)
    with pytest.raises(ValueError, match=r"^Expected feedback='none\(\)' to be reconstruction\(\)"):
        sasg_jax.lag(0.1, num_workers=2, feedback=sasg_jax.none())
