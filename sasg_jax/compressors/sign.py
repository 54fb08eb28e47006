"""Sends signs, and one or two magnitudes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sasg_jax import bits
from sasg_jax._checks import check_int
from sasg_jax.compressors.base import Compressor
from sasg_jax.compressors.tensorwise import (
    by_largest,
    every_entry,
    rows_of,
    sound_scale,
    tensorwise,
)


class SignMessage(NamedTuple):
    """One tensor of n entries in blocks."""

    negative: jax.Array  # a bit for each entry. shape=(ceil(n / 8),), dtype=jnp.uint8
    magnitudes: jax.Array  # of a block; or of what is not negative, and of what is.
    # shape=(ceil(n / block), 1 or 2), of float32 at least


def sign(block: int | None = None) -> Compressor:
    r"""Sends signs, and the mean magnitude (EF-signSGD).

    .. math:: \mathcal{C}(x) = \frac{\|x\|_1}{n}\, \mathrm{sign}(x), \quad \mathrm{sign}(0) = +1

    Sent: a bit an entry, and 32 for each tensor, or each ``block`` of so many of its entries. Kept:
    what is left out, in the residual that it needs; without one, plain signSGD need not converge.

    Guarantees:
      - Contraction:
        :math:`\|x - \mathcal{C}(x)\|^2 = \left(1 - \frac{\|x\|_1^2}{n\|x\|^2}\right) \|x\|^2`.
      - Conservation: ``remainder == tree - decompress(message)``, bit for bit.
      - Tensors whose entries are below 1e-30 decode to zeros.

    To take where a tensor's entries are of like size, e.g. as ``downlink`` too, and where an entry
    may take a whole bit; not with few large entries, which a top k is made for. ValueError for a
    block that is no integer of at least 1.

    >>> import jax.numpy as jnp
    >>> x = jnp.array([3.0, -1.0, 0.0, 2.0, -4.0])
    >>> message, remainder, _ = sign().compress(x, ((),), None)
    >>> sign().decompress(message, x).tolist(), remainder.tolist()
    ([2.0, -2.0, 2.0, 2.0, -2.0], [1.0, 1.0, -2.0, 0.0, -2.0])

    References: Karimireddy et al., `Error Feedback Fixes SignSGD and other Gradient Compression
    Schemes <https://arxiv.org/abs/1901.09847>`_, 2019; both ways: Zheng et al., `Blockwise
    Momentum SGD with Error-Feedback <https://arxiv.org/abs/1905.10936>`_, 2019"""
    return _signs("sign", block, lambda x: [jnp.ones(x.shape, bool)])


def one_bit(block: int | None = None) -> Compressor:
    r"""Sends signs, the mean of what is negative, and the mean of the rest (1-bit SGD).

    .. math:: \mathcal{C}(x)_i = \mathrm{mean}\{x_j : x_j < 0\} \text{ if } x_i < 0, \text{ else }
        \mathrm{mean}\{x_j : x_j \ge 0\}

    As :func:`sign`, with 64 bits in place of 32 for each tensor or block, and with no more left
    out: of all messages that say two numbers and who has which by sign, the nearest. (The paper has
    two means for each column of a weight matrix.)

    >>> import jax.numpy as jnp
    >>> x = jnp.array([3.0, -1.0, 0.0, 2.0, -4.0])
    >>> received = one_bit().decompress(one_bit().compress(x, ((),), None).message, x)
    >>> [round(number, 4) for number in received.tolist()]
    [1.6667, -2.5, 1.6667, 1.6667, -2.5]

    References: Seide et al., `1-Bit Stochastic Gradient Descent and its Application to
    Data-Parallel Distributed Training of Speech DNNs
    <https://doi.org/10.21437/Interspeech.2014-274>`_, 2014"""
    return _signs("one_bit", block, lambda x: [x >= 0, x < 0])


def _signs(name: str, block: Any, groups: Callable[[jax.Array], list[jax.Array]]) -> Compressor:
    """``groups``: masks of the entries that have one magnitude."""
    block = None if block is None else check_int("block", block, minimum=1)
    row = lambda size: min(block or size, size)

    def encode(x, memory, key):
        rows = rows_of(x, row(x.size))
        there = rows_of(jnp.ones(x.size), row(x.size)) > 0
        top, parts = by_largest(rows)
        masks = [there & mask for mask in groups(rows)]
        mean = lambda mask: jnp.where(mask, jnp.abs(parts), 0).sum(1) / jnp.maximum(mask.sum(1), 1)
        magnitudes = top * jnp.stack(list(map(mean, masks)), 1)
        return SignMessage(bits.pack_integers(x.reshape(-1) < 0, 1), magnitudes), memory

    def decode(code, like, key):
        negative = bits.unpack_integers(code.negative, 1, like.size) > 0
        scale = sound_scale(code.magnitudes)
        negative = rows_of(negative.astype(scale.dtype), row(like.size)) > 0
        x = jnp.where(negative, -scale[:, -1:], scale[:, :1])
        return x.reshape(-1)[: like.size]

    arguments = "" if block is None else f"block={block}"
    return tensorwise(f"{name}({arguments})", encode, decode, num_values=every_entry)
