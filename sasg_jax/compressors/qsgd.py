"""Rounds at random to a few levels of a norm."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sasg_jax import bits
from sasg_jax._checks import check_choice, check_int, require
from sasg_jax.compressors.base import Compressor
from sasg_jax.compressors.tensorwise import (
    by_largest,
    every_entry,
    quotient,
    round_at_random,
    rows_of,
    sound_scale,
    tensorwise,
)


class QuantisedMessage(NamedTuple):
    """One tensor of n entries in buckets."""

    norms: jax.Array  # shape=(ceil(n / bucket),), of float32 at least
    levels: jax.Array  # signed, ceil(log2(2 s + 1)) bits each. shape=(bytes,), dtype=jnp.uint8


def qsgd(levels: int = 7, bucket: int = 128, *, norm: str = "l2") -> Compressor:
    r"""Sends a sign and one of s levels for each entry, rounded at random, and norms (QSGD).

    .. math:: \mathcal{C}(x)_i = \|x\| \cdot \mathrm{sign}(x_i) \cdot \ell_i / s, \quad
        \mathbb{E}\, \ell_i = s |x_i| / \|x\|

    where :math:`\ell_i` is one of the two integers around its mean, and x the entries of one
    bucket. Sent: ⌈log₂(2s + 1)⌉ bits an entry and 32 a bucket; 4.25 an entry as it comes. Kept:
    nothing. (A variable-length code, as in the paper, would be shorter where most levels are 0;
    its messages would have no static size.)

    Args:
      levels: s, at least 1; 1, 3, 7 and 127 fill 2, 3, 4 and 8 bits.
      bucket: entries to a norm, at least 1. Fewer are more exact, and more norms.
      norm: ``"l2"``, the paper's, or ``"max"``, the largest magnitude: finer steps, and no zeros to
        speak of.

    Guarantees:
      - Right in the mean, entry by entry (in half precision up to its rounding), so that no
        residual need be kept.
      - For n entries in a bucket
        :math:`\mathbb{E}\|\mathcal{C}(x) - x\|^2 \le \min(n/s^2, \sqrt{n}/s) \|x\|^2` with
        ``"l2"``, and :math:`\le n \|x\|_\infty^2 / 4 s^2` with ``"max"``.
      - Where all is zero, or below 1e-30, so is what is decoded.

    To take where all entries matter and 4 to 8 times fewer bits are enough. Not to take at 1 bit
    (see :func:`sasg_jax.eden`), nor in place of a top k: noise of such a size asks for smaller
    steps. ValueError for an argument out of its range.

    >>> import jax, jax.numpy as jnp
    >>> message, _, _ = qsgd(3).compress(jnp.ones(256), ((),), jax.random.key(0))
    >>> qsgd(3).message_size(jnp.ones(256)).bytes, message[0].norms.tolist()
    (104, [11.313708305358887, 11.313708305358887])

    References: Alistarh et al., `QSGD: Communication-Efficient SGD via Gradient Quantization and
    Encoding <https://arxiv.org/abs/1610.02132>`_, 2016"""
    levels = check_int("levels", levels, minimum=1)
    require(levels < 2**23, "levels", levels, "to be below 2**23")
    bucket = check_int("bucket", bucket, minimum=1)
    check_choice("norm", norm, ("l2", "max"))
    width = math.ceil(math.log2(2 * levels + 1))
    row = lambda size: min(bucket, size)

    def encode(x, memory, key):
        rows = jnp.abs(rows_of(x, row(x.size)))
        # The norm that is sent, however it was rounded, is the one to be right with.
        norms = jax.lax.optimization_barrier(bucket_norms(rows, norm))
        exact = levels * quotient(rows, norms)
        level = jnp.minimum(round_at_random(exact, key), levels).reshape(-1)[: x.size]
        number = signed_levels(level.astype(jnp.int32), x.reshape(-1) < 0)
        return QuantisedMessage(norms[:, 0], bits.pack_integers(number, width)), memory

    def decode(code, like, key):
        level = with_signs(bits.unpack_integers(code.levels, width, like.size), levels)
        part = rows_of(level.astype(code.norms.dtype) / levels, row(like.size))
        return (sound_scale(code.norms)[:, None] * part).reshape(-1)[: like.size]

    arguments = f"{levels}, {bucket}" + f", norm={norm!r}" * (norm != "l2")
    return tensorwise(
        f"qsgd({arguments})",
        encode,
        decode,
        num_values=every_entry,
        unbiased=True,
        random=True,
    )


def bucket_norms(rows: jax.Array, norm: str) -> jax.Array:
    """Of every row; at most the largest float, with which it stays right in the mean.
    ``# shape=(rows, 1)``"""
    top, parts = by_largest(rows)
    if norm == "l2":
        top = top * jnp.sqrt(jnp.sum(jnp.square(parts), 1, keepdims=True))
    return jnp.minimum(top, jnp.finfo(top.dtype).max)


def signed_levels(level: jax.Array, negative: jax.Array) -> jax.Array:
    """0, -1, 1, -2, 2, ... as 0, 1, 2, 3, 4, ..."""
    return jnp.where(negative & (level > 0), 2 * level - 1, 2 * level)


def with_signs(number: jax.Array, levels: int) -> jax.Array:
    """The inverse, of at most so many levels, whatever has arrived."""
    level = jnp.minimum((number + 1) // 2, levels).astype(jnp.int32)
    return jnp.where(number % 2 == 1, -level, level)
