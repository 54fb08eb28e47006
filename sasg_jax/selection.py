r"""Selection of the k entries of largest magnitude of one vector.

:func:`magnitude_top_k` is exact. :func:`lax_top_k` is its reference and what accelerators use. On
the CPU, where :func:`lax.top_k` is the slowest part of a round, :func:`pruned_top_k` gives the same
set of indices and looks at most entries only to count them:

1. A strided sample gives a bound below the k-th largest magnitude with high probability.
2. Entries above the bound are marked in a bit mask (one bit an entry) and listed from it.
3. Bisection over the bits of the listed magnitudes finds the k largest exactly.

In tensors that are mostly zero, the entries above the bound and the first that equal it are the k
largest. When the sample misled, the reference is used, so the result is exact for every input.
:func:`approximate_top_k` does without: the threshold of the last selection serves again.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap

from sasg_jax._checks import check_choice
from sasg_jax.bits import WORD, first_set_bits, pack_mask

# Below this size lax.top_k is as fast, and above this density the bound prunes too little.
_MIN_PRUNED_SIZE = 1 << 15
_MAX_PRUNED_DENSITY = 1 / 4
# Primes, so that the sample falls on every column of a matrix: rows and columns differ in scale.
# The longest with which that many of the k largest are sampled, or else the shortest.
_SAMPLE_STRIDES = (67, 31, 17)
_ENOUGH_SAMPLED = 125

MIN_FILL = 0.8
"""Part of k that reaches a reused threshold, at the least; with fewer it is found anew."""
_AIMED_FILL = 0.9
# Under error feedback entries crowd below the threshold, and the number of those above it can fall
# as its tenth power. A larger exponent then overshoots: at 1/4 most thresholds were found anew.
_CORRECTION = 1 / 12


def magnitude_top_k(x: jax.Array, k: int, *, method: str = "auto") -> jax.Array:
    """The indices of the ``k`` entries of largest magnitude of a vector, in no particular order.
    ``# shape=(k,), dtype=jnp.int32`` Of equal ones those with the lowest index, as in
    :func:`jax.lax.top_k`; NaN only where there are fewer than ``k`` numbers. ``method`` is
    ``"lax"``, ``"pruned"``, or ``"auto"``: pruned on the CPU for long vectors."""
    check_choice("method", method, METHODS)
    return METHODS[method](x, k)


def lax_top_k(x: jax.Array, k: int) -> jax.Array:
    """The reference, :func:`jax.lax.top_k` on magnitudes."""
    return lax.top_k(_magnitudes(x), k)[1].astype(jnp.int32)


def pruned_top_k(x: jax.Array, k: int) -> jax.Array:
    """The same set as :func:`lax_top_k`, found by pruning with a sampled bound.

    Under ``vmap`` one vector after another: the ``lax.cond`` of a batch would run both branches."""
    if x.dtype.itemsize > 4:  # float64 has no exact float32 magnitude
        return lax_top_k(x, k)
    return sequential_vmap(lambda x: _pruned(x, k))(x)


def _pruned(x: jax.Array, k: int) -> jax.Array:
    x = x.astype(jnp.float32)
    enough = (stride for stride in _SAMPLE_STRIDES if k // stride >= _ENOUGH_SAMPLED)
    stride = next(enough, _SAMPLE_STRIDES[-1])
    sample = x[: x.size // stride * stride]
    sample = _magnitudes(sample.reshape(-1, stride)[:, 0])
    # A quarter more than the expected rank, and some entries for small k, so that the bound rarely
    # lies above the k-th largest. `min`, not `[-1]`: XLA's fast top-k is lost behind a slice.
    rank = int(1.25 * k / stride) + 8
    if rank > sample.size:
        return lax_top_k(x, k)
    bound = lax.top_k(sample, rank)[0].min()
    capacity = min(k + k // 2 + 512, x.size)
    listed, count = first_set_bits(pack_mask(jnp.abs(x) > bound), capacity)
    magnitudes = lambda: jnp.where(jnp.arange(capacity) < count, jnp.abs(x[listed]), -1.0)
    exact = lambda: listed[_bisect_top_k(magnitudes(), k)]

    def tied():
        # Counted as bits, of which the CPU takes none for zero, as it does with the tiniest floats.
        bits, bound_bits = (lax.bitcast_convert_type(y, jnp.int32) for y in (_magnitudes(x), bound))
        equal, num_equal = first_set_bits(pack_mask(bits == bound_bits), k)
        slots = jnp.arange(k)
        largest = jnp.where(slots < count, listed[:k], equal[jnp.maximum(slots - count, 0)])
        found = (count < k) & (count + num_equal >= k) & ((bits > bound_bits).sum() == count)
        return lax.cond(found, lambda: largest, lambda: lax_top_k(x, k))

    return lax.cond((count >= k) & (count <= capacity), exact, tied)


def approximate_top_k(x: jax.Array, k: int, threshold: jax.Array) -> tuple[jax.Array, jax.Array]:
    r"""``k`` indices of large magnitudes of a vector, and the threshold for the next selection.

    Where between 0.8 k and k entries reach the ``threshold`` of the last selection (0 for none),
    these are chosen, and as many others as are missing from k. Otherwise, and in short vectors, the
    choice is that of :func:`magnitude_top_k`, and the threshold becomes the k-th largest magnitude.

    Guarantees:
      - Lemma 1 with :math:`\delta = 0.8\,k/n`: what is not chosen has at most :math:`1 - \delta` of
        the sum of squares, as at least 0.8 k chosen entries reach the threshold, and no others do.
      - NaN is chosen only where there are fewer than ``k`` numbers."""
    if not _is_worth_pruning(x, k):
        return magnitude_top_k(x, k), threshold
    return sequential_vmap(lambda x, threshold: _approximate(x, k, threshold))(x, threshold)


def _approximate(x: jax.Array, k: int, threshold: jax.Array) -> tuple[jax.Array, jax.Array]:
    min_count = math.ceil(MIN_FILL * k)
    magnitudes, bound = jnp.abs(x), threshold.astype(x.dtype)
    large, count = first_set_bits(pack_mask(magnitudes >= bound), k)
    # At most k of the first 2 k entries are large, so the others fill every gap, NaN aside.
    others, num_others = first_set_bits(pack_mask(magnitudes[: 2 * k] < bound), k - min_count)
    fits = (count >= min_count) & (count <= k) & (num_others >= k - count)

    def reuse():
        slots = jnp.arange(k)
        fill = others[jnp.maximum(slots - count, 0)] if min_count < k else large
        return jnp.where(slots < count, large, fill), threshold, count

    def renew():
        indices = magnitude_top_k(x, k)
        return indices, jnp.abs(x[indices]).min().astype(jnp.float32), jnp.int32(k)

    indices, threshold, count = lax.cond(fits, reuse, renew)
    correction = (count.astype(jnp.float32) / (_AIMED_FILL * k)) ** _CORRECTION
    return indices, threshold * correction


_magnitudes = lambda x: jnp.where(jnp.isnan(x), -1, jnp.abs(x))
_is_worth_pruning = lambda x, k: x.size >= _MIN_PRUNED_SIZE and k <= _MAX_PRUNED_DENSITY * x.size


def _auto_top_k(x: jax.Array, k: int) -> jax.Array:
    if not _is_worth_pruning(x, k):
        return lax_top_k(x, k)
    pruned, default = lambda x: pruned_top_k(x, k), lambda x: lax_top_k(x, k)
    return lax.platform_dependent(x, cpu=pruned, default=default)


METHODS = {"auto": _auto_top_k, "lax": lax_top_k, "pruned": pruned_top_k}


def _bisect_top_k(magnitudes: jax.Array, k: int) -> jax.Array:
    """Indices of the k largest of ``magnitudes`` (>= 0; negative ones are never chosen)."""
    # Floats that are not negative are ordered as their bit patterns are. The threshold is built
    # from its highest bit down, until exactly k entries reach it or it is the k-th largest itself.
    bits = lax.bitcast_convert_type(magnitudes, jnp.int32)
    undecided = lambda state: (state[0] > 0) & (state[2] != k)

    def decide_bit(state):
        bit, threshold, count = state
        candidate = threshold | bit
        reached = (bits >= candidate).sum()
        enough = reached >= k
        return bit >> 1, jnp.where(enough, candidate, threshold), jnp.where(enough, reached, count)

    start = jnp.int32(1 << 30), jnp.int32(0), (bits >= 0).sum()
    threshold = lax.while_loop(undecided, decide_bit, start)[1]
    # Everything above the threshold, then what equals it in order of index, until k are full.
    above, equal = pack_mask(bits > threshold), pack_mask(bits == threshold)
    indices, _ = first_set_bits(jnp.concatenate([above, equal]), k)
    return indices % (above.size * WORD)
