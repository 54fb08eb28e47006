"""The rules of CADA and LASG beside loops written from their formulas."""

import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import recipes

import sasg_jax

ROUNDS, RATE, HISTORY, CAP = 40, 0.1, 4, 7


_zeros = lambda tree: jax.tree.map(jnp.zeros_like, tree)


class AMSGrad:
    """As optax has it: the bias of both moments is corrected."""

    def __init__(self, rate, b1=0.9, b2=0.999):
        self.rate, self.b1, self.b2, self.t = rate, b1, b2, 0
        self.m, self.v, self.top = 0, 0, 0

    def __call__(self, g):
        self.t += 1
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * g**2
        self.top = np.maximum(self.top, self.v / (1 - self.b2**self.t))
        return self.rate * self.m / (1 - self.b1**self.t) / (np.sqrt(self.top) + 1e-8)


def _loop(given, c, step, *, snapshot, in_params=False, present=None):
    """The server keeps M gradients and steps with their mean. ``in_params``: LASG's threshold, of
    the parameters' steps, (c / γ²D) Σ ‖Δw‖², the same where w loses γ ḡ."""
    rounds, num_workers = given.targets.shape[:2]
    w, path, means = recipes.start(), [recipes.start()], []
    kept = np.zeros((num_workers, recipes.SIZE))
    stale, delta = [w] * num_workers, np.zeros_like(kept)
    last, taken, taken_in, new = [-CAP] * num_workers, w, 0, w
    uploaded = np.zeros((rounds, num_workers), bool)
    found = np.zeros((rounds, num_workers))
    thresholds, compare = [], recipes.compared()
    for t in range(rounds):
        if in_params:
            pairs = list(zip(path[1:], path, strict=False))[-HISTORY:]
            threshold = sum(recipes.squared(a - b) for a, b in pairs) * c / (RATE**2 * HISTORY)
        else:
            threshold = c / HISTORY * sum(map(recipes.squared, means[-HISTORY:]))
        thresholds.append(threshold)
        if t % CAP == 0:
            taken, taken_in = w, t
        for m in range(num_workers):
            if present is not None and not present[t, m]:
                continue
            g = given.grad(t, m, w)
            if not np.isfinite(g).all():
                continue
            forced = t - last[m] >= CAP
            if snapshot:
                forced |= last[m] < taken_in or t == taken_in
                new = g - given.grad(t, m, taken)
                change = recipes.squared(new - delta[m])
            else:
                change = recipes.squared(g - given.grad(t, m, stale[m]))
            if forced or compare(change, threshold):
                uploaded[t, m], kept[m], stale[m], last[m] = True, g, w, t
                delta[m] = new if snapshot else 0
            found[t, m] = 0 if forced else change
        mean = kept.mean(0)
        means.append(mean)
        w = w - step(mean)
        path.append(w)
    return np.array(path), uploaded, found, np.array(thresholds), compare


