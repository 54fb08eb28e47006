"""Upload rules: when a worker sends."""

from sasg_jax.rules.base import SILENCES, Decision, Round, Rule, View
from sasg_jax.rules.fixed import always, every
from sasg_jax.rules.innovation import innovation, released_alpha

__all__ = ["SILENCES", "Decision", "Round", "Rule", "View"]
__all__ += ["always", "every", "innovation", "released_alpha"]
