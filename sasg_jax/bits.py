"""Numbers of few bits, and positions as bits, in words of 32 and in bytes, lowest bit first.

Types narrower than a byte are widened by XLA wherever they are moved: what is to be narrow on the
wire is packed here by shifts.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

WORD = 32  # bits in one word


def pack_mask(mask: jax.Array) -> jax.Array:
    """Packs a boolean vector into words. ``# shape=(ceil(n / 32),), dtype=jnp.uint32``"""
    lanes = jnp.pad(mask, (0, -mask.size % WORD)).reshape(-1, WORD).astype(jnp.uint32)
    return (lanes << jnp.arange(WORD, dtype=jnp.uint32)[None]).sum(1, dtype=jnp.uint32)


def set_bits(positions: jax.Array, size: int) -> jax.Array:
    """Words of ``size`` bits of which those at ``positions``, each given once, are set.
    ``# shape=(ceil(size / 32),), dtype=jnp.uint32``"""
    words = jnp.zeros(-(-size // WORD), jnp.uint32)
    one = jnp.uint32(1) << (positions % WORD).astype(jnp.uint32)
    return words.at[positions // WORD].add(one)  # no two are the same: a sum is an or


def first_set_bits(words: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Positions of the first ``count`` set bits, ascending, and how many are set in all. Positions
    past that number are in range, and meaningless."""
    ends = jnp.cumsum(lax.population_count(words).astype(jnp.int32))
    slots = jnp.arange(count, dtype=jnp.int32)
    word = jnp.searchsorted(ends, slots, side="right").astype(jnp.int32)
    word = jnp.minimum(word, words.size - 1)
    rank = slots - jnp.where(word > 0, ends[word - 1], 0)
    return word * WORD + _bit_of_rank(words[word], rank), ends[-1]


def _bit_of_rank(words: jax.Array, rank: jax.Array) -> jax.Array:
    """Position of the set bit that has ``rank`` set bits below it, word by word."""
    position = jnp.zeros_like(rank)
    for width in (16, 8, 4, 2, 1):
        low = (words >> position.astype(jnp.uint32)) & jnp.uint32((1 << width) - 1)
        below = lax.population_count(low).astype(jnp.int32)
        beyond = rank >= below
        position = jnp.where(beyond, position + width, position)
        rank = jnp.where(beyond, rank - below, rank)
    return position


def pack_integers(x: jax.Array, width: int) -> jax.Array:
    """The lowest ``width`` bits, 0 to 32, of each of n integers, one after another.
    ``# shape=(ceil(n * width / 8),), dtype=jnp.uint8``"""
    # 32 numbers take ``width`` words exactly: in each group of them all shifts are the same.
    numbers = jnp.pad(x.astype(jnp.uint32), (0, -x.size % WORD)).reshape(-1, WORD, 1)
    start, word = np.arange(WORD)[None, :, None] * width, np.arange(width)[None, None]
    shift = start - WORD * word  # of number i into word j: to the left, or to the right below 0
    numbers &= _mask(width)
    left = jnp.where((shift >= 0) & (shift < WORD), numbers << _amount(shift), 0)
    right = jnp.where((shift < 0) & (shift > -width), numbers >> _amount(-shift), 0)
    words = (left | right).sum(1, dtype=jnp.uint32).reshape(-1)
    return words_to_bytes(words, x.size * width)


def unpack_integers(octets: jax.Array, width: int, count: int) -> jax.Array:
    """The inverse of :func:`pack_integers`. ``# shape=(count,), dtype=jnp.uint32``"""
    if not width:
        return jnp.zeros(count, jnp.uint32)
    words = bytes_to_words(octets)
    groups = -(-count // WORD)
    words = jnp.pad(words, (0, groups * width - words.size)).reshape(groups, width)
    word, shift = np.divmod(np.arange(WORD)[None] * width, WORD)
    low = words[:, word[0]] >> shift.astype(np.uint32)
    high = words[:, np.minimum(word[0] + 1, width - 1)] << _amount(WORD - shift)
    both = jnp.where(shift + width > WORD, low | high, low)
    return (both & _mask(width)).reshape(-1)[:count]


def pack_trits(x: jax.Array) -> jax.Array:
    """Numbers from 0 to 2, five to a byte: 1.6 bits each. ``# shape=(ceil(n / 5),),
    dtype=jnp.uint8``"""
    rows = jnp.pad(x.astype(jnp.uint8), (0, -x.size % TRITS)).reshape(-1, TRITS)
    return (rows * _POWERS_OF_3[None]).sum(1, dtype=jnp.uint8)


def unpack_trits(octets: jax.Array, count: int) -> jax.Array:
    """The inverse of :func:`pack_trits`; of any bytes, numbers from 0 to 2.
    ``# shape=(count,), dtype=jnp.uint8``"""
    return (octets[:, None] // _POWERS_OF_3[None] % 3).reshape(-1)[:count]


def words_to_bytes(words: jax.Array, num_bits: int) -> jax.Array:
    """The bytes that hold the first ``num_bits``."""
    octets = lax.bitcast_convert_type(words, jnp.uint8).reshape(-1)
    return octets[: num_bytes(num_bits)]


def bytes_to_words(octets: jax.Array) -> jax.Array:
    """The inverse of :func:`words_to_bytes`, padded with zeros."""
    octets = jnp.pad(octets, (0, -octets.size % 4)).reshape(-1, 4)
    return lax.bitcast_convert_type(octets, jnp.uint32)


def num_bytes(num_bits: int) -> int:
    return -(-num_bits // 8)


TRITS = 5  # in a byte: 3⁵ is 243
_POWERS_OF_3 = 3 ** np.arange(TRITS, dtype=np.uint8)
_amount = lambda shift: np.clip(shift, 0, WORD - 1).astype(np.uint32)
_mask = lambda width: np.uint32((1 << width) - 1)
