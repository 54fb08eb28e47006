"""Rule (6) by hand: its threshold, what it measures, and when an upload is forced."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sasg_jax.rules.base import Round, View
from sasg_jax.rules.innovation import innovation, released_alpha, weights


def _thresholds(rule, steps, num_workers, rates=None):
    """The threshold of every round of a run that makes these steps. ``# shape=(T, n)``

    The rule sees them where the parameters of a round begin, whoever has made them; so nothing of
    the server's.
    """
    rates = np.ones(len(steps)) if rates is None else rates
    paths = np.cumsum(np.concatenate([np.zeros((1, steps.shape[1])), steps]), axis=0)[:-1]

    def one(shared, now):
        t, params, rate = now
        round = Round(params, t, num_workers, rate)
        threshold, shared = rule.begin(shared, round)
        return rule.end(shared, round, jnp.full_like(params, jnp.nan)), threshold

    start = rule.init_shared(jnp.zeros(steps.shape[1]))
    rounds = jnp.arange(len(steps)), jnp.float32(paths), jnp.float32(rates)
    return np.asarray(jax.jit(lambda s, x: jax.lax.scan(one, s, x)[1])(start, rounds))


def _of_squared_norms(*values):
    return np.sqrt(np.array(values, np.float64))[:, None]


def test_threshold_by_hand():
    """alpha = (3, 5), M = 2, steps of squared norm 4, 1, 9, 0: (3 * newest + 5 * before) / 4."""
    rule = innovation([3.0, 5.0], history=2)
    got = _thresholds(rule, _of_squared_norms(4, 1, 9, 0, 0, 0), num_workers=2)
    want = [0, 3 * 4 / 4, (3 * 1 + 5 * 4) / 4, (3 * 9 + 5 * 1) / 4, 5 * 9 / 4, 0]
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("max_staleness", [1, 2, 5])
def test_threshold_is_that_of_a_loop(max_staleness, share):
    """(1/M²) Σ_d α_d ‖step of d rounds ago‖², where α was that of the step's own rate."""
    rng = np.random.default_rng(0)
    rounds, M, history = 12, 3, 4
    steps = rng.normal(size=(rounds, 6))
    rates = rng.uniform(0.1, 1, rounds).astype(np.float32)
    factors = np.array([4.0, 3.0, 2.0, 1.0])
    rule = innovation(
        lambda rate: jnp.asarray(factors, jnp.float32) / rate,
        max_staleness=max_staleness,
        history=history,
        share_stale_params=share,
    )
    want = []
    for t in range(rounds):
        past = range(1, min(history, t) + 1)
        terms = [factors[d - 1] / rates[t - d] * np.sum(steps[t - d] ** 2) for d in past]
        want.append(sum(terms) / M**2)
    np.testing.assert_allclose(_thresholds(rule, steps, M, rates), want, rtol=1e-4)


def test_history_is_weighted_when_it_is_made():
    """A step made at rate 0.5 keeps its weight after the rate has dropped."""
    rule = innovation(lambda rate: 1 / rate, history=2)
    rates = [0.5, 0.5, 0.25, 0.25]
    got = _thresholds(rule, np.ones((4, 1)), num_workers=1, rates=rates)
    np.testing.assert_allclose(got, [0, 2, 2 + 2, 2 + 4])


@pytest.mark.parametrize("rate", [0.0, -1e-9, np.nan])
def test_a_rate_that_has_decayed_to_zero_weighs_nothing(rate):
    """Not infinitely, not 0/0, and not less than nothing; older steps keep their weight."""
    rule = innovation(released_alpha(1.0, 1), history=3)
    rates = [0.5, rate, rate, rate]
    got = _thresholds(rule, np.ones((4, 1)), num_workers=1, rates=rates)
    np.testing.assert_allclose(got, [0, 2, 2, 2])


# What is measured, and when -----------------------------------------------------------------------

PARAMS, STALE = jnp.array([1.0, 2.0]), jnp.array([0.0, 1.0])
DIRECTION = jnp.array([3.0, 4.0])


