"""Directions: what a worker makes of its batch in a round, a gradient or the way that several steps
have led it. A rule's second evaluation is the same function at other parameters.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sasg_jax._checks import check_bool, check_int, is_real, require
from sasg_jax.numerics import PyTree, squared_norm, wide


class Evaluation(NamedTuple):
    """What a direction makes of a batch."""

    direction: PyTree  # like params
    own: PyTree  # what the worker carries for the direction, e.g. an inner optimiser's state
    model_state: PyTree
    loss: jax.Array  # the mean over what was accumulated. shape=()
    aux: PyTree  # of loss_fn; with a leading axis of the steps where there are several


@dataclasses.dataclass(frozen=True, kw_only=True)
class Direction:
    """Pure functions, made by :func:`gradient` and :func:`local_steps`. ``own = init(params)``
    is what a worker carries; ``evaluation = evaluate(params, own, model_state, key, batch)``."""

    init: Callable[[PyTree], PyTree]
    evaluate: Callable[[PyTree, PyTree, PyTree, Any, PyTree], Evaluation]
    steps: int | None = None  # the leading axis of a worker's batch, where it has one of its own
    accumulate: int | None = None  # the axis after that one, where there is one
    gradients: int = 1  # that a round takes
    has_aux: bool = False
    has_model_state: bool = False
    has_key: bool = False


def gradient(
    loss_fn: Callable[..., Any],
    *,
    accumulate: int = 1,
    has_aux: bool = False,
    has_model_state: bool = False,
    has_key: bool = False,
) -> Direction:
    """The gradient of the loss, or the mean of several. ValueError for an argument out of range.

    Args:
      loss_fn: one worker's loss, ``loss_fn(params, batch)``. With ``has_model_state`` (BatchNorm
        statistics, say) it also gets ``model_state=``, and with ``has_key`` a fresh ``key=``, the
        same for the gradient at the current and at other parameters. It returns ``loss``, or
        ``(loss, aux)`` with ``has_aux``, ``(loss, new_model_state)`` with ``has_model_state``, and
        ``(loss, (new_model_state, aux))`` with both.
      accumulate: how many gradients are added up before anything is sent. With more than 1 every
        leaf of a worker's batch has a leading axis of that many.
      has_aux, has_model_state, has_key: what ``loss_fn`` returns and takes."""
    accumulate = check_int("accumulate", accumulate, minimum=1)
    has = {"has_aux": has_aux, "has_model_state": has_model_state, "has_key": has_key}
    value_and_grad = _mean_of(accumulate, _value_and_grad(loss_fn, **has))

    def evaluate(params, own, model_state, key, batch):
        (loss, (model_state, aux)), grads = value_and_grad(params, model_state, key, batch)
        return Evaluation(grads, own, model_state, loss, aux)

    how = {"steps": None if accumulate == 1 else accumulate, "gradients": accumulate, **has}
    return Direction(init=lambda params: (), evaluate=evaluate, **how)


def local_steps(
    loss_fn: Callable[..., Any],
    inner: optax.GradientTransformation,
    *,
    steps: int,
    accumulate: int = 1,
    has_aux: bool = False,
    has_model_state: bool = False,
    has_key: bool = False,
) -> Direction:
    """The way that ``steps`` steps of a worker's own lead, Δ: old minus new parameters.

    What follows the mean, the outer optimiser, then takes Δ for a gradient: ``optax.sgd(1.0)`` is
    local SGD, ``optax.sgd(0.7, momentum=0.9, nesterov=True)`` is DiLoCo's, and ``optax.sgd(a,
    momentum=b)`` is SlowMo's u ← b u + Δ/γ, w ← w - a γ u at a constant inner rate γ. Local SGD
    whose Δ is sent as a top k of few bits with a residual (``sasg_jax.top_k(0.01, values="sign")``)
    is Qsparse-local-SGD. Post-local SGD is two train steps one after another, of ``steps=1`` until
    the rate first drops and of 16 from then on: with the same optimisers they have the same state.
    :func:`norm_test` says how large the batches should be.

    Args:
      loss_fn, has_aux, has_model_state, has_key: as in :func:`gradient`.
      inner: the worker's own optimiser, of optax. It gets the loss as ``value=``. Its state stays
        with the worker, from round to round: a schedule in it counts the worker's own steps, H a
        round. A round in which the worker's way counts for nothing leaves it as it was.
      steps: H, at least 1, or ValueError. Every leaf of a worker's batch has a leading axis of H.
      accumulate: k, how many gradients are averaged for each step. With more than 1 every leaf of
        a worker's batch has leading axes of H and k, and so has ``aux``.

    References: Stich, `Local SGD Converges Fast and Communicates Little
    <https://arxiv.org/abs/1805.09767>`_, 2018; Lin et al., `Don't Use Large Mini-Batches, Use Local
    SGD <https://arxiv.org/abs/1808.07217>`_, 2018; Basu et al., `Qsparse-local-SGD
    <https://arxiv.org/abs/1906.02367>`_, 2019; Wang et al., `SlowMo
    <https://arxiv.org/abs/1910.00643>`_, 2019; Douillard et al., `DiLoCo
    <https://arxiv.org/abs/2311.08105>`_, 2023"""
    steps = check_int("steps", steps, minimum=1)
    accumulate = check_int("accumulate", accumulate, minimum=1)
    is_optimiser = isinstance(inner, optax.GradientTransformation)
    require(is_optimiser, "inner", inner, "to be an optax optimiser")
    inner = optax.with_extra_args_support(inner)
    has = {"has_aux": has_aux, "has_model_state": has_model_state, "has_key": has_key}
    value_and_grad = _mean_of(accumulate, _value_and_grad(loss_fn, **has))

    def evaluate(params, own, model_state, key, batch):
        def step(carried, step_input):
            local, own, model_state = carried
            number, part = step_input
            given = local, model_state, _fold(key, number), part
            (loss, (model_state, aux)), grads = value_and_grad(*given)
            updates, own = inner.update(grads, own, local, value=loss)
            local = optax.apply_updates(local, updates)
            return (local, own, model_state), (loss, aux)

        carried, parts = (params, own, model_state), (jnp.arange(steps), batch)
        (local, own, model_state), (losses, aux) = jax.lax.scan(step, carried, parts)
        delta = jax.tree.map(jnp.subtract, params, local)
        return Evaluation(delta, own, model_state, losses.mean(), aux)

    how = {"accumulate": None if accumulate == 1 else accumulate, **has}
    gradients = steps * accumulate
    return Direction(init=inner.init, evaluate=evaluate, steps=steps, gradients=gradients, **how)


def norm_test(gradients: PyTree, batch_size: Any, *, eta: float) -> jax.Array:
    r"""How large each worker's batch should be for the mean of all to be more than its noise.

    .. math::
        T = \left\lceil \frac{b}{M - 1} \cdot
        \frac{\sum_m \|g_m - \bar g\|^2}{M \eta^2 \|\bar g\|^2} \right\rceil

    At an exchange of a local method, let ``b = max(b, T)``. The batches are your data pipeline's:
    those of another size compile another step.

    Args:
      gradients: of all workers, each on b of its samples, as they are: of compressed ones the test
        is biased. A leading axis M on every leaf.
      batch_size: b, a number.
      eta: η, above 0: of the mean's norm, the part that its noise may have. Smaller means larger
        batches.

    Returns:
      T, at least 1 and at most 2³⁰, where the mean is zero, too; b where a gradient is not finite.
      ``# shape=(), dtype=jnp.int32``

    ValueError for an argument out of range, or fewer than two workers. Workers with data of their
    own differ without any noise: there it asks for more than batches can give.

    References: Lau et al., `Adaptive Batch Size Strategies for Local Gradient Methods
    <https://arxiv.org/abs/2406.13936>`_, 2024

    >>> import jax.numpy as jnp
    >>> int(norm_test(jnp.array([[1.0, 1.0], [1.0, -1.0]]), 8, eta=0.5))
    32
    """
    require(is_real(eta) and 0 < eta < math.inf, "eta", eta, "to be a finite number above 0")
    sizes = {jnp.shape(x)[:1] for x in jax.tree.leaves(gradients)}
    allowed = "to be one M of at least 2 on all leaves"
    (num_workers,) = next(iter(sizes)) if len(sizes) == 1 and sizes != {()} else (0,)
    require(num_workers > 1, "the leading axes of gradients", sorted(sizes), allowed)
    mean = jax.tree.map(lambda x: x.astype(wide(x.dtype)).mean(0), gradients)
    spread = jax.tree.map(lambda x, m: x.astype(m.dtype) - m[None], gradients, mean)
    noise = squared_norm(spread) / (num_workers * (num_workers - 1))
    size = jnp.ceil(batch_size * (noise / (eta**2 * squared_norm(mean))))
    size = jnp.where(jnp.isfinite(noise), jnp.clip(size, 1, 2**30), batch_size)
    return jnp.where(jnp.isnan(size), 1, size).astype(jnp.int32)


def as_direction(loss_fn: Any, **has: bool) -> Direction:
    """A direction as it is, or the gradient of a loss function."""
    is_one = isinstance(loss_fn, Direction)
    for name, value in has.items():
        check_bool(name, value)
        allowed = "to be said to sasg_jax.gradient or local_steps instead"
        require(not (is_one and value), name, value, allowed)
    return loss_fn if is_one else gradient(loss_fn, **has)


def _value_and_grad(loss_fn, has_aux, has_model_state, has_key):
    """``(loss, (new_model_state, aux)), grads = fn(params, model_state, key, batch)``"""

    def parts(params, model_state, key, batch):
        extra = {"model_state": model_state} if has_model_state else {}
        extra |= {"key": key} if has_key else {}
        out = loss_fn(params, batch, **extra)
        if not has_model_state and not has_aux:
            return out, ((), ())
        loss, rest = out
        if has_model_state and has_aux:
            new_model_state, aux = rest
            return loss, (new_model_state, aux)
        return loss, (rest, ()) if has_model_state else ((), rest)

    return jax.value_and_grad(parts, has_aux=True)


def _mean_of(accumulate, value_and_grad):
    """The same of a batch with a leading axis of that many: the mean gradient and loss, with the
    model state handed on from one to the next."""
    if accumulate == 1:
        return value_and_grad

    def several(params, model_state, key, batch):
        def add(carried, step):
            total, model_state = carried
            number, part = step
            given = params, model_state, _fold(key, number), part
            (loss, (model_state, aux)), grads = value_and_grad(*given)
            total = jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, grads)
            return (total, model_state), (loss, aux)

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, wide(p.dtype)), params)
        carried, parts = (zeros, model_state), (jnp.arange(accumulate), batch)
        (total, model_state), (losses, aux) = jax.lax.scan(add, carried, parts)
        mean = jax.tree.map(lambda t, p: (t / accumulate).astype(p.dtype), total, params)
        return (losses.mean(), (model_state, aux)), mean

    return several


_fold = lambda key, number: key if isinstance(key, tuple) else jax.random.fold_in(key, number)
