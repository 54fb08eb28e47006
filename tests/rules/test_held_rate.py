"""The rule that is told how often to send: how its bound moves, and what it leaves as it is."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sasg_jax
from sasg_jax.rules.base import SILENCES, Round, View
from sasg_jax.rules.held_rate import Held
from sasg_jax.server import init_server
from sasg_jax.worker import init_worker, worker_half

PARAMS = jnp.zeros(2)


def _norm(view):
    """What the first entry of a direction is, so that a test may say what is measured."""
    return view.direction[0]


def _keeps_directions(measure=_norm, **settings):
    """A rule whose bound is never reached, and which remembers the last direction that was sent."""
    return sasg_jax.Rule(
        name="made()",
        decide=lambda view: pytest.fail("nobody asked whether it would upload"),
        measure=measure,
        init_worker=jnp.zeros_like,
        sent=lambda memory, params, direction, learning_rate: direction,
        **settings,
    )


RULE = _keeps_directions()


def _decide(rule, memory, measured, *, round=0, forced=False):
    now = Round(PARAMS, jnp.int32(round), 4, None)
    threshold, shared = rule.begin(rule.init_shared(PARAMS), now)
    unused = lambda *params: pytest.fail("nobody asked for it")
    direction = jnp.stack([jnp.asarray(measured, jnp.float32), jnp.float32(7)])
    rest = memory, shared, threshold, jnp.asarray(forced), unused, unused, unused
    return rule.decide(View(now, jnp.int32(1), direction, (), jnp.int32(1), *rest))


def _run(rule, measured, forced=None):
    """Decisions of one worker, round by round, and its memory after the last."""
    forced = [False] * len(measured) if forced is None else forced

    def one(memory, now):
        t, x, forced = now
        decision = _decide(rule, memory, x, round=t, forced=forced)
        return decision.memory, decision

    rounds = jnp.arange(len(measured)), jnp.float32(measured), jnp.asarray(forced)
    return jax.jit(lambda: jax.lax.scan(one, rule.init_worker(PARAMS), rounds))()


# The bound ----------------------------------------------------------------------------------------


def test_bound_by_hand():
    """It starts at the first measurement, then log θ moves by 0.5 (uploaded - 0.25)."""
    rule = sasg_jax.held_rate(0.25, RULE, gain=0.5)
    measured = [8.0, 8.0, 11.0, 12.0, 1.0, 13.0]
    memory, decisions = _run(rule, measured)
    logs = [math.log(8) + 0.5 * 0.75]  # 11.6
    logs += [logs[-1] - 0.125]  # 10.3
    logs += [logs[-1] + 0.375]  # 15.0
    logs += [logs[-1] - 0.125]  # 13.2
    logs += [logs[-1] - 0.125]  # 11.6
    logs += [logs[-1] + 0.375]
    np.testing.assert_array_equal(decisions.upload, [True, False, True, False, False, True])
    np.testing.assert_array_equal(decisions.measured, measured)
    np.testing.assert_allclose(decisions.memory.log_threshold, logs, rtol=1e-6)
    assert memory.started


@pytest.mark.parametrize(("measured", "uploads"), [(math.e * 1.001, True), (math.e / 1.001, False)])
def test_uploads_above_its_own_bound(measured, uploads):
    """Which is e here; that of the rule inside it, which is zero, does not count."""
    memory = Held(jnp.zeros(2), jnp.float32(1), jnp.asarray(True))
    assert _decide(sasg_jax.held_rate(0.5, RULE), memory, measured).upload == uploads


def test_what_equals_its_bound_is_silent():
    memory = Held(jnp.zeros(2), jnp.float32(0), jnp.asarray(True))
    assert not _decide(sasg_jax.held_rate(0.5, RULE), memory, 1.0).upload
    assert _decide(sasg_jax.held_rate(0.5, RULE), memory, np.nextafter(1, 2, dtype="f")).upload


@pytest.mark.parametrize("first", [0.0, np.inf, np.nan])
def test_bound_starts_at_the_first_measurement_that_is_one(first):
    """Before it, everything uploads: nobody knows what is much."""
    rule = sasg_jax.held_rate(0.25, RULE, gain=0.5)
    memory, decisions = _run(rule, [first, first, 4.0, 4.0])
    np.testing.assert_array_equal(decisions.upload, [True, True, True, False])
    np.testing.assert_array_equal(decisions.memory.started, [False, False, True, True])
    starts = [0, 0, math.log(4) + 0.375, math.log(4) + 0.25]
    np.testing.assert_allclose(decisions.memory.log_threshold, starts, rtol=1e-6)
    assert memory.log_threshold.dtype == jnp.float32


@pytest.mark.parametrize(("measured", "uploads"), [(0.0, 0), (np.inf, 1), (np.nan, 1)])
def test_what_is_no_positive_number_counts_and_no_more(measured, uploads):
    """Nothing to say is silent; what cannot be measured is sent. The bound stays a number."""
    rule = sasg_jax.held_rate(0.25, RULE, gain=0.5)
    memory = Held(jnp.zeros(2), jnp.float32(-3), jnp.asarray(True))
    decision = _decide(rule, memory, measured)
    assert decision.upload == uploads
    assert decision.memory is not None
    np.testing.assert_allclose(decision.memory.log_threshold, -3 + 0.5 * (uploads - 0.25))
    assert decision.memory.started


def test_forced_uploads_count():
    """As any other, so that a rate below that of the forced ones is made up for by silence."""
    rule = sasg_jax.held_rate(0.25, RULE, gain=0.5)
    memory = Held(jnp.zeros(2), jnp.float32(2), jnp.asarray(True))
    decision = _decide(rule, memory, 1.0, forced=True)
    assert decision.upload
    assert decision.memory is not None
    assert decision.memory.log_threshold == 2 + 0.375


def test_a_rate_of_one_lets_the_bound_only_sink():
    """Until everything is above it."""
    _, decisions = _run(sasg_jax.held_rate(1, RULE), [4.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    np.testing.assert_array_equal(decisions.upload, [1, 0, 0, 0, 0, 0, 1, 1])
    assert (np.diff(decisions.memory.log_threshold) <= 0).all()


# The rate -----------------------------------------------------------------------------------------

ROUNDS = 2_000


def _measured(drift=1.0, seed=0):
    """Lognormal numbers whose scale drifts by this factor."""
    noise = np.random.default_rng(seed).normal(size=ROUNDS)
    return np.exp(noise + np.linspace(0, math.log(drift), ROUNDS))


@pytest.mark.parametrize("drift", [1.0, 1e4, 1e-4])
@pytest.mark.parametrize("rate", [0.05, 0.3, 0.8])
def test_rate_is_held_whatever_the_scale_does(rate, drift):
    """To the uploads in which the bound has moved as far as the scale."""
    memory, decisions = _run(sasg_jax.held_rate(rate, RULE), _measured(drift))
    moved = memory.log_threshold - np.log(_measured(drift)[0])
    np.testing.assert_allclose(decisions.upload.sum(), rate * ROUNDS + moved / 0.3, rtol=1e-3)
    assert abs(decisions.upload.mean() - rate) < 0.025
    assert abs(decisions.upload[ROUNDS // 2 :].mean() - rate) < 0.025


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_nothing_hangs_on_the_unit(scale):
    rule = sasg_jax.held_rate(0.3, RULE)
    _, decisions = _run(rule, _measured())
    _, scaled = _run(rule, scale * _measured())
    assert (decisions.upload == scaled.upload).mean() > 0.99


def test_what_is_measured_most_is_sent():
    """And not any three rounds of ten."""
    measured = _measured()
    _, decisions = _run(sasg_jax.held_rate(0.3, RULE, gain=0.05), measured)
    sent, silent = measured[decisions.upload], measured[~decisions.upload]
    assert np.quantile(sent, 0.1) > np.quantile(silent, 0.9)


def test_rate_that_is_a_function_of_the_round_is_followed():
    rate = lambda t: jnp.where(t < ROUNDS // 2, 0.1, 0.6)
    _, decisions = _run(sasg_jax.held_rate(rate, RULE), _measured())
    halves = decisions.upload.reshape(2, -1).mean(1)
    np.testing.assert_allclose(halves, [0.1, 0.6], atol=0.025)


def test_forced_uploads_are_part_of_the_rate():
    """Every tenth; of a rate of 0.3 the rule chooses the rest."""
    forced = np.arange(ROUNDS) % 10 == 0
    _, decisions = _run(sasg_jax.held_rate(0.3, RULE), _measured(), forced)
    assert decisions.upload[forced].all()
    assert abs(decisions.upload.mean() - 0.3) < 0.025


# The rule inside ----------------------------------------------------------------------------------


@pytest.mark.parametrize("silence", SILENCES)
def test_keeps_what_the_rule_is_otherwise(silence):
    inner = _keeps_directions(silence=silence, max_staleness=7, needs_learning_rate=True)
    rule = sasg_jax.held_rate(0.2, inner)
    for name in ("max_staleness", "needs_learning_rate", "always"):
        assert getattr(rule, name) == getattr(inner, name)
    for name in ("end", "init_shared"):
        assert getattr(rule, name) is getattr(inner, name)
    assert rule.silence == "keep"


def test_each_worker_has_a_bound_of_its_own_so_that_none_is_reported():
    inner = dataclasses.replace(RULE, begin=lambda shared, round: (jnp.float32(7), shared + 1))
    now = Round(PARAMS, jnp.int32(0), 4, None)
    threshold, shared = sasg_jax.held_rate(0.2, inner).begin(1, now)
    assert (float(threshold), shared) == (0, 2)


def test_one_that_holds_a_rate_measures_nothing_for_another():
    with pytest.raises(
        ValueError, match=r"^Expected rule='held_rate\(0.2, made\(\)\)' to be one tha"
    ):
        sasg_jax.held_rate(0.1, sasg_jax.held_rate(0.2, _keeps_directions()))
    shared = sasg_jax.innovation(share_stale_params=True)
    with pytest.raises(ValueError, match=r"share_stale_params=True\)' to be one that measures"):
        sasg_jax.held_rate(0.1, shared)


def test_names_say_the_rate_and_the_rule():
    made = sasg_jax.held_rate(0.05, sasg_jax.direction_change())
    assert made.name == "held_rate(0.05, direction_change(max_staleness=10))"
    made = sasg_jax.held_rate(lambda t: 0.1, sasg_jax.message_share(), gain=0.1)
    assert made.name == "held_rate(rate, message_share(max_staleness=10))"


@pytest.mark.parametrize(("sign", "uploads"), [(1, False), (-1, True)])
@pytest.mark.parametrize("theta", [0.0, 1e30])
def test_bound_and_turns_of_the_rule_do_not_count(theta, sign, uploads):
    """It is the turn of worker 1; its direction is the one of before or that backwards, and 4 is
    above e."""
    inner = sasg_jax.direction_change(theta, max_staleness=4)
    rule = sasg_jax.held_rate(0.2, inner)
    memory = Held(sign * jnp.asarray([1.0, 7.0]), jnp.float32(1), jnp.asarray(True))
    decision = _decide(rule, memory, 1.0, round=3)
    assert (decision.upload, decision.measured) == (uploads, 4 if uploads else 0)
    assert _decide(inner, memory.memory, 1.0, round=3).upload


def test_measures_with_the_memory_of_the_rule():
    """Of which a silent round changes nothing."""
    inner = _keeps_directions(lambda view: jnp.sum(view.memory))
    memory = Held(jnp.asarray([3.0, 4.0]), jnp.float32(5), jnp.asarray(True))
    decision = _decide(sasg_jax.held_rate(0.2, inner), memory, 1.0)
    assert (decision.upload, decision.measured) == (False, 7)
    assert decision.memory is not None
    np.testing.assert_array_equal(decision.memory.memory, [3, 4])


# In a worker's half of a round --------------------------------------------------------------------

STARTED = Held(jnp.asarray([9.0, 9.0]), jnp.float32(1), jnp.asarray(True))


def _round(direction, *, silence="keep", present=True, staleness=1):
    """The rule's memory after a round, of one at e, and who uploads."""
    g = jnp.asarray(direction, jnp.float32)
    rule = sasg_jax.held_rate(0.25, _keeps_directions(max_staleness=5), gain=0.5)
    method = sasg_jax.make_method(sasg_jax.top_k(0.5), rule, num_workers=4, silence=silence)
    worker = init_worker(method, PARAMS)._replace(rule=STARTED, staleness=jnp.int32(staleness))
    server = init_server(method, PARAMS)

    @jax.jit
    def half(worker):
        return worker_half(method, worker, server, g, PARAMS, index=0, present=present)

    new, _ = half(worker)
    return new.rule, bool(new.uploaded), bool(new.finite)


