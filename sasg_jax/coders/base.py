"""What coders are: pairs of pure functions of static sizes.

Whatever arrives, of the right shapes, decodes to indices in range and to finite values: that costs
one comparison an entry. (Where nobody has written it indices may repeat, and large values add up to
infinity; such a step is refused, as any that is not finite.) Zeros decode to zeros: they stand for
a message that was not sent.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from sasg_jax._checks import expected
from sasg_jax.numerics import PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexCoder:
    """How k different indices of a vector of n entries are written, exactly.

    Args:
      num_bits: ``bits = num_bits(kept, size)``, of k and n: what the code takes, before it is
        rounded up to whole bytes.
      encode: ``code = encode(indices, size)``: a pytree of arrays. The indices are ascending, of
        type int32.
      decode: ``indices = decode(code, kept, size)``. ``# shape=(k,), dtype=jnp.int32``"""

    name: str
    num_bits: Callable[[int, int], int]
    encode: Callable[[jax.Array, int], PyTree]
    decode: Callable[[PyTree, int, int], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValueCoder:
    """How k values are written, exactly or not.

    Args:
      encode: ``code = encode(values)``: a pytree of arrays whose shapes depend on the number and
        the type of the values alone.
      decode: ``values = decode(code, kept, dtype)``, which the worker keeps the difference to."""

    name: str
    encode: Callable[[jax.Array], PyTree]
    decode: Callable[[PyTree, int, Any], jax.Array]
    exact: bool = False  # decode gives back every value, bit for bit


def find(kind: type, argument: str, coder: Any, named: Mapping[str, Any]) -> Any:
    """The coder that a user names, or gives. ValueError for another."""
    if isinstance(coder, kind):
        return coder
    if isinstance(coder, str) and coder in named:
        return named[coder]
    choices = ", ".join(map(repr, named))
    raise expected(argument, coder, f"to be one of {choices}, or of type {kind.__name__}")
