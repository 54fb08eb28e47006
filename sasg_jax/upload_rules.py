r"""Upload rules: whether a worker uploads in a round, as pure functions of a few scalars.

The innovation rule is the paper's (6). Worker m stays silent in round t when

.. math::
    \|g - g'\|^2 \le \frac{1}{M^2} \sum_{d=1}^{D} \alpha_d \|w_{t+1-d} - w_{t-d}\|^2

and its staleness is below ``max_staleness`` and at least D rounds have passed. Here g and g' are
its gradients at the current and at the stale parameters, on the same batch.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from sasg_jax._checks import check_int, expected, is_real

Alpha = float | Sequence[float] | jax.Array
AlphaFn = Callable[[Any], Any]


class UploadRule(NamedTuple):
    """Made by :func:`always` and :func:`innovation`."""

    adaptive: bool
    """Whether a worker may stay silent."""
    alpha: Alpha | AlphaFn = 0.0
    max_staleness: int = 1
    history: int = 0  # D


def always() -> UploadRule:
    """Every worker uploads in every round."""
    return UploadRule(adaptive=False)


def innovation(alpha: Alpha | AlphaFn, *, max_staleness: int = 10, history: int = 10) -> UploadRule:
    """The paper's rule (6): a worker uploads when its gradient has changed enough.

    Args:
      alpha: the weights α_d. A number, a sequence of ``history`` numbers (the first weighs the
        newest step), or a function of the learning rate that returns either; larger means fewer
        uploads. :func:`released_alpha` is the authors' choice.
      max_staleness: an upload is forced when the last one is this many rounds back; 1 means in
        every round.
      history: D, the number of past steps that the threshold sums over. In the first D rounds
        everybody uploads.

    Raises:
      ValueError: an argument is out of its range, or alpha has the wrong length.
    """
    history = check_int("history", history, minimum=1)
    max_staleness = check_int("max_staleness", max_staleness, minimum=1)
    if not callable(alpha):
        _check_alpha(alpha, history)
    return UploadRule(True, alpha, max_staleness, history)


def released_alpha(c: float, num_workers: int) -> AlphaFn:
    """α_d = c·M/γ for every d: the authors' released threshold, written for a mean over workers.

    Their code steps with the sum over workers, so that their learning rate is our γ / M, and tests
    ``innovation <= c / (their rate · M²) · Σ_d ‖step‖²``, which is ``c / (γ·M) · Σ_d ‖step‖²``.

    >>> released_alpha(0.5, num_workers=10)(0.05)
    100.0
    """
    if not is_real(c) or not (math.isfinite(c) and c >= 0):
        raise expected("c", c, "to be a finite number of at least 0")
    num_workers = check_int("num_workers", num_workers, minimum=1)
    return lambda learning_rate: c * num_workers / learning_rate


def weights(rule: UploadRule, learning_rate: Any) -> jax.Array:
    """The α_d that the step made with ``learning_rate`` gets. ``# shape=(D,), dtype=float32``

    Args:
      rule: an adaptive rule.
      learning_rate: the step's learning rate, or None where there is none.

    Raises:
      ValueError: alpha is a function and there is no learning rate, or it returned a wrong shape.
    """
    alpha = rule.alpha
    if callable(alpha):
        if learning_rate is None:
            raise ValueError(
                "Expected alpha to be a number or a sequence of numbers: as a function of the "
                "learning rate it needs an optimiser that has one (sasg_jax.sasg or "
                "sasg_jax.lasg), and sasg_jax.aggregate has none."
            )
        alpha = jnp.asarray(alpha(learning_rate), jnp.float32)
        _check_alpha_shape(alpha, alpha.shape, rule.history)
    return jnp.broadcast_to(jnp.asarray(alpha, jnp.float32), (rule.history,))


def record_step(
    history: jax.Array, step_weights: jax.Array, step_squared_norm: jax.Array, num_workers: int
) -> jax.Array:
    """Adds what a step will weigh in the thresholds of the D rounds after it.

    The history is weighted when it is made: entry j is the part of the threshold of the j-th round
    from now that past steps have settled, so a change of the learning rate never re-weighs them.

    Args:
      history: ``# shape=(D,), dtype=float32``
      step_weights: α_d from :func:`weights`. ``# shape=(D,), dtype=float32``
      step_squared_norm: ‖w_{t+1} − w_t‖². ``# shape=(), dtype=float32``
      num_workers: M.
    """
    # A step of zero weighs nothing, even where a learning rate of zero made its weight infinite.
    weighed = jnp.where(step_squared_norm > 0, step_weights * step_squared_norm, 0.0)
    return history + weighed / num_workers**2


def take_threshold(history: jax.Array) -> tuple[jax.Array, jax.Array]:
    """This round's threshold, and the history moved on by one round."""
    return history[0], jnp.append(history[1:], 0.0)


def must_upload(rule: UploadRule, staleness: jax.Array, round: jax.Array) -> jax.Array:
    """Whether the upload is forced, whatever the innovation. ``# shape=(), dtype=bool``"""
    return (staleness >= rule.max_staleness) | (round < rule.history)


def _check_alpha(alpha: Any, history: int) -> None:
    if isinstance(alpha, jax.core.Tracer):  # only its shape is known
        _check_alpha_shape(alpha, alpha.shape, history)
        return
    allowed = "to be a number, a sequence of numbers, or a function of the learning rate"
    try:
        values = np.asarray(alpha)
    except ValueError:  # a ragged sequence
        raise expected("alpha", alpha, allowed) from None
    if values.dtype.kind not in "iuf":
        raise expected("alpha", alpha, allowed)
    _check_alpha_shape(alpha, values.shape, history)
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise expected("alpha", alpha, "to be finite and at least 0")


def _check_alpha_shape(alpha: Any, shape: tuple[int, ...], history: int) -> None:
    if shape not in ((), (history,)):
        raise expected("alpha", alpha, f"to be one number or history={history} numbers")