def _check(run, want, *, rates=(0.2, 0.8), there: Any = True):
    path, uploaded, found, thresholds, compare = want
    assert compare.margin > 1e-3  # nothing hangs on rounding
    assert rates[0] < uploaded.mean() < rates[1]
    np.testing.assert_array_equal(run.uploaded, uploaded)
    np.testing.assert_allclose(np.where(there, run.innovation, 0), found, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(run.threshold, thresholds, rtol=1e-3, atol=1e-5)
    recipes.assert_same_path(run, path)


@pytest.mark.parametrize("snapshot", [False, True], ids=["cada2", "cada1"])
@pytest.mark.parametrize("num_workers", [1, 4])
def test_before_amsgrad(num_workers, snapshot):
    given, c = recipes.data(num_workers, ROUNDS, noise=0.5), 0.1
    tx = sasg_jax.cada(
        RATE,
        num_workers=num_workers,
        c=c,
        history=HISTORY,
        max_staleness=CAP,
        snapshot=snapshot,
    )
    want = _loop(given, c, AMSGrad(RATE), snapshot=snapshot)
    _check(recipes.run(tx, given), want)


@pytest.mark.parametrize("snapshot", [False, True], ids=["wk2", "wk1"])
def test_before_sgd_it_is_lasg(snapshot):
    """Whose threshold is of the parameters' steps, with the rate inside the compressor."""
    given = recipes.data(4, ROUNDS, noise=0.5)
    rule = sasg_jax.cada_rule(0.1, history=HISTORY, max_staleness=CAP, snapshot=snapshot)
    tx = sasg_jax.compressed_sgd(RATE, sasg_jax.identity(), rule, num_workers=4)
    want = _loop(given, 0.1, lambda g: RATE * g, snapshot=snapshot, in_params=True)
    _check(recipes.run(tx, given), want)


@pytest.mark.parametrize("snapshot", [False, True])
def test_absent_and_refused(snapshot):
    """Nothing of theirs changes; a worker that was not there for a snapshot sends the first time
    that it is."""
    given = recipes.data(4, ROUNDS, noise=0.5)
    present = np.random.default_rng(1).random((ROUNDS, 4)) < 0.7
    present[[7, 14, 21], [0, 1, 2]] = False
    given.targets[[7, 12, 22], [3, 0, 1], 0] = np.nan
    rule = sasg_jax.cada_rule(0.05, history=HISTORY, max_staleness=CAP, snapshot=snapshot)
    tx = sasg_jax.aggregate(sasg_jax.identity(), rule, num_workers=4)
    run = recipes.run(sasg_jax.pipeline(tx, optax.sgd(RATE)), given, present=present)
    want = _loop(given, 0.05, lambda g: RATE * g, snapshot=snapshot, present=present)
    refused = np.isnan(given.targets).any(2) & present
    _check(run, want, there=present & ~refused)
    np.testing.assert_array_equal(run.finite, ~refused)
    late = (run.staleness[:-1] > (np.arange(1, ROUNDS) % CAP)[:, None]) & present[1:]
    assert not snapshot or run.uploaded[1:][late & ~refused[1:]].all()


@pytest.mark.parametrize("snapshot", [False, True])
def test_what_equals_the_threshold_uploads(snapshot):
    """As in the released code; and what is not a number does."""
    rule = sasg_jax.cada_rule(snapshot=snapshot)
    ones = jax.tree.map(jnp.ones_like, recipes.params())
    memory = _zeros(ones) if snapshot else ones
    how: Any = {"memory": memory, "shared": rule.init_shared(ones), "again": _zeros(ones)}
    decide = lambda threshold: rule.decide(recipes.view(ones, threshold=threshold, **how))
    assert decide(5.0).upload
    assert not decide(np.nextafter(np.float32(5), np.float32(6))).upload
    assert decide(5.0).measured == 5
    how["again"] = jax.tree.map(lambda x: x * jnp.nan, ones)
    assert decide(1e30).upload


@pytest.mark.parametrize("snapshot", [False, True])
def test_nothing_hangs_on_a_unit(snapshot):
    """Neither of the loss nor of the rate: a loss is scaled, and the rate makes up for it."""
    given, factor = recipes.data(4, 25, noise=0.5), 1e4
    rule = sasg_jax.cada_rule(0.6, history=HISTORY, max_staleness=CAP, snapshot=snapshot)
    make = lambda rate: sasg_jax.compressed_sgd(rate, sasg_jax.identity(), rule, num_workers=4)
    scaled = lambda params, batch: factor * recipes.loss(params, batch)
    plain = recipes.run(make(RATE), given)
    other = recipes.run(make(RATE / factor), given, direction=scaled)
    np.testing.assert_array_equal(other.uploaded, plain.uploaded)
    np.testing.assert_allclose(other.threshold, factor**2 * plain.threshold, rtol=1e-3)


def test_a_rate_that_drops_leaves_the_threshold_as_it_was():
    """It is of gradients, which do not jump with the rate."""
    rule = sasg_jax.cada_rule(history=2)
    now = lambda rate: sasg_jax.Round(recipes.params(), jnp.int32(3), 4, jnp.float32(rate))
    step = lambda size: jax.tree.map(lambda x: jnp.full_like(x, size), recipes.params())
    steps = rule.end(rule.init_shared(None), now(0.5), step(0.5))
    steps = rule.end(steps, now(0.05), step(0.05))
    np.testing.assert_allclose(rule.begin(steps, now(0.05))[0], 5, rtol=1e-6)
    # A rate of zero says nothing of gradients, and nor do steps that are beyond float32.
    for rate, size in ((0.0, 0.0), (0.5, 1e30)):
        np.testing.assert_allclose(rule.end(steps, now(rate), step(size)), [5, 0], rtol=1e-6)


def test_a_gradient_at_old_parameters_that_is_not_finite():
    """Uploads, and is not what later ones are compared with."""
    rule = sasg_jax.cada_rule(snapshot=True)
    g, ones = recipes.params(), jax.tree.map(jnp.ones_like, recipes.params())
    how: Any = {"memory": ones, "shared": rule.init_shared(ones), "threshold": 1e30}
    for factor, uploads in ((jnp.nan, True), (jnp.inf, True), (1e30, True), (0.0, False)):
        again = jax.tree.map(lambda x, factor=factor: x * factor, ones)
        decision = rule.decide(recipes.view(g, again=again, **how))
        assert decision.upload == uploads
        chex.assert_trees_all_equal(decision.memory, _zeros(ones) if uploads else ones)


def test_what_they_say_of_themselves():
    rule, other = sasg_jax.cada_rule(3.0), sasg_jax.cada_rule(history=2, snapshot=True)
    assert rule.name == "cada_rule(history=10, max_staleness=50)"
    assert other.name == "cada_rule(history=2, max_staleness=50, snapshot=True)"
    assert rule.compares
    assert other.compares
    assert (rule.silence, other.silence) == ("reuse", "reuse")
    assert not rule.needs_learning_rate
    assert rule.measure is not None


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("c", -1, "to be a finite number of at least 0"),
        ("c", math.inf, "to be a finite number of at least 0"),
        ("history", 0, "to be an integer of at least 1"),
        ("max_staleness", 0, "to be an integer of at least 1"),
        ("snapshot", 1, "to be True or False"),
    ],
)
def test_arguments_out_of_range(name, value, allowed):
    with pytest.raises(ValueError, match=rf"^Expected {name}={value!r} {allowed}"):
        sasg_jax.cada_rule(**{name: value})
