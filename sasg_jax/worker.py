r"""The worker's half of a round: decide whether to upload, and form the message.

.. math::
    p = \gamma g + e, \quad \text{message} = \mathcal{C}(p), \quad e \leftarrow p - \mathcal{C}(p)

for a worker that uploads. A silent worker changes nothing but its staleness; where it keeps its
direction, its residual becomes p.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sasg_jax.compressors.base import Compressed, wide
from sasg_jax.control_flow import update_if
from sasg_jax.method import Method
from sasg_jax.rules.base import View
from sasg_jax.states import ServerState, WorkerState

PyTree = Any


class Post(NamedTuple):
    """What a worker has for the exchange."""

    message: PyTree  # all zeros where the worker is silent
    uploaded: jax.Array  # shape=(), dtype=jnp.bool_


def init_worker(method: Method, params: PyTree) -> WorkerState:
    """The state before the first round. A worker that has never uploaded must upload."""
    return WorkerState(
        feedback=method.feedback.init(params),
        compressor_memory=method.per_link(method.compressor).init_memory(params),
        rule=jax.tree.map(jnp.copy, method.rule.init_worker(params)),  # may be params themselves
        staleness=jnp.asarray(method.rule.max_staleness or 1, jnp.int32),
        uploaded=jnp.asarray(False),
        used=jnp.asarray(False),
        finite=jnp.asarray(True),
        innovation=jnp.zeros((), jnp.float32),
    )


def worker_half(
    method: Method,
    worker: WorkerState,
    server: ServerState,
    direction: PyTree,
    params: PyTree,
    *,
    index: Any,
    present: Any = True,
    reevaluate: Callable[[PyTree], PyTree] | None = None,
) -> tuple[WorkerState, Post]:
    """One worker's half of a round.

    Args:
      method: its parts.
      worker: the worker's state.
      server: the server's, before the round. Of it, only what is the same on all workers is read.
      direction: g, e.g. its gradient at ``params``. Like ``params``.
      params: w_t.
      index: which worker this is, from 0. ``# shape=(), dtype=int32``
      present: whether it takes part in this round. ``# shape=(), dtype=bool``
      reevaluate: gives the direction at other parameters, on the same batch with the same
        randomness; for rules that ask for it.

    Returns:
      The new state, and what goes to the exchange.

    Guarantees:
      - Conservation: decoded message + new residual = γ g + old residual where it uploads, and new
        residual = γ g + old residual where it is silent and keeps its direction.
      - What is not finite never reaches the residual, the message or the rule's memory: neither a
        gradient nor what γ g + e makes of one. That worker is silent for the round.

    Raises:
      TypeError: the rule asks for another evaluation, and ``reevaluate`` is None.
    """
    present, index = jnp.asarray(present), jnp.asarray(index)
    round = method.round(params, server.round)
    threshold, shared = method.rule.begin(server.rule, round)
    cap = method.rule.max_staleness
    forced = jnp.asarray(False) if cap is None else worker.staleness >= cap
    decision = method.rule.decide(
        View(
            round=round,
            worker=index,
            direction=direction,
            feedback=worker.feedback,
            staleness=worker.staleness,
            memory=worker.rule,
            shared=shared,
            threshold=threshold,
            forced=forced,
            reevaluate=_missing if reevaluate is None else reevaluate,
        )
    )
    wants = present & (forced | decision.upload)
    keys = method.keys(server.round, index)
    carried = worker.feedback, worker.compressor_memory, worker.rule
    operands = direction, params, round.learning_rate, keys, wants
    acts = present if method.keeps else wants
    carried, (message, fits) = update_if(acts, _act(method), carried, *operands)
    uploaded = wants & fits
    new_worker = WorkerState(
        *carried,
        staleness=jnp.where(uploaded, 1, worker.staleness + 1).astype(jnp.int32),
        uploaded=uploaded,
        used=acts & fits,
        finite=fits | ~acts,
        innovation=decision.measured.astype(jnp.float32),
    )
    return new_worker, Post(message, uploaded)


def _act(method: Method) -> Callable[..., tuple[PyTree, PyTree]]:
    """What a worker does that uploads, or keeps its direction, for :func:`update_if`."""
    compressor, feedback = method.per_link(method.compressor), method.feedback

    def act(carried, direction, params, learning_rate, keys, wants):
        memory = carried[0]
        p = feedback.before(scale(learning_rate, direction), memory)

        def send(carried):
            memory, compressor_memory, rule_memory = carried
            key = method.compressor_key(compressor, keys)
            compressed = compressor.compress(p, compressor_memory, key)

            def decoded():
                key = method.decoder_key(compressor, keys)
                return compressor.decompress(compressed.message, p, key)

            memory = feedback.after(memory, compressed, decoded)
            rule_memory = method.rule.sent(rule_memory, params, direction, learning_rate)
            return (memory, compressed.memory, rule_memory), compressed.message

        def keep(carried):
            assert feedback.keep is not None
            return (feedback.keep(carried[0], p), *carried[1:]), compressor.zero_message(p)

        def refuse(carried):
            return carried, compressor.zero_message(p)

        fits = all_finite(p)
        if method.keeps:
            branch = jnp.where(fits, jnp.where(wants, 0, 1), 2)
            carried, message = lax.switch(branch, (send, keep, refuse), carried)
        else:
            carried, message = lax.cond(fits, send, refuse, carried)
        return carried, (message, fits)

    return act


def worker_half_with_mean(
    method: Method,
    worker: WorkerState,
    server: ServerState,
    direction: PyTree,
    params: PyTree,
    *,
    index: Any,
    present: Any,
    mean: Callable[[PyTree], PyTree],
) -> tuple[WorkerState, PyTree]:
    """As :func:`worker_half`, for a compressor that takes means over workers in its middle.

    Everybody takes part in the means: one that is refused or absent adds zeros. In place of a
    message it returns the mean over workers, decoded and like ``params``.
    """
    assert method.compressor.compress_mean is not None
    round = method.round(params, server.round)
    p = method.feedback.before(scale(round.learning_rate, direction), worker.feedback)
    fits = all_finite(p)
    used = fits & jnp.asarray(present)
    p = jax.tree.map(lambda x: jnp.where(used, x, 0), p)
    key = method.compressor_key(method.compressor, method.keys(server.round, index))
    decoded, remainder, memory = method.compressor.compress_mean(
        p, worker.compressor_memory, key, mean
    )
    compressed = Compressed((), remainder, memory)
    feedback = method.feedback.after(worker.feedback, compressed, lambda: decoded)
    new_worker = worker._replace(
        feedback=jax.tree.map(lambda x, old: jnp.where(used, x, old), feedback, worker.feedback),
        compressor_memory=memory,
        staleness=jnp.where(used, 1, worker.staleness + 1).astype(jnp.int32),
        uploaded=used,
        used=used,
        finite=fits | ~jnp.asarray(present),
    )
    return new_worker, decoded


def all_finite(tree: PyTree) -> jax.Array:
    """Whether no entry is NaN or infinite. ``# shape=(), dtype=bool``"""
    flags = [jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(flags)) if flags else jnp.asarray(True)


def scale(learning_rate: jax.Array | None, tree: PyTree) -> PyTree:
    """γ x, with the products taken in at least float32; x where there is no rate."""
    if learning_rate is None:
        return tree

    def leaf(x):
        dtype = wide(x.dtype)
        return (learning_rate.astype(dtype) * x.astype(dtype)).astype(x.dtype)

    return jax.tree.map(leaf, tree)


def _missing(params: PyTree) -> PyTree:
    del params
    raise TypeError(
        "update() of this upload rule needs grad_fn=..., a function of the parameters that "
        "evaluates the gradient on the same batch with the same randomness"
    )
