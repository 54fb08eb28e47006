"""Rules that look at nothing: in every round, or in turn."""

import jax.numpy as jnp

from sasg_jax._checks import check_int
from sasg_jax.rules.base import Decision, Rule


def always() -> Rule:
    """Every worker uploads in every round."""
    decide = lambda view: Decision(jnp.asarray(True), jnp.zeros((), jnp.float32))
    return Rule(name="always()", decide=decide, always=True, silence="keep")


def every(period: int, *, staggered: bool = True) -> Rule:
    """Every worker uploads in every ``period``-th round, an integer of at least 1, or ValueError.

    A silent worker's direction goes into its residual unless ``silence`` says otherwise. Staggered,
    worker m uploads in rounds t with ``(t + m) % period == 0``: every round brings somebody;
    else all upload in the rounds ``t % period == 0``."""
    period = check_int("period", period, minimum=1)

    def decide(view):
        turn = view.round.number + (view.worker if staggered else 0)
        return Decision(turn % period == 0, jnp.zeros((), jnp.float32))

    name = f"every({period})" if staggered else f"every({period}, staggered=False)"
    return Rule(name=name, decide=decide, always=period == 1, silence="keep")
