"""Which training examples each worker holds, and in which order it takes them.

A partition deals all examples out to ``num_workers`` workers, at random by ``seed`` (an integer
from 0 to 2**32 - 1). It returns one sorted int64 array of indices per worker: disjoint, covering
all examples. Too many workers, or another seed, are a ValueError that says what is allowed.
"""

from collections.abc import Sequence

import numpy as np

_MAX_SEED = 2**32 - 1  # A larger seed would take two words of a seed sequence and could collide.
_MAX_DRAWS = 1000


def iid_shards(num_examples: int, num_workers: int, seed: int) -> list[np.ndarray]:
    """Deals the examples out evenly: sizes differ by at most one."""
    _check("num_workers", num_workers, 1, num_examples)
    permutation = _partition_rng(seed).permutation(num_examples)
    return [np.sort(shard) for shard in np.array_split(permutation, num_workers)]


def by_source(train_source: np.ndarray, num_workers: int, seed: int) -> list[np.ndarray]:
    """Gives worker m examples of data set m % num_sources only, evenly within it.

    ``train_source`` says where each example is from, as of :func:`experiments.data.combine`.
    """
    sizes = np.bincount(train_source)
    most = min(len(sizes) * int(size) + source for source, size in enumerate(sizes))
    _check("num_workers", num_workers, len(sizes), most)
    rng = _partition_rng(seed)
    shards = [np.empty(0, np.int64)] * num_workers
    for source in range(len(sizes)):
        indices = rng.permutation(np.flatnonzero(train_source == source))
        workers = range(source, num_workers, len(sizes))
        for worker, shard in zip(workers, np.array_split(indices, len(workers)), strict=True):
            shards[worker] = np.sort(shard)
    return shards


def dirichlet_label_skew(
    labels: np.ndarray, num_workers: int, concentration: float, seed: int
) -> list[np.ndarray]:
    r"""Gives every worker another mixture of classes.

    For every class the shares of the workers are drawn from a symmetric Dirichlet distribution,

    .. math:: (q_{c,1}, \dots, q_{c,M}) \sim \mathrm{Dir}(\alpha, \dots, \alpha),

    and worker m gets that share of the class's examples, at random and rounded. The smaller the
    concentration :math:`\alpha` is, the fewer workers hold a class; for large ones the shards
    become i.i.d. All shares are drawn again until every worker has an example.

    ValueError for an argument out of range, or where 1,000 draws left a worker with no example.

    References: Hsu et al., `Measuring the Effects of Non-Identical Data Distribution for Federated
    Visual Classification <https://arxiv.org/abs/1909.06335>`_, 2019; drawn by class as in Yurochkin
    et al., `Bayesian Nonparametric Federated Learning of Neural Networks
    <https://arxiv.org/abs/1905.12022>`_, 2019
    """
    _check("num_workers", num_workers, 1, len(labels))
    if not 0 < concentration < np.inf:
        raise ValueError(f"Expected concentration={concentration!r} to be positive and finite.")
    rng = _partition_rng(seed)
    counts = np.bincount(labels)
    for _ in range(_MAX_DRAWS):
        shares = rng.dirichlet(np.full(num_workers, concentration), size=len(counts))
        # Where worker m's share of class c ends, rounded.
        ends = np.rint(np.cumsum(shares, axis=1) * counts[:, None]).astype(np.int64)
        if np.diff(ends, axis=1, prepend=0).sum(axis=0).all():
            break
    else:
        raise ValueError(
            f"Expected concentration={concentration!r} to leave each of num_workers={num_workers} "
            f"an example of {len(labels):,}, which none of {_MAX_DRAWS} draws did: use a larger "
            "concentration or fewer workers."
        )
    pieces = [
        np.split(rng.permutation(np.flatnonzero(labels == label)), ends[label, :-1])
        for label in range(len(counts))
    ]
    return [np.sort(np.concatenate(shard)) for shard in zip(*pieces, strict=True)]


def batch_order(
    shards: Sequence[np.ndarray],
    batch_size: int,
    iterations: int,
    seed: int,
    start: int = 0,
    workers: Sequence[int] | None = None,
) -> np.ndarray:
    """The training examples in the batches of rounds start..start + iterations - 1.

    Every worker walks through its own shard in a new random order each epoch. Epochs follow each
    other without a gap, so no example is dropped: a batch may span two epochs, or many where the
    shard is smaller than the batch.

    The order depends on ``shards``, ``batch_size`` and ``seed`` alone, so a run that is resumed or
    works in chunks gets the same batches as one that asks for all rounds at once. Only the epochs
    in these rounds are drawn, each from its own generator.

    Of all workers, or of the W that ``workers`` names. shape=(iterations, W, B), dtype=int32
    """
    workers = range(len(shards)) if workers is None else workers
    order = np.empty((iterations, len(workers), batch_size), np.int32)
    begin, end = start * batch_size, (start + iterations) * batch_size
    for column, worker in enumerate(workers):
        shard = shards[worker]
        epochs = range(begin // len(shard), -(-end // len(shard)))
        walk = np.concatenate(
            [np.random.default_rng([seed, worker, epoch]).permutation(shard) for epoch in epochs]
        )
        skipped = begin - epochs.start * len(shard)
        order[:, column] = walk[skipped : skipped + end - begin].reshape(iterations, batch_size)
    return order


def _partition_rng(seed: int) -> np.random.Generator:
    _check("seed", seed, 0, _MAX_SEED)
    # The last word sets it apart from every [seed, worker, epoch] of batch_order: missing words
    # count as zeros, so [seed] alone would be the generator of worker 0's first epoch.
    return np.random.default_rng([seed, 0, 0, 1])


def _check(name: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise ValueError(f"Expected {name}={value} to be an integer from {least} to {most}.")
