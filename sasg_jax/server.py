r"""The server's half of a round: keep every worker's last message, and step with all of them.

.. math:: w_{t+1} = w_t - \frac{1}{M} \sum_{m=1}^{M} C_m

where C_m is worker m's message of this round, or its last one if it is silent. With a compressor
on the way down, the server sends C'(u + r) instead of the mean step u and keeps the rest in r.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sasg_jax.compressors import Compressor, compress_with_feedback
from sasg_jax.recent_params import init_recent
from sasg_jax.shards import one_shard
from sasg_jax.upload_rules import UploadRule

PyTree = Any


class ServerState(NamedTuple):
    """What the server carries from round to round.

    The same on all workers. But ``messages``, ``downlink_residual`` and ``downlink_memory`` are
    where the exchange has the server: with ``"sharded"`` each worker has those of its own shard,
    and with ``"server"`` only those of worker 0 are kept up.
    """

    messages: PyTree  # last message of each worker, leading axis M; () if all upload always
    history: PyTree  # of upload_rules.record_step. shape=(D,), dtype=jnp.float32; () likewise
    threshold: jax.Array  # of the last round. shape=(), dtype=jnp.float32
    round: jax.Array  # rounds made, t. shape=(), dtype=jnp.int32
    downlink_residual: PyTree  # r, like params; () for a dense way down
    downlink_memory: PyTree  # of Compressor.init_memory, mostly without arrays
    previous_params: PyTree  # w_{t-1}, like params; () where the step is known as it is made
    recent_params: PyTree  # of sasg_jax.recent_params; () where each worker keeps its own


def init_server(
    compressor: Compressor,
    rule: UploadRule,
    downlink: Compressor,
    params: PyTree,
    *,
    num_workers: int,
    num_shards: int = 1,
    keep_params: bool,
    share_stale_params: bool = False,
) -> ServerState:
    """The state before the first round: empty messages and no steps.

    With ``num_shards`` it is that of the server of one of the shards of ``params``.
    """
    served = params if num_shards == 1 else one_shard(params, num_shards)
    message = jax.eval_shape(lambda tree: compressor.compress(tree).message, served)
    return ServerState(
        messages=jax.tree.map(lambda s: jnp.zeros((num_workers, *s.shape), s.dtype), message)
        if rule.adaptive
        else (),
        history=jnp.zeros(rule.history, jnp.float32) if rule.adaptive else (),
        threshold=jnp.zeros((), jnp.float32),
        round=jnp.zeros((), jnp.int32),
        downlink_residual=()
        if downlink.lossless
        else jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), served),
        downlink_memory=downlink.init_memory(served),
        previous_params=jax.tree.map(jnp.copy, params) if keep_params else (),
        recent_params=init_recent(params, rule.max_staleness) if share_stale_params else (),
    )


def replace_messages(messages: PyTree, fresh: PyTree, uploaded: jax.Array) -> PyTree:
    """Replaces the messages of the workers that uploaded.

    Args:
      messages: the last message of each worker, leading axis M.
      fresh: this round's messages, leading axis M.
      uploaded: which of them count. ``# shape=(M,), dtype=bool``
    """

    def replace(old, new):
        flags = uploaded.reshape(-1, *(1,) * (new.ndim - 1))
        return jnp.where(flags, new, old)

    return jax.tree.map(replace, messages, fresh)


def server_round(
    compressor: Compressor,
    downlink: Compressor,
    like: PyTree,
    memory: tuple[PyTree, PyTree, PyTree],
    fresh: PyTree,
    uploaded: jax.Array | None,
) -> tuple[tuple[PyTree, PyTree, PyTree], PyTree]:
    """The server's half of a round, wherever the exchange runs it.

    Args:
      compressor: C, of the workers.
      downlink: C', of the way down.
      like: shapes and dtypes of what the messages decode to.
      memory: the last messages, leading axis M, or () where all upload always; and the residual
        and the compressor's memory of the way down.
      fresh: this round's messages, leading axis M.
      uploaded: which of them count; None for all. ``# shape=(M,), dtype=bool``

    Returns:
      The new memory, and the message that every worker decodes to the step.

    Guarantees:
      - Conservation: decoded message + new residual = step + old residual, bit for bit.
    """
    messages, residual, down_memory = memory
    if uploaded is not None:
        fresh = messages = replace_messages(messages, fresh, uploaded)
    num_workers = jax.tree.leaves(fresh)[0].shape[0]
    total = compressor.decompress_sum(fresh, like)
    step = jax.tree.map(lambda x: x / num_workers, total)
    down, residual, down_memory = compress_with_feedback(downlink, step, residual, down_memory)
    return (messages, residual, down_memory), down
