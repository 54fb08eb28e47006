r"""The server's half of a round: step with the mean of what the workers have sent.

.. math:: w_{t+1} = w_t - \frac{1}{M} \sum_{m=1}^{M} C_m

where C_m is worker m's message of this round; of a silent worker, by name: its last message
(reuse), nothing (keep), or nothing in a mean over those that sent (drop). In a mean over senders, M
is for each coordinate the number of messages that have something there. Of a worker that sends
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
from sasg_jax.rules import Decision, Rule, View
from sasg_jax.states import DownlinkRule, ServerState


class Kept(NamedTuple):
    """What of the state is carried where the server is; the first fields of ServerState."""

    memory: PyTree
    downlink_feedback: PyTree
    downlink_memory: PyTree
    downlink_rule: PyTree


class Down(NamedTuple):
    """What the server sends."""

    message: PyTree  # all zeros where it is silent
    sends: PyTree  # whether it is not. shape=(), dtype=jnp.bool_; () where all know


def init_server(method: Method, params: PyTree) -> ServerState:
    """The state before the first round: empty messages and no steps."""
    served = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), _served_shapes(method, params))
    memory = ()
    if method.feedback.reconstructs:
        memory = jax.tree.map(lambda x: x.astype(wide(x.dtype)), served)
    elif method.remembers:
        message = method.compressor.message_shapes(served)
        memory = jax.tree.map(lambda s: jnp.zeros((method.num_workers, *s.shape), s.dtype), message)
    feedback, compressor = method.downlink_feedback.init(served), method.downlink
    down = feedback, compressor.init_memory(served), _init_rule(method.downlink_rule, served)
    rule = jax.tree.map(jnp.copy, method.rule.init_shared(params))
    yes, zero, start = jnp.asarray(True), jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
    return ServerState(memory, *down, rule, yes, jnp.copy(yes), zero, start)


def _init_rule(rule: Rule, served: PyTree) -> PyTree:
    """Of the way down: as a worker's, of one worker alone."""
    if rule.always:
        return ()
    own = jax.tree.map(jnp.copy, (rule.init_worker(served), rule.init_shared(served)))
    return DownlinkRule(own[0], own[1], jnp.asarray(rule.max_staleness or 1, jnp.int32))


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


def serve(method: Method, server: ServerState, messages, uploaded, params) -> tuple[Kept, Down]:
    """What happens where the server is: its new memory, and what it sends."""
    fn, kept, operands = served(method, server, params)
    return fn(kept, messages, uploaded, *operands)


def served(method: Method, server: ServerState, params: PyTree) -> tuple[Any, Kept, tuple]:
    """``fn, kept, operands``: ``kept, down = fn(kept, messages, uploaded, *operands)``. It closes
    over nothing that is traced, so that an exchange may run it in a branch."""
    kept = Kept(*server[: len(Kept._fields)])
    shard = jax.lax.axis_index(method.axis_name) if method.exchange.sharded else jnp.int32(0)
    keys = [method.keys(server.round, who) for who in (shard, method.num_workers + shard)]
    operands = *keys, server.round
    return functools.partial(_serve, method, _served_shapes(method, params)), kept, operands


def _serve(method: Method, like: PyTree, kept: Kept, messages, uploaded, of_messages, *of_step):
    memory, count = kept.memory, method.num_workers
    if uploaded is not None and not method.exchange.sums:
        replaced = memory if method.remembers else jax.tree.map(jnp.zeros_like, messages)
        messages = replace_messages(replaced, messages, uploaded)
    if method.remembers:
        memory = messages
    if uploaded is not None and method.silence == "drop":
        count = jnp.maximum(uploaded.sum(), 1)
    key = method.decoder_key(method.compressor, of_messages)
    if method.mean == "senders":
        total, count = method.compressor.mean_over_senders(messages, like, key), 1
    else:
        total = method.compressor.decompress_sum(messages, like, key)
    if method.feedback.reconstructs:
        arrived, total = total, jax.tree.map(jnp.add, memory, total)
        memory = total
        if (part := method.feedback.damping) != 1:
            memory = jax.tree.map(lambda h, x: h + part * x, kept.memory, arrived)
    # Divided before it is rounded: in half precision the sum need not fit where the mean does.
    step = jax.tree.map(lambda x, leaf: (x / count).astype(leaf.dtype), total, like)
    return _send_down(method, kept._replace(memory=memory), step, *of_step)


