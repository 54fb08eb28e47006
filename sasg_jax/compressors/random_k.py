"""Keeps entries that a shared seed draws."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from sasg_jax._checks import check_bool, check_fraction
from sasg_jax.compressors.base import Compressor
from sasg_jax.compressors.tensorwise import tensorwise
from sasg_jax.numerics import wide


def random_k(density: float, *, unbiased: bool = False) -> Compressor:
    r"""Keeps the same random entries on all workers, whose indices nobody sends.

    .. math:: \mathcal{C}(x)_i = c\, x_i \text{ for the k entries that are drawn, else } 0, \quad
        k = \max(1, \lfloor \mathrm{density} \cdot n \rfloor)

    with c = 1, or n/k with ``unbiased``, in every tensor of n entries. Each is drawn with
    probability k/n, and none twice: one of each n/k neighbours, counted from a place drawn at
    random, which takes time in proportion to k and has the mean and the error of a draw among all
    subsets. Sent: k values. All workers draw from the key of the round, so that messages add up,
    and a sum over workers (``exchange="psum"``) serves. Kept: what is left out, in a residual; with
    ``unbiased`` nothing.

    Guarantees:
      - Contraction: :math:`\mathbb{E}\|x - \mathcal{C}(x)\|^2 = (1 - k/n) \|x\|^2` with c = 1.
      - With ``unbiased`` right in the mean, entry by entry, and
        :math:`\mathbb{E}\|\mathcal{C}(x) - x\|^2 = (n/k - 1) \|x\|^2`. (What c takes beyond the
        range of the dtype is sent as the largest number that it does not.)
      - Conservation: ``remainder == tree - decompress(message, key)``, bit for bit; with c = 1 no
        entry is in both.

    To take where a sum is what the network is good at, or where selecting is too slow. Not to take
    where few entries matter: :func:`sasg_jax.top_k` leaves out far less; nor with ``"reuse"``, as
    an old message cannot be decoded by a new key. ValueError for an argument out of its range.

    >>> import jax, jax.numpy as jnp
    >>> message, remainder, _ = random_k(0.25).compress(jnp.ones(8), ((),), jax.random.key(0))
    >>> message[0].tolist(), int(remainder.sum())
    ([1.0, 1.0], 6)

    References: Stich et al., `Sparsified SGD with Memory <https://arxiv.org/abs/1809.07599>`_, 2018
    """
    density = check_fraction("density", density)
    check_bool("unbiased", unbiased)
    num_kept = lambda size: max(1, math.floor(density * size))
    factor = lambda size: size / num_kept(size) if unbiased else 1.0

    def in_range(values, size):
        """So that c times as much is a number of the dtype, whatever has arrived."""
        finfo = jnp.finfo(values.dtype)
        largest = float(finfo.max) / factor(size) * (1 - 2 * float(finfo.eps))
        return jnp.clip(values, -largest, largest) if unbiased else values

    def encode(x, memory, key):
        values = x.reshape(-1)[draw_places(key, num_kept(x.size), x.size)]
        return in_range(values, x.size), memory

    def decode(code, like, key):
        places, dtype = draw_places(key, num_kept(like.size), like.size), wide(like.dtype)
        if code.dtype == like.dtype:  # of half precision, sums come in float32, and may be larger
            code = in_range(code, like.size)
        values = code.astype(dtype) * jnp.asarray(factor(like.size), dtype)
        return jnp.zeros(like.size, dtype).at[places].set(values, unique_indices=True)

    return tensorwise(
        f"random_k({density}{', unbiased=True' * unbiased})",
        encode,
        decode,
        unbiased=unbiased,
        linear=True,
        random=True,
        shares_key=True,
    )


def draw_places(key: Any, kept: int, size: int) -> jax.Array:
    """``kept`` different places of ``size``, each with the same probability.
    ``# shape=(kept,), dtype=jnp.int32``"""
    key_of_start, key_of_places = jax.random.split(key)
    stratum = jnp.arange(kept, dtype=jnp.int32)
    length, longer = divmod(size, kept)  # the first ones are longer by one
    first = stratum * length + jnp.minimum(stratum, longer)
    ends = length + (stratum < longer)
    place = first + jax.random.randint(key_of_places, (kept,), 0, ends, jnp.int32)
    start = jax.random.randint(key_of_start, (), 0, size, jnp.int32)
    return jnp.where(place >= size - start, place - (size - start), place + start)
