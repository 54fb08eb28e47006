"""Coders: how a message becomes the arrays that cross the wire, of static sizes.

Compressor and coder are a compressor again, :func:`coded`: its remainder takes in what the coder
rounded, so that what the receiver decodes and the remainder add up to what was compressed.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sasg_jax.compressors.base import Compressed, Compressor
from sasg_jax.numerics import PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coder:
    """Pure functions of messages, e.g. :func:`plain`.

    Args:
      encode: ``coded = encode(message)``: a pytree of arrays whose shapes depend on those of the
        message alone. A message of zeros must come back as one that decodes to zeros.
      decode: ``message = decode(coded, shapes)``, with the shapes and dtypes of the message."""

    name: str  # in errors
    encode: Callable[[PyTree], PyTree]
    decode: Callable[[PyTree, PyTree], PyTree]
    exact: bool = False  # decode gives back every message bit for bit


def plain() -> Coder:
    """Sends a message's arrays as they are."""
    return Coder(name="plain()", encode=lambda x: x, decode=lambda x, shapes: x, exact=True)


def coded(compressor: Compressor, coder: Coder) -> Compressor:
    """The compressor whose messages are the coded messages of ``compressor``. Decoded message +
    remainder = tree, to the rounding of one subtraction; bit for bit with an exact coder."""
    decode = lambda coded, like: coder.decode(coded, compressor.message_shapes(like))

    def compress(tree, memory, key):
        message, remainder, memory = compressor.compress(tree, memory, key)
        sent = coder.encode(message)
        if not coder.exact:
            shared = key if compressor.shares_key else None
            received = compressor.decompress(decode(sent, tree), tree, shared)
            remainder = jax.tree.map(jnp.subtract, tree, received)
        return Compressed(sent, remainder, memory)

    def decompress_sum(messages, like, key):
        rows = jax.vmap(lambda row: decode(row, like))(messages)
        return compressor.decompress_sum(rows, like, key)

    return dataclasses.replace(
        compressor,
        name=f"{compressor.name} as {coder.name}",
        compress=compress,
        decompress_sum=decompress_sum,
        num_values=lambda tree: compressor.message_size(tree).paper_bits // 32,
        exact=compressor.exact and coder.exact,
        unbiased=compressor.unbiased and coder.exact,
        linear=False,
    )
