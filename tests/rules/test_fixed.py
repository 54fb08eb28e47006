"""Rules that look at nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sasg_jax
from sasg_jax.rules.base import Round, View

M, ROUNDS = 4, 7


def _uploads(rule):
    """Who uploads in each round. shape=(ROUNDS, M)"""

    unused = lambda *params: pytest.fail("nobody asked for it")

    def decide(number, worker):
        view = View(
            round=Round(jnp.zeros(1), number, M, None),
            worker=worker,
            direction=jnp.zeros(1),
            feedback=(),
            staleness=jnp.int32(1),
            memory=(),
            shared=(),
            threshold=jnp.float32(0),
            forced=jnp.asarray(False),
            reevaluate=unused,
            pending=unused,
            remainder=unused,
        )
        decision = rule.decide(view)
        return decision.upload & (decision.measured == 0)

    of_worker = jax.vmap(decide, in_axes=(None, 0))
    return jax.vmap(of_worker, in_axes=(0, None))(jnp.arange(ROUNDS), jnp.arange(M))


def _rows(text):
    return np.array([[flag == "1" for flag in row] for row in text.split()])


def test_always():
    np.testing.assert_array_equal(_uploads(sasg_jax.always()), np.ones((ROUNDS, M)))
    assert sasg_jax.always().always


def test_every_third_round_in_turn():
    """Worker m in rounds t with (t + m) % 3 == 0."""
    want = _rows("1001 0010 0100 1001 0010 0100 1001")
    np.testing.assert_array_equal(_uploads(sasg_jax.every(3)), want)


def test_all_in_every_third_round():
    want = _rows("1111 0000 0000 1111 0000 0000 1111")
    np.testing.assert_array_equal(_uploads(sasg_jax.every(3, staggered=False)), want)


def test_a_longer_period_than_there_are_workers():
    """Has rounds without anybody."""
    want = _rows("1000 0000 0000 0001 0010 0100 1000")
    np.testing.assert_array_equal(_uploads(sasg_jax.every(6)), want)


def test_every_round_is_always():
    rule = sasg_jax.every(1)
    assert rule.always
    np.testing.assert_array_equal(_uploads(rule), np.ones((ROUNDS, M)))
    assert not sasg_jax.every(2).always


def test_names_say_the_settings():
    """By which a state of another rule is found out."""
    rules = sasg_jax.always(), sasg_jax.every(3), sasg_jax.every(3, staggered=False)
    assert [rule.name for rule in rules] == ["always()", "every(3)", "every(3, staggered=False)"]
    assert {rule.silence for rule in rules} == {"keep"}


@pytest.mark.parametrize("period", [0, -1, 1.5, True, "3", None])
def test_period_below_one(period):
    with pytest.raises(ValueError, match=rf"^Expected period={period!r} to be an integer of at l"):
        sasg_jax.every(period)
