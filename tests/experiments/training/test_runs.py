"""Runs are named, made once, and reported on in a way that suits who reads."""

import dataclasses
import io
import re

import pytest
import rich.console

from experiments import data
from experiments.configs import CONFIGS
from experiments.training import runs
from experiments.training.records import Point, Store

DIGITS = dataclasses.replace(CONFIGS["digits"], iterations=40, evaluate_every=10)


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def console(*, terminal=False):
    return rich.console.Console(file=io.StringIO(), width=200, force_terminal=terminal)


def text(console):
    return console.file.getvalue()


def test_names_tell_densities_apart_where_they_matter():
    names = {
        runs.Run(dataclasses.replace(DIGITS, density=density), method, seed).name
        for density in (0.01, 0.001)
        for method in ("sasg", "lasg")
        for seed in (1, 2)
    }
    assert names == {
        "digits-sasg-seed1",
        "digits-sasg-seed2",
        "digits-lasg-seed1",
        "digits-lasg-seed2",
        "digits-sasg-density0.001-seed1",
        "digits-sasg-density0.001-seed2",
    }
    run = runs.Run(dataclasses.replace(DIGITS, density=0.001), "sasg", 2)
    assert run.label == "SASG at 0.1 %, seed 2"


def test_a_run_is_made_once(tmp_path, digits):
    store, run = Store(tmp_path), runs.Run(DIGITS, "sasg", 1)
    said = []
    for _ in range(2):
        written = console()
        with runs.Reporter(written) as reporter:
            runs.perform(run, store, digits, None, arguments=["run"], reporter=reporter)
        said.append(text(written))
    assert "SASG, seed 1: round 40 of 40, test accuracy" in said[0]
    assert said[1].startswith("SASG, seed 1: done before")
    (files,) = store.runs()
    assert [session["round"] for session in files.about()["sessions"]] == [0]
    assert [point["iteration"] for point in files.curve()] == [10, 20, 30, 40]
    assert store.records() == [files.record()]
    assert not files.checkpoints_path.exists()
    assert files.params_path.exists()


def test_other_data_are_another_run(tmp_path, digits):
    run = runs.Run(DIGITS, "sasg", 1)
    mirrored = dataclasses.replace(digits, test_images=digits.test_images[:, :, ::-1])
    specs = [run.spec(dataset, None)["data"] for dataset in (digits, mirrored)]
    assert specs[0]["name"] == specs[1]["name"]
    assert specs[0]["sha256"] != specs[1]["sha256"]


def point(iteration):
    numbers = {field.name: 0 for field in dataclasses.fields(Point)}
    return Point(
        **numbers
        | {
            "iteration": iteration,
            "uploads": 1234,
            "uplink_bytes": 100,
            "downlink_bytes": 400,
            "dense_bytes": 2000,
            "test_accuracy": 0.9,
        }
    )


def run_of(rounds):
    config = dataclasses.replace(CONFIGS["digits"], iterations=rounds)
    return runs.Run(config, "sasg", 1)


def test_a_plain_line_says_how_far_how_good_how_much_is_saved_and_how_long(monkeypatch):
    now = 0.0
    monkeypatch.setattr(runs.time, "monotonic", lambda: now)
    written = console()
    with runs.Reporter(written) as reporter:
        reporter.follow(run_of(1000), 200)
        now = 60.0
        reporter.on_point(point(400))
        now = 61.0
        reporter.on_point(point(401))  # not again so soon
        now = 300.0
        reporter.on_point(point(1000))
    assert text(written).splitlines() == [
        "SASG, seed 1: goes on after round 200",
        "SASG, seed 1: round 400 of 1,000, test accuracy 90.00%, 1,234 uploads, "
        "1/4.0 of dense bytes both ways, 3 min left",
        "SASG, seed 1: round 1,000 of 1,000, test accuracy 90.00%, 1,234 uploads, "
        "1/4.0 of dense bytes both ways",
    ]


@pytest.mark.parametrize("plain", [False, True])
def test_a_terminal_has_a_bar_unless_it_is_to_be_plain(plain):
    written = console(terminal=True)
    with runs.Reporter(written, plain=plain) as reporter:
        reporter.follow(run_of(1000), 0)
        reporter.on_rounds(500)
        reporter.on_point(point(500))
    said = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text(written))
    assert ("500/1000" in said) == (not plain)
    if not plain:
        assert "test accuracy 90.00%, 1,234 uploads, 1/4.0 of dense bytes both ways" in said
