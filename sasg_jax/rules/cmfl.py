"""CMFL's rule: whether a worker agrees with where all went last."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp

from sasg_jax._checks import check_bound, check_cap, require
from sasg_jax.numerics import PyTree, all_finite, squared_norm
from sasg_jax.rules.base import Decision, Rule, View


class LastStep(NamedTuple):
    """What :func:`cmfl_rule` keeps once for all workers."""

    step: PyTree  # u, the last that was not zero, like params
    started: jax.Array  # whether there is one. shape=(), dtype=jnp.bool_


def cmfl_rule(
    relevance: float | Callable[[Any], Any] | None = None, *, max_staleness: int | None = None
) -> Rule:
    r"""A worker uploads when its direction has the signs of the server's last step.

    .. math::
        \frac{|\{j : \mathrm{sign}(x_j) = \mathrm{sign}(u_j),\ u_j \ne 0\}|}{|\{j : u_j \ne 0\}|}
        \ge v_t

    with x its gradient, or the way of its local steps, and u the last step of the server that was
    not zero: of a sparse way down only what it has sent is looked at. An entry of x that is zero
    agrees with nothing. Until there is a step, all upload. A silent worker counts as nothing, in a
    mean over those that sent (``silence="drop"``); where nobody sends nothing moves, and the next
    round compares with the same step.

    Sent: what the compressor says. Kept: u, which all have seen anyway. No second gradient.

    Guarantees: a scale of the gradients or of the rate changes no decision.

    Take it for local steps of workers of which some are far off. Not where workers see different
    classes: who never agrees is never heard, unless ``max_staleness`` is given. On i.i.d. data of
    small batches signs are noise, and the share is near a half for all.

    Args:
      relevance: v, in [0, 1], or a function of the round; by default 0.8/√t in round t, as in
        released code. Larger means fewer uploads.
      max_staleness: an upload is forced when the last one is this many rounds back; by default
        never.

    ValueError for an argument out of range.

    References: Wang et al., `CMFL: Mitigating Communication Overhead for Federated Learning
    <https://doi.org/10.1109/ICDCS.2019.00099>`_, 2019"""
    if relevance is None:
        relevance = lambda t: 0.8 / jnp.sqrt(jnp.maximum(t, 1).astype(jnp.float32))
    elif not callable(relevance):
        relevance = _check_share("relevance", relevance)
    max_staleness = check_cap(max_staleness)

    def begin(shared: LastStep, round):
        bound = relevance(round.number) if callable(relevance) else relevance
        return jnp.asarray(bound, jnp.float32), shared

    def decide(view: View) -> Decision:
        share = agreement(view.direction, view.shared.step)
        forced = view.forced | ~view.shared.started
        # A direction that is not finite must be looked at, and refused.
        sound = all_finite(view.direction)
        upload = forced | ~(share < view.threshold) | ~sound
        return Decision(upload, jnp.where(forced, 0, share))

    def end(shared: LastStep, round, step):
        moved = squared_norm(step) > 0
        taken = jax.tree.map(lambda new, old: jnp.where(moved, new, old), step, shared.step)
        return LastStep(taken, shared.started | moved)

    zeros = lambda params: jax.tree.map(jnp.zeros_like, params)
    return Rule(
        name="cmfl_rule()" if max_staleness is None else f"cmfl_rule({max_staleness=})",
        decide=decide,
        max_staleness=max_staleness,
        silence="drop",
        init_shared=lambda params: LastStep(zeros(params), jnp.asarray(False)),
        begin=begin,
        end=end,
    )


def agreement(x: PyTree, u: PyTree) -> jax.Array:
    """Of the entries of u that are not zero, the share whose sign x has. ``# shape=()``"""
    agree = lambda x, u: jnp.sum((jnp.sign(x) == jnp.sign(u)) & (u != 0), dtype=jnp.float32)
    count = lambda u: jnp.sum(u != 0, dtype=jnp.float32)
    total = lambda tree: sum(jax.tree.leaves(tree), jnp.zeros((), jnp.float32))
    agreed, counted = total(jax.tree.map(agree, x, u)), total(jax.tree.map(count, u))
    return agreed / jnp.maximum(counted, 1)


def _check_share(name: str, value: Any) -> Any:
    value = check_bound(name, value)
    is_share = isinstance(value, jax.core.Tracer) or value <= 1
    require(is_share, name, value, "to be a number in [0, 1]")
    return value
