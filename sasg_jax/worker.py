r"""The worker's half of a round: decide whether to upload, and form the message.

.. math::
    p = \gamma g + e, \quad \text{message} = \mathcal{C}(p), \quad e \leftarrow p - \mathcal{C}(p),
    \quad w_s \leftarrow w_t

for a worker that uploads. A silent worker changes nothing but its staleness.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sasg_jax.compressors import Compressor, compress_with_feedback
from sasg_jax.control_flow import for_all, update_if
from sasg_jax.upload_rules import UploadRule, must_upload

PyTree = Any


class WorkerState(NamedTuple):
    """What one worker carries from round to round. Differs between workers."""

    residual: PyTree  # like params, or () for a lossless compressor
    compressor_memory: PyTree  # of Compressor.init_memory, mostly without arrays
    stale_params: PyTree  # like params; () when all always upload, or the server keeps them
    staleness: jax.Array  # rounds since the last upload, τ = t - s. shape=(), dtype=jnp.int32
    uploaded: jax.Array  # in the last round. shape=(), dtype=jnp.bool_
    finite: jax.Array  # whether the last gradient was. shape=(), dtype=jnp.bool_
    innovation: jax.Array  # ‖g - g'‖², 0 in a forced round. shape=(), dtype=jnp.float32


def init_worker(
    compressor: Compressor, rule: UploadRule, params: PyTree, *, keep_params: bool
) -> WorkerState:
    """The state before the first round. A worker that has never uploaded must upload.

    With ``keep_params`` it keeps the parameters of its last upload.
    """
    return WorkerState(
        residual=() if compressor.lossless else jax.tree.map(jnp.zeros_like, params),
        compressor_memory=compressor.init_memory(params),
        stale_params=jax.tree.map(jnp.copy, params) if keep_params else (),
        staleness=jnp.asarray(rule.max_staleness, jnp.int32),
        uploaded=jnp.asarray(False),
        finite=jnp.asarray(True),
        innovation=jnp.zeros((), jnp.float32),
    )


def worker_round(
    compressor: Compressor,
    rule: UploadRule,
    state: WorkerState,
    grads: PyTree,
    params: PyTree,
    *,
    stale_grads_fn: Callable[[PyTree], PyTree],
    learning_rate: jax.Array,
    threshold: jax.Array,
    round: jax.Array,
    keep_params: bool,
) -> tuple[WorkerState, PyTree]:
    """One worker's half of a round.

    Args:
      compressor: C.
      rule: the upload rule.
      state: the worker's state.
      grads: g, its gradient at ``params``. Like ``params``.
      params: w_t.
      stale_grads_fn: gives g' from ``state.stale_params``; called only for an adaptive rule, and on
        a device of its own run only in rounds in which the upload is not forced anyway.
      learning_rate: γ. ``# shape=()``
      threshold: right-hand side of (6). ``# shape=(), dtype=float32``
      round: t. ``# shape=(), dtype=int32``
      keep_params: as in :func:`init_worker`.

    Returns:
      The new state, and the message, which is all zeros where the worker is silent.

    Guarantees:
      - Conservation: decoded message + new residual = γ g + old residual where it uploads.
      - A gradient that is not finite never reaches the residual, the message or the stale
        parameters: that worker is silent for the round and must upload as soon as its staleness
        reaches the cap.
    """
    if rule.adaptive:
        forced = must_upload(rule, state.staleness, round)
        measured = lax.cond(
            for_all(forced),
            lambda: jnp.full((), jnp.nan, jnp.float32),
            lambda: squared_distance(grads, stale_grads_fn(state.stale_params)),
        )
        # A finite sum of squares of g - g' vouches for g. Otherwise g itself is looked at.
        _, not_finite = update_if(
            ~jnp.isfinite(measured), lambda _, g: ((), ~_all_finite(g)), (), grads
        )
        finite = ~not_finite
        innovation = jnp.where(forced, 0, measured)
        # Written so that an innovation that is not a number uploads.
        uploaded = finite & (forced | ~(innovation <= threshold))
    else:
        innovation = state.innovation
        finite = _all_finite(grads)
        uploaded = finite

    def upload(carried, grads, params, learning_rate):
        residual, memory, _ = carried
        scaled = jax.tree.map(lambda g: _scale(learning_rate, g), grads)
        message, residual, memory = compress_with_feedback(compressor, scaled, residual, memory)
        return (residual, memory, params if keep_params else ()), message

    carried = state.residual, state.compressor_memory, state.stale_params
    (residual, memory, stale_params), message = update_if(
        uploaded, upload, carried, grads, params, learning_rate
    )
    new_state = WorkerState(
        residual=residual,
        compressor_memory=memory,
        stale_params=stale_params,
        staleness=jnp.where(uploaded, 1, state.staleness + 1).astype(jnp.int32),
        uploaded=uploaded,
        finite=finite,
        innovation=innovation,
    )
    return new_state, message


def squared_distance(a: PyTree, b: PyTree) -> jax.Array:
    """‖a - b‖² over all leaves. ``# shape=(), dtype=float32``"""

    def leaf(x, y):
        return jnp.sum(jnp.square(x.astype(jnp.float32) - y.astype(jnp.float32)))

    return sum(jax.tree.leaves(jax.tree.map(leaf, a, b)), jnp.zeros((), jnp.float32))


def squared_norm(tree: PyTree) -> jax.Array:
    """‖x‖² over all leaves. ``# shape=(), dtype=float32``"""
    leaves = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)]
    return sum(leaves, jnp.zeros((), jnp.float32))


def _all_finite(tree: PyTree) -> jax.Array:
    return jnp.all(jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]))


def _scale(learning_rate: jax.Array, grad: jax.Array) -> jax.Array:
    """γ g, with the product taken in at least float32."""
    wide = jnp.promote_types(grad.dtype, jnp.float32)
    return (learning_rate.astype(wide) * grad.astype(wide)).astype(grad.dtype)
