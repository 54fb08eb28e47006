"""Estimates of whole runs from a few rounds."""

import dataclasses
import itertools
import json

import pytest

from experiments import cli
from experiments.configs import CONFIGS
from experiments.studies import estimate


def test_the_estimate_is_of_rounds_after_the_first_d(monkeypatch):
    """Those of the first D rounds, in which everybody uploads, are not counted."""
    config = dataclasses.replace(CONFIGS["cifar10_resnet18"], width=2, history=2, iterations=7200)
    seconds = itertools.chain([0, 100, 200], [202, 205, 207, 1000])  # four rounds after the first D
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: next(seconds))
    monkeypatch.setattr("experiments.training.train.train", _train)
    found = estimate.estimate(config, "sasg", 6)
    assert found["seconds_per_round"] == 2.5
    assert found["estimated_hours"] == 5.0


def _train(config, method, seed, dataset, *, on_rounds):
    del method, seed
    assert (config.rounds_per_call, len(dataset.train_labels)) == (1, 1000)
    for _ in range(config.iterations):
        on_rounds(1)
    return type("Record", (), {"final_train_loss": 1.0, "num_parameters": 1, "uploads": 1})


def test_as_few_rounds_as_d_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="Expected --rounds=10 to be more than D=10"):
        cli.main(["estimate", "cifar10_resnet18", "--rounds", "10"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parameters", "iterations"),
    [
        ("cifar10_resnet18", 11_173_962, 15_000),
        ("cifar100_resnet18", 11_173_962 + 90 * 513, 25_000),
    ],
)
def test_full_width_settings_run_for_20_rounds(tmp_path, capsys, name, parameters, iterations):
    """Takes minutes and several GB."""
    cli.main(["estimate", name, "--methods", "sasg", "--out", str(tmp_path)])
    found = json.loads((tmp_path / f"{name}-sasg.json").read_text())
    assert found["num_parameters"] == parameters
    assert found["rounds"] == 20
    assert 10 * 10 <= found["uploads"] <= 20 * 10
    assert found["seconds_per_round"] > 0
    assert found["estimated_hours"] == found["seconds_per_round"] * iterations / 3600
    said = capsys.readouterr().out
    assert f"{found['seconds_per_round']:.1f} s a round" in said
    assert f"for {iterations:,} rounds" in said