@pytest.mark.parametrize("silence", SILENCES)
def test_memory_of_who_is_there(silence):
    """That of the rule is what its ``sent`` makes, of who uploads; the bound moves anyway."""
    held, uploads, _ = _round([4, 1], silence=silence)
    assert uploads
    np.testing.assert_array_equal(held.memory, [4, 1])
    np.testing.assert_allclose(held.log_threshold, 1 + 0.375)
    held, uploads, _ = _round([2, 1], silence=silence)
    assert not uploads
    np.testing.assert_array_equal(held.memory, [9, 9])
    np.testing.assert_allclose(held.log_threshold, 1 - 0.125)
    held, uploads, _ = _round([2, 1], silence=silence, staleness=5)
    assert uploads
    np.testing.assert_array_equal(held.memory, [2, 1])
    np.testing.assert_allclose(held.log_threshold, 1 + 0.375)


@pytest.mark.parametrize("silence", SILENCES)
@pytest.mark.parametrize("staleness", [1, 5])
@pytest.mark.parametrize(
    ("direction", "present"),
    [([4, 1], False), ([2, 1], False), ([np.nan, 1], True), ([4, np.inf], True)],
)
def test_memory_of_who_is_absent_or_refused(direction, present, staleness, silence):
    """Is what it was: also where an upload is due."""
    options = {"present": present, "staleness": staleness, "silence": silence}
    held, uploads, finite = _round(direction, **options)
    assert (uploads, finite) == (False, not present)
    for got, want in zip(held, STARTED, strict=True):
        np.testing.assert_array_equal(got, want)