def _decide(rule, *, again, threshold=1.0, round=9, staleness=3, rate=None, old_rate=0.0):
    """The decision of one worker, and how often it has evaluated its direction again."""
    ran = []

    def reevaluate(params):
        jax.debug.callback(lambda p: ran.append(p), params)
        return jnp.asarray(again, jnp.float32)

    def decide(number, staleness, rate):
        shared = rule.init_shared(PARAMS)
        memory = rule.init_worker(STALE)._replace(learning_rate=jnp.float32(old_rate))
        return rule.decide(
            View(
                round=Round(PARAMS, number, 4, rate),
                worker=jnp.int32(0),
                direction=DIRECTION,
                feedback=(),
                staleness=staleness,
                memory=memory,
                shared=shared,
                threshold=jnp.float32(threshold),
                forced=staleness >= rule.max_staleness,
                reevaluate=reevaluate,
                pending=lambda: pytest.fail("nobody asked for it"),
                remainder=lambda: pytest.fail("nobody asked for it"),
            )
        )

    rate = None if rate is None else jnp.float32(rate)
    decision = jax.jit(decide)(jnp.int32(round), jnp.int32(staleness), rate)
    jax.block_until_ready(decision)
    jax.effects_barrier()
    for params in ran:
        np.testing.assert_array_equal(params, STALE)
    return bool(decision.upload), float(decision.measured), len(ran)


RULE = innovation(1.0, max_staleness=5, history=3)


@pytest.mark.parametrize(
    ("threshold", "uploads"), [(0.0, True), (24.9, True), (25.0, False), (np.inf, False)]
)
def test_innovation_is_compared_with_the_threshold(threshold, uploads):
    """‖(3, 4) - (0, 0)‖² is 25, and what equals the threshold stays silent."""
    assert _decide(RULE, again=[0, 0], threshold=threshold) == (uploads, 25, 1)
    assert _decide(RULE, again=[3, 4], threshold=0) == (False, 0, 1)


@pytest.mark.parametrize("again", [[np.nan, 0], [np.inf, 0]])
def test_innovation_that_is_no_number_uploads(again):
    uploads, _, _ = _decide(RULE, again=again, threshold=1e30)
    assert uploads


@pytest.mark.parametrize(
    ("staleness", "round", "forced"),
    [
        (1, 0, True),
        (1, 2, True),
        (1, 3, False),  # D = 3 rounds have passed
        (4, 3, False),
        (5, 3, True),  # max_staleness = 5
        (6, 3, True),
    ],
)
def test_forced_uploads_measure_nothing(staleness, round, forced):
    got = _decide(RULE, again=DIRECTION, threshold=9, staleness=staleness, round=round)
    assert got == ((True, 0, 0) if forced else (False, 0, 1))


@pytest.mark.parametrize(
    ("rate", "old_rate", "forced"),
    [
        (0.1, 0.1, False),
        (0.1, 0.2, False),  # half of it, to the last bit
        (0.1, 0.21, True),
        (0.4, 0.1, False),
        (0.0, 0.0, True),
        (None, 0.0, False),
    ],
)
def test_forced_where_the_rate_has_fallen_by_half(rate, old_rate, forced):
    """The server would apply a message of the old rate again and again."""
    got = _decide(RULE, again=DIRECTION, threshold=9, rate=rate, old_rate=old_rate)
    assert got == ((True, 0, 0) if forced else (False, 0, 1))


def test_who_is_forced_in_every_round_never_asks():
    rule = innovation(1.0, max_staleness=1, history=1)
    assert _decide(rule, again=DIRECTION, threshold=9, staleness=1) == (True, 0, 0)


def test_remembers_the_parameters_and_the_rate_of_the_last_upload():
    memory = RULE.sent(RULE.init_worker(STALE), PARAMS, DIRECTION, jnp.float32(0.25))
    assert memory.stale_params is PARAMS
    assert memory.learning_rate == 0.25
    assert RULE.sent(memory, STALE, DIRECTION, None).learning_rate == 0
    shared = innovation(1.0, share_stale_params=True)
    assert shared.sent(shared.init_worker(STALE), PARAMS, DIRECTION, None).stale_params == ()


def test_what_it_says_of_itself():
    rule = innovation(1.0, max_staleness=7, history=3)
    assert rule.name == "innovation(max_staleness=7, history=3)"
    shared = innovation(1.0, max_staleness=7, history=3, share_stale_params=True)
    assert shared.name == "innovation(max_staleness=7, history=3, share_stale_params=True)"
    assert (rule.silence, rule.max_staleness, rule.always) == ("reuse", 7, False)
    assert not rule.needs_learning_rate
    assert innovation(lambda rate: rate).needs_learning_rate
    assert innovation(1.0).name == innovation(1.0, max_staleness=10, history=10).name


