"""The table of a language model says what was run, and its cost model adds up."""

import dataclasses
import json

import pytest

from experiments.cli import main
from experiments.configs import CONFIGS
from experiments.methods import make_optimizer
from experiments.report.language import plot_bytes, plot_times, seconds
from experiments.studies.language import ROWS, config_of

LM = CONFIGS["stdlib_lm"]


@pytest.mark.parametrize("name", ROWS)
def test_each_row_takes_as_many_gradients_and_can_be_made(name):
    row, config = ROWS[name], config_of(LM, name)
    make_optimizer(config, row.method)
    assert config.iterations * config.local_steps == LM.iterations
    assert config.evaluate_every * config.local_steps == LM.evaluate_every


def test_rows_leave_out_one_part_of_ours():
    ours = config_of(LM, "ours")
    for name in ("no_density", "no_coding", "ours_adamw"):
        other = config_of(LM, name)
        differ = {
            f.name
            for f in dataclasses.fields(ours)
            if getattr(ours, f.name) != getattr(other, f.name)
        }
        assert differ <= {"density", "values", "indices", "inner"}
        assert ROWS[name].method == ROWS["ours"].method


def test_seconds_are_those_of_computing_waiting_and_moving():
    run = {"gradients": 1000, "rounds": 100}
    point = {"rounds": 50, "bytes": 1e6}
    how = {"step_ms": 20, "round_trip_ms": 30}
    assert seconds(run, point, 8e6, **how) == pytest.approx(500 * 0.020 + 50 * 0.030 + 1)


def _runs(bits):
    curve = [
        {"rounds": 10 * n, "bytes": 1e6 * n, "bits_per_byte": bits + 1 / n} for n in range(1, 5)
    ]
    return [{"gradients": 40, "rounds": 40, "curve": curve}]


def test_pictures_are_drawn(tmp_path):
    rows = {"adamw": ("AdamW", "adamw", _runs(2)), "ours": ("ours", "local_coded", _runs(1.9))}
    plot_bytes(rows, tmp_path / "bytes.png")
    plot_times(rows, tmp_path / "times.png", step_ms=50, round_trip_ms=40)
    for name in ("bytes", "times"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--rows", "none"], "Expected --rows of adamw, .*, got none"),
        (["--step-ms", "-1"], r"Expected --step-ms=-1.0 to be finite and at least 0"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path, given, message):
    with pytest.raises(SystemExit, match=message):
        main(["language", "--out", str(tmp_path), *given])


@pytest.mark.slow
def test_the_command_makes_the_table_and_goes_on(tmp_path, capsys):
    given = ["language", "--smoke", "--seeds", "1", "--out", str(tmp_path)]
    main([*given, "--rows", "adamw"])
    main([*given, "--rows", "adamw", "ours"])
    assert "done before" in capsys.readouterr().out
    rows = json.loads((tmp_path / "language.json").read_text())["rows"]
    assert set(rows) == {"adamw", "ours"}
    assert rows["adamw"][0]["gradients"] == rows["ours"][0]["gradients"] == 240
    assert rows["adamw"][0]["two_way_bytes"] > 500 * rows["ours"][0]["two_way_bytes"]
