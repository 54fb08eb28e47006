"""Upload rules: when a worker sends."""

from sasg_jax.rules.base import SILENCES, Decision, Round, Rule, View
from sasg_jax.rules.cada import cada_rule
from sasg_jax.rules.clag import clag_rule
from sasg_jax.rules.cmfl import cmfl_rule
from sasg_jax.rules.fixed import always, every
from sasg_jax.rules.held_rate import held_rate
from sasg_jax.rules.innovation import innovation, released_alpha
from sasg_jax.rules.lag import lag_rule, laq_rule
from sasg_jax.rules.lag_ps import lag_ps_rule
from sasg_jax.rules.relative import direction_change, message_share, residual_norm

__all__ = ["SILENCES", "Decision", "Round", "Rule", "View"]
__all__ += ["always", "every", "held_rate", "innovation", "released_alpha"]
__all__ += ["cada_rule", "clag_rule", "cmfl_rule", "lag_ps_rule", "lag_rule", "laq_rule"]
__all__ += ["direction_change", "message_share", "residual_norm"]
