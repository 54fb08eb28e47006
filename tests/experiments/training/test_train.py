"""Whole runs: what is trained, on which data, and what is counted."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import data
from experiments.configs import CONFIGS
from experiments.methods import PAPER_METHODS
from experiments.training import inputs, tasks
from experiments.training import train as training
from experiments.training.checkpoints import Checkpoints

DIGITS = dataclasses.replace(
    CONFIGS["digits"], iterations=120, evaluate_every=50, rounds_per_call=10
)


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def run(config, method, dataset, **options) -> tuple[Any, list[Any]]:
    points = []
    record = training.train(config, method, 1, dataset, on_point=points.append, **options)
    return record, points


def test_a_record_is_consistent_with_its_curve(digits):
    rounds = []
    record, points = run(DIGITS, "sasg", digits, on_rounds=rounds.append)
    assert [point.iteration for point in points] == [50, 100, 120]
    assert sum(rounds) == record.iterations == 120
    last = points[-1]
    assert (record.uploads, record.final_test_accuracy) == (last.uploads, last.test_accuracy)
    assert record.final_train_loss == last.train_loss
    # 64-64-10 at 1 %: 40 + 1 + 6 + 1 entries; indices of 2, 1, 2 and 1 bytes.
    assert record.num_parameters == 64 * 64 + 64 + 64 * 10 + 10
    assert record.paper_uplink_bits == record.uploads * 32 * 48
    assert record.uplink_bytes == record.uploads * (48 * 4 + 40 * 2 + 1 + 6 * 2 + 1) + 120 * 10
    assert record.downlink_bytes == 120 * 10 * 4 * record.num_parameters
    # In the first 10 rounds all ten workers upload; later not always.
    assert 10 * 10 <= record.uploads < 120 * 10
    uploads = np.diff([0] + [point.uploads for point in points])
    np.testing.assert_allclose([p.upload_fraction for p in points], uploads / [500, 500, 200])


def test_runs_repeat_to_the_bit(digits):
    (first, points), (second, again) = (run(DIGITS, "sasg_two_way", digits) for _ in range(2))
    assert points == again
    timings = {"compute_seconds": 0.0, "ms_per_iteration": 0.0}
    assert dataclasses.replace(first, **timings) == dataclasses.replace(second, **timings)


def test_methods_start_from_the_same_parameters_and_data(digits):
    """Until the first step, all methods see the same losses."""
    config = dataclasses.replace(DIGITS, iterations=1, evaluate_every=1)
    losses = {run(config, method, digits)[0].final_train_loss for method in PAPER_METHODS}
    assert len(losses) == 1
    other_seed = training.train(config, "sgd", 2, digits)
    assert other_seed.final_train_loss not in losses


def test_accuracy_is_that_of_the_whole_test_set(digits):
    """An accuracy is a whole number of test images, also where they do not fill a last batch."""
    many = dataclasses.replace(
        digits,
        test_images=np.concatenate([digits.test_images] * 3 + [digits.test_images[:1]]),
        test_labels=np.concatenate([digits.test_labels] * 3 + [digits.test_labels[:1]]),
    )
    assert len(many.test_labels) == 1081
    config = dataclasses.replace(DIGITS, iterations=50)
    small, large = run(config, "sgd", digits)[0], run(config, "sgd", many)[0]
    correct = round(large.final_test_accuracy * 1081)
    assert correct == pytest.approx(large.final_test_accuracy * 1081, abs=1e-9)
    assert correct - 3 * round(small.final_test_accuracy * 360) in (0, 1)


def test_heterogeneous_workers_hold_one_data_set_each(digits):
    dark = dataclasses.replace(digits, name="dark", train_images=digits.train_images // 2)
    dataset, source = data.combine([digits, dark])
    shards = inputs.partition(DIGITS, dataset, source, seed=0)
    for worker, shard in enumerate(shards):
        assert set(source[shard]) == {worker % 2}
    record, _ = run(dataclasses.replace(DIGITS, iterations=20), "sasg", dataset, source=source)
    assert record.dataset == dataset.name


class Normalised(nn.Module):
    """The least network with statistics of its batches."""

    classes: int

    @nn.compact
    def __call__(self, images, *, train):
        x = nn.BatchNorm(use_running_average=not train)(images.reshape(len(images), -1))
        return nn.Dense(self.classes)(x)


def test_each_test_set_is_for_the_workers_that_hold_its_like(digits, monkeypatch):
    """With BatchNorm statistics of these workers alone: averages over all would fit neither."""
    bright = dataclasses.replace(
        digits,
        train_images=255 - digits.train_images // 4,
        test_images=255 - digits.test_images[:100] // 4,
        test_labels=digits.test_labels[:100],
    )
    dataset, source = data.combine([digits, bright])
    whole, parts = [], []
    first = lambda model_state: np.asarray(model_state["BatchNorm_0"]["mean"])

    def mean(model_state):
        parts.append(first(model_state))
        return jax.tree.map(lambda x: x.mean(0), model_state)

    def record(ledger, model_state):
        del ledger
        whole.append(first(model_state))

    monkeypatch.setattr(training.sasg_jax.Ledger, "record_model_state", record)
    monkeypatch.setattr(training.sasg_jax, "mean_model_state", mean)
    monkeypatch.setattr(tasks, "make_model", lambda config, classes: Normalised(classes))
    config = dataclasses.replace(DIGITS, iterations=2, evaluate_every=2)
    run(config, "sgd", dataset, source=source)
    (everyone,) = whole
    assert len(np.unique(everyone, axis=0)) == config.num_workers
    for part, workers in zip(parts, (everyone[0::2], everyone[1::2]), strict=True):
        np.testing.assert_array_equal(part, workers)


def test_dirichlet_partition_is_skewed(digits):
    config = dataclasses.replace(DIGITS, partition="dirichlet", concentration=0.1)
    shards = inputs.partition(config, digits, None, seed=0)
    even = inputs.partition(DIGITS, digits, None, seed=0)

    def largest_class_share(shards):
        counts = [np.bincount(digits.train_labels[shard], minlength=10) for shard in shards]
        return np.mean([count.max() / count.sum() for count in counts])

    assert largest_class_share(shards) > 0.5 > 0.2 > largest_class_share(even)


def test_a_diverging_run_is_an_error(digits):
    config = dataclasses.replace(DIGITS, learning_rate=1e6)
    with pytest.raises(FloatingPointError, match=r"sgd \(seed 1\) diverged.*learning rate"):
        run(config, "sgd", digits)


def test_augmentation_crops_and_flips_whole_images():
    image = np.arange(1, 65, dtype=np.uint8).reshape(1, 8, 8, 1)
    seen = set()
    for seed in range(40):
        out = np.asarray(inputs.augment(jnp.asarray(image), jax.random.key(seed)))[0, :, :, 0]
        padded = np.pad(image[0, :, :, 0], 4)
        places = [
            (row, column, flipped)
            for row in range(9)
            for column in range(9)
            for flipped, crop in enumerate((padded[row : row + 8, column : column + 8],) * 2)
            if (out == (crop[:, ::-1] if flipped else crop)).all()
        ]
        assert len(places) == 1
        seen.add(places[0])
    assert {place[2] for place in seen} == {0, 1}
    assert len({place[:2] for place in seen}) > 10


def test_normalised_training_images_have_mean_0_and_deviation_1(digits):
    normalised = inputs.normaliser(digits.train_images)(digits.train_images)
    assert float(normalised.mean()) == pytest.approx(0, abs=1e-4)
    assert float(normalised.std()) == pytest.approx(1, abs=1e-4)


@pytest.mark.slow
def test_a_narrow_resnet_with_augmentation_runs(digits):
    """BatchNorm statistics stay with their worker, and their averaging is counted."""
    images = np.random.default_rng(0).integers(0, 256, (60, 16, 16, 3), dtype=np.uint8)
    labels = np.arange(60, dtype=np.int32) % 10
    dataset = data.Dataset("noise", images, labels, images[:20], labels[:20], 10)
    config = dataclasses.replace(
        CONFIGS["cifar10_resnet18"],
        width=2,
        iterations=4,
        evaluate_every=2,
        num_workers=3,
        batch_size=2,
    )
    record, points = run(config, "sasg", dataset)
    assert len(points) == 2
    channels = 2 * (1 + 2 * 2) + sum(2 * 2**stage * 5 for stage in (1, 2, 3))
    # Mean and variance, 4 bytes each, of 3 workers, at 2 evaluations.
    assert record.model_state_bytes == channels * 2 * 4 * 3 * 2


@pytest.mark.parametrize(
    "changes",
    [{}, pytest.param({"model": "resnet18", "width": 2, "augment": True}, marks=pytest.mark.slow)],
    ids=["mlp", "resnet18"],
)
def test_one_by_one_is_the_same_run_up_to_rounding(digits, changes):
    config = dataclasses.replace(DIGITS, iterations=2, evaluate_every=1, num_workers=2, **changes)
    together, apart = (
        run(config, "sasg", digits, one_by_one=one_by_one)[1] for one_by_one in (False, True)
    )
    for point, other in zip(together, apart, strict=True):
        assert point.train_loss == pytest.approx(other.train_loss, rel=1e-4)
        assert point.uploads == other.uploads


@pytest.mark.parametrize("method", PAPER_METHODS)
def test_every_method_learns_the_digits(digits, method):
    config = dataclasses.replace(CONFIGS["digits"], iterations=600)
    assert run(config, method, digits)[0].final_test_accuracy > 0.9


LM = dataclasses.replace(
    CONFIGS["stdlib_lm_smoke"],
    width=32,
    context=16,
    iterations=12,
    batch_size=2,
    num_workers=2,
    local_steps=3,
    evaluate_every=4,
    rounds_per_call=2,
    density=0.05,
    down_density=0.05,
    period=2,
)


@pytest.fixture(scope="module")
def few_bytes():
    text, _ = data.load_stdlib(LM.context)
    few = {"test_windows": text.test_windows[:50], "test_lengths": text.test_lengths[:50]}
    return dataclasses.replace(text, train_windows=text.train_windows[:500], **few)


_slow = pytest.param("diloco", "muon", marks=pytest.mark.slow)


@pytest.mark.parametrize(("method", "inner"), [("local_coded", "adamw"), _slow])
def test_a_language_model_goes_on_bit_for_bit_also_after_the_rate_has_fallen(
    few_bytes, tmp_path, method, inner
):
    """Stopped after 6 of 12 rounds, where the inner optimisers have moments and have counted 18
    steps of a schedule that falls; and whole."""
    config = dataclasses.replace(LM, inner=inner)
    whole, points = run(config, method, few_bytes)

    def stop(rounds, made=[0]):  # noqa: B006
        made[0] += rounds
        if made[0] == 6:
            raise KeyboardInterrupt

    with Checkpoints(tmp_path, 0) as checkpoints, pytest.raises(KeyboardInterrupt):
        run(config, method, few_bytes, checkpoints=checkpoints, on_rounds=stop)
    starts = []
    with Checkpoints(tmp_path, 0) as checkpoints:
        resumed, later = run(
            config, method, few_bytes, checkpoints=checkpoints, on_start=starts.append
        )
    assert starts == [6]
    assert resumed.params_sha256 == whole.params_sha256
    assert later == points[1:]
    assert whole.final_bits_per_byte == points[-1].bits_per_byte
    assert whole.final_test_accuracy is None
    assert 0 < points[-1].bits_per_byte < points[0].bits_per_byte < 8.1


def test_a_package_for_each_worker(monkeypatch):
    text, source = data.load_stdlib(LM.context, packages=2)
    assert source is not None
    assert text.test_source is not None
    shards = inputs.partition(LM, text, source, 1)
    assert [set(source[shard]) for shard in shards] == [{0}, {1}]
    few = np.concatenate([np.flatnonzero(source == place)[:50] for place in (0, 1)])
    rows = np.concatenate([np.flatnonzero(text.test_source == place)[:9] for place in (0, 1)])
    names = {name: getattr(text, name)[rows] for name in ("test_windows", "test_lengths")}
    small = dataclasses.replace(
        text, train_windows=text.train_windows[few], test_source=text.test_source[rows], **names
    )
    assert small.train_windows.shape == (100, LM.context + 1)
    monkeypatch.setattr(tasks.Bytes, "score", lambda *args: args[-1].sum() * 8.0)
    config = dataclasses.replace(LM, iterations=1)
    record, _ = run(config, "adamw", small, source=source[few])
    assert record.final_bits_per_byte == 8  # of the bytes of both
