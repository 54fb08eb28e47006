"""Rounds to the nearest point of an even grid."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sasg_jax import bits as bits_lib
from sasg_jax._checks import check_choice, check_int, require
from sasg_jax.compressors.base import Compressed, Compressor
from sasg_jax.control_flow import sum_rows
from sasg_jax.numerics import wide


class GridMessage(NamedTuple):
    """One tensor of n entries."""

    radius: Any  # R, of float32 at least; () where the first tensor's is that of all
    levels: jax.Array  # b bits each. shape=(ceil(n * b / 8),), dtype=jnp.uint8


def grid(bits: int, *, scope: str = "tensor") -> Compressor:
    r"""Rounds every entry to the nearest of 2^b numbers, evenly from -R to R: LAQ's quantiser.

    .. math::
        \mathcal{C}(x)_j = -R + 2 \Delta
        \left\lfloor \frac{x_j + R + \Delta}{2 \Delta} \right\rfloor,
        \quad R = \max_j |x_j|, \quad \Delta = \frac{R}{2^b - 1}

    Deterministic, and biased: 0 is no point of the grid, and decodes to Δ. A message is R and b
    bits for each entry, in bytes. Take it for differences (:func:`sasg_jax.reconstruction`), whose
    range shrinks as training goes on, or with a residual. Not for gradients of heavy tails: one
    large entry widens the grid for all.

    Args:
      bits: b, 1 to 16.
      scope: ``"tensor"`` has an R for each tensor, ``"tree"`` one for all, as in LAQ.

    Guarantees: :math:`|x_j - \mathcal{C}(x)_j| \le \Delta` but for rounding; the remainder is the
    tree less what is decoded, bit for bit; zeros decode to zeros.

    ValueError for an argument out of range.

    References: Sun et al., `LAQ <https://arxiv.org/abs/1909.07588>`_, 2019

    >>> import jax.numpy as jnp
    >>> message, remainder, _ = grid(2).compress(jnp.array([-3.0, 0.5, 3.0]), (), None)
    >>> remainder.tolist(), grid(2).message_size(jnp.zeros(1000)).bytes
    ([0.0, -0.5, 0.0], 254)
    """
    bits = check_int("bits", bits, minimum=1)
    require(bits <= 16, "bits", bits, "to be at most 16")
    check_choice("scope", scope, ("tensor", "tree"))
    top = 2**bits - 1

    def encode(x, radius):
        # As parts of R, whose double need not be a number.
        level = jnp.floor((x.astype(radius.dtype) / radius + 1) * (top / 2) + 0.5)
        level = jnp.where(radius > 0, jnp.clip(level, 0, top), 0).reshape(-1)
        return bits_lib.pack_integers(level.astype(jnp.uint32), bits)

    def decode(levels, radius, like):
        level = bits_lib.unpack_integers(levels, bits, like.size).astype(radius.dtype)
        # Whatever arrives, what is added up is finite.
        radius = jnp.where(jnp.isfinite(radius), radius, 0)
        # One product, whose factors are the same for all: XLA divides by a constant in one program
        # otherwise than in another. The largest must not be rounded beyond R.
        decoded = (2 * level - top) * (radius * (1 / top))
        return jnp.clip(decoded, -radius, radius).reshape(like.shape)

    def radii(leaves):
        each = [jnp.max(jnp.abs(x)).astype(wide(x.dtype)) for x in leaves]
        # What is too small to be divided by is no number but zero.
        each = [jnp.where(r < jnp.finfo(r.dtype).tiny, 0, r) for r in each]
        if scope == "tensor" or not each:
            return each
        largest = jnp.max(jnp.stack([r.astype(jnp.result_type(*each)) for r in each]))
        return [largest] * len(each)

    def written(i, radius):
        return radius if scope == "tensor" or i == 0 else ()

    def decode_all(messages, leaves):
        first = [messages[0].radius] * len(messages) if scope == "tree" and messages else None
        of = [x.radius for x in messages] if first is None else first
        decoded = [decode(m.levels, r, x) for m, r, x in zip(messages, of, leaves, strict=True)]
        # Rounded to the tensor's own type, as the remainder is.
        pairs = zip(decoded, leaves, strict=True)
        return [x.astype(leaf.dtype).astype(wide(leaf.dtype)) for x, leaf in pairs]

    def compress(tree, memory, key):
        leaves, treedef = jax.tree.flatten(tree)
        of = radii(leaves)
        pairs = enumerate(zip(leaves, of, strict=True))
        messages = tuple(GridMessage(written(i, r), encode(x, r)) for i, (x, r) in pairs)
        # Without the barrier product and difference would be rounded once, and not as the server's.
        decoded = jax.lax.optimization_barrier(decode_all(messages, leaves))
        rest = [x - y.astype(x.dtype) for x, y in zip(leaves, decoded, strict=True)]
        return Compressed(messages, treedef.unflatten(rest), memory)

    def decompress_sum(messages, like, key):
        leaves, treedef = jax.tree.flatten(like)
        rows = jax.vmap(lambda row: decode_all(row, leaves))(messages)
        return treedef.unflatten([sum_rows(x) for x in rows])

    scoped = "" if scope == "tensor" else f", scope={scope!r}"
    return Compressor(
        name=f"grid({bits}{scoped})",
        compress=compress,
        decompress_sum=decompress_sum,
        num_values=lambda tree: sum(x.size for x in jax.tree.leaves(tree)),
    )
