"""Methods are tuned on one seed and reported on others; what cannot be tuned is refused."""

import dataclasses
import json

import pytest

from experiments import cli
from experiments.configs import CONFIGS
from experiments.options import Compare
from experiments.training import grid
from experiments.training.records import write_json
from experiments.training.runs import Run

DIGITS = CONFIGS["digits"]
AXES = {
    "learning_rate": (0.1, 0.3),
    "alpha_c": (0.1, 0.5),
    "density": (0.01, 0.05),
    "period": (4, 8, 16),
    "silence": ("reuse", "keep"),
}


@pytest.mark.parametrize(
    ("method", "count"),
    [("sgd", 2), ("sparse", 2 * 2), ("lasg", 2 * 2 * 2), ("sasg", 16), ("turn", 2 * 2 * 3 * 2)],
)
def test_a_method_is_tried_with_all_that_it_takes_and_nothing_else(method, count):
    configs = grid.candidates(DIGITS, method, AXES)
    assert len({Run(config, method, 1).name for config in configs}) == len(configs) == count


def test_a_c_is_that_of_all_rules_with_an_alpha():
    (config,) = grid.candidates(DIGITS, "sasg", {"alpha_c": (0.2,)})
    assert config.alpha_c == {"lasg": 0.2, "sasg": 0.2}


def _record(uploads, rounds=100, up=10, down=10, accuracy=0.9):
    taken = dict(zip(grid.OUTCOME, (rounds, uploads, up, down, rounds), strict=True))
    at_target = {f"{key}_at_target": uploads and value for key, value in taken.items()}
    return {**at_target, "final_test_accuracy": accuracy}


@pytest.mark.parametrize(
    ("by", "place"),
    [("uploads", 2), ("rounds", 1), ("bytes", 3)],
)
def test_the_best_takes_least_to_the_target(by, place):
    records = [
        _record(None, accuracy=0.99),  # never got there
        _record(500, rounds=50, up=9, down=90),
        _record(100, rounds=200, up=8, down=80),
        _record(300, rounds=80, up=7, down=20),
        None,  # diverged
    ]
    assert grid.best(records, by) == place


def test_of_none_at_the_target_the_best_is_nearest():
    records = [None, _record(None, accuracy=0.5), _record(None, accuracy=0.7), None]
    assert grid.best(records, "uploads") == 2


def test_axes_are_options_with_several_values():
    options = Compare("digits", learning_rates=(0.1, 0.2), density=(0.05,), period=(4, 8))
    assert grid.axes(options) == {"learning_rate": (0.1, 0.2), "period": (4, 8)}


def test_gradients_are_rounds_of_so_many():
    config = dataclasses.replace(DIGITS, evaluate_every=100)
    several = {"local_steps": (1, 8)}
    rounds = [(c.iterations, c.evaluate_every)
              for c in grid.candidates(config, "turn", several, 1000)]  # fmt: skip
    assert rounds == [(1000, 100), (125, 12)]
    (both,) = grid.candidates(config, "sasg", gradients=1001)  # which takes two in a round
    assert both.iterations == 500
    assert grid.of_method(config, "turn", None) == config
    with pytest.raises(ValueError, match=r"^Expected --gradients=1 to be enough for a round, 2\."):
        grid.of_method(config, "sasg", 1)


def test_what_a_method_does_not_take_makes_no_difference_to_it():
    """Also where there is one value for all: rule (6) has an α that is for gradients."""
    config = dataclasses.replace(DIGITS, local_steps=4, residual_decay=0.9)
    taken = {}
    for method in ("sasg", "sgd", "turn"):
        (own,) = grid.candidates(config, method, gradients=100)
        taken[method] = own.local_steps, own.residual_decay, own.iterations
    assert taken == {"sasg": (1, 0.9, 50), "sgd": (4, None, 25), "turn": (4, 0.9, 25)}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    out = tmp_path_factory.mktemp("tuned")
    command = "compare digits --methods sgd turn --learning-rates 0.1 1 --period 2 --seeds 1 2 3"
    small = f"--width 8 --iterations 60 --evaluate-every 10 --target 0.5 --quiet --out {out}"
    cli.main(f"{command} {small}".split())
    return out


def test_trials_end_at_the_target_and_reported_runs_do_not(tuned):
    rounds = {}
    for path in tuned.glob("runs/*/record.json"):
        record = json.loads(path.read_text())
        rounds.setdefault(record["seed"] == 1, []).append(record)
    assert len(rounds[True]) == 4  # two rates of each method
    assert len(rounds[False]) == 4  # the best of each, with two more seeds
    for record in rounds[True]:
        assert record["iterations"] == record["iterations_at_target"] or 60
    assert any(record["iterations"] < 60 for record in rounds[True])
    assert {record["iterations"] for record in rounds[False]} == {60}


