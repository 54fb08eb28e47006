"""What a training run carries and reports, and one worker's round of it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from sasg_jax._checks import check_like
from sasg_jax.control_flow import for_all
from sasg_jax.directions import Direction, Evaluation
from sasg_jax.numerics import PyTree, is_masked, wide
from sasg_jax.state_axes import keep_own
from sasg_jax.states import diagnostics, find_state
from sasg_jax.transform import Transformation, before_ours
from sasg_jax.worker import needs_direction


class TrainState(NamedTuple):
    """Everything that a run carries from round to round."""

    params: PyTree  # the same on all workers
    opt_state: PyTree  # optax state; a worker's own parts have a leading axis M
    model_state: PyTree = ()  # e.g. BatchNorm statistics, leading axis M; () if there is none
    keys: PyTree = ()  # PRNG keys of the workers, folded by round. shape=(M,); () if there are none
    direction: PyTree = ()  # e.g. inner optimisers' state, leading axis M; () if there is none


class RoundInfo(NamedTuple):
    """What one round reports. M is the number of workers."""

    loss: jax.Array  # each worker's own, before the step. shape=(M,)
    uploaded: jax.Array  # shape=(M,), dtype=jnp.bool_
    finite: jax.Array  # whether nothing was refused. shape=(M,), dtype=jnp.bool_
    staleness: jax.Array  # after the round, 1 = just uploaded. shape=(M,), dtype=jnp.int32
    innovation: jax.Array  # as in sasg_jax.Diagnostics. shape=(M,), dtype=jnp.float32
    threshold: jax.Array  # with what it was compared. shape=(), dtype=jnp.float32
    sent_down: jax.Array  # whether the server sent a step. shape=(), dtype=jnp.bool_
    aux: PyTree  # of loss_fn, leading axis M; () if there is none


def evaluate(
    direction: Direction, tx: Any, state: TrainState, batch: PyTree, index: Any, present: Any
) -> tuple[Evaluation, Any]:
    """A worker's direction, and the function that gives it at other parameters: there it has gone
    through what stands before ours in ``tx``, as ``tx.update`` does with the former. A direction
    that is known to count for nothing is not made: it is zero, and its loss NaN."""
    folded = lambda: jax.random.fold_in(state.keys, find_state(state.opt_state).server.round)
    key = folded() if direction.has_key else ()

    rest = state.direction, state.model_state, key, batch

    def grad_fn(params):
        params = _all_params(params, state.params)
        made = direction.evaluate(params, *rest)
        return before_ours(tx, made.direction, state.opt_state, params)

    make = lambda: direction.evaluate(state.params, *rest)
    needed = None
    if isinstance(tx, Transformation):
        ours = tx.find_ours(state.opt_state)
        how = {"index": index, "present": present}
        needed = needs_direction(tx.method, ours.worker, ours.server, state.params, **how)
    if needed is None:
        return make(), grad_fn
    zeros = lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(make))
    made = jax.lax.cond(for_all(~needed), zeros, make)
    return made._replace(loss=jnp.where(needed, made.loss, jnp.nan)), grad_fn


def worker_round(
    direction: Direction,
    tx: optax.GradientTransformationExtraArgs,
    state: TrainState,
    batch: PyTree,
    present: jax.Array | None = None,
    *,
    axis_name: str = "workers",
    pass_value: bool = False,
) -> tuple[TrainState, RoundInfo]:
    """One worker's view of a round, under a map over workers named ``axis_name``.

    Args:
      direction, tx: what it makes of its batch, and an optimiser that contains one of ours.
      state, batch: its own view: nothing has an axis over workers.
      present: who takes part, the same on all workers; None for all. ``# shape=(M,), dtype=bool``
      pass_value: whether ``tx.update`` gets the mean finite loss of those present as ``value=``.

    A round in which its direction counts for nothing (refused, silent and not kept, or absent)
    changes only our counters: not its model state, nor the direction's, nor what is before ours."""
    index = jax.lax.axis_index(axis_name)
    there = True if present is None else jnp.asarray(present)[index]
    made, grad_fn = evaluate(direction, tx, state, batch, index, there)
    extra = {} if present is None else {"present": present}
    if pass_value:
        extra["value"] = mean_loss(made.loss, there, lambda x: jax.lax.psum(x, axis_name))
    given = made.direction, state.opt_state, state.params
    updates, opt_state = tx.update(*given, grad_fn=grad_fn, **extra)
    used = find_state(opt_state).worker.used
    new_state = keep_if(used, made, state)._replace(
        params=optax.apply_updates(state.params, updates),
        opt_state=keep_own(opt_state, state.opt_state, used),
    )
    return new_state, RoundInfo(made.loss, *diagnostics(opt_state), made.aux)


def mean_loss(loss: jax.Array, there: Any, add: Callable[[PyTree], PyTree]) -> jax.Array:
    """The mean of the losses that are finite, over workers that take part; ``add`` sums over them.
    A worker whose gradient is refused has no part in what all do with it. Infinite without any."""
    counts = jnp.isfinite(loss) & there
    total, count = add((jnp.where(counts, loss.astype(wide(loss.dtype)), 0), counts.astype(int)))
    return jnp.where(count > 0, total / jnp.maximum(count, 1), jnp.inf).astype(loss.dtype)


def keep_if(used: jax.Array, made: Evaluation, state: TrainState) -> TrainState:
    """``state``, with what was made of the model's and the direction's if that is used."""
    check_like("the model state", made.model_state, state.model_state, "the one before")
    choose = lambda new, old: jax.tree.map(lambda x, y: jnp.where(used, x, y), new, old)
    model_state = choose(made.model_state, state.model_state)
    return state._replace(model_state=model_state, direction=choose(made.own, state.direction))


def mean_model_state(model_state: PyTree) -> PyTree:
    """The mean over workers of their model states, for evaluation and checkpoints. Leaves that are
    no floating-point numbers, e.g. counters and keys, are taken from worker 0. See also
    :meth:`sasg_jax.Ledger.record_model_state`."""
    mean = lambda x: x.mean(0) if jnp.issubdtype(x.dtype, jnp.inexact) else x[0]
    return jax.tree.map(mean, model_state)


def _all_params(tree: PyTree, params: PyTree) -> PyTree:
    """``tree`` as ``params`` are, also where ``optax.flatten`` has made one vector of it, and with
    the current parameters where ``optax.masked`` has hidden others."""
    if isinstance(tree, jax.Array) and tree.shape != getattr(params, "shape", None):
        return ravel_pytree(params)[1](tree)
    fill = lambda x, p: p if is_masked(x) else x
    return jax.tree.map(fill, tree, params, is_leaf=is_masked)
