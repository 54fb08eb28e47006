"""Coders of values."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sasg_jax import bits
from sasg_jax._checks import check_int, require
from sasg_jax.coders.base import ValueCoder
from sasg_jax.numerics import wide


def plain_values() -> ValueCoder:
    """As they are."""
    return ValueCoder(
        name="plain",
        encode=lambda values: values,
        decode=lambda code, kept, dtype: _finite(code),
        exact=True,
    )


def shorter(coder: ValueCoder, count: int, dtype: Any) -> ValueCoder:
    """``coder``, or the plain one where its code for so many values would be no shorter."""
    values = jax.ShapeDtypeStruct((count,), dtype)
    code = jax.tree.leaves(jax.eval_shape(coder.encode, values))
    num_bytes = sum(x.size * x.dtype.itemsize for x in code)
    return coder if num_bytes < count * values.dtype.itemsize else VALUE_CODERS["plain"]


def bfloat16() -> ValueCoder:
    """Rounded to the nearest of 16 bits; what would be rounded to infinity, to the largest."""
    largest = float(jnp.finfo(jnp.bfloat16).max)
    return ValueCoder(
        name="bfloat16",
        encode=lambda values: jnp.clip(values, -largest, largest).astype(jnp.bfloat16),
        decode=lambda code, kept, dtype: _in_range_of(_finite(code).astype(wide(dtype)), dtype),
    )


class SignCode(NamedTuple):
    """A vector of k values in blocks of B."""

    signs: jax.Array  # and which level: 1 + log2(levels) bits each. shape=(bytes,), dtype=uint8
    magnitudes: jax.Array  # shape=(ceil(k / B), levels), of float32 at least


_STEPS = 4  # of Lloyd's: on heavy tails (t with 3 degrees) more gain less than a percent


def signs(levels: int = 1, block: int | None = None) -> ValueCoder:
    """The sign of each, and one of 1, 2, 4 or 8 magnitudes. The magnitudes are means of those that
    they stand for, so that decoded values have the sum of magnitudes of those that were sent.

    Args:
      levels: how many magnitudes there are, found by Lloyd's iteration from a geometric start.
      block: values to each set of magnitudes; by default all of a vector.

    Numbers too small to be divided by, below 1e-37 in float32, decode to 0."""
    allowed = "to be 1, 2, 4 or 8"
    require(check_int("levels", levels, minimum=1) in (1, 2, 4, 8), "levels", levels, allowed)
    block = None if block is None else check_int("block", block, minimum=1)
    width = levels.bit_length()  # of the sign and the level

    def encode(values):
        size = min(block or values.size, values.size)
        x = jnp.abs(values.astype(wide(values.dtype)))
        x = jnp.pad(x, (0, -x.size % size)).reshape(-1, size)
        there = jnp.arange(x.size).reshape(x.shape) < values.size
        # As parts of the largest: sums of large numbers, or of their squares, need not fit.
        top = x.max(1, keepdims=True)
        top = jnp.where(top < 1e-37, 0, top)
        level, magnitudes = _quantise(x / jnp.where(top > 0, top, 1), there, levels)
        code = (values < 0).astype(jnp.uint32) | level.reshape(-1)[: values.size] << 1
        return SignCode(bits.pack_integers(code, width), top * magnitudes)

    def decode(code, kept, dtype):
        numbers = bits.unpack_integers(code.signs, width, kept)
        magnitudes = _in_range_of(_finite(jnp.abs(code.magnitudes)), dtype)
        block_of = jnp.arange(kept) // min(block or kept, kept)
        x = magnitudes.reshape(-1)[block_of * levels + (numbers >> 1).astype(jnp.int32)]
        return jnp.where(numbers & 1, -x, x).astype(dtype)

    name = f"sign{levels}" if levels > 1 else "sign"
    name += "" if block is None else f"(block={block})"
    return ValueCoder(name=name, encode=encode, decode=decode)


def _quantise(x: jax.Array, there: jax.Array, levels: int) -> tuple[jax.Array, jax.Array]:
    """Of numbers in [0, 1], row by row: which level each is of, and the means of the levels."""
    mean = lambda mask: jnp.where(mask, x, 0).sum(1) / jnp.maximum(mask.sum(1), 1)
    if levels == 1:
        return jnp.zeros(x.shape, jnp.uint32), mean(there)[:, None]
    smallest = jnp.where(there & (x > 0), x, 1).min(1)
    exponent = jnp.linspace(1, 0, levels)[None]
    centres = jnp.maximum(smallest, 1e-4)[:, None] ** exponent

    def nearest(centres):
        middles = (centres[:, 1:] + centres[:, :-1]) / 2
        return (x[:, :, None] > middles[:, None, :]).sum(2, dtype=jnp.uint32)

    def refine(_, centres):
        level = nearest(centres)
        of = [there & (level == i) for i in range(levels)]
        new = [jnp.where(mask.any(1), mean(mask), centres[:, i]) for i, mask in enumerate(of)]
        return jnp.stack(new, 1)

    # The last means are of the levels that are sent with them.
    before = jax.lax.fori_loop(0, _STEPS - 1, refine, centres)
    return nearest(before), refine(0, before)


_finite = lambda x: jnp.where(jnp.isfinite(x), x, 0)


def _in_range_of(x: jax.Array, dtype: Any) -> jax.Array:
    """``x`` as numbers that ``dtype`` has."""
    largest = jnp.finfo(dtype).max.astype(x.dtype)
    return jnp.clip(x, -largest, largest).astype(dtype)


_CODERS = plain_values(), bfloat16(), signs(), signs(2), signs(4), signs(8)
VALUE_CODERS: dict[str, ValueCoder] = {coder.name: coder for coder in _CODERS}
