"""CMFL's rule beside a loop written from its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recipes

import sasg_jax
from sasg_jax.rules.cmfl import LastStep, agreement

ROUNDS, RATE = 40, 0.1


def _loop(given, relevance, *, cap=None, present=None, top=None):
    """A mean over those that sent; the signs of the last step that was one."""
    rounds, M = given.targets.shape[:2]
    w, path, u = recipes.start(), [recipes.start()], None
    last = np.full(M, -(cap or 1))
    uploaded, found, nobody = np.zeros((rounds, M), bool), np.zeros((rounds, M)), 0
    residual = np.zeros(recipes.SIZE)
    for t in range(rounds):
        sent = []
        for m in range(M):
            x = RATE * given.grad(t, m, w)
            if not np.isfinite(x).all() or (present is not None and not present[t, m]):
                continue
            forced = u is None or (cap is not None and t - last[m] >= cap)
            if not forced:
                on = u != 0
                found[t, m] = (np.sign(x[on]) == np.sign(u[on])).sum() / on.sum()
            if forced or found[t, m] >= relevance(t):
                sent.append(x)
                uploaded[t, m], last[m] = True, t
        step = np.mean(sent, 0) if sent else np.zeros(recipes.SIZE)
        nobody += not sent
        if top is not None:  # a sparse way down
            total = step + residual
            step = np.where(np.argsort(np.argsort(-np.abs(total))) < top, total, 0)
            residual = total - step
        u = step if step.any() else u
        w = w - step
        path.append(w)
    return np.array(path), uploaded, found, nobody


def _check(run, want, there: np.ndarray | bool = True):
    path, uploaded, found, _ = want
    assert 0.2 < uploaded.mean() < 0.9
    np.testing.assert_array_equal(run.uploaded, uploaded)
    np.testing.assert_allclose(np.where(there, run.innovation, 0), found, atol=1e-6)
    recipes.assert_same_path(run, path)


def _tx(num_workers, *rule, **parts):
    cap = parts.pop("cap", None)
    made = sasg_jax.cmfl_rule(*rule, max_staleness=cap)
    return sasg_jax.compressed_sgd(
        RATE, sasg_jax.identity(), made, num_workers=num_workers, **parts
    )


@pytest.mark.parametrize(("num_workers", "relevance", "cap"), [(4, 0.7, 5), (1, 0.5, None)])
def test_equals_a_loop(num_workers, relevance, cap):
    """With rounds in which nobody sends: there nothing moves."""
    given = recipes.data(num_workers, ROUNDS, noise=2.0)
    want = _loop(given, lambda t: relevance, cap=cap)
    assert want[-1] > 0
    _check(recipes.run(_tx(num_workers, relevance, cap=cap), given), want)


def test_a_relevance_that_falls():
    """By default 0.8/√t; who is absent or refused has no part in the mean."""
    given = recipes.data(4, ROUNDS, noise=2.0)
    present = np.random.default_rng(1).random((ROUNDS, 4)) < 0.7
    given.targets[[0, 1, 12], [0, 2, 3], 0] = np.nan
    run = recipes.run(sasg_jax.cmfl(RATE, num_workers=4), given, present=present)
    refused = np.isnan(given.targets).any(2) & present
    want = _loop(given, lambda t: 0.8 / np.sqrt(max(t, 1)), present=present)
    _check(run, want, present & ~refused)
    np.testing.assert_allclose(run.threshold[1:], 0.8 / np.sqrt(np.arange(1, ROUNDS)), rtol=1e-6)
    np.testing.assert_array_equal(run.finite, ~refused)


def test_of_a_sparse_way_down_only_what_was_sent_is_looked_at():
    given = recipes.data(4, ROUNDS, noise=2.0)
    down = sasg_jax.top_k(0.4, scope="tree")
    run = recipes.run(_tx(4, 0.75, downlink=down), given)
    _check(run, _loop(given, lambda t: 0.75, top=2))


def _decide(x, u, threshold, started=True):
    rule = sasg_jax.cmfl_rule(0.5)
    shared = LastStep(jnp.asarray(u), jnp.asarray(started))
    return rule.decide(
        recipes.view(jnp.asarray(x), shared=shared, threshold=jnp.float32(threshold))
    )


def test_signs_by_hand():
    """Zeros of u are not counted; those of x, of either sign, agree with nothing."""
    x, u = (
        jnp.asarray([1.0, -2.0, 0.0, -0.0, 5.0, 3.0]),
        jnp.asarray([2.0, 1.0, 1.0, -1.0, 0.0, 9.0]),
    )
    assert agreement(x, u) == 2 / 5
    assert agreement({"a": x, "b": x}, {"a": u, "b": 0 * u}) == 2 / 5
    assert agreement(x, 0 * u) == 0
    # What equals its bound is sent, and what is not a number.
    assert _decide([1.0, 1.0], [1.0, -1.0], 0.5).upload
    assert not _decide([1.0, 1.0], [1.0, -1.0], 0.5 + 1e-6).upload
    assert _decide([-1.0, jnp.nan], [1.0, -1.0], 1.0).upload
    assert _decide([-1.0, 1.0], [1.0, -1.0], 1.0, started=False).upload
    assert _decide([-1.0, 1.0], [1.0, -1.0], 1.0, started=False).measured == 0


def test_a_step_of_zero_is_none():
    rule = sasg_jax.cmfl_rule(0.5)
    shared, now = rule.init_shared(jnp.ones(2)), recipes.view(None).round
    assert not shared.started
    shared = rule.end(shared, now, jnp.zeros(2))
    assert not shared.started
    shared = rule.end(rule.end(shared, now, jnp.asarray([0.0, -2.0])), now, jnp.zeros(2))
    assert shared.started
    np.testing.assert_array_equal(shared.step, [0, -2])


def test_what_it_says_of_itself():
    assert sasg_jax.cmfl_rule().name == "cmfl_rule()"
    assert sasg_jax.cmfl_rule(max_staleness=3).name == "cmfl_rule(max_staleness=3)"
    method = sasg_jax.cmfl(0.1, num_workers=2).method
    assert (method.silence, method.feedback.name, method.remembers) == ("drop", "none()", False)
    with pytest.raises(ValueError, match=r"^Expected relevance=1.5 to be a number in \[0, 1\]"):
        sasg_jax.cmfl_rule(1.5)
    with pytest.raises(ValueError, match=r"^Expected max_staleness=0 to be an integer"):
        sasg_jax.cmfl_rule(max_staleness=0)
    assert jax.tree.leaves(sasg_jax.cmfl_rule(lambda t: 0.5).init_worker(jnp.ones(2))) == []