def _send_down(method, kept: Kept, step, keys, number) -> tuple[Kept, Down]:
    """The way down, with its feedback and its rule. A step that is not finite leaves no trace."""
    compressor, feedback, rule = method.downlink, method.downlink_feedback, method.downlink_rule
    p = feedback.before(step, kept.downlink_feedback)

    def compress():
        key = method.compressor_key(compressor, keys)
        return compressor.compress(p, kept.downlink_memory, key)

    def send():
        compressed = compress()
        after = feedback.after(kept.downlink_feedback, compressed, lambda: None)
        return after, compressed.memory, compressed.message

    def hold():
        after = feedback.keep(kept.downlink_feedback, p)
        return after, kept.downlink_memory, compressor.zero_message(p)

    def refuse():  # NaN tells the workers
        nan = lambda x: jnp.full_like(x, jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else 0)
        message = jax.tree.map(nan, compressor.zero_message(p))
        return kept.downlink_feedback, kept.downlink_memory, message

    sends, of_rule = (), kept.downlink_rule
    if compressor.exact:
        after, memory, message = send()
    elif rule.always:
        after, memory, message = jax.lax.cond(all_finite(p), send, refuse)
    else:
        finite, round = all_finite(p), method.round((), number)._replace(num_workers=1)
        pending, remainder = lambda: p, lambda: compress().remainder
        decision, decided = _decide_down(rule, kept, round, step, pending, remainder)
        sends = decision.upload | ~finite
        speak = lambda: jax.lax.cond(finite, send, refuse)
        after, memory, message = jax.lax.cond(sends, speak, hold)
        sent = jax.tree.map(lambda x, e: x - e, p, after.residual)  # zero where it is silent
        made = _after_rule(rule, decided, round, step, sent, sends)
        choose = lambda new, old: jnp.where(finite, new, old)
        of_rule = jax.tree.map(choose, made, kept.downlink_rule)
    return Kept(kept.memory, after, memory, of_rule), Down(message, sends)


def _decide_down(rule, kept, round, step, pending, remainder) -> tuple[Decision, DownlinkRule]:
    """Whether the server sends, and its rule's memory once it has decided: as worker 0 of one; with
    shards each as worker 0, as what one of them sends moves with what the others do."""
    old: DownlinkRule = kept.downlink_rule
    threshold, shared = rule.begin(old.shared, round)
    cap = rule.max_staleness
    forced = jnp.asarray(False) if cap is None else old.staleness >= cap
    own = step, kept.downlink_feedback, old.staleness, old.memory, shared, threshold, forced
    first = jnp.zeros((), jnp.int32)
    decision = rule.decide(View(round, first, *own, _nothing_to_compare, pending, remainder))
    memory = old.memory if decision.memory is None else decision.memory
    decided = DownlinkRule(memory, shared, old.staleness)
    return decision._replace(upload=forced | decision.upload), decided


def _after_rule(rule, decided: DownlinkRule, round, step, sent, sends) -> DownlinkRule:
    """The rule's memory after the round."""
    after = rule.sent(decided.memory, (), step, round.learning_rate)
    memory = jax.tree.map(lambda new, old: jnp.where(sends, new, old), after, decided.memory)
    staleness = jnp.where(sends, 1, decided.staleness + 1).astype(jnp.int32)
    return DownlinkRule(memory, rule.end(decided.shared, round, sent), staleness)


def _nothing_to_compare(params: PyTree) -> PyTree:
    raise TypeError("A rule of the way down has no direction at other parameters to compare with.")


def spread(method: Method, down: Down) -> Down:
    """What the server sends, on every worker; nothing moves but a flag where it is silent."""
    exchange, axis_name = method.exchange, method.axis_name
    if method.downlink_rule.always:
        return down._replace(message=exchange.spread(down.message, axis_name))
    assert exchange.tell_down is not None
    sends = exchange.tell_down(down.sends, axis_name)
    shapes = jax.eval_shape(lambda message: exchange.spread(message, axis_name), down.message)
    zeros = lambda message: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    send = lambda message: exchange.spread(message, axis_name)
    return Down(jax.lax.cond(sends, send, zeros, down.message), sends)


def replace_messages(messages: PyTree, fresh: PyTree, uploaded: jax.Array) -> PyTree:
    """``messages`` (leading axis M), with the ``fresh`` ones of the workers that uploaded."""
    flags = lambda x: uploaded.reshape(-1, *(1,) * (x.ndim - 1))
    return jax.tree.map(lambda old, new: jnp.where(flags(new), new, old), messages, fresh)


def finish(method: Method, server: ServerState, kept: Kept, down: Down, params: PyTree) -> Any:
    """What every worker makes of what the server sends: the step, and the server's new state."""
    round = method.round(params, server.round)
    threshold, shared = method.rule.begin(server.rule, round)
    message = step = down.message  # what is sent without loss and in one piece is the step itself
    if not method.downlink.exact or method.exchange.sharded:
        compressor = method.per_link(method.downlink)
        key = method.decoder_key(compressor, method.keys(server.round, jnp.int32(0)))
        step = compressor.decompress(message, params, key)
    floats = [x for x in jax.tree.leaves(message) if jnp.issubdtype(x.dtype, jnp.floating)]
    finite = all_finite(floats)
    step = jax.tree.map(lambda x: jnp.where(finite, x, 0), step)
    number = jnp.asarray(optax.safe_increment(server.round))
    rule = method.rule.end(shared, round, step)
    sent_down = jnp.asarray(True) if method.downlink_rule.always else down.sends
    return step, ServerState(*kept, rule, finite, sent_down, threshold, number)
