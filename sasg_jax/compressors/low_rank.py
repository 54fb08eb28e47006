"""Two thin factors in place of a matrix."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sasg_jax._checks import check_int
from sasg_jax.compressors.base import Compressed, Compressor
from sasg_jax.compressors.tensorwise import by_largest, tensorwise


class LowRankMessage(NamedTuple):
    """One matrix of m rows and n columns, in its dtype."""

    left: jax.Array  # P, with orthonormal columns. shape=(m, r)
    right: jax.Array  # Q. shape=(n, r)


def power_sgd(rank: int = 2) -> Compressor:
    r"""Sends two thin factors of the mean of matrices, by one step of power iteration (PowerSGD).

    .. math:: P = \mathrm{orth}\Big(\tfrac{1}{M} \sum_m X_m Q\Big), \quad
        Q \leftarrow \tfrac{1}{M} \sum_m X_m^\top P, \quad
        \tfrac{1}{M} \sum_m X_m \approx P Q^\top

    where X_m is worker m's matrix, residual included, and Q is that of the round before, at first
    random and the same on all. Tensors of more axes are matrices of as many columns as their last
    axis has. Sent: two sums over workers, of r (m + n) float32 for a matrix, and tensors as they
    are for which that is no less, so that biases are dense. Kept: :math:`X_m - P Q^\top`.

    Args:
      rank: r, at least 1; 1 to 4 in the paper.

    Guarantees:
      - Conservation: the mean of trees is the mean of remainders and what is decoded, bit for bit
        on each worker where decoded and remainder are of a matrix.
      - Of a fixed matrix the product goes to the nearest of rank r, round by round.
      - Orthogonalised and multiplied in float32; a matrix of zeros leaves Q as it was.

    To take with ``always``, a sum that the network is good at, matrices whose gradients have few
    directions, and momentum after it. Not to take where workers may be silent: what it sends are
    parts of one mean; :func:`low_rank` has messages that stand alone. ValueError for a bad rank.

    >>> import jax.numpy as jnp
    >>> power_sgd(2).message_size({"w": jnp.zeros((100, 50)), "b": jnp.zeros(50)}).bytes
    1400

    References: Vogels et al., `PowerSGD: Practical Low-Rank Gradient Compression for Distributed
    Optimization <https://arxiv.org/abs/1905.13727>`_, 2019"""
    rank = check_int("rank", rank, minimum=1)

    def init_memory(tree):
        return tuple(_start(x, rank, i) for i, x in enumerate(jax.tree.leaves(tree)))

    def compress_mean(tree, memory, key, mean):
        leaves, treedef = jax.tree.flatten(tree)
        matrices = {i: _matrix(x) for i, x in enumerate(leaves) if _is_thin(x, rank)}
        dense = [x for i, x in enumerate(leaves) if i not in matrices]
        left, dense = mean(([_product(x, memory[i]) for i, x in matrices.items()], dense))
        left = list(map(_orthonormal, left))
        right = mean([_product(x.T, p) for x, p in zip(matrices.values(), left, strict=True)])
        decoded, rest, memory, whole = [], [], list(memory), iter(dense)
        factors = dict(zip(matrices, zip(left, right, strict=True), strict=True))
        for i, x in enumerate(leaves):
            if i in factors:
                product = _product(factors[i][0], factors[i][1].T).reshape(x.shape).astype(x.dtype)
                decoded.append(jax.lax.optimization_barrier(product))
                rest.append(x - decoded[-1])
                memory[i] = _next(memory[i], factors[i][1])
            else:
                decoded.append(next(whole))
                rest.append(jnp.zeros_like(x))
        return Compressed(treedef.unflatten(decoded), treedef.unflatten(rest), tuple(memory))

    return Compressor(
        name=f"power_sgd({rank})", init_memory=init_memory, compress_mean=compress_mean
    )


def low_rank(rank: int = 2) -> Compressor:
    r"""Sends two thin factors of each worker's own matrices, by one step of power iteration.

    .. math:: P = \mathrm{orth}(X Q), \quad Q \leftarrow X^\top P, \quad \mathcal{C}(X) = P Q^\top

    :func:`power_sgd` with factors of its own for each worker: messages that stand alone, for every
    rule, way of being silent and exchange, and for the way down. The mean of M of them has rank
    r M. Sent: r (m + n) numbers of the matrix's dtype, and tensors as they are for which that is
    no less. Kept: Q for the next message, and what is left out in a residual.

    Args:
      rank: r, at least 1.

    Guarantees:
      - Conservation: ``remainder == tree - decompress(message)``, bit for bit.
      - Contraction: a projection, :math:`\|X - \mathcal{C}(X)\|^2 = \|X\|^2 - \|Q\|^2`, up to
        rounding; of a fixed matrix it goes to the nearest of rank r, message by message.
      - Orthogonalised and multiplied in float32. Matrices below 1e-30 decode to zeros.

    To take where :func:`power_sgd` cannot be: with silent workers. Not to take among many that all
    send: factors of M workers move in place of one sum of them. ValueError for a bad rank.

    >>> import jax.numpy as jnp
    >>> x = {"w": jnp.outer(jnp.arange(6.0), jnp.ones(5))}
    >>> made = low_rank(1).compress(x, low_rank(1).init_memory(x), None)
    >>> low_rank(1).message_size(x).bytes, bool(jnp.abs(made.remainder["w"]).max() < 1e-5)
    (44, True)

    References: Vogels et al., `PowerSGD: Practical Low-Rank Gradient Compression for Distributed
    Optimization <https://arxiv.org/abs/1905.13727>`_, 2019"""
    rank = check_int("rank", rank, minimum=1)

    def encode(x, memory, key):
        top, parts = by_largest(_matrix(x).reshape(1, -1))
        matrix = parts.reshape(_matrix(x).shape)
        left = _orthonormal(_product(matrix, memory)).astype(x.dtype)
        right = _product(matrix.T, left.astype(memory.dtype))
        largest = float(jnp.finfo(x.dtype).max)
        sent = jnp.clip(top[0, 0] * right, -largest, largest).astype(x.dtype)
        return LowRankMessage(left, sent), _next(memory, right)

    def decode(code, like, key):
        left, right = (jnp.where(jnp.isfinite(x), x, 0).astype(jnp.float32) for x in code)
        return _product(left, right.T)

    # The same start for all tensors: each is multiplied by its own.
    start = lambda x: _start(x, rank, 0, always=True)
    return tensorwise(f"low_rank({rank})", encode, decode, init_memory=start)


def _shape(x: Any) -> tuple[int, int]:
    columns = x.shape[-1] if x.ndim else 1
    return x.size // columns, columns


def _matrix(x: jax.Array) -> jax.Array:
    return x.reshape(_shape(x)).astype(jnp.float32)


def _is_thin(x: Any, rank: int) -> bool:
    """Whether two factors are less than the tensor."""
    rows, columns = _shape(x)
    size = 4 * min(rank, rows, columns) * (rows + columns)
    return size < rows * columns * x.dtype.itemsize


def _start(x: Any, rank: int, place: int, *, always: bool = False) -> Any:
    """Q before the first message, the same on all workers; () for a tensor that is sent whole."""
    if not (always or _is_thin(x, rank)):
        return ()
    rows, columns = _shape(x)
    key = jax.random.fold_in(jax.random.key(0), place)
    return jax.random.normal(key, (columns, min(rank, rows, columns)), jnp.float32)


_product = lambda a, b: jnp.matmul(a, b, precision="highest")
_orthonormal = lambda x: jnp.linalg.qr(x)[0]
# Of nothing there is no direction to start from.
_next = lambda old, new: jnp.where(jnp.any(new != 0), new, old)
