"""The command line: what a person types, reads and finds on disk."""

import json
import subprocess
import sys

import pytest

from experiments import cli

ISSUE_KEYS = (
    "config dataset method seed num_workers iterations uploads target_accuracy "
    "iterations_at_target uploads_at_target final_test_accuracy final_train_loss "
    "paper_uplink_bits paper_uplink_bits_at_target uplink_bytes downlink_bytes "
    "compute_seconds ms_per_iteration"
).split()


def test_compare_writes_records_curves_and_a_figure(tmp_path, capsys):
    out = tmp_path / "out"
    cli.main(
        ["compare", "digits", "--methods", "sgd", "sasg", "--seeds", "1", "2"]
        + ["--iterations", "200", "--out", str(out)]
    )
    records = json.loads((out / "summary.json").read_text())
    assert [(r["method"], r["seed"]) for r in records] == [
        ("sgd", 1),
        ("sasg", 1),
        ("sgd", 2),
        ("sasg", 2),
    ]
    for record in records:
        assert set(ISSUE_KEYS) <= set(record)
        assert 0 <= record["final_test_accuracy"] <= 1
        folder = out / "runs" / f"digits-{record['method']}-seed{record['seed']}"
        lines = (folder / "curve.jsonl").read_text()
        assert [json.loads(line)["iteration"] for line in lines.splitlines()] == [100, 200]
        about = json.loads((folder / "run.json").read_text())
        assert about["config"]["iterations"] == 200
        assert about["sessions"][0]["command"].startswith("python -m experiments compare digits")
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "SASG" in printed
    assert "95% test accuracy" in printed
    assert str(out / "summary.json") in printed.replace("\n", "")


def test_run_adds_to_earlier_ones_and_does_not_repeat_them(tmp_path, capsys):
    out = ["--iterations", "20", "--out", str(tmp_path)]
    cli.main(["run", "digits", "--method", "lasg", "--seed", "3", *out])
    cli.main(["run", "digits", "--method", "sparse", "--seed", "3", *out])
    written = {path: path.read_bytes() for path in tmp_path.glob("runs/*/*.json*")}
    cli.main(["run", "digits", "--method", "lasg", "--seed", "3", *out])
    assert "LASG, seed 3: done before" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in tmp_path.glob("runs/*/*.json*")} == written
    records = json.loads((tmp_path / "summary.json").read_text())
    assert [(r["method"], r["seed"]) for r in records] == [("sparse", 3), ("lasg", 3)]


def test_results_of_other_options_are_not_gone_on_with(tmp_path):
    cli.main(["run", "digits", "--iterations", "20", "--out", str(tmp_path)])
    with pytest.raises(
        SystemExit, match=r"config.iterations is 20 there and 30 here.*another --out"
    ):
        cli.main(["run", "digits", "--iterations", "30", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"holds results of digits"):
        cli.main(["run", "mnist_fc", "--out", str(tmp_path)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--iterations", "0"], "Expected --iterations=0 to be at least 1"),
        (["--width", "-3"], "Expected --width=-3 to be at least 1"),
        (["--concentration", "0"], "Expected --concentration=0.0 to be above 0"),
        (["--density", "1.5"], "Expected --density=1.5 in (0, 1]"),
        (["--checkpoint-seconds", "-1"], "Expected --checkpoint-seconds=-1.0 to be at least 0"),
        (["--seeds", "1", "1"], "Expected --seeds to name one or more, each once"),
        (["--seeds", "-1"], "Expected seeds of at least 0"),
        (
            ["--dataset", "digits+digits", "--partition", "dirichlet"],
            "Expected --partition=iid with several data sets",
        ),
    ],
)
def test_errors_name_the_argument_and_what_is_allowed(tmp_path, arguments, message):
    with pytest.raises(SystemExit) as error:
        cli.main(["compare", "digits", *arguments, "--out", str(tmp_path / "out")])
    assert message in str(error.value)
    assert not (tmp_path / "out" / "summary.json").exists()


def test_two_data_sets_go_to_the_workers_in_turn(tmp_path):
    cli.main(
        ["run", "digits", "--dataset", "digits+digits", "--iterations", "20"]
        + ["--out", str(tmp_path)]
    )
    (record,) = json.loads((tmp_path / "summary.json").read_text())
    assert record["dataset"].count("digits") == 2


def test_help_explains_every_option():
    result = subprocess.run(
        [sys.executable, "-m", "experiments", "compare", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    text = " ".join(result.stdout.replace("│", " ").split())
    options = "--methods --seeds --iterations --dataset --data-dir --archives --out --width"
    for option in options.split():
        assert option in text
    for words in ("sends every gradient whole", "mnist_fc", "nothing there is overwritten"):
        assert words in text


def test_a_missing_extra_is_named():
    """Without tyro, the command says what to install instead of a traceback."""
    code = (
        "import sys, runpy; sys.modules['tyro'] = None; "
        "runpy.run_module('experiments', run_name='__main__')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert "need the package 'tyro'" in result.stderr
    assert 'pip install -e ".[experiments]"' in result.stderr
    assert "Traceback" not in result.stderr
