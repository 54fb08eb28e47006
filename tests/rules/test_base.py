"""What a rule is that says no more than what it decides."""

import jax.numpy as jnp
import pytest

import sasg_jax
from sasg_jax.rules import SILENCES
from sasg_jax.rules.base import Round

ROUND = Round(params=jnp.ones(3), number=jnp.int32(0), num_workers=2, learning_rate=None)


def _never(view):
    return sasg_jax.Decision(jnp.asarray(False), jnp.zeros(()))


def test_name_and_decide_are_enough():
    """No memory, no threshold, nothing forced, and what is kept is kept as it was."""
    rule = sasg_jax.Rule(name="never()", decide=_never)
    assert rule.init_worker(ROUND.params) == rule.init_shared(ROUND.params) == ()
    threshold, shared = rule.begin("shared", ROUND)
    assert (float(threshold), shared) == (0, "shared")
    assert rule.sent("memory", ROUND.params, ROUND.params, None) == "memory"
    assert rule.end("shared", ROUND, ROUND.params) == "shared"
    assert (rule.max_staleness, rule.always, rule.needs_learning_rate) == (None, False, False)
    assert rule.measure is None
    assert rule.silence in SILENCES


def test_decision_need_not_say_whether_the_direction_is_sound():
    """Nor what the rule remembers after it."""
    assert _never(None).sound is None
    assert _never(None).memory is None


def test_positions_are_no_part_of_the_contract():
    with pytest.raises(TypeError):
        sasg_jax.Rule("never()", _never)  # pyright: ignore
