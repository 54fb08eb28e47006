"""CLAG's rule: what the server lacks, beside what the last round has brought."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sasg_jax._checks import check_bound, check_cap
from sasg_jax.numerics import PyTree, squared_distance, squared_norm, wide
from sasg_jax.rules.base import Decision, Rule, View
from sasg_jax.rules.relative import ratio


class Last(NamedTuple):
    """What :func:`clag_rule` keeps on a worker."""

    direction: PyTree  # y, like params, of float32 at least
    started: jax.Array  # whether there is one. shape=(), dtype=jnp.bool_


def clag_rule(zeta: float = 10.0, *, max_staleness: int | None = None) -> Rule:
    r"""A worker uploads when the server lacks much of its gradient, beside a round's change of it.

    .. math:: \|x_t - h\|^2 > \zeta \|x_t - x_{t-1}\|^2

    with x its directions of this round and the last, and h what the server has of it: it is for
    :func:`sasg_jax.reconstruction`, which is the default, and sends C(x - h). ζ = 0 is EF21, and
    with :func:`sasg_jax.identity` it is lazy aggregation with a bound of its own. Where γ is
    inside, or the feedback has a momentum, x is what these make of g.

    Sent: C(x - h). Kept: h and x_{t-1} on each worker; the sum of all h at the server. One gradient
    a round, no old parameters, and no message to decide.

    Guarantees: ζ has no unit; the first round uploads; what the server lacks of a silent worker is
    at most √ζ times what the round has changed. So one whose gradient moves steadily sends in every
    √ζ-th round, and below ζ = 1 in all.

    Take it with gradients of all the data, or with a moving average of others
    (``reconstruction(momentum=0.1)``): of what is mostly noise both sides are alike, and any ζ
    above 1 then means never.

    Args:
      zeta: ζ, at least 0; larger means fewer uploads.
      max_staleness: an upload is forced when the last one is this many rounds back; by default
        never.

    ValueError for an argument out of range, or for a feedback that reconstructs nothing.

    References: Richtárik et al., `3PC <https://arxiv.org/abs/2202.00998>`_, 2022"""
    zeta = check_bound("zeta", zeta)
    max_staleness = check_cap(max_staleness)

    def decide(view: View) -> Decision:
        lacks, last = view.pending(), view.memory
        x = jax.tree.map(jnp.add, lacks, view.feedback.reconstruction)
        found = ratio(squared_norm(lacks), squared_distance(x, last.direction))
        forced = view.forced | ~last.started
        found = jnp.where(forced, 0, found)
        # Written so that what is not a number uploads.
        upload = forced | ~(found <= view.threshold)
        return Decision(upload, found, memory=Last(x, jnp.asarray(True)))

    def init_worker(params: PyTree) -> Any:
        zeros = lambda x: jnp.zeros(x.shape, wide(x.dtype))
        return Last(jax.tree.map(zeros, params), jnp.asarray(False))

    return Rule(
        name="clag_rule()" if max_staleness is None else f"clag_rule({max_staleness=})",
        decide=decide,
        max_staleness=max_staleness,
        needs_reconstruction=True,
        init_worker=init_worker,
        begin=lambda shared, round: (jnp.asarray(zeta, jnp.float32), shared),
    )
