"""Makes a biased compressor right in the mean by a second message."""

import jax
import jax.numpy as jnp

from sasg_jax._checks import require
from sasg_jax.compressors.base import Compressed, Compressor
from sasg_jax.compressors.by_leaf import check_keys


def induced(first: Compressor, second: Compressor) -> Compressor:
    r"""Sends what ``second`` makes of what ``first`` leaves out, beside what ``first`` sends.

    .. math:: \mathcal{C}(x) = \mathcal{C}_1(x) + \mathcal{C}_2(x - \mathcal{C}_1(x))

    Sent: both messages. Kept: nothing.

    Args:
      first: any, e.g. :func:`sasg_jax.top_k`.
      second: one that is unbiased, e.g. :func:`sasg_jax.qsgd`; where both draw at random, they
        share the key of the round or neither does.

    Guarantees:
      - Right in the mean: as much as ``second`` is.
      - Where :math:`\|x - \mathcal{C}_1(x)\|^2 \le (1 - \delta)\|x\|^2` and ``second`` has
        :math:`\mathbb{E}\|\mathcal{C}_2(x) - x\|^2 \le \omega \|x\|^2`,
        :math:`\mathbb{E}\|\mathcal{C}(x) - x\|^2 \le \omega (1 - \delta) \|x\|^2`.
      - Conservation: ``remainder == tree - decompress(message)``, up to rounding.

    To take where there is no room for a residual, with a dense ``second`` of few bits, whose
    variance the large entries then do not add to. Not to take with a sparse one: with
    :func:`sasg_jax.random_k` at 1 % ω is 99; there a residual does better. ValueError where
    ``second`` is biased, or one of them needs means over workers.

    >>> import sasg_jax
    >>> compressor = induced(sasg_jax.top_k(0.01), sasg_jax.qsgd(1, 512))
    >>> compressor.name, compressor.unbiased
    ('induced(top_k(0.01), qsgd(1, 512))', True)

    References: Horváth and Richtárik, `A Better Alternative to Error Feedback for
    Communication-Efficient Distributed Learning <https://arxiv.org/abs/2006.11077>`_, 2020"""
    parts = {"first": first, "second": second}
    for name, part in parts.items():
        is_one = isinstance(part, Compressor) and part.compress_mean is None
        allowed = "to be a compressor that needs no means over workers"
        require(is_one, name, getattr(part, "name", part), allowed)
    allowed = "to be unbiased, e.g. sasg_jax.qsgd, sasg_jax.natural"
    require(second.unbiased, "second", second.name, allowed)
    shares_key = check_keys(parts)

    def keys_of(key, drawn):
        """Of the two; None for one that draws nothing."""
        keys = (None, None) if key is None else jax.random.split(key)
        return [own if is_drawn else None for own, is_drawn in zip(keys, drawn, strict=True)]

    def compress(tree, memory, key):
        keys = keys_of(key, (first.random, second.random))
        message, rest, own = first.compress(tree, memory[0], keys[0])
        # One rounding for what is sent of it and what is left.
        rest = jax.lax.optimization_barrier(rest)
        other = second.compress(rest, memory[1], keys[1])
        return Compressed((message, other.message), other.remainder, (own, other.memory))

    def decompress_sum(messages, like, key):
        keys = keys_of(key, (first.shares_key, second.shares_key))
        pairs = zip((first, second), messages, keys, strict=True)
        sums = [part.decompress_sum(rows, like, own) for part, rows, own in pairs]
        return jax.tree.map(jnp.add, *sums)

    sizes = lambda tree: [part.message_size(tree).paper_bits // 32 for part in (first, second)]
    return Compressor(
        name=f"induced({first.name}, {second.name})",
        compress=compress,
        decompress_sum=decompress_sum,
        init_memory=lambda tree: (first.init_memory(tree), second.init_memory(tree)),
        num_values=lambda tree: sum(sizes(tree)),
        unbiased=True,
        linear=first.linear and second.linear,
        random=first.random or second.random,
        shares_key=shares_key,
    )
