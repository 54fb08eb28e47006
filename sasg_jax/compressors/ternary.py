"""Sends -1, 0 or 1 for each entry, drawn at random."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sasg_jax import bits
from sasg_jax._checks import check_positive
from sasg_jax.compressors.base import Compressor
from sasg_jax.compressors.tensorwise import (
    by_largest,
    every_entry,
    quotient,
    rows_of,
    sound_scale,
    tensorwise,
)


class TernaryMessage(NamedTuple):
    """One tensor of n entries."""

    scale: jax.Array  # shape=(), of float32 at least
    trits: jax.Array  # 0 for 0, 1 for 1, 2 for -1. shape=(ceil(n / 5),), dtype=jnp.uint8


def ternary(clip: float | None = 2.5) -> Compressor:
    r"""Sends signs of entries that are drawn by their magnitude, and the largest (TernGrad).

    .. math:: \mathcal{C}(x)_i = s\, \mathrm{sign}(x_i)\, b_i, \quad
        \mathbb{P}(b_i = 1) = |x_i| / s, \quad s = \max_j |x_j|

    in every tensor, whose entries are clipped first at ``clip`` root mean squares. (The paper takes
    standard deviations, for entries whose mean is zero; others they would clip to nothing.)
    Sent: 1.6 bits an entry (five to a byte) and 32 for each tensor. Kept: nothing. Each worker has
    a scale of its own. (With one for all, messages would add up as integers, for another exchange
    of numbers in every round; the sum of M messages then takes log₂(2M + 1) bits an entry.)

    Args:
      clip: above 0, or None for no clipping, which is what makes s large and the signs few.

    Guarantees:
      - Without clipping right in the mean, entry by entry, so that no residual need be kept; with
        it right in the mean for what was clipped. Then a residual takes in the rest, as it comes:
        ``feedback=none()`` is TernGrad as published, which is :func:`sasg_jax.terngrad`.
      - :math:`\mathbb{E}\|\mathcal{C}(x) - x\|^2 = s \|x\|_1 - \|x\|^2`, of what was clipped.
      - Conservation: ``remainder == tree - decompress(message)``, bit for bit.
      - Tensors whose entries are below 1e-30 decode to zeros.

    To take as the coarsest of the quantisers without memory. Not to take where there may be a
    residual: :func:`sasg_jax.sign` leaves out less in fewer bits. ValueError for a bad ``clip``.

    >>> import jax, jax.numpy as jnp
    >>> x = jnp.array([1.0, -1.0, 0.0, 1.0] * 5)
    >>> message, _, _ = ternary(None).compress(x, ((),), jax.random.key(0))
    >>> ternary().decompress(message, x).tolist()[:4], ternary().message_size(x).bytes
    ([1.0, -1.0, 0.0, 1.0], 8)

    References: Wen et al., `TernGrad: Ternary Gradients to Reduce Communication in Distributed Deep
    Learning <https://arxiv.org/abs/1705.07878>`_, 2017"""
    clip = None if clip is None else check_positive("clip", clip)

    def encode(x, memory, key):
        top, parts = by_largest(rows_of(x, x.size))
        if clip is not None:
            bound = clip * jnp.sqrt(jnp.mean(jnp.square(parts), 1, keepdims=True))
            parts = jnp.clip(parts, -bound, bound)
        scale = jax.lax.optimization_barrier(jnp.abs(parts).max(1, keepdims=True))
        drawn = jax.random.uniform(key, (x.size,), parts.dtype)
        one = drawn < quotient(jnp.abs(parts), scale)[0]
        trits = jnp.where(one, jnp.where(parts[0] < 0, 2, 1), 0)
        return TernaryMessage((top * scale)[0, 0], bits.pack_trits(trits)), memory

    def decode(code, like, key):
        trits = bits.unpack_trits(code.trits, like.size)
        scale = sound_scale(code.scale)
        return jnp.where(trits == 0, 0, jnp.where(trits == 1, scale, -scale))

    return tensorwise(
        f"ternary({clip})",
        encode,
        decode,
        num_values=every_entry,
        unbiased=clip is None,
        random=True,
    )
