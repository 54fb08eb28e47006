r"""The server's half of a round: step with the mean of what the workers have sent.

.. math:: w_{t+1} = w_t - \frac{1}{M} \sum_{m=1}^{M} C_m

where C_m is worker m's message of this round; of a silent worker, by name: its last message
(reuse), nothing (keep), or nothing in a mean over those that sent (drop). Of a worker that sends
differences, C_m is what all of them have added up to. With a compressor on the way down, the server
sends C'(u + r) in place of the mean step u and keeps the rest in r.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sasg_jax.exchanges.shards import one_shard
from sasg_jax.method import Method
from sasg_jax.numerics import PyTree, all_finite, wide
from sasg_jax.states import ServerState


class Kept(NamedTuple):
    """What of the state is carried where the server is; the first fields of ServerState."""

    memory: PyTree
    downlink_feedback: PyTree
    downlink_memory: PyTree


def init_server(method: Method, params: PyTree) -> ServerState:
    """The state before the first round: empty messages and no steps."""
    served = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), _served_shapes(method, params))
    memory = ()
    if method.feedback.reconstructs:
        memory = jax.tree.map(lambda x: x.astype(wide(x.dtype)), served)
    elif method.remembers:
        message = method.compressor.message_shapes(served)
        memory = jax.tree.map(lambda s: jnp.zeros((method.num_workers, *s.shape), s.dtype), message)
    down = method.downlink_feedback.init(served), method.downlink.init_memory(served)
    rule = jax.tree.map(jnp.copy, method.rule.init_shared(params))
    zero, start = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
    return ServerState(memory, *down, rule, jnp.asarray(True), zero, start)


def _served_shapes(method: Method, params: PyTree) -> PyTree:
    """Shapes and dtypes of what one server serves: all, or a shard."""
    whole = jax.eval_shape(lambda: params)
    return one_shard(params, method.num_workers) if method.exchange.sharded else whole


def server_half(
    method: Method,
    server: ServerState,
    messages: PyTree,
    uploaded: jax.Array | None,
    params: PyTree,
) -> tuple[PyTree, ServerState]:
    """The server's half of a round, whoever has brought the messages: the step, and its new state.

    The step, like ``params`` w_t, is what they lose where the method has a learning rate, and the
    mean direction where it has none. Step + new residual of the way down = mean + old residual, bit
    for bit. Not for the exchange ``"sharded"``, where each serves a part.

    Args:
      messages: of all workers, with a leading axis M; or one row, their sum, where they add up.
      uploaded: which of them count; None for all. ``# shape=(M,), dtype=bool``"""
    kept, down = serve(method, server, messages, uploaded, params)
    return finish(method, server, kept, down, params)


def serve(method: Method, server: ServerState, messages, uploaded, params) -> tuple[Kept, PyTree]:
    """What happens where the server is: its new memory, and what it sends."""
    fn, kept, operands = served(method, server, params)
    return fn(kept, messages, uploaded, *operands)


def served(method: Method, server: ServerState, params: PyTree) -> tuple[Any, Kept, tuple]:
    """``fn, kept, operands``: ``kept, down = fn(kept, messages, uploaded, *operands)``. It closes
    over nothing that is traced, so that an exchange may run it in a branch."""
    kept = Kept(server.memory, server.downlink_feedback, server.downlink_memory)
    shard = jax.lax.axis_index(method.axis_name) if method.exchange.sharded else jnp.int32(0)
    keys = [method.keys(server.round, who) for who in (shard, method.num_workers + shard)]
    return functools.partial(_serve, method, _served_shapes(method, params)), kept, tuple(keys)


def _serve(method: Method, like: PyTree, kept: Kept, messages, uploaded, of_messages, of_step):
    memory, count = kept.memory, method.num_workers
    if uploaded is not None and not method.exchange.sums:
        replaced = memory if method.remembers else jax.tree.map(jnp.zeros_like, messages)
        messages = replace_messages(replaced, messages, uploaded)
    if method.remembers:
        memory = messages
    if uploaded is not None and method.silence == "drop":
        count = jnp.maximum(uploaded.sum(), 1)
    key = method.decoder_key(method.compressor, of_messages)
    total = method.compressor.decompress_sum(messages, like, key)
    if method.feedback.reconstructs:
        total = memory = jax.tree.map(jnp.add, memory, total)
    # Divided before it is rounded: in half precision the sum need not fit where the mean does.
    step = jax.tree.map(lambda x, leaf: (x / count).astype(leaf.dtype), total, like)
    feedback, down_memory, down = _send_down(method, kept, step, of_step)
    return Kept(memory, feedback, down_memory), down


def _send_down(method, kept, step, keys):
    """The way down, with its feedback. A step that is not finite leaves no trace in it."""
    compressor, feedback = method.downlink, method.downlink_feedback
    p = feedback.before(step, kept.downlink_feedback)

    def send():
        key = method.compressor_key(compressor, keys)
        compressed = compressor.compress(p, kept.downlink_memory, key)
        after = feedback.after(kept.downlink_feedback, compressed, lambda: None)
        return after, compressed.memory, compressed.message

    def refuse():  # NaN tells the workers
        nan = lambda x: jnp.full_like(x, jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else 0)
        message = jax.tree.map(nan, compressor.zero_message(p))
        return kept.downlink_feedback, kept.downlink_memory, message

    return send() if compressor.exact else jax.lax.cond(all_finite(p), send, refuse)


def replace_messages(messages: PyTree, fresh: PyTree, uploaded: jax.Array) -> PyTree:
    """``messages`` (leading axis M), with the ``fresh`` ones of the workers that uploaded."""
    flags = lambda x: uploaded.reshape(-1, *(1,) * (x.ndim - 1))
    return jax.tree.map(lambda old, new: jnp.where(flags(new), new, old), messages, fresh)


def finish(method: Method, server: ServerState, kept: Kept, down: PyTree, params: PyTree) -> Any:
    """What every worker makes of what the server sends: the step, and the server's new state."""
    round = method.round(params, server.round)
    threshold, shared = method.rule.begin(server.rule, round)
    step = down  # what is sent without loss and in one piece is the step itself
    if not method.downlink.exact or method.exchange.sharded:
        compressor = method.per_link(method.downlink)
        key = method.decoder_key(compressor, method.keys(server.round, jnp.int32(0)))
        step = compressor.decompress(down, params, key)
    finite = all_finite([x for x in jax.tree.leaves(down) if jnp.issubdtype(x.dtype, jnp.floating)])
    step = jax.tree.map(lambda x: jnp.where(finite, x, 0), step)
    number = jnp.asarray(optax.safe_increment(server.round))
    rule = method.rule.end(shared, round, step)
    return step, ServerState(*kept, rule, finite, threshold, number)
