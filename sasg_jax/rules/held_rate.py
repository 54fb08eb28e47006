"""A rule that is told how often to send, and finds out by itself how much that takes."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sasg_jax._checks import check_fraction, expected, is_real, require
from sasg_jax.control_flow import for_all
from sasg_jax.numerics import PyTree
from sasg_jax.rules.base import Decision, Rule, View


class Held(NamedTuple):
    """What :func:`held_rate` keeps on a worker."""

    memory: PyTree  # of the rule that measures
    log_threshold: jax.Array  # shape=(), dtype=jnp.float32
    started: jax.Array  # whether it has measured anything yet. shape=(), dtype=jnp.bool_


def held_rate(rate: float | Callable[[Any], Any], rule: Rule, *, gain: float = 0.3) -> Rule:
    r"""A worker uploads in a given part of the rounds: in those in which ``rule`` measures most.

    It finds the threshold θ by itself, whatever the units:

    .. math:: \log \theta \leftarrow \log \theta + \eta\,(\mathrm{uploaded} - \mathrm{rate})

    Args:
      rate: uploads per worker and round, in (0, 1], or a function of the round, e.g. of what the
        link can carry.
      rule: what measures, e.g. ``innovation()``. Its own bound and turns do not count; where it has
        a ``max_staleness``, that does. A silent worker's direction goes into its residual.
      gain: η, above 0: how fast θ follows."""
    if not callable(rate):
        rate = check_fraction("rate", rate)
    require(is_real(gain) and 0 < gain < math.inf, "gain", gain, "to be a finite number above 0")
    require(isinstance(rule, Rule), "rule", rule, "to be made by sasg_jax.innovation, ...")
    measure = rule.measure
    if measure is None:
        raise expected("rule", rule.name, "to be one that measures something")

    def decide(view: View) -> Decision:
        held: Held = view.memory
        skip = lambda: jnp.zeros((), jnp.float32)
        found = lambda: measure(view._replace(memory=held.memory)).astype(jnp.float32)
        measured = jax.lax.cond(for_all(view.forced), skip, found)
        measured = jnp.where(view.forced, 0, measured)
        wanted = jnp.asarray(rate(view.round.number) if callable(rate) else rate, jnp.float32)
        log = jnp.log(jnp.maximum(measured, jnp.finfo(jnp.float32).tiny))
        started = held.started | ((measured > 0) & jnp.isfinite(measured))
        threshold = jnp.where(held.started, held.log_threshold, jnp.where(started, log, 0))
        # Written so that what is not a number uploads; at first, nobody knows what is much.
        upload = view.forced | ~held.started | ~(log <= threshold)
        moved = jnp.where(started, threshold + float(gain) * (upload - wanted), 0)
        return Decision(upload, measured, memory=Held(held.memory, moved, started))

    def sent(memory: Held, *upload):
        return memory._replace(memory=rule.sent(memory.memory, *upload))

    zero, no = lambda: jnp.zeros((), jnp.float32), lambda: jnp.asarray(False)
    shown = "rate" if callable(rate) else f"{rate:g}"
    return dataclasses.replace(
        rule,
        name=f"held_rate({shown}, {rule.name})",
        decide=decide,
        measure=None,
        silence="keep",
        begin=lambda shared, round: (jnp.zeros((), jnp.float32), rule.begin(shared, round)[1]),
        init_worker=lambda params: Held(rule.init_worker(params), zero(), no()),
        sent=sent,
    )