# Bad arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0, -0.1, 1.001, math.nan, math.inf, True, "1", None])
def test_rates_out_of_range(rate):
    with pytest.raises(ValueError, match=rf"^Expected rate={rate!r} in \(0, 1\]\.$"):
        sasg_jax.held_rate(rate, RULE)


@pytest.mark.parametrize("gain", [0, -0.3, math.nan, math.inf, True, "1", None])
def test_gains_out_of_range(gain):
    with pytest.raises(
        ValueError, match=rf"^Expected gain={gain!r} to be a finite number above 0\.$"
    ):
        sasg_jax.held_rate(0.2, RULE, gain=gain)


@pytest.mark.parametrize(
    "rule",
    [
        sasg_jax.always(),
        sasg_jax.every(3),
        sasg_jax.innovation(max_staleness=1),
        sasg_jax.innovation(1.0, max_staleness=1),
    ],
    ids=lambda rule: rule.name,
)
def test_rules_that_measure_nothing_are_named(rule):
    message = f"Expected rule={rule.name!r} to be one that measures something."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        sasg_jax.held_rate(0.2, rule)


@pytest.mark.parametrize("rule", [1.0, "innovation", None, sasg_jax.innovation])
def test_what_is_no_rule(rule):
    with pytest.raises(ValueError, match=r"^Expected rule=.* to be made by sasg_jax.innovation, "):
        sasg_jax.held_rate(0.2, rule)
