r"""The server's half of a round: keep every worker's last message, and step with all of them.

.. math:: w_{t+1} = w_t - \frac{1}{M} \sum_{m=1}^{M} C_m

where C_m is worker m's message of this round, or its last one if it is silent. With a compressor
on the way down, the server sends C'(u + r) instead of the mean step u and keeps the rest in r.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sasg_jax.compressors import Compressor
from sasg_jax.upload_rules import UploadRule

PyTree = Any


class ServerState(NamedTuple):
    """What the server carries from round to round. The same on all workers."""

    messages: PyTree  # last message of each worker, leading axis M; () if all upload always
    history: PyTree  # of upload_rules.record_step. shape=(D,), dtype=jnp.float32; () likewise
    threshold: jax.Array  # of the last round. shape=(), dtype=jnp.float32
    round: jax.Array  # rounds made, t. shape=(), dtype=jnp.int32
    downlink_residual: PyTree  # r, like params; () for a dense way down
    previous_params: PyTree  # w_{t-1}, like params; () where the step is known as it is made


def init_server(
    compressor: Compressor,
    rule: UploadRule,
    downlink: Compressor | None,
    params: PyTree,
    *,
    num_workers: int,
    keep_params: bool,
) -> ServerState:
    """The state before the first round: empty messages and no steps."""
    message = jax.eval_shape(lambda tree: compressor.compress(tree)[0], params)
    keep_residual = downlink is not None and not downlink.lossless
    return ServerState(
        messages=jax.tree.map(lambda s: jnp.zeros((num_workers, *s.shape), s.dtype), message)
        if rule.adaptive
        else (),
        history=jnp.zeros(rule.history, jnp.float32) if rule.adaptive else (),
        threshold=jnp.zeros((), jnp.float32),
        round=jnp.zeros((), jnp.int32),
        downlink_residual=jax.tree.map(jnp.zeros_like, params) if keep_residual else (),
        previous_params=jax.tree.map(jnp.copy, params) if keep_params else (),
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


def compress_step(
    downlink: Compressor | None, step: PyTree, residual: PyTree
) -> tuple[PyTree, PyTree]:
    """The step that every worker takes after the way down, and the server's new residual.

    Guarantees:
      - Conservation: returned step + new residual = step + old residual, bit for bit.
    """
    if downlink is None or downlink.lossless:
        return step, residual
    message, residual = downlink.compress(jax.tree.map(jnp.add, step, residual))
    return downlink.decompress(message, step), residual