# The authors' convention --------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_released_alpha_is_the_authors_threshold(seed):
    """Their decision is ours, and would not be if M were off by one factor."""
    rng = np.random.default_rng(seed)
    num_workers = int(rng.integers(2, 20))
    c, gamma = float(rng.uniform(0.1, 5)), float(rng.uniform(0.001, 1))
    steps = rng.normal(size=(4, 7))
    # As in their released code: eta steps with the sum over workers.
    eta = gamma / num_workers
    theirs = c / (eta * num_workers**2) * np.sum(np.square(steps[:3]))

    def ours(alpha):
        return _thresholds(innovation(alpha, history=3), steps, num_workers, [gamma] * 4)[3]

    right = released_alpha(c, num_workers)
    np.testing.assert_allclose(ours(right), theirs, rtol=1e-4)
    for factor in (num_workers, 1 / num_workers):
        wrong = ours(factor * right(gamma))
        between = math.sqrt(theirs * wrong)  # an innovation about which the two disagree
        assert (between <= ours(right)) != (between <= wrong)
        assert (between <= theirs) == (between <= ours(right))


def test_released_alpha_by_hand():
    """MNIST: c = 0.5, ten workers, our rate 0.05 (their 0.005)."""
    assert released_alpha(0.5, 10)(0.05) == 100
    assert released_alpha(0, 10)(0.05) == 0


# Bad arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["max_staleness", "history"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "3"])
def test_caps_below_one(name, value):
    with pytest.raises(
        ValueError, match=rf"^Expected {name}={value!r} to be an integer of at least 1\.$"
    ):
        innovation(1.0, **{name: value})


@pytest.mark.parametrize("alpha", [1.0, None])
@pytest.mark.parametrize("value", [1, None, "yes"])
def test_sharing_that_is_no_flag(value, alpha):
    with pytest.raises(ValueError, match=rf"^Expected share_stale_params={value!r} to be True or "):
        innovation(alpha, share_stale_params=value)


@pytest.mark.parametrize("name", ["theta", "look_every"])
@pytest.mark.parametrize("alpha", [1.0, (1.0,) * 10, released_alpha])
def test_arguments_of_the_other_form_with_an_alpha(alpha, name):
    options: Any = {name: 1}
    with pytest.raises(ValueError, match=rf"^Expected {name}=1 to be None with an alpha, which "):
        innovation(alpha, **options)


def test_history_without_an_alpha():
    with pytest.raises(ValueError, match=r"^Expected history=10 to be None without an alpha\.$"):
        innovation(history=10)


@pytest.mark.parametrize("alpha", [[1.0], [1.0] * 4, np.ones((3, 1)), []], ids=repr)
def test_alpha_of_wrong_length(alpha):
    with pytest.raises(ValueError, match=r"(?s)^Expected alpha=.* to be one number or history=3 n"):
        innovation(alpha, history=3)


@pytest.mark.parametrize("alpha", [-1.0, math.nan, math.inf, [1.0, -1.0, 1.0]], ids=repr)
def test_alpha_that_is_not_a_weight(alpha):
    with pytest.raises(ValueError, match=r"Expected alpha=.* to be finite and at least 0\.$"):
        innovation(alpha, history=3)


@pytest.mark.parametrize("alpha", ["large", {"a": 1}, [[1.0], [1.0, 2.0], 3.0]], ids=repr)
def test_alpha_of_another_type(alpha):
    with pytest.raises(ValueError, match=r"Expected alpha=.* or a function of the learning rate"):
        innovation(alpha, history=3)


def test_alpha_function_that_returns_a_wrong_length():
    with pytest.raises(ValueError, match=r"Expected alpha=.* to be one number or history=3 numb"):
        weights(lambda rate: [rate, rate], 0.1, 3)


def test_traced_alpha_of_wrong_length():
    with pytest.raises(ValueError, match=r"to be one number or history=3 numbers\."):
        jax.eval_shape(lambda alpha: innovation(alpha, history=3).init_shared(alpha), jnp.ones(2))
    jax.eval_shape(lambda alpha: innovation(alpha, history=3).init_shared(alpha), jnp.ones(3))


@pytest.mark.parametrize("c", [-1.0, math.nan, math.inf, True, "1"], ids=repr)
def test_released_alpha_of_a_bad_c(c):
    with pytest.raises(ValueError, match=r"Expected c=.* to be a finite number of at least 0\.$"):
        released_alpha(c, 10)


def test_released_alpha_of_no_workers():
    with pytest.raises(ValueError, match="Expected num_workers=0 to be an integer of at least 1"):
        released_alpha(0.5, 0)
