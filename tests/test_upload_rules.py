"""The threshold of rule (6) by hand, and when an upload is forced."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sasg_jax import upload_rules
from sasg_jax.upload_rules import always, innovation, released_alpha


def _thresholds(rule, squared_norms, num_workers, rates=None):
    """The threshold of every round of a run whose steps have these squared norms."""
    history = jnp.zeros(rule.history)
    thresholds = []
    for t, squared_norm in enumerate(squared_norms):
        threshold, history = upload_rules.take_threshold(history)
        thresholds.append(float(threshold))
        weights = upload_rules.weights(rule, None if rates is None else rates[t])
        history = upload_rules.record_step(history, weights, jnp.float32(squared_norm), num_workers)
    return thresholds


def test_threshold_by_hand():
    """alpha = (3, 5), M = 2, steps of squared norm 4, 1, 2, 0: (3 * newest + 5 * before) / 4."""
    rule = innovation([3.0, 5.0], history=2)
    got = _thresholds(rule, [4, 1, 2, 0, 0, 0], num_workers=2)
    assert got == [0, 3 * 4 / 4, (3 * 1 + 5 * 4) / 4, (3 * 2 + 5 * 1) / 4, 5 * 2 / 4, 0]


def test_one_number_weighs_every_step():
    rule = innovation(6.0, history=3)
    assert _thresholds(rule, [1, 2, 3, 4, 5], num_workers=1) == [0, 6, 18, 36, 54]


def test_history_is_weighted_when_it_is_made():
    """A step made at rate 0.5 keeps its weight after the rate has dropped."""
    rule = innovation(lambda rate: 1 / rate, history=2)
    got = _thresholds(rule, [1, 1, 1, 1], num_workers=1, rates=[0.5, 0.5, 0.25, 0.25])
    assert got == [0, 2, 2 + 2, 2 + 4]


def test_function_of_the_learning_rate_may_return_one_weight_for_each_step():
    rule = innovation(lambda rate: [rate, 10 * rate], history=2)
    np.testing.assert_allclose(upload_rules.weights(rule, 0.5), [0.5, 5])


def test_a_step_of_zero_weighs_nothing_even_at_rate_zero():
    rule = innovation(lambda rate: jnp.float32(1) / rate, history=2)
    assert _thresholds(rule, [0, 0], num_workers=1, rates=[jnp.float32(0)] * 2) == [0, 0]


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
def test_forced_uploads(staleness, round, forced):
    rule = innovation(1.0, max_staleness=5, history=3)
    got = upload_rules.must_upload(rule, jnp.int32(staleness), jnp.int32(round))
    assert bool(got) is forced


def test_always_is_not_adaptive():
    assert not always().adaptive
    assert innovation(0.0).adaptive


# The authors' convention --------------------------------------------------------------------------


def _authors_threshold(c, eta, num_workers, steps):
    """As in their released code: eta steps with the sum over workers."""
    return c / (eta * num_workers**2) * sum(np.sum(np.square(step)) for step in steps)


@pytest.mark.parametrize("seed", range(5))
def test_released_alpha_is_the_authors_threshold(seed):
    """Their decision is ours, and would not be if M were off by one factor."""
    rng = np.random.default_rng(seed)
    num_workers = int(rng.integers(2, 20))
    c, gamma = float(rng.uniform(0.1, 5)), float(rng.uniform(0.001, 1))
    steps = rng.normal(size=(3, 7)).astype(np.float32)
    theirs = _authors_threshold(c, gamma / num_workers, num_workers, steps)

    def ours(alpha):
        squares = [*np.sum(np.square(steps), axis=1), 0.0]
        return _thresholds(innovation(alpha, history=3), squares, num_workers, rates=[gamma] * 4)

    right = released_alpha(c, num_workers)
    np.testing.assert_allclose(ours(right)[-1], theirs, rtol=1e-5)
    for factor in (num_workers, 1 / num_workers):
        wrong = ours(factor * right(gamma))[-1]
        between = math.sqrt(theirs * wrong)  # an innovation about which the two disagree
        assert (between <= ours(right)[-1]) != (between <= wrong)
        assert (between <= theirs) == (between <= ours(right)[-1])


def test_released_alpha_by_hand():
    """MNIST: c = 0.5, ten workers, our rate 0.05 (their 0.005)."""
    assert released_alpha(0.5, 10)(0.05) == 100
    assert released_alpha(0, 10)(0.05) == 0


# Bad arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["max_staleness", "history"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "3", None])
def test_caps_below_one(name, value):
    with pytest.raises(
        ValueError, match=rf"^Expected {name}={value!r} to be an integer of at least 1\.$"
    ):
        innovation(1.0, **{name: value})


@pytest.mark.parametrize("alpha", [[1.0], [1.0] * 4, np.ones((3, 1)), []], ids=repr)
def test_alpha_of_wrong_length(alpha):
    with pytest.raises(ValueError, match=r"(?s)^Expected alpha=.* to be one number or history=3 n"):
        innovation(alpha, history=3)


@pytest.mark.parametrize("alpha", [-1.0, math.nan, math.inf, [1.0, -1.0, 1.0]], ids=repr)
def test_alpha_that_is_not_a_weight(alpha):
    with pytest.raises(ValueError, match=r"Expected alpha=.* to be finite and at least 0\.$"):
        innovation(alpha, history=3)


@pytest.mark.parametrize("alpha", ["large", None, {"a": 1}], ids=repr)
def test_alpha_of_another_type(alpha):
    with pytest.raises(ValueError, match="Expected alpha="):
        innovation(alpha, history=3)


def test_alpha_function_that_returns_a_wrong_length():
    rule = innovation(lambda rate: [rate, rate], history=3)
    with pytest.raises(ValueError, match=r"Expected alpha=.* to be one number or history=3 numb"):
        upload_rules.weights(rule, 0.1)


def test_traced_alpha_of_wrong_length():
    with pytest.raises(ValueError, match=r"to be one number or history=3 numbers\."):
        jax.eval_shape(
            lambda alpha: upload_rules.weights(innovation(alpha, history=3), None), jnp.ones(2)
        )


@pytest.mark.parametrize("c", [-1.0, math.nan, math.inf, True, "1"], ids=repr)
def test_released_alpha_of_a_bad_c(c):
    with pytest.raises(ValueError, match=r"Expected c=.* to be a finite number of at least 0\.$"):
        released_alpha(c, 10)


def test_released_alpha_of_no_workers():
    with pytest.raises(ValueError, match="Expected num_workers=0 to be an integer of at least 1"):
        released_alpha(0.5, 0)
