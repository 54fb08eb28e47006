"""Draws entries by their magnitude."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sasg_jax import bits, selection
from sasg_jax._checks import check_fraction
from sasg_jax.coders import elias_fano
from sasg_jax.compressors.base import Compressor
from sasg_jax.compressors.draws import draw, factor_of
from sasg_jax.compressors.tensorwise import by_largest, rows_of, sound_scale, tensorwise
from sasg_jax.numerics import PyTree, wide


class DrawnMessage(NamedTuple):
    """Entries of one tensor: k places for drawn ones and ceil(k / 8) for exact ones."""

    magnitude: jax.Array  # of all drawn ones. shape=(), of float32 at least
    signs: jax.Array  # 0 for none, 1 for +, 2 for -: 1.6 bits each. shape=(bytes,), dtype=uint8
    places: PyTree  # Elias-Fano, about log2(n/k) + 2 bits each
    exact: jax.Array  # the largest, where they must be sent; or 0. dtype of the tensor
    exact_places: PyTree


def wangni(density: float) -> Compressor:
    r"""Draws entries with probabilities by their magnitude (Wangni et al.).

    .. math:: \mathcal{C}(x)_i = x_i / p_i \text{ with probability } p_i = \min(1, c |x_i|),
        \text{ else } 0, \quad \sum_i p_i \le k = \max(1, \lfloor \mathrm{density} \cdot n \rfloor)

    in every tensor of n entries, with c by rescaling, as in the paper's greedy algorithm. Whatever
    is drawn by chance decodes to ±1/c, and takes a sign in place of a value. Sent, for each tensor:
    k signs and places, about log₂(n/k) + 3.6 bits each; and room for k/8 exact values with their
    places, about 5 bits more for each of k. Kept: nothing.

    Sizes do not depend on the data, and nothing ever overflows: entries are drawn by one random
    start (as teeth of a comb, not each by its own coin), so that at most k come, each still with
    its p; and where more than k/8 would be sure to come, c is so small that no more are, and fewer
    than k come.

    Args:
      density: k/n, in (0, 1].

    Guarantees:
      - Right in the mean, entry by entry (in half precision up to its rounding and its range).
      - :math:`\mathbb{E}\|\mathcal{C}(x) - x\|^2 = \sum_i x_i^2 (1/p_i - 1)`, the least of all
        probabilities that add up to as much; at most
        :math:`\|x\|_1^2 / k' - \|x\|^2` with :math:`k' = 0.999 k` where none is sure.
      - Tensors whose entries are below 1e-30 decode to zeros.

    To take for few bits without memory where tails are heavy. Not to take where there may be a
    residual: :func:`sasg_jax.top_k` leaves out less than this adds. ValueError for a bad density.

    >>> import jax, jax.numpy as jnp
    >>> x = jnp.zeros(1000).at[jnp.array([3, 77, 200])].set(jnp.array([5.0, -1.0, 2.0]))
    >>> message, _, _ = wangni(0.03).compress(x, ((),), jax.random.key(0))
    >>> wangni(0.03).decompress(message, x)[jnp.array([3, 77, 200])].tolist()  # all are sure
    [5.0, -1.0, 2.0]

    References: Wangni et al., `Gradient Sparsification for Communication-Efficient Distributed
    Optimization <https://arxiv.org/abs/1710.09854>`_, 2017"""
    density = check_fraction("density", density)
    num_drawn = lambda size: max(1, math.floor(density * size))
    num_exact = lambda size: -(-num_drawn(size) // 8)
    coder = elias_fano()

    def encode(x, memory, key):
        size, kept, room = x.size, num_drawn(x.size), num_exact(x.size)
        top, parts = by_largest(rows_of(x, size))
        magnitudes = jnp.abs(parts[0])
        largest = selection.magnitude_top_k(x.reshape(-1), min(room + 1, size))
        largest = largest.astype(jnp.int32)
        of_largest = magnitudes[largest]
        if room < size:  # what has no room for its value must not be surer than sure
            least = jnp.argmin(of_largest)
            limit = of_largest[least]
            largest = jnp.delete(largest, least, assume_unique_indices=True)
        else:
            limit = jnp.zeros((), magnitudes.dtype)
        largest = jnp.sort(largest)
        factor = factor_of(magnitudes, kept)
        factor = jnp.where(factor * limit > 1, 1 / jnp.where(limit > 0, limit, 1), factor)
        one = 1 / jnp.where(factor > 0, factor, 1)
        probabilities = jnp.where(factor > 0, magnitudes / one, 0)
        is_exact = probabilities[largest] >= 1
        probabilities = probabilities.at[largest].multiply(jnp.where(is_exact, 0, 1))
        drawn = draw(probabilities, key)
        # Places without an entry: the first that are not drawn, with no sign.
        free = jnp.cumsum(~drawn, dtype=jnp.int32) <= kept - drawn.sum(dtype=jnp.int32)
        taken = drawn | (~drawn & free)
        places, _ = bits.first_set_bits(bits.pack_mask(taken), kept)
        sign = jnp.where(drawn, jnp.where(parts[0] < 0, 2, 1), 0)[places]
        exact = jnp.where(is_exact, x.reshape(-1)[largest], 0).astype(x.dtype)
        magnitude = jnp.where(factor > 0, top[0, 0] * one, 0)
        message = DrawnMessage(
            jnp.minimum(magnitude, jnp.finfo(magnitude.dtype).max),
            bits.pack_trits(sign),
            coder.encode(places, size),
            exact,
            coder.encode(largest, size),
        )
        return message, memory

    def decode(code, like, key):
        size, kept, room = like.size, num_drawn(like.size), num_exact(like.size)
        trits = bits.unpack_trits(code.signs, kept)
        scale = sound_scale(code.magnitude)
        drawn = jnp.where(trits == 0, 0, jnp.where(trits == 1, scale, -scale))
        exact = jnp.where(jnp.isfinite(code.exact), code.exact, 0).astype(wide(like.dtype))
        x = jnp.zeros(size, wide(like.dtype))
        x = x.at[coder.decode(code.places, kept, size)].add(drawn)
        return x.at[coder.decode(code.exact_places, room, size)].add(exact)

    return tensorwise(
        f"wangni({density})",
        encode,
        decode,
        num_values=lambda tree: sum(num_drawn(x.size) for x in jax.tree.leaves(tree)),
        unbiased=True,
        random=True,
    )
