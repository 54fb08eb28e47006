r"""The worker's half of a round: decide whether to upload, and form the message.

.. math::
    p = \gamma g + e, \quad \text{message} = \mathcal{C}(p), \quad e \leftarrow p - \mathcal{C}(p)

for a worker that uploads. A silent one changes its staleness, and where it keeps p, its residual.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sasg_jax.compressors.base import Compressed
from sasg_jax.control_flow import for_all, update_if
from sasg_jax.method import Method
from sasg_jax.numerics import LARGEST_RATE, PyTree, all_finite, scale, squared_norm
from sasg_jax.rules.base import View
from sasg_jax.states import NEVER, ServerState, WorkerState


class Post(NamedTuple):
    """What a worker has for the exchange."""

    message: PyTree  # all zeros where the worker is silent
    uploaded: jax.Array  # shape=(), dtype=jnp.bool_


def init_worker(method: Method, params: PyTree) -> WorkerState:
    """The state before the first round. A worker that has never uploaded must upload."""
    # Each array once: a step may donate them.
    no, yes, zero = jnp.asarray(False), jnp.asarray(True), jnp.zeros((), jnp.float32)
    memory = method.per_link(method.compressor).init_memory(params)
    rule = jax.tree.map(jnp.copy, method.rule.init_worker(params))  # may be params themselves
    staleness = jnp.asarray(method.rule.max_staleness or 1, jnp.int32)
    return WorkerState(method.feedback.init(params), memory, rule, staleness, no, ~yes, yes, zero)


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
    """One worker's half of a round: its new state, and what goes to the exchange.

    Args:
      server: before the round. Of it, only what is the same on all workers is read.
      direction, params: g, e.g. its gradient, and w_t, of the same shapes and dtypes.
      index: which worker this is, from 0. ``# shape=(), dtype=int32``
      present: whether it takes part in this round. ``# shape=(), dtype=bool``
      reevaluate: gives the direction at other parameters, on the same batch with the same
        randomness; for rules that ask for it, or TypeError.

    Guarantees:
      - Conservation: decoded message + new residual = γ g + old residual where it uploads, and new
        residual = γ g + old residual where it is silent and keeps its direction.
      - What is not finite never reaches the residual, the message or the rule's memory: neither a
        gradient nor what γ g + e makes of one. That worker is silent for the round."""
    present, index = jnp.asarray(present), jnp.asarray(index)
    round = method.round(params, server.round)
    threshold, shared = method.rule.begin(server.rule, round)
    forced = _must_upload(method, worker)
    rate, feedback, keys = round.learning_rate, method.feedback, method.keys(server.round, index)
    pending = lambda: _taken_in(feedback, scale(rate, direction), worker.feedback)[1]
    remainder = lambda: _compress(method, worker.compressor_memory, pending(), keys).remainder
    own = worker.feedback, worker.staleness, worker.rule
    rest = shared, threshold, forced, _missing if reevaluate is None else reevaluate
    decision = method.rule.decide(View(round, index, direction, *own, *rest, pending, remainder))
    wants = present & (forced | decision.upload)
    acts = present if method.keeps else wants
    fits = _fits(method, acts, decision.sound, direction, worker.feedback, rate)
    uploaded = wants & fits
    rule_memory = worker.rule
    if decision.memory is not None:
        decided = present & (fits | ~acts)
        take = lambda new, old: jnp.where(decided, new, old)
        rule_memory = jax.tree.map(take, decision.memory, rule_memory)
    carried = worker.feedback, worker.compressor_memory, rule_memory
    operands = direction, params, rate, keys
    send = functools.partial(_send, method)
    carried, message = update_if(uploaded, send, carried, *operands)
    if method.keeps:
        keep: Any = feedback.keep
        take_in = lambda memory, g, rate: _taken_in(feedback, scale(rate, g), memory)
        keep_direction = lambda memory, *g: (keep(*take_in(memory, *g)), ())
        kept, _ = update_if(acts & fits & ~wants, keep_direction, carried[0], direction, rate)
        carried = kept, *carried[1:]
    staleness = jnp.where(uploaded, 1, worker.staleness + 1).astype(jnp.int32)
    report = uploaded, acts & fits, fits | ~acts, decision.measured.astype(jnp.float32)
    new_worker = WorkerState(carried[0], carried[1], carried[2], staleness, *report)
    return new_worker, Post(message, uploaded)


def _must_upload(method: Method, worker: WorkerState) -> jax.Array:
    """Whatever the rule says; where it has no bound, only who has joined a run."""
    return worker.staleness >= (method.rule.max_staleness or NEVER)


def needs_direction(
    method: Method, worker: WorkerState, server: ServerState, params: PyTree, *, index, present=True
) -> jax.Array | None:
    """Whether a worker's direction counts for anything in this round, before it is made; None where
    nobody can tell: with most rules, and where a silent worker keeps its direction. The arguments
    are those of :func:`worker_half`. ``# shape=(), dtype=bool``"""
    if not method.rule.foresees or method.keeps or method.compressor.compress_mean is not None:
        return None
    round = method.round(params, server.round)
    threshold, shared = method.rule.begin(server.rule, round)
    forced = _must_upload(method, worker)
    own = worker.feedback, worker.staleness, worker.rule
    rest = shared, threshold, forced, _foreseen, _foreseen, _foreseen
    decision = method.rule.decide(View(round, jnp.asarray(index), None, *own, *rest))
    return jnp.asarray(present) & (forced | decision.upload)


