"""Rotates at random, so that all entries are of like size, and sends few bits of each."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sasg_jax import bits as bits_lib
from sasg_jax._checks import check_bool, check_int, require
from sasg_jax.compressors.base import Compressor
from sasg_jax.compressors.tensorwise import (
    by_largest,
    every_entry,
    quotient,
    rows_of,
    sound_scale,
    tensorwise,
)


class RotatedMessage(NamedTuple):
    """One tensor in blocks of B entries, a power of two; the last is padded with zeros."""

    seed: jax.Array  # of the rotation. shape=(), dtype=jnp.uint32
    scales: jax.Array  # shape=(blocks,), of float32 at least
    numbers: jax.Array  # of levels, in some bits each. shape=(bytes,), dtype=jnp.uint8


def eden(bits: int = 1, *, unbiased: bool = True, block: int = 4096) -> Compressor:
    r"""Sends the nearest of 2ᵇ levels for each rotated entry (EDEN; DRIVE for one bit).

    .. math:: y = R x, \quad \mathcal{C}(x) = S\, R^\top c(y), \quad
        S = \frac{\|y\|^2}{\langle y, c(y) \rangle} \text{ or }
        \frac{\langle y, c(y) \rangle}{\|c(y)\|^2}

    in every block, where R is a random rotation, and c takes each entry, as a part of the root mean
    square, to the nearest of the best levels of a normal number (Lloyd-Max). R is twice a
    Walsh-Hadamard transform of random signs. Sent: b bits an entry, 32 a block for S, and 32 a
    tensor for the seed; entries are padded to blocks of a size that makes that shortest. Kept:
    nothing; where biased, what is left out in a residual.

    Args:
      bits: b, from 1 to 4.
      unbiased: which scale: the first, or the second, which leaves out least.
      block: entries of a block at most, a power of two of at least 64.

    Guarantees:
      - With ``unbiased`` :math:`\langle x, \mathcal{C}(x) \rangle = \|x\|^2`, and right in the mean
        over all rotations; over those that are drawn here nearly so, within 0.5 % of ‖x‖ by
        measurement. (One transform, which is what is mostly run, is off by half of ‖x‖ for a tensor
        of two entries, one twice the other, however long: hence two.)
      - Of a long tensor :math:`\|\mathcal{C}(x) - x\|^2 / \|x\|^2` is 0.571, 0.133, 0.0358, 0.0096
        for one to four bits; biased 0.363, 0.117, 0.0345, 0.0095, and always below 1.
      - Conservation: ``remainder == tree - decompress(message)``, bit for bit.
      - Blocks whose entries are below 1e-30 decode to zeros.

    To take for the least error of a dense message of one to four bits, without memory or with.
    Not to take where rotating is too slow: log₂ B additions an entry, twice, and again for each
    message that is decoded. ValueError for an argument out of its range.

    >>> import jax, jax.numpy as jnp
    >>> x = jnp.sin(jnp.arange(4096.0))
    >>> message, remainder, _ = eden(2).compress(x, ((),), jax.random.key(0))
    >>> eden(2).message_size(x).bytes, bool((remainder @ remainder) < 0.15 * (x @ x))
    (1032, True)

    References: Vargaftik et al., `EDEN: Communication-Efficient and Robust Distributed Mean
    Estimation for Federated Learning <https://arxiv.org/abs/2108.08842>`_, 2021; `DRIVE: One-bit
    Distributed Mean Estimation <https://arxiv.org/abs/2105.08339>`_, 2021"""
    bits = check_int("bits", bits, minimum=1)
    require(bits <= 4, "bits", bits, "to be from 1 to 4")
    check_bool("unbiased", unbiased)
    levels = normal_levels(bits)
    middles = (levels[1:] + levels[:-1]) / 2

    def quantise(y, key):
        size = jnp.sqrt(jnp.mean(jnp.square(y), 1, keepdims=True))
        number = jnp.searchsorted(jnp.asarray(middles, y.dtype), quotient(y, size).reshape(-1))
        c = jnp.asarray(levels, y.dtype)[number].reshape(y.shape)
        along = jnp.sum(y * c, 1)  # above 0 where there is anything
        squares = jnp.sum(jnp.square(y if unbiased else c), 1)
        over, under = (squares, along) if unbiased else (along, squares)
        return jnp.where(along > 0, over / jnp.where(under > 0, under, 1), 0), number

    value = lambda number, dtype: jnp.asarray(levels, dtype)[number]
    arguments = (
        [f"{bits}"] + ["unbiased=False"] * (not unbiased) + [f"block={block}"] * (block != 4096)
    )
    return _rotated(f"eden({', '.join(arguments)})", block, bits, 2, quantise, value, unbiased)


def dithered_sign(*, block: int = 4096) -> Compressor:
    r"""Sends signs of rotated entries and random numbers (FO-SGD).

    .. math:: y = R x, \quad s = \mathrm{sign}(y + \lambda u), \quad u_i \sim U(-1, 1), \quad
        \mathcal{C}(x) = \lambda R^\top s, \quad \lambda = \max_i |y_i|

    in every block, where R is a Walsh-Hadamard transform of random signs. (The paper has one λ for
    all, which some entries may exceed: it is then biased. Here it is sent, and nothing exceeds it.)
    Sent: a bit an entry, 32 a block for λ, and 32 a tensor for the seed, padded as in
    :func:`eden`. Kept: nothing, by design: also as ``downlink``.

    Args:
      block: entries of a block at most, a power of two of at least 64.

    Guarantees:
      - Right in the mean, entry by entry, exactly, whatever the rotation.
      - :math:`\mathbb{E}\|\mathcal{C}(x) - x\|^2 = B \lambda^2 - \|x\|^2`, about
        :math:`(2 \log 2B - 1) \|x\|^2` at most for almost all rotations of B entries, also where x
        has a single entry: without the rotation it would be (B - 1) ‖x‖².
      - Blocks whose entries are below 1e-30 decode to zeros.

    To take where one bit both ways, no memory and no bias are wanted, with small steps. Not to take
    else: :func:`eden` has a thirtieth of the variance in the same bits. ValueError for a bad block.

    >>> import jax, jax.numpy as jnp
    >>> x = jnp.zeros(512).at[7].set(1.0)  # a rotated single entry has one size: no error
    >>> message, _, _ = dithered_sign().compress(x, ((),), jax.random.key(0))
    >>> bool(jnp.allclose(dithered_sign().decompress(message, x), x, atol=1e-6))
    True

    References: Stollenwerk and Jacques, `Flattened one-bit stochastic gradient descent: compressed
    distributed optimization with controlled variance <https://arxiv.org/abs/2405.11095>`_, 2024"""

    def quantise(y, key):
        largest = jnp.abs(y).max(1)
        # As a probability: sign(y + λu) is 1 where u > -y/λ.
        up = jax.random.uniform(key, y.shape, y.dtype) < 0.5 * (1 + quotient(y, largest[:, None]))
        return largest, up.reshape(-1).astype(jnp.uint32)

    value = lambda number, dtype: 2 * number.astype(dtype) - 1
    name = "dithered_sign()" if block == 4096 else f"dithered_sign(block={block})"
    return _rotated(name, block, 1, 1, quantise, value, unbiased=True)


def _rotated(
    name: str,
    block: int,
    bits: int,
    times: int,
    quantise: Callable[[jax.Array, Any], tuple[jax.Array, jax.Array]],
    value: Callable[[jax.Array, Any], jax.Array],
    unbiased: bool,
) -> Compressor:
    """``scales, numbers = quantise(y, key)``, and what a number stands for, as a part of a scale;
    ``times``: how often the transform is made."""
    block = check_int("block", block, minimum=64)
    require(block & (block - 1) == 0, "block", block, "to be a power of two")
    length = functools.partial(block_length, bits=bits, longest=block)

    def encode(x, memory, key):
        key_of_seed, key_of_numbers = jax.random.split(key)
        seed = jax.random.bits(key_of_seed, (), jnp.uint32)
        top, parts = by_largest(rows_of(x, length(x.size)))
        y = rotate(parts, seed, times)
        scales, numbers = quantise(y, key_of_numbers)
        scales = jnp.minimum(top[:, 0] * scales, jnp.finfo(top.dtype).max)
        return RotatedMessage(seed, scales, bits_lib.pack_integers(numbers, bits)), memory

    def decode(code, like, key):
        rows, scale = code.scales.size, sound_scale(code.scales)
        count = rows * length(like.size)
        c = value(bits_lib.unpack_integers(code.numbers, bits, count), scale.dtype)
        x = rotate_back(c.reshape(rows, -1), code.seed, times)
        return (scale[:, None] * x).reshape(-1)[: like.size]

    return tensorwise(name, encode, decode, num_values=every_entry, unbiased=unbiased, random=True)


def block_length(size: int, bits: int, longest: int) -> int:
    """Of the powers of two from 64, that which makes a message of ``size`` entries shortest."""
    lengths = [2**i for i in range(6, longest.bit_length())]
    num_bits = lambda length: -(-size // length) * (length * bits + 32)
    return min(reversed(lengths), key=num_bits)  # of equal ones the longest


def rotate(rows: jax.Array, seed: jax.Array, times: int) -> jax.Array:
    """Random signs and a Walsh-Hadamard transform of every row, so many times."""
    for i in range(times):
        rows = hadamard(rows * _random_signs(rows, seed, i))
    return rows


def rotate_back(rows: jax.Array, seed: jax.Array, times: int) -> jax.Array:
    """The inverse of :func:`rotate`, which is its transpose."""
    for i in reversed(range(times)):
        rows = hadamard(rows) * _random_signs(rows, seed, i)
    return rows


def _random_signs(rows: jax.Array, seed: jax.Array, i: int) -> jax.Array:
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), i)
    words = jax.random.bits(key, (rows.size // 32,), jnp.uint32)
    negative = words[:, None] >> jnp.arange(32, dtype=jnp.uint32)[None] & 1
    return 1 - 2 * negative.reshape(rows.shape).astype(rows.dtype)


def hadamard(rows: jax.Array) -> jax.Array:
    """The orthonormal Walsh-Hadamard transform of every row, of a power of two entries: its own
    inverse. Of additions alone, which round alike in every program."""
    count, length = rows.shape

    def step(_, rows):
        """By the lowest bit of the place, which becomes the highest: the same in every step."""
        pairs = rows.reshape(count, length // 2, 2)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        return jnp.concatenate([first + second, first - second], 1)

    rows = jax.lax.fori_loop(0, length.bit_length() - 1, step, rows)
    return rows * jnp.asarray(1 / math.sqrt(length), rows.dtype)


@functools.lru_cache
def normal_levels(bits: int) -> np.ndarray:
    """The levels that leave out least of a normal number, by Lloyd's iteration. Ascending."""
    erf = np.vectorize(math.erf, otypes=[float])
    cdf = lambda x: (1 + erf(x / math.sqrt(2))) / 2
    density = lambda x: np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    levels = np.linspace(-2, 2, 2**bits) if bits > 1 else np.array([-1.0, 1.0])
    for _ in range(2000):
        edges = np.r_[-40.0, (levels[1:] + levels[:-1]) / 2, 40.0]
        old, mass = levels, cdf(edges[1:]) - cdf(edges[:-1])
        levels = (density(edges[:-1]) - density(edges[1:])) / mass
        levels = (levels - levels[::-1]) / 2  # symmetric, to the last bit
        if np.abs(levels - old).max() < 1e-12:
            break
    return levels
