"""A rule without units: turns, of a period that a worker finds by how fast its gradient changes."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sasg_jax._checks import check_bool, check_bound, check_int
from sasg_jax.control_flow import for_all, zero_after
from sasg_jax.numerics import PyTree, squared_distance, squared_norm
from sasg_jax.rules.base import Decision, Round, Rule, View
from sasg_jax.rules.fixed import always
from sasg_jax.rules.recent_params import init_recent, read_recent, write_recent
from sasg_jax.rules.relative import ratio


class OwnPeriod(NamedTuple):
    """What the rule keeps on a worker."""

    stale_params: PyTree  # of its last upload, like params; () where they are shared
    period: jax.Array  # a power of two. shape=(), dtype=jnp.int32
    uploads: jax.Array  # since it has last looked. shape=(), dtype=jnp.int32


def own_period(
    theta: Any, *, max_staleness: int, look_every: int, share_stale_params: bool
) -> Rule:
    """See :func:`sasg_jax.innovation` without an alpha."""
    theta = check_bound("theta", theta)
    max_staleness = check_int("max_staleness", max_staleness, minimum=1)
    look_every = check_int("look_every", look_every, minimum=1)
    check_bool("share_stale_params", share_stale_params)
    if max_staleness == 1:
        return dataclasses.replace(always(), name="innovation(max_staleness=1)")
    kept = max_staleness + 1  # as the parameters of a turn ago are asked for
    longest = 2 ** (max_staleness.bit_length() - 1)
    one = lambda: jnp.ones((), jnp.int32)

    def measure(view: View) -> jax.Array:
        stale_params = view.memory.stale_params
        if share_stale_params:
            stale_params = read_recent(view.shared, view.round.number - view.staleness)
        changed = squared_distance(view.direction, view.reevaluate(stale_params))
        return ratio(changed, squared_norm(view.direction))

    def decide(view: View) -> Decision:
        memory, worker = view.memory, view.worker
        upload = (view.round.number + worker) % memory.period == 0
        # Not in the first upload, before which there is nothing; nor all in the same round.
        first = memory.uploads == 0
        uploads = memory.uploads + jnp.where(first, 1 + worker % look_every, 1) * upload
        # Nor after an absence, which says nothing about the period.
        looks = upload & (uploads > look_every) & (view.staleness <= max_staleness)
        skip = lambda: jnp.zeros((), jnp.float32)
        found = jax.lax.cond(for_all(~looks), skip, lambda: measure(view))
        found = jnp.where(looks, found, 0)
        halved, doubled = memory.period // 2, 2 * memory.period
        # Over twice the time, the change is about four times as large.
        period = jnp.where(4 * found <= view.threshold, doubled, memory.period)
        # Written so that what is not a number counts as much.
        period = jnp.clip(jnp.where(found <= view.threshold, period, halved), 1, longest)
        period = jnp.where(looks, period, memory.period).astype(jnp.int32)
        uploads = jnp.where(looks, 1, jnp.minimum(uploads, look_every + 1)).astype(jnp.int32)
        return Decision(upload, found, memory=OwnPeriod(memory.stale_params, period, uploads))

    def sent(memory: OwnPeriod, params: PyTree, direction: PyTree, learning_rate: Any):
        return memory if share_stale_params else memory._replace(stale_params=params)

    def end(shared: PyTree, round: Round, step: PyTree):
        return write_recent(shared, round.params, round.number + zero_after(step))

    own = lambda params: () if share_stale_params else params
    settings = f"max_staleness={max_staleness}, look_every={look_every}"
    return Rule(
        name=f"innovation({settings}{', share_stale_params=True' * share_stale_params})",
        decide=decide,
        # What is shared goes back no further than a turn.
        measure=None if share_stale_params else measure,
        silence="keep",
        compares=True,
        init_worker=lambda params: OwnPeriod(own(params), one(), jnp.zeros((), jnp.int32)),
        init_shared=lambda params: init_recent(params, kept) if share_stale_params else (),
        begin=lambda shared, round: (jnp.asarray(theta, jnp.float32), shared),
        sent=sent,
        end=end if share_stale_params else Rule.end,
    )
