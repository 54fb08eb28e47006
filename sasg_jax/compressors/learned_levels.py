"""Rounds at random to levels that are fitted to the data."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sasg_jax import bits
from sasg_jax._checks import check_choice, check_int, require
from sasg_jax.compressors.base import Compressor
from sasg_jax.compressors.qsgd import bucket_norms, signed_levels, with_signs
from sasg_jax.compressors.tensorwise import (
    every_entry,
    quotient,
    rows_of,
    sound_scale,
    tensorwise,
)


class LearnedMessage(NamedTuple):
    """One tensor of n entries in buckets."""

    levels: jax.Array  # those between 0 and 1, ascending. shape=(s - 1,), of float32 at least
    norms: jax.Array  # shape=(ceil(n / bucket),), of float32 at least
    numbers: jax.Array  # signed, ceil(log2(2 s + 1)) bits each. shape=(bytes,), dtype=jnp.uint8


class FittedLevels(NamedTuple):
    """The memory of one tensor."""

    levels: jax.Array  # shape=(s - 1,), of float32 at least
    age: jax.Array  # messages since they were fitted. shape=(), dtype=jnp.int32


def learned_levels(
    levels: int = 7, bucket: int = 512, *, every: int = 16, norm: str = "l2"
) -> Compressor:
    r"""Sends a sign and one of s levels for each entry, which are fitted to the tensor (as ALQ).

    .. math:: \mathcal{C}(x)_i = \|x\| \cdot \mathrm{sign}(x_i) \cdot \ell, \quad
        \ell_j \le |x_i| / \|x\| \le \ell_{j+1}, \quad 0 = \ell_0 < \ell_1 < \dots < \ell_s = 1

    with the one of the two that is drawn so that it is right in the mean. Levels are those of which
    the variance :math:`\sum \|x\|^2 (\ell_{j+1} - r)(r - \ell_j)` over all entries r is least, each
    between its neighbours in turn,

    .. math:: F(\ell_j) = F(\ell_{j+1}) -
        \int_{\ell_{j-1}}^{\ell_{j+1}} \frac{r - \ell_{j-1}}{\ell_{j+1} - \ell_{j-1}} dF(r)

    with F the distribution of the entries themselves, in 512 bins, in place of the truncated normal
    that the paper fits. Each worker has levels of its own for each tensor, fitted in every so many
    messages, and sends them with each: nobody need agree. Sent: as :func:`sasg_jax.qsgd`, and
    s - 1 levels for a tensor. Kept: the levels, and how old they are.

    Args:
      levels: s, from 1 to 127.
      bucket: entries to a norm, at least 1.
      every: messages to one fit, at least 1.
      norm: ``"l2"``, or ``"max"``, the largest magnitude.

    Guarantees:
      - Right in the mean, whatever the levels, entry by entry (in half precision up to rounding).
      - A fit leaves no more variance than its start, which are the levels of equal shares.
      - Where all is zero, or below 1e-30, so is what is decoded.

    To take in place of :func:`sasg_jax.qsgd` for 2 to 4 bits. (AMQ, whose levels are powers of one
    learned number, and NUQSGD, of 1/2, are special cases that this does better than.) ValueError
    for an argument out of its range.

    >>> import jax, jax.numpy as jnp
    >>> x = jnp.sin(jnp.arange(1024.0)) ** 9
    >>> compressor = learned_levels(3)
    >>> message, _, memory = compressor.compress(x, compressor.init_memory(x), jax.random.key(0))
    >>> compressor.message_size(x).bytes, message[0].levels.shape, int(memory[0].age)
    (400, (2,), 1)

    References: Faghri et al., `Adaptive Gradient Quantization for Data-Parallel SGD
    <https://arxiv.org/abs/2010.12460>`_, 2020"""
    levels = check_int("levels", levels, minimum=1)
    require(levels <= 127, "levels", levels, "to be at most 127")
    bucket = check_int("bucket", bucket, minimum=1)
    every = check_int("every", every, minimum=1)
    check_choice("norm", norm, ("l2", "max"))
    width = math.ceil(math.log2(2 * levels + 1))
    row = lambda size: min(bucket, size)
    whole = lambda inner: jnp.pad(inner, (1, 1), constant_values=(0, 1))

    def init_memory(x):
        return FittedLevels(jnp.zeros(levels - 1), jnp.zeros((), jnp.int32))

    def encode(x, memory, key):
        rows = jnp.abs(rows_of(x, row(x.size)))
        norms = jax.lax.optimization_barrier(bucket_norms(rows, norm))
        part = jnp.minimum(quotient(rows, norms), 1)
        weight = jnp.broadcast_to(jnp.square(quotient(norms, norms.max()[None, None])), part.shape)
        refit = lambda: fit_levels(part, weight, levels).astype(memory.levels.dtype)
        inner = jax.lax.cond(memory.age % every == 0, refit, lambda: memory.levels)
        inner = jax.lax.optimization_barrier(inner)
        ends = whole(inner)
        below = jnp.clip(jnp.searchsorted(ends, part.reshape(-1), side="right") - 1, 0, levels - 1)
        low, high = ends[below], ends[below + 1]
        share = (part.reshape(-1) - low) / jnp.where(high > low, high - low, 1)
        up = jax.random.uniform(key, share.shape, share.dtype) < share
        number = signed_levels((below + up)[: x.size], x.reshape(-1) < 0)
        code = LearnedMessage(inner, norms[:, 0], bits.pack_integers(number, width))
        return code, FittedLevels(inner, (memory.age + 1) % every)

    def decode(code, like, key):
        level = with_signs(bits.unpack_integers(code.numbers, width, like.size), levels)
        inner = jnp.where(jnp.isfinite(code.levels), jnp.clip(code.levels, 0, 1), 0)
        part = jnp.sign(level) * whole(inner)[jnp.abs(level)]
        norms = sound_scale(code.norms)
        return (norms[:, None] * rows_of(part, row(like.size))).reshape(-1)[: like.size]

    arguments = f"{levels}, {bucket}" + f", every={every}" * (every != 16)
    arguments += f", norm={norm!r}" * (norm != "l2")
    return tensorwise(
        f"learned_levels({arguments})",
        encode,
        decode,
        init_memory=init_memory,
        num_values=every_entry,
        unbiased=True,
        random=True,
    )


_BINS, _SWEEPS = 512, 10


def fit_levels(parts: jax.Array, weights: jax.Array, levels: int) -> jax.Array:
    """The levels between 0 and 1 of least variance for numbers in [0, 1].
    ``# shape=(levels - 1,)``"""
    # Bins are finer near zero, where most entries are.
    edges = jnp.square(jnp.linspace(0, 1, _BINS + 1, dtype=parts.dtype))
    place = jnp.minimum((jnp.sqrt(parts) * _BINS).astype(jnp.int32), _BINS - 1).reshape(-1)
    zeros = jnp.zeros(_BINS, parts.dtype)
    mass = zeros.at[place].add(weights.reshape(-1))
    moment = zeros.at[place].add((weights * parts).reshape(-1))
    total = jnp.where(mass.sum() > 0, mass.sum(), 1)
    below = jnp.pad(jnp.cumsum(mass), (1, 0)) / total  # F at the edges
    first_moment = jnp.pad(jnp.cumsum(moment), (1, 0)) / total
    shares = jnp.arange(1, levels, dtype=parts.dtype) / levels
    ends = jnp.concatenate([jnp.zeros(1), jnp.interp(shares, below, edges), jnp.ones(1)])

    def better(i, ends):
        j = i % (levels - 1) + 1
        low, high = ends[j - 1], ends[j + 1]
        at = lambda x, values: jnp.interp(x, edges, values)
        moments = at(high, first_moment) - at(low, first_moment)
        share = high * (at(high, below) - at(low, below)) - moments
        target = at(low, below) + share / jnp.where(high > low, high - low, 1)
        return ends.at[j].set(jnp.clip(jnp.interp(target, below, edges), low, high))

    if levels == 1:
        return jnp.zeros(0, parts.dtype)
    return jax.lax.fori_loop(0, _SWEEPS * (levels - 1), better, ends.astype(parts.dtype))[1:-1]
