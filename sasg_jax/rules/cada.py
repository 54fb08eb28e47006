"""The rules of CADA and LASG: how far a gradient has moved, beside the server's last gradients."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sasg_jax._checks import check_bool, check_bound, check_int
from sasg_jax.control_flow import for_all
from sasg_jax.numerics import PyTree, squared_distance, squared_norm
from sasg_jax.rules.base import Decision, Rule, View
from sasg_jax.rules.past_steps import add_gradient, no_steps


class Snapshot(NamedTuple):
    """What the rule with a snapshot keeps once for all workers."""

    stale_params: PyTree  # w̃, like params
    steps: jax.Array  # ‖ḡ‖² of the last rounds, the newest last. shape=(D,), dtype=jnp.float32


def cada_rule(
    c: float = 1.0, *, history: int = 10, max_staleness: int = 50, snapshot: bool = False
) -> Rule:
    r"""A worker uploads when its gradient has moved far beside the server's last gradients.

    .. math::
        \|\delta\|^2 \ge \frac{c}{D} \sum_{d=1}^{D} \|\bar g_{t-d}\|^2, \quad
        \delta = \nabla \ell_m(w_t; \xi) - \nabla \ell_m(w_s; \xi)

    with w_s the parameters of its last upload, on the same batch ξ, and ḡ the means that the server
    has stepped with, stale gradients in them, in the unit of gradients also where γ is inside. That
    is CADA2, and before SGD LASG-WK2 (:func:`sasg_jax.innovation` is that with weights of one's
    own, and steps of the parameters). With ``snapshot``, CADA1 and LASG-WK1:

    .. math::
        \|\delta_t - \delta_s\|^2 \ge \frac{c}{D} \sum_{d=1}^{D} \|\bar g_{t-d}\|^2, \quad
        \delta_t = \nabla \ell_m(w_t; \xi_t) - \nabla \ell_m(\tilde w; \xi_t)

    where s is the round of its last upload and w̃ the parameters of the last round that
    ``max_staleness`` divides. In that round all upload, and δ is zero. δ is a gradient of which the
    noise that the snapshot sees too is taken away; those of two batches are compared.

    Sent: the whole gradient, if the compressor says nothing else. Kept: w_s, or δ_s, on each
    worker; with a snapshot w̃ once; the last message of every worker at the server. Takes a second
    gradient in every round that does not force an upload.

    Guarantees: in round 0 all upload; nobody is silent for ``max_staleness`` rounds; a loss or a
    rate that is scaled changes no decision (c has no unit).

    Take it before Adam, for which rule (6) has no right α. Not where batches are so small that
    ‖δ‖ is noise, nor at the rates that are best for SGD: a silent worker's last gradient is applied
    again, see ``silence``.

    Args:
      c: at least 0; larger means fewer uploads. For gradients as they are and their mean: released
        code compares gradients that are divided by M, so that its c is M² c here. LASG's is 1.
      history: D, the steps that the threshold looks back on. Those before the first are zero.
      max_staleness: an upload is forced when the last one is this many rounds back; with a
        snapshot, the rounds from one to the next.
      snapshot: whether it compares with a snapshot that all share.

    ValueError for an argument out of range. The paper's threshold has steps of AMSGrad, ‖Δw‖², in
    the place of ‖ḡ‖², as if these were SGD's: then c has a unit.

    References: Chen et al., `CADA <https://arxiv.org/abs/2012.15469>`_, 2020; Chen et al., `LASG
    <https://arxiv.org/abs/2002.11360>`_, 2020"""
    c = check_bound("c", c)
    history = check_int("history", history, minimum=1)
    max_staleness = check_int("max_staleness", max_staleness, minimum=1)
    check_bool("snapshot", snapshot)
    make = _with_snapshot if snapshot else _with_last_upload
    scale = lambda steps: (c * steps.mean()).astype(jnp.float32)
    return make(scale, history, max_staleness)


def _with_last_upload(scale: Any, history: int, max_staleness: int) -> Rule:
    measure = lambda view: squared_distance(view.direction, view.reevaluate(view.memory))

    def decide(view: View) -> Decision:
        skip = lambda: jnp.zeros((), jnp.float32)
        found = jax.lax.cond(for_all(view.forced), skip, lambda: measure(view))
        found = jnp.where(view.forced, 0, found)
        # Written so that what is not a number uploads.
        return Decision(view.forced | ~(found < view.threshold), found)

    return Rule(
        name=f"cada_rule(history={history}, max_staleness={max_staleness})",
        decide=decide,
        measure=measure,
        max_staleness=max_staleness,
        compares=True,
        init_worker=lambda params: params,
        init_shared=no_steps(history),
        begin=lambda steps, round: (scale(steps), steps),
        sent=lambda memory, params, direction, learning_rate: params,
        end=add_gradient,
    )


def _with_snapshot(scale: Any, history: int, max_staleness: int) -> Rule:
    zeros = lambda params: jax.tree.map(jnp.zeros_like, params)

    def begin(shared: Snapshot, round):
        renew = round.number % max_staleness == 0
        taken = jax.tree.map(lambda new, old: jnp.where(renew, new, old), round.params, shared[0])
        return scale(shared.steps), shared._replace(stale_params=taken)

    def decide(view: View) -> Decision:
        since = view.round.number % max_staleness
        # Also one that was absent, or refused, in the round of the snapshot: δ_s is of another.
        forced = view.forced | (view.staleness > since)
        again = lambda: view.reevaluate(view.shared.stale_params)
        # In that round itself, which is the same for all, δ is zero.
        again = jax.lax.cond(since == 0, lambda: view.direction, again)
        delta = jax.tree.map(jnp.subtract, view.direction, again)
        found = jnp.where(forced, 0, squared_distance(delta, view.memory))
        upload = forced | ~(found < view.threshold)
        # What it compares with is the one that was sent: a silent worker's stays.
        fits = jnp.isfinite(squared_norm(delta))  # or every round to come would upload
        memory = jax.tree.map(
            lambda new, old: jnp.where(upload, jnp.where(fits, new, 0), old), delta, view.memory
        )
        return Decision(upload, found, memory=memory)

    def end(shared: Snapshot, round, step):
        return shared._replace(steps=add_gradient(shared.steps, round, step))

    return Rule(
        name=f"cada_rule(history={history}, max_staleness={max_staleness}, snapshot=True)",
        decide=decide,
        max_staleness=max_staleness,
        compares=True,
        init_worker=zeros,
        init_shared=lambda params: Snapshot(params, no_steps(history)(params)),
        begin=begin,
        end=end,
    )
