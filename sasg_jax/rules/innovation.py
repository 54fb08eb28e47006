"""The paper's rule (6): a worker uploads when its gradient has changed enough."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from sasg_jax._checks import check_bool, check_int, is_real, require
from sasg_jax.control_flow import for_all, zero_after
from sasg_jax.numerics import PyTree, squared_distance, squared_distance_of_sound, squared_norm
from sasg_jax.rules.base import Decision, Round, Rule, View
from sasg_jax.rules.own_period import own_period
from sasg_jax.rules.recent_params import init_recent, read_recent, write_recent

Alpha = float | Sequence[float] | jax.Array
AlphaFn = Callable[[Any], Any]


class StaleParams(NamedTuple):
    """What the rule keeps on a worker."""

    stale_params: PyTree  # w_s, like params; () where they are shared
    learning_rate: jax.Array  # γ_s; 0 where there is none. shape=(), dtype=jnp.float32


class StepHistory(NamedTuple):
    """What the rule keeps once for all workers."""

    history: jax.Array  # past steps' part in the thresholds to come. shape=(D,), dtype=jnp.float32
    step_weights: jax.Array  # α_d of the last round's step. shape=(D,), dtype=jnp.float32
    previous_params: PyTree  # w_{t-1}, like params; () where recent_params has it
    recent_params: PyTree  # of sasg_jax.rules.recent_params; () where each worker keeps its own


def innovation(
    alpha: Alpha | AlphaFn | None = None,
    *,
    theta: float | None = None,
    max_staleness: int | None = None,
    look_every: int | None = None,
    history: int | None = None,
    share_stale_params: bool = False,
) -> Rule:
    r"""A worker uploads when its gradient has changed enough since its last upload.

    Without an ``alpha``, whatever the units: it uploads in turns of a period of its own, at first
    in every round. In every ``look_every``-th upload it looks at how much its gradient has changed
    since the one before, as a part of itself:

    .. math:: r = \|g - g'\|^2 / \|g\|^2

    Here g and g' are its gradients at the current parameters and at those of its last upload, on
    the same batch. Where r > θ its period is halved, and where 4 r ≤ θ doubled, up to
    ``max_staleness``. Meanwhile its direction goes into its residual.

    With one, the paper's rule (6): worker m stays silent in round t when

    .. math::
        \|g - g'\|^2 \le \frac{1}{M^2} \sum_{d=1}^{D} \alpha_d \|w_{t+1-d} - w_{t-d}\|^2

    and its staleness is below ``max_staleness`` and at least D rounds have passed. Where every
    upload is forced, g' is not asked for. Where the learning rate is below half of what it was at
    the worker's last upload, or zero, it uploads, too: the server would apply a message of the old
    rate again.

    ValueError for an argument out of range, or of the other form.

    Args:
      alpha: the weights α_d. A number, ``history`` numbers (the first weighs the newest step), or a
        function of the learning rate that returns either; larger means fewer uploads.
        :func:`released_alpha` is the authors' choice. A step made at a learning rate for which it
        is not finite weighs nothing.
      theta: θ, at least 0, by default 1; larger means fewer uploads.
      max_staleness: an upload is forced when the last one is this many rounds back; by default 10.
        Without an alpha, the longest period, by default 2, which holds before momentum, too. Before
        SGD, 8 saves more.
      look_every: uploads from one look to the next, by default 16: a look takes as long as another
        gradient.
      history: D, the past steps that the threshold of (6) sums over; the first D rounds force
        uploads. By default 10.
      share_stale_params: whether the parameters of the last ``max_staleness`` rounds are kept once,
        in place of a copy for each worker: less memory where a device simulates more workers."""
    if alpha is None:
        require(history is None, "history", history, "to be None without an alpha")
        return own_period(
            1.0 if theta is None else theta,
            max_staleness=2 if max_staleness is None else max_staleness,
            look_every=16 if look_every is None else look_every,
            share_stale_params=share_stale_params,
        )
    allowed = "to be None with an alpha, which makes the threshold"
    require(theta is None, "theta", theta, allowed)
    require(look_every is None, "look_every", look_every, allowed)
    history = check_int("history", 10 if history is None else history, minimum=1)
    max_staleness = check_int(
        "max_staleness", 10 if max_staleness is None else max_staleness, minimum=1
    )
    check_bool("share_stale_params", share_stale_params)
    if not callable(alpha):
        _check_alpha(alpha, history)
    # A worker that is forced in every round never asks for stale parameters.
    has_recent = share_stale_params and max_staleness > 1
    own = lambda params, rate: StaleParams(() if share_stale_params else params, rate)

    def init_shared(params):
        zeros = jnp.zeros(history, jnp.float32)
        kept = ((), init_recent(params, max_staleness)) if has_recent else (params, ())
        return StepHistory(zeros, zeros, *kept)

    def begin(shared: StepHistory, round: Round):
        previous = shared.previous_params
        if has_recent:  # in round 0 that is no parameters, but nothing has a weight yet
            previous = read_recent(shared.recent_params, round.number - 1)
        moved = squared_distance(round.params, previous)
        # Weighted when it is made: a change of the learning rate never re-weighs past steps.
        steps = shared.history + shared.step_weights * moved / round.num_workers**2
        return steps[0], shared._replace(history=jnp.append(steps[1:], 0.0))  # one round on

    def measure(view: View) -> jax.Array:
        stale_params = view.memory.stale_params
        if share_stale_params:
            uploaded_in = view.round.number - view.staleness
            stale_params = read_recent(view.shared.recent_params, uploaded_in)
        return squared_distance_of_sound(view.direction, view.reevaluate(stale_params))

    def decide(view: View) -> Decision:
        forced = view.forced | (view.round.number < history)
        if (rate := view.round.learning_rate) is not None:
            forced |= (rate == 0) | (rate < 0.5 * view.memory.learning_rate)
        if max_staleness == 1:
            return Decision(jnp.asarray(True), jnp.zeros((), jnp.float32))
        # Where g' is not asked for, g is looked at all the same.
        skip = lambda: 0 * squared_norm(view.direction)
        found = jax.lax.cond(for_all(forced), skip, lambda: measure(view))
        measured = jnp.where(forced, 0, found)
        # Written so that an innovation that is no finite number uploads.
        unchanged = (measured <= view.threshold) & (measured < jnp.inf)
        return Decision(forced | ~unchanged, measured, ~jnp.isnan(found))

    def sent(memory: StaleParams, params: PyTree, direction: PyTree, learning_rate: Any):
        rate = jnp.zeros(()) if learning_rate is None else learning_rate
        return own(params, rate.astype(jnp.float32))

    def end(shared: StepHistory, round: Round, step: PyTree):
        # Written after the newest is read for the threshold: else the compiler copies them all.
        now = round.number + zero_after(shared.history)
        recent = write_recent(shared.recent_params, round.params, now)
        step_weights = weights(alpha, round.learning_rate, history)
        return StepHistory(shared.history, step_weights, () if has_recent else round.params, recent)

    sharing = ", share_stale_params=True" if share_stale_params else ""
    return Rule(
        name=f"innovation(max_staleness={max_staleness}, history={history}{sharing})",
        decide=decide,
        measure=measure if max_staleness > 1 else None,
        max_staleness=max_staleness,
        compares=True,
        needs_learning_rate=callable(alpha),
        init_worker=lambda params: own(params, jnp.zeros((), jnp.float32)),
        init_shared=init_shared,
        begin=begin,
        sent=sent,
        end=end,
    )


def released_alpha(c: float, num_workers: int) -> AlphaFn:
    """α_d = c·M/γ for every d: the authors' released threshold, written for a mean over workers.
    (Their code steps with the sum: their learning rate is our γ / M.)

    >>> released_alpha(0.5, num_workers=10)(0.05)
    100.0
    """
    require(is_real(c) and 0 <= c < math.inf, "c", c, "to be a finite number of at least 0")
    num_workers = check_int("num_workers", num_workers, minimum=1)
    return lambda learning_rate: c * num_workers / learning_rate


def weights(alpha: Alpha | AlphaFn, learning_rate: Any, history: int) -> jax.Array:
    """The α_d that the step made with ``learning_rate`` gets: zero where a function is not finite
    there, or negative, at a rate that has decayed to zero, or below it by a rounding."""
    if callable(alpha):
        alpha = jnp.asarray(alpha(learning_rate), jnp.float32)
        _check_alpha_shape(alpha, alpha.shape, history)
        alpha = jnp.where(jnp.isfinite(alpha) & (alpha > 0), alpha, 0)
    return jnp.broadcast_to(jnp.asarray(alpha, jnp.float32), (history,))


def _check_alpha(alpha: Any, history: int) -> None:
    if isinstance(alpha, jax.core.Tracer):  # only its shape is known
        return _check_alpha_shape(alpha, alpha.shape, history)
    try:
        values = np.asarray(alpha)
    except ValueError:  # a ragged sequence
        values = np.asarray("ragged")
    allowed = "to be a number, a sequence of numbers, or a function of the learning rate"
    require(values.dtype.kind in "iuf", "alpha", alpha, allowed)
    _check_alpha_shape(alpha, values.shape, history)
    is_right = (values >= 0) & (values < np.inf)
    require(is_right.all(), "alpha", alpha, "to be finite and at least 0")


def _check_alpha_shape(alpha: Any, shape: tuple[int, ...], history: int) -> None:
    allowed = f"to be one number or history={history} numbers"
    require(shape in ((), (history,)), "alpha", alpha, allowed)
