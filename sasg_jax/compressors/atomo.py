"""Draws singular vectors by their singular values."""

from typing import Any

import jax.numpy as jnp

from sasg_jax._checks import check_int
from sasg_jax.compressors.base import Compressor
from sasg_jax.compressors.draws import draw, factor_of
from sasg_jax.compressors.low_rank import LowRankMessage
from sasg_jax.compressors.tensorwise import by_largest, tensorwise


def atomo(rank: int = 2) -> Compressor:
    r"""Draws singular vectors with probabilities by their singular values (spectral ATOMO).

    .. math:: X = \sum_i s_i u_i v_i^\top, \quad
        \mathcal{C}(X) = \sum_{i \text{ drawn}} \frac{s_i}{p_i} u_i v_i^\top, \quad
        p_i = \min(1, c\, s_i), \quad \sum_i p_i \le r

    for every matrix; tensors of more axes are matrices of as many columns as their last axis has.
    Sent: r pairs of vectors, r (m + n) numbers of the matrix's dtype, and tensors as they are for
    which that is no less, so that biases are dense. Kept: nothing. As in :func:`sasg_jax.wangni` at
    most r are drawn, once, each with its p. (To draw again until there is one, as is done
    elsewhere, is biased.)

    Args:
      rank: r, at least 1.

    Guarantees:
      - Right in the mean, entry by entry, up to the rounding of a singular value decomposition, and
        in half precision of the factors.
      - :math:`\mathbb{E}\|\mathcal{C}(X) - X\|^2 = \sum_i s_i^2 (1/p_i - 1)`, at most
        :math:`(\sum_i s_i)^2 / 0.999 r - \|X\|^2` where none is sure.
      - Matrices below 1e-30 decode to zeros.

    To take where no memory is wanted and few singular values are large. Not to take for large
    matrices, whose singular values cost far more than a gradient; :func:`sasg_jax.low_rank` with a
    residual leaves out less, for two products. ValueError for a bad rank.

    >>> import jax, jax.numpy as jnp
    >>> x = {"w": jnp.zeros((8, 9)).at[2, 3].set(5.0)}
    >>> made = atomo(2).compress(x, ((),), jax.random.key(0))
    >>> atomo(2).message_size(x).bytes, bool(jnp.abs(made.remainder["w"]).max() < 1e-5)
    (136, True)

    References: Wang et al., `ATOMO: Communication-efficient Learning via Atomic Sparsification
    <https://arxiv.org/abs/1806.04090>`_, 2018"""
    rank = check_int("rank", rank, minimum=1)

    def encode(x, memory, key):
        rows, columns = _shape(x)
        kept = min(rank, rows, columns)
        top, parts = by_largest(x.reshape(1, -1).astype(jnp.float32))
        u, s, vt = jnp.linalg.svd(parts.reshape(rows, columns), full_matrices=False)
        s = jnp.where(s > 1e-6 * s[0], s, 0)  # what is below is rounding
        share = s / jnp.where(s[0] > 0, s[0], 1)
        probabilities = factor_of(share, kept) * share
        drawn = draw(probabilities, key)
        first = jnp.argsort(~drawn, stable=True)[:kept]
        weight = jnp.where(drawn, s / jnp.clip(probabilities, 1e-30, 1), 0)[first]
        right = (top[0, 0] * weight)[:, None] * vt[first]
        largest = float(jnp.finfo(x.dtype).max)
        right = jnp.clip(right, -largest, largest).T.astype(x.dtype)
        return LowRankMessage(u[:, first].astype(x.dtype), right), memory

    def decode(code, like, key):
        left, right = (jnp.where(jnp.isfinite(x), x, 0).astype(jnp.float32) for x in code)
        return jnp.matmul(left, right.T, precision="highest")

    return tensorwise(f"atomo({rank})", encode, decode, unbiased=True, random=True)


def _shape(x: Any) -> tuple[int, int]:
    columns = x.shape[-1] if x.ndim else 1
    return x.size // columns, columns
