"""Which way is better, and what a target is."""

import dataclasses

import pytest

from experiments.configs import CONFIGS
from experiments.metrics import ACCURACY, BITS_PER_BYTE, metric_of
from experiments.training.records import at_target


def test_a_metric_knows_which_way_is_better():
    assert ACCURACY.reaches(0.98, 0.98)
    assert not ACCURACY.reaches(0.97, 0.98)
    assert BITS_PER_BYTE.reaches(2.0, 2.0)
    assert not BITS_PER_BYTE.reaches(2.1, 2.0)
    assert ACCURACY.cost(0.9) < ACCURACY.cost(0.8)
    assert BITS_PER_BYTE.cost(2.0) < BITS_PER_BYTE.cost(2.1)


@pytest.mark.parametrize("metric", [ACCURACY, BITS_PER_BYTE])
def test_nothing_reaches_no_target(metric):
    assert not metric.reaches(1.0, None)
    assert "no target" in metric.describe_target(None)


def test_it_is_shown_as_people_write_it():
    assert ACCURACY.show(0.98123) == "98.12%"
    assert ACCURACY.describe_target(0.98) == "98% test accuracy"
    assert BITS_PER_BYTE.show(2.04849) == "2.048"
    assert BITS_PER_BYTE.describe_target(2.05) == "2.050 bits per byte"


def test_each_experiment_has_one():
    for name, config in CONFIGS.items():
        metric = metric_of(config)
        assert metric is (BITS_PER_BYTE if name.startswith("stdlib") else ACCURACY)
        assert metric_of(dataclasses.asdict(config)) is metric


def test_of_a_text_the_first_point_at_or_below_the_target_counts():
    counts = ("uploads", "paper_uplink_bits", "uplink_bytes", "downlink_bytes")
    point = lambda at, bits: {"iteration": at, "bits_per_byte": bits, **dict.fromkeys(counts, at)}
    curve = [point(10, 3.0), point(20, 2.0), point(30, 1.5)]
    found = at_target(curve, 2.0, BITS_PER_BYTE)
    assert found["bits_per_byte_target"] == 2.0
    assert found["iterations_at_target"] == found["uploads_at_target"] == 20
    assert at_target(curve, None, BITS_PER_BYTE)["iterations_at_target"] is None
