"""LAG's rule and its neighbours': what the server lacks of a worker, beside its own last steps."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sasg_jax._checks import check_bound, check_cap, check_int
from sasg_jax.numerics import squared_distance, squared_norm
from sasg_jax.rules.base import Decision, Round, Rule, View
from sasg_jax.rules.past_steps import add_step, no_steps


def lag_rule(
    xi: float = 0.1,
    *,
    history: int = 10,
    max_staleness: int | None = None,
    slack: float | Callable[[Any], Any] = 0.0,
) -> Rule:
    r"""A worker uploads when the server lacks much of its gradient, beside the last steps.

    .. math:: \|g - h\|^2 > \xi \sum_{d=1}^{D} \|u_{t-d}\|^2 + \sigma_t

    with h what the server has of it, and u the server's steps: the means of all h. It is for
    :func:`sasg_jax.reconstruction`, which is the default. That is LAG-WK, and with a slack σ that
    shrinks CSGD. Where γ is inside, g and u are γ g and γ ū, and σ is γ² σ.

    The papers write it for the sum of M losses at a rate α, with Σ‖Δw‖² / (α²M²) in the place of
    Σ‖u‖². Of a mean over workers at the rate γ = α M, before SGD, that is the same.

    Sent: g - h. Kept: h on each worker, like its gradient; the sum of all h at the server. One
    gradient a round, and no old parameters.

    Guarantees: ξ has no unit, and no rate enters; with gradients of all the data and a ξ of at most
    1/D LAG has the rate of gradient descent (its authors').

    Take it with gradients of all the data, where workers differ. With small batches the left side
    never falls below their noise, and all send for ever: there CSGD lets the batch grow as fast as
    σ shrinks, by 1.01 a round for 0.991 in its authors' code. The batch is your data pipeline's.

    Args:
      xi: ξ, at least 0; larger means fewer uploads. LAG's is 0.1 with D = 10, CSGD's 1/600.
      history: D. Steps before the first are zero.
      max_staleness: an upload is forced when the last one is this many rounds back; by default
        never.
      slack: σ, at least 0, or a function of the round, e.g. ``lambda t: 0.1 * 0.991**t``.

    ValueError for an argument out of range, or for a feedback that reconstructs nothing.

    References: Chen et al., `LAG <https://arxiv.org/abs/1805.09965>`_, 2018; Li et al., `CSGD
    <https://arxiv.org/abs/1909.03631>`_, 2019"""
    xi = check_bound("xi", xi)
    history = check_int("history", history, minimum=1)
    max_staleness = check_cap(max_staleness)
    if not callable(slack):
        slack = check_bound("slack", slack)

    def begin(steps: jax.Array, round: Round):
        sigma = jnp.asarray(slack(round.number) if callable(slack) else slack, jnp.float32)
        if round.learning_rate is not None:
            sigma *= round.learning_rate.astype(jnp.float32) ** 2
        return (xi * steps.sum() + sigma).astype(jnp.float32), steps

    measure = lambda view: squared_norm(view.pending())

    def decide(view: View) -> Decision:
        lacks = measure(view)
        # Written so that what is not a number uploads.
        return Decision(view.forced | ~(lacks <= view.threshold), lacks)

    capped = "" if max_staleness is None else f", max_staleness={max_staleness}"
    return Rule(
        name=f"lag_rule(history={history}{capped})",
        decide=decide,
        measure=measure,
        max_staleness=max_staleness,
        needs_reconstruction=True,
        init_shared=no_steps(history),
        begin=begin,
        end=add_step,
    )


def laq_rule(
    xi: float = 0.08, *, history: int = 10, max_staleness: int = 100, errors: float = 3.0
) -> Rule:
    r"""LAG's rule for messages that are rounded: what rounding alone would change is not news.

    .. math::
        \|\mathcal{C}(g - h)\|^2 >
        \xi \sum_{d=1}^{D} \|u_{t-d}\|^2 + 3\,(\|\varepsilon_t\|^2 + \|\varepsilon_s\|^2)

    with ε what the message would leave out of g - h, and ε_s what the last that was sent left out.
    The rest is as in :func:`lag_rule`. LAQ's compressor is ``sasg_jax.grid(bits, scope="tree")``;
    SLAQ is the same with mini-batches, whose noise LAQ's convergence does not cover.

    Sent: C(g - h). Kept: h and one number on each worker; the sum of all h at the server. It makes
    a message in every round, to see what it would carry.

    Guarantees: as :func:`lag_rule`; in round 0 all upload.

    Args:
      xi: ξ, at least 0; larger means fewer uploads. The authors' is 0.8/D.
      history: D. Steps before the first are zero.
      max_staleness: an upload is forced when the last one is this many rounds back.
      errors: the weight of the two errors, at least 0; 3 in the paper, half of it in SLAQ's code.

    ValueError for an argument out of range, or for a feedback that reconstructs nothing.

    References: Sun et al., `LAQ <https://arxiv.org/abs/1909.07588>`_, 2019"""
    xi, errors = check_bound("xi", xi), check_bound("errors", errors)
    history = check_int("history", history, minimum=1)
    max_staleness = check_int("max_staleness", max_staleness, minimum=1)

    def decide(view: View) -> Decision:
        lacks, rest = view.pending(), view.remainder()
        error, carried = squared_norm(rest), squared_distance(lacks, rest)
        news = jnp.maximum(carried - errors * (error + view.memory), 0)
        upload = view.forced | ~(news <= view.threshold)
        return Decision(upload, news, memory=jnp.where(upload, error, view.memory))

    return Rule(
        name=f"laq_rule(history={history}, max_staleness={max_staleness})",
        decide=decide,
        max_staleness=max_staleness,
        needs_reconstruction=True,
        init_worker=lambda params: jnp.zeros((), jnp.float32),
        init_shared=no_steps(history),
        begin=lambda steps, round: ((xi * steps.sum()).astype(jnp.float32), steps),
        end=add_step,
    )