def test_what_was_tried_and_picked_is_on_disk(tuned):
    best = json.loads((tuned / "best.json").read_text())
    assert (best["picked_with_seed"], best["reported_seeds"]) == (1, [2, 3])
    assert (tuned / "best.png").exists()  # of all that were tried
    for name, method in best["methods"].items():
        tried = method["tried"]
        assert [trial["learning_rate"] for trial in tried] == [0.1, 1.0]
        cost = [trial["uploads_at_target"] or 1e9 for trial in tried]
        assert method["best"]["learning_rate"] == tried[cost.index(min(cost))]["learning_rate"]
        assert [run["seed"] for run in method["runs"]] == [2, 3]
        for run in method["runs"]:
            folder = f"digits-{name}"
            rate = method["best"]["learning_rate"]
            folder += f"-learning_rate{rate:g}" * (rate != DIGITS.learning_rate)
            folder += "-period2" * (name == "turn")
            path = tuned / "runs" / f"{folder}-seed{run['seed']}" / "record.json"
            record = json.loads(path.read_text())
            assert run["uploads_at_target"] == record["uploads_at_target"]
            assert run["gradients_per_worker_at_target"] == record["iterations_at_target"]
            assert run["accuracy"] == record["final_test_accuracy"]


def test_the_same_command_makes_nothing_anew(tuned, capsys):
    before = {path: path.read_bytes() for path in tuned.glob("runs/*/record.json")}
    command = "compare digits --methods sgd turn --learning-rates 0.1 1 --period 2 --seeds 1 2 3"
    small = f"--width 8 --iterations 60 --evaluate-every 10 --target 0.5 --quiet --out {tuned}"
    cli.main(f"{command} {small}".split())
    assert {path: path.read_bytes() for path in tuned.glob("runs/*/record.json")} == before
    printed = " ".join(capsys.readouterr().out.split())
    assert "each at its best" in printed
    assert "Means over seeds 2, 3." in printed


def test_other_methods_do_not_write_over_what_was_tuned_before(tmp_path):
    write_json(tmp_path / "best.json", {"methods": {"sgd": {}, "turn": {}}})
    assert grid.path(tmp_path, ("turn", "sgd")) == tmp_path / "best.json"
    assert grid.path(tmp_path, ("sasg",)) == tmp_path / "best-2.json"
    write_json(tmp_path / "best-2.json", {"methods": {"sasg": {}}})
    assert grid.path(tmp_path, ("sasg",)) == tmp_path / "best-2.json"
    assert grid.path(tmp_path, ("lasg", "sasg")) == tmp_path / "best-3.json"


def test_a_setting_that_diverges_is_not_the_best(tmp_path, capsys):
    command = "compare digits --methods sgd --learning-rates 1e18 0.5 --optimizer sgd --width 8"
    command += " --iterations 40 --target 0.2 --quiet"
    cli.main([*command.split(), "--out", str(tmp_path)])
    best = json.loads((tmp_path / "best.json").read_text())["methods"]["sgd"]
    assert best["best"] == {"learning_rate": 0.5}
    assert best["tried"][0] == {"learning_rate": 1e18, "seed": 1, "diverged": True}
    assert "In turn" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--learning-rates 0.1 0.1", "Expected --learning-rates to have each value once, got (0.1"),
        ("--learning-rates 0.1 -1", "Expected --learning-rates=-1.0 to be above 0 and finite."),
        ("--learning-rates inf", "Expected --learning-rates=inf to be above 0 and finite."),
        ("--methods sgd --period 4 8", "Expected --period only with one of turn, sasg_keep, turn_"),
        ("--methods sgd --period 4", "Expected --period only with one of turn, sasg_keep, turn_"),
        ("--methods turn --period 0", "Expected --period=0 to be at least 1."),
        ("--density 0.1 2", "Expected --density=2.0 to be at most 1."),
        ("--target 98", "Expected --target=98.0 to be at most 1."),
        ("--batch-size 0", "Expected --batch-size=0 to be at least 1."),
        ("--evaluate-every 0", "Expected --evaluate-every=0 to be at least 1."),
        ("--theta -1 --methods sasg_keep", "Expected --theta=-1.0 to be at least 0."),
    ],
)
def test_bad_grids_are_one_line(options, message):
    with pytest.raises(SystemExit) as error:
        cli.main(["compare", "digits", *options.split()])
    assert str(error.value).startswith(f"error: {message}")


def test_other_settings_are_another_run():
    tuned = dataclasses.replace(DIGITS, learning_rate=0.3, period=4)
    assert Run(tuned, "turn", 1).name == "digits-turn-learning_rate0.3-period4-seed1"
    assert Run(tuned, "turn", 1).label == "In turn at rate 0.3, period 4, seed 1"
    assert Run(tuned, "sgd", 1).name == "digits-sgd-learning_rate0.3-seed1"
