"""Partitions over workers, and the order of batches."""

import numpy as np
import pytest

from experiments import data


def assert_partition(shards, num_examples):
    np.testing.assert_array_equal(np.sort(np.concatenate(shards)), np.arange(num_examples))
    for shard in shards:
        assert shard.dtype == np.int64
        np.testing.assert_array_equal(shard, np.sort(shard))


class TestIidShards:
    @pytest.mark.parametrize(("num_examples", "num_workers"), [(10, 1), (10, 3), (10, 10), (7, 4)])
    def test_partition_of_even_sizes(self, num_examples, num_workers):
        shards = data.iid_shards(num_examples, num_workers, seed=0)
        assert len(shards) == num_workers
        assert_partition(shards, num_examples)
        sizes = [len(shard) for shard in shards]
        assert max(sizes) - min(sizes) <= 1

    def test_random_and_reproducible(self):
        first, again, other = (data.iid_shards(1000, 4, seed) for seed in (0, 0, 1))
        assert all(map(np.array_equal, first, again))
        assert not any(map(np.array_equal, first, other))
        # Each quarter of the examples is spread over all workers.
        for shard in first:
            counts = np.bincount(shard // 250, minlength=4)
            assert counts.min() > 30


class TestBySource:
    SOURCE = np.repeat(np.array([0, 1, 2], np.int32), [20, 31, 9])

    @pytest.mark.parametrize("num_workers", [3, 4, 7, 12])
    def test_each_worker_holds_one_source(self, num_workers):
        shards = data.by_source(self.SOURCE, num_workers, seed=0)
        assert len(shards) == num_workers
        assert_partition(shards, 60)
        for worker, shard in enumerate(shards):
            assert set(self.SOURCE[shard]) == {worker % 3}
        for source in range(3):
            sizes = [len(shard) for shard in shards[source::3]]
            assert max(sizes) - min(sizes) <= 1

    def test_random_and_reproducible(self):
        first, again, other = (data.by_source(self.SOURCE, 6, seed) for seed in (0, 0, 1))
        assert all(map(np.array_equal, first, again))
        assert not all(map(np.array_equal, first, other))
        assert not np.array_equal(first[0], np.arange(10))

    def test_errors(self):
        # With 30 workers, ten would share the nine examples of the third source.
        assert len(data.by_source(self.SOURCE, 29, seed=0)) == 29
        for num_workers in (2, 30):
            with pytest.raises(
                ValueError, match=rf"num_workers={num_workers} to be an integer from 3 to 29\."
            ):
                data.by_source(self.SOURCE, num_workers, seed=0)


class TestDirichletLabelSkew:
    LABELS = np.random.default_rng(0).integers(10, size=2000).astype(np.int32)

    @pytest.mark.parametrize("concentration", [0.05, 0.5, 5.0, 1e6])
    @pytest.mark.parametrize("num_workers", [1, 3, 10])
    def test_partition(self, concentration, num_workers):
        shards = data.dirichlet_label_skew(self.LABELS, num_workers, concentration, seed=0)
        assert len(shards) == num_workers
        assert_partition(shards, len(self.LABELS))
        assert all(len(shard) for shard in shards)

    @pytest.mark.parametrize("concentration", [0.5, 4.0])
    def test_shares_are_dirichlet(self, concentration):
        # 500 classes of 200 examples: 500 draws of the shares of 4 workers.
        num_classes, size, num_workers = 500, 200, 4
        labels = np.random.default_rng(1).permutation(np.arange(num_classes * size) % num_classes)
        shards = data.dirichlet_label_skew(labels, num_workers, concentration, seed=0)
        shares = np.stack([np.bincount(labels[s], minlength=num_classes) for s in shards], 1) / size
        np.testing.assert_allclose(shares.sum(1), 1)
        mean = 1 / num_workers
        variance = mean * (1 - mean) / (num_workers * concentration + 1)
        np.testing.assert_allclose(shares.mean(0), mean, atol=4 * np.sqrt(variance / num_classes))
        np.testing.assert_allclose(shares.var(), variance, rtol=0.15)

    def test_large_concentration_is_even(self):
        shards = data.dirichlet_label_skew(self.LABELS, 5, 1e8, seed=0)
        whole = np.bincount(self.LABELS)
        for shard in shards:
            assert np.abs(np.bincount(self.LABELS[shard]) - whole / 5).max() <= 1

    def test_examples_of_a_class_are_dealt_at_random(self):
        shards = data.dirichlet_label_skew(np.zeros(100, int), 2, 1e8, seed=0)
        assert not np.array_equal(shards[0], np.arange(len(shards[0])))

    def test_draws_until_all_have_an_example(self, monkeypatch):
        """With 40 workers and so much skew, every other draw leaves one without."""
        settings = self.LABELS, 40, 0.1
        for seed in range(5):
            assert all(map(len, data.dirichlet_label_skew(*settings, seed)))
        monkeypatch.setattr("experiments.data.partition._MAX_DRAWS", 1)
        with pytest.raises(ValueError, match="none of 1 draws"):
            [data.dirichlet_label_skew(*settings, seed) for seed in range(5)]

    def test_random_and_reproducible(self):
        first, again, other = (
            data.dirichlet_label_skew(self.LABELS, 4, 0.5, seed) for seed in (0, 0, 1)
        )
        assert all(map(np.array_equal, first, again))
        assert not any(map(np.array_equal, first, other))

    def test_gives_up(self):
        # Nearly all examples of the only class go to one worker.
        message = (
            r"Expected concentration=0\.001 to leave each of num_workers=10 an example of 100, "
            r"which none of 1000 draws did: use a larger concentration or fewer workers\."
        )
        with pytest.raises(ValueError, match=message):
            data.dirichlet_label_skew(np.zeros(100, int), 10, 0.001, seed=0)

    @pytest.mark.parametrize("concentration", [0, -1.0, float("inf"), float("nan")])
    def test_concentration_errors(self, concentration):
        with pytest.raises(
            ValueError, match=f"Expected concentration={concentration} to be positive and finite"
        ):
            data.dirichlet_label_skew(self.LABELS, 2, concentration, seed=0)

    def test_other_errors(self):
        with pytest.raises(ValueError, match=r"num_workers=2001 to be an integer from 1 to 2000\."):
            data.dirichlet_label_skew(self.LABELS, 2001, 1.0, seed=0)


class TestBatchOrder:
    SHARDS = (np.array([3, 1, 4, 15, 9]), np.array([2, 6]), np.arange(20, 37))

    @pytest.mark.parametrize("batch_size", [1, 2, 4, 5, 7, 40])
    def test_every_epoch_is_a_permutation_of_the_shard(self, batch_size):
        order = data.batch_order(self.SHARDS, batch_size, 60, seed=0)
        assert order.shape == (60, 3, batch_size)
        assert order.dtype == np.int32
        for worker, shard in enumerate(self.SHARDS):
            walk = order[:, worker].ravel()
            whole = len(walk) // len(shard) * len(shard)
            epochs = walk[:whole].reshape(-1, len(shard))
            np.testing.assert_array_equal(
                np.sort(epochs, axis=1), np.tile(np.sort(shard), (len(epochs), 1))
            )
            rest = walk[whole:]
            assert len(set(rest)) == len(rest)

    @pytest.mark.parametrize("batch_size", [1, 3, 5, 40])
    def test_slices_agree_with_the_whole(self, batch_size):
        whole = data.batch_order(self.SHARDS, batch_size, 50, seed=7)
        for start, iterations in [(0, 50), (0, 1), (1, 1), (3, 20), (17, 33), (49, 1)]:
            part = data.batch_order(self.SHARDS, batch_size, iterations, seed=7, start=start)
            np.testing.assert_array_equal(part, whole[start : start + iterations])

    def test_the_walk_does_not_depend_on_the_batch_size(self):
        by_one = data.batch_order(self.SHARDS, 1, 60, seed=0)
        by_six = data.batch_order(self.SHARDS, 6, 10, seed=0)
        for worker in range(3):
            np.testing.assert_array_equal(by_one[:, worker].ravel(), by_six[:, worker].ravel())

    def test_order_differs_by_epoch_worker_and_seed(self):
        shards = [np.arange(50), np.arange(50)]
        epochs = data.batch_order(shards, 50, 3, seed=0)
        other = data.batch_order(shards, 50, 3, seed=1)
        walks = [tuple(walk) for walk in np.concatenate([epochs, other]).reshape(-1, 50)]
        assert len(set(walks)) == 12
        assert tuple(range(50)) not in walks

    def test_shard_is_kept(self):
        shards = [np.arange(10)]
        data.batch_order(shards, 3, 10, seed=0)
        np.testing.assert_array_equal(shards[0], np.arange(10))

    def test_only_the_epochs_needed_are_drawn(self, monkeypatch):
        seeds = []
        default_rng = np.random.default_rng

        def counting(seed):
            seeds.append(seed)
            return default_rng(seed)

        monkeypatch.setattr(np.random, "default_rng", counting)
        data.batch_order([np.arange(100)], 10, 12, seed=5, start=100_005)
        # Examples 1,000,050 to 1,000,170.
        assert seeds == [[5, 0, 10_000], [5, 0, 10_001]]
        seeds.clear()
        data.batch_order([np.arange(100)], 10, 10, seed=5, start=10)  # Exactly the second epoch.
        assert seeds == [[5, 0, 1]]


PARTITIONS = {
    "iid_shards": lambda num_workers, seed: data.iid_shards(10, num_workers, seed),
    "by_source": lambda num_workers, seed: data.by_source(np.zeros(10, int), num_workers, seed),
    "dirichlet_label_skew": lambda num_workers, seed: data.dirichlet_label_skew(
        np.zeros(10, int), num_workers, 1.0, seed
    ),
}


@pytest.mark.parametrize("partition", PARTITIONS.values(), ids=PARTITIONS)
class TestPartitionErrors:
    @pytest.mark.parametrize("num_workers", [0, -1, 11])
    def test_fewer_workers_than_one_or_more_than_examples(self, partition, num_workers):
        message = f"Expected num_workers={num_workers} to be an integer from 1 to 10\\."
        with pytest.raises(ValueError, match=message):
            partition(num_workers, 0)

    @pytest.mark.parametrize("seed", [-1, 2**32])
    def test_seed(self, partition, seed):
        with pytest.raises(ValueError, match=f"Expected seed={seed} to be an integer from 0 to"):
            partition(2, seed)

    def test_numpy_integers_are_integers(self, partition):
        assert all(map(np.array_equal, partition(np.int64(2), np.uint32(3)), partition(2, 3)))


def test_partition_and_order_use_different_generators():
    shuffled = [np.random.default_rng([3, 0, epoch]).permutation(100) for epoch in range(5)]
    (half, _) = data.iid_shards(100, 2, seed=3)
    assert not any(np.array_equal(half, np.sort(epoch[:50])) for epoch in shuffled)
