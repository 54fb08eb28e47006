"""Coders: how the kept entries of a vector are written, in few bits and of static sizes.

Which entries they are (:class:`IndexCoder`, exact), by name in ``top_k(indices=...)``:

================  ==================================================  ======================
name              bits for k of n entries                             when
================  ==================================================  ======================
``"plain"``       8, 16 or 32 k                                       the default
``"fixed"``       k ⌈log₂ n⌉                                          short vectors
``"tiled"``       12 k + 13 ⌈n/4096⌉, about                           what peers send
``"bitmap"``      n                                                   of more than a quarter
``"elias_fano"``  k l + k + (n - 1)/2ˡ, l = ⌊log₂(n/k)⌋                the shortest of all here
================  ==================================================  ======================

And what they are (:class:`ValueCoder`), by name in ``top_k(values=...)``: ``"plain"``,
``"bfloat16"`` (16 bits), ``"sign"`` (one bit, and one magnitude for the vector), ``"sign2"``,
``"sign4"``, ``"sign8"`` (one to three bits more, to choose among as many magnitudes);
``coders.signs(4, block=1024)`` has them by blocks.
"""

from sasg_jax.coders.base import IndexCoder, ValueCoder
from sasg_jax.coders.indices import INDEX_CODERS, bitmap, elias_fano, fixed, plain_indices, tiled
from sasg_jax.coders.values import VALUE_CODERS, bfloat16, plain_values, signs

__all__ = [
    "INDEX_CODERS",
    "VALUE_CODERS",
    "IndexCoder",
    "ValueCoder",
    "bfloat16",
    "bitmap",
    "elias_fano",
    "fixed",
    "plain_indices",
    "plain_values",
    "signs",
    "tiled",
]
