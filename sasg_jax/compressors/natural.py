"""Rounds at random to powers of two."""

import jax
import jax.numpy as jnp

from sasg_jax import bits
from sasg_jax.compressors.base import Compressor
from sasg_jax.compressors.tensorwise import every_entry, tensorwise
from sasg_jax.numerics import wide


def natural() -> Compressor:
    r"""Sends a sign and an exponent for each entry, rounded at random to a power of two.

    .. math:: \mathcal{C}(x) = \mathrm{sign}(x)\, 2^e \text{ or } \mathrm{sign}(x)\, 2^{e + 1},
        \quad 2^e \le |x| < 2^{e+1}

    with the probability that makes it right in the mean, which is the mantissa. Sent: of float32
    and bfloat16 9 bits an entry, of float16 6: what is left of the number when its mantissa is
    rounded away. Kept: nothing.

    Guarantees:
      - Right in the mean, entry by entry, exactly, also for numbers below the smallest normal one
        (to it, or to 0). What would be rounded beyond the dtype's range is rounded down.
      - :math:`\mathbb{E}\|\mathcal{C}(x) - x\|^2 \le \tfrac{1}{8} \|x\|^2`, of normal numbers.
      - Nothing is divided or multiplied: a decoded message has exact powers of two.

    To take where 3.5 times fewer bits are enough and nothing may change: no other compressor here
    has so small a variance. Not to take where bytes matter more: see :func:`sasg_jax.qsgd`, and as
    the second part of :func:`sasg_jax.induced` anything coarser. Its message has no float, so that
    on the way down a step that is not finite is not told of; it is left out.

    >>> import jax, jax.numpy as jnp
    >>> x = jnp.array([1.0, -4.0, 0.0, 3.0])
    >>> message, _, _ = natural().compress(x, ((),), jax.random.key(0))
    >>> natural().decompress(message, x).tolist()[:3], natural().message_size(jnp.zeros(800)).bytes
    ([1.0, -4.0, 0.0], 900)

    References: Horváth et al., `Natural Compression for Distributed Deep Learning
    <https://arxiv.org/abs/1905.10988>`_, 2019"""

    def encode(x, memory, key):
        mantissa_bits, exponent_bits, integer = _format(x.dtype)
        pattern = jax.lax.bitcast_convert_type(x.reshape(-1), integer).astype(jnp.uint32)
        mantissa = pattern & ((1 << mantissa_bits) - 1)
        signed = pattern >> mantissa_bits
        drawn = jax.random.bits(key, pattern.shape, jnp.uint32) >> (32 - mantissa_bits)
        largest = (1 << exponent_bits) - 2
        exponent = signed & ((1 << exponent_bits) - 1)
        up = (drawn < mantissa) & (exponent < largest)
        return bits.pack_integers(signed + up, 1 + exponent_bits), memory

    def decode(code, like, key):
        mantissa_bits, exponent_bits, integer = _format(like.dtype)
        signed = bits.unpack_integers(code, 1 + exponent_bits, like.size)
        sign = signed >> exponent_bits << exponent_bits
        exponent = jnp.minimum(signed ^ sign, (1 << exponent_bits) - 2)  # above it is no number
        pattern = ((sign | exponent) << mantissa_bits).astype(integer)
        return jax.lax.bitcast_convert_type(pattern, like.dtype).astype(wide(like.dtype))

    return tensorwise(
        "natural()", encode, decode, num_values=every_entry, unbiased=True, random=True
    )


def _format(dtype: jnp.dtype) -> tuple[int, int, jnp.dtype]:
    """Bits of mantissa and exponent, and the integer type of the same size."""
    finfo = jnp.finfo(dtype)
    return finfo.nmant, finfo.nexp, jnp.dtype(f"uint{finfo.bits}")
