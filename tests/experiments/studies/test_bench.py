"""The benchmark times what it says."""

import dataclasses
import json

import numpy as np
import pytest

from experiments import cli
from experiments.configs import CONFIGS
from experiments.studies.bench import rounds, scale, selection, timing


def test_cases_take_turns_and_the_first_time_is_not_counted():
    calls = []
    cases = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    seconds = timing.interleave(cases, 3)
    assert calls == ["a", "b"] * 4
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


def test_rows_are_medians_beside_the_floor():
    floor = [2.0, 4.0, 3.0]
    row = timing.row("part", "case", [9.0, 6.0, 30.0], floor, per=10)
    assert row.seconds == pytest.approx(0.9)
    assert (row.low, row.high) == (0.6, 3.0)
    assert row.ratio == pytest.approx(3)
    assert timing.row("part", "floor", floor, floor, per=10).ratio == 1


def test_the_command_leaves_numbers_and_a_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(selection, "SIZES", (2000,))
    out = tmp_path / "bench"
    cli.main(["bench", "--parts", "selection", "--repeats", "2", "--out", str(out)])
    content = json.loads((out / "selection.json").read_text())
    rows = {row["case"]: row for row in content["rows"]}
    assert rows.keys() >= {"one pass", "ours", "lax.top_k"}
    for row in rows.values():
        assert row["low"] <= row["seconds"] <= row["high"]
        assert row["ratio"] == row["seconds"] / rows["one pass"]["seconds"]
    assert content["command"].startswith("python -m experiments bench")
    assert (out / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert "top 1 % of 2,000" in capsys.readouterr().out


def test_bad_repeats(capsys):
    with pytest.raises(SystemExit, match="Expected --repeats=0 to be at least 1"):
        cli.main(["bench", "--repeats", "0"])


def _peak_with(size):
    np.ones(size, np.uint8)
    return timing.peak_bytes()


@pytest.mark.processes
@pytest.mark.skipif(not timing.peak_bytes(), reason="this system does not tell a process its peak")
def test_memory_is_that_of_a_process_of_its_own():
    """Not of the process that starts it, and all that it has had."""
    mine = np.ones(2**30, np.uint8)
    little, much = (timing.in_a_process(_peak_with, size) for size in (2**10, 2**29))
    assert little < mine.nbytes < timing.peak_bytes()
    assert much - little > 0.9 * 2**29


@pytest.mark.slow
def test_many_workers_are_timed_after_the_rounds_in_which_all_must_upload():
    assert len(scale.many_workers(12, 2)[0]) == 2


def test_a_workers_step_needs_at_most_nine_arrays_like_its_parameters():
    """Of these, the rule (6) keeps the parameters of two rounds."""
    size = 10_000_000
    seconds, _, needed = scale.many_parameters(size, 1)
    assert len(seconds) == 1
    assert 4 * size < needed <= 9 * 4 * size


def test_a_run_that_is_timed_is_under_way(monkeypatch):
    """In its first ten rounds everybody uploads; those are over, and not counted."""
    monkeypatch.setattr(rounds, "WARM_UP_CALLS", 1)
    config = dataclasses.replace(CONFIGS["mnist_fc"], num_workers=2)
    simulated = rounds.Simulated(config, "sasg", rounds.calls(*rounds.examples(2, 2, 20, 0.5)))
    (warm_up,) = simulated._uploaded
    assert np.all(warm_up[:10])
    simulated.run()
    timed = np.mean(simulated._uploaded[1])
    assert simulated.fraction() == pytest.approx(float(timed))
    assert timed < np.mean(warm_up)