def _foreseen(*params: PyTree) -> PyTree:
    raise TypeError("A rule that foresees must not ask for what takes the direction.")


def _send(method: Method, carried, direction, params, learning_rate, keys):
    """What a worker does that uploads, for :func:`update_if`."""
    compressor, feedback = method.per_link(method.compressor), method.feedback
    memory, compressor_memory, rule_memory = carried
    memory, p = _taken_in(feedback, scale(learning_rate, direction), memory)
    compressed = _compress(method, compressor_memory, p, keys)
    shared = lambda: method.decoder_key(compressor, keys)
    decoded = lambda: compressor.decompress(compressed.message, p, shared())
    memory = feedback.after(memory, compressed, decoded)
    rule_memory = method.rule.sent(rule_memory, params, direction, learning_rate)
    return (memory, compressed.memory, rule_memory), compressed.message


def _taken_in(feedback, x: PyTree, memory: PyTree) -> tuple[PyTree, PyTree]:
    """The feedback's memory with this round's direction in it, and of what a message is made."""
    memory = memory if feedback.take_in is None else feedback.take_in(x, memory)
    return memory, feedback.before(x, memory)


def _compress(method, memory, p, keys) -> Compressed:
    compressor = method.per_link(method.compressor)
    return compressor.compress(p, memory, method.compressor_key(compressor, keys))


def _fits(method, acts, sound, direction, memory, rate) -> jax.Array:
    """Whether p = γ g + e is finite, for a worker that acts. A residual is finite, and far from the
    largest numbers where it moves by small ones: it is enough to look at g and γ, but in half
    precision, where p is made."""
    if any(float(jnp.finfo(x.dtype).max) < 1e30 for x in jax.tree.leaves(direction)):
        look = lambda: all_finite(_taken_in(method.feedback, scale(rate, direction), memory)[1])
        return jax.lax.cond(for_all(~acts), lambda: jnp.asarray(True), look)
    if sound is None:
        sound = jnp.isfinite(squared_norm(direction))
    return ~acts | (sound if rate is None else sound & (jnp.abs(rate) <= LARGEST_RATE))


def worker_half_with_mean(
    method: Method, worker, server, direction, params, *, index, present, mean
):
    """As :func:`worker_half`, for a compressor that takes means over workers in its middle; who is
    refused or absent adds zeros. The message is the mean, decoded and like ``params``."""
    assert method.compressor.compress_mean is not None
    round, present = method.round(params, server.round), jnp.asarray(present)
    x = scale(round.learning_rate, direction)
    memory, p = _taken_in(method.feedback, x, worker.feedback)
    fits = all_finite(p)
    used = fits & present
    p = jax.tree.map(lambda x: jnp.where(used, x, 0), p)
    key = method.compressor_key(method.compressor, method.keys(server.round, index))
    made = method.compressor.compress_mean(p, worker.compressor_memory, key, mean)
    decoded, compressed = made[0], Compressed((), *made[1:])
    feedback = method.feedback.after(memory, compressed, lambda: decoded)
    feedback = jax.tree.map(lambda x, old: jnp.where(used, x, old), feedback, worker.feedback)
    staleness = jnp.where(used, 1, worker.staleness + 1).astype(jnp.int32)
    carried = feedback, compressed.memory, worker.rule, staleness
    new_worker = WorkerState(*carried, used, used, fits | ~present, worker.innovation)
    return new_worker, Post(decoded, used)


def _missing(params: PyTree) -> PyTree:
    why = "update() of this upload rule needs grad_fn=..., a function of the parameters that "
    raise TypeError(why + "evaluates the gradient on the same batch with the same randomness")
