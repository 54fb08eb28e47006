"""The command line: what a person types, reads and finds on disk."""

import dataclasses
import json
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

from experiments import cli, data
from experiments.configs import CONFIGS
from experiments.options import Compare, Run
from experiments.training import command
from experiments.training.records import Store

ROOT = pathlib.Path(cli.__file__).parents[1]

ISSUE_KEYS = (
    "config dataset method seed num_workers iterations uploads target_accuracy "
    "iterations_at_target uploads_at_target final_test_accuracy final_train_loss "
    "paper_uplink_bits paper_uplink_bits_at_target uplink_bytes downlink_bytes "
    "compute_seconds ms_per_iteration"
).split()


def said(*arguments) -> str:
    """The one line with which a command ends."""
    with pytest.raises(SystemExit) as error:
        cli.main(list(map(str, arguments)))
    line = str(error.value)
    assert line.startswith("error: ")
    assert "\n" not in line
    return line.removeprefix("error: ")


def test_compare_writes_records_curves_and_a_figure(tmp_path, capsys):
    out = tmp_path / "out"
    cli.main(
        ["compare", "digits", "--methods", "sasg", "sgd", "--width", "4", "--iterations", "200"]
        + ["--out", str(out)]
    )
    records = json.loads((out / "summary.json").read_text())
    assert [(r["method"], r["seed"]) for r in records] == [("sgd", 1), ("sasg", 1)]
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


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Results of a short run."""
    out = tmp_path_factory.mktemp("done")
    cli.main(["run", "digits", "--method", "lasg", "--seed", "3", *SHORT, "--out", str(out)])
    return out


SHORT = "--width 4 --iterations 20".split()


def test_run_adds_to_earlier_ones_and_does_not_repeat_them(done, capsys):
    out = [*SHORT, "--out", str(done)]
    cli.main(["run", "digits", "--method", "sparse", "--seed", "3", *out])
    written = {path: path.read_bytes() for path in done.glob("runs/*/*.json*")}
    cli.main(["run", "digits", "--method", "lasg", "--seed", "3", *out])
    assert "LASG, seed 3: done before" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in done.glob("runs/*/*.json*")} == written
    records = json.loads((done / "summary.json").read_text())
    assert [(r["method"], r["seed"]) for r in records] == [("sparse", 3), ("lasg", 3)]


def test_results_of_other_options_are_not_gone_on_with(done):
    line = said("run", "digits", "--method", "lasg", "--seed", 3, "--width", 4, "--out", done)
    assert "config.iterations is 20 there and 3000 here" in line
    assert line.endswith("Choose another --out.")
    assert "holds results of digits" in said("run", "mnist_fc", "--out", done)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--iterations 0", "Expected --iterations=0 to be at least 1."),
        ("--width -3", "Expected --width=-3 to be at least 1."),
        ("--num-workers 0", "Expected --num-workers=0 to be at least 1."),
        ("--concentration 0", "Expected --concentration=0.0 to be above 0 and finite."),
        ("--connect-timeout inf", "Expected --connect-timeout=inf to be above 0 and finite."),
        ("--density 1.5", "Expected --density=1.5 to be at most 1."),
        ("--density nan", "Expected --density=nan to be above 0 and finite."),
        ("--checkpoint-seconds -1", "Expected --checkpoint-seconds=-1.0 to be at least 0."),
        ("--seeds 1 1", "Expected --seeds to name one or more, each once, got (1, 1)."),
        ("--seeds -1", "Expected --seeds=-1 to be at least 0."),
        ("--seeds 4294967296", "Expected seed=4294967296 to be an integer from 0 to 4294967295."),
        ("--methods sasg sasg", "Expected --methods to name one or more, each once, got "),
        ("--methods sasg --exchange psum", "Expected exchange='psum' to be another where"),
        ("--dataset digits+digits --partition dirichlet", "Expected --partition=iid with several"),
        ("--num-workers 1500", "Expected num_workers=1500 to be an integer from 1 to 1437."),
        (
            "--num-workers 40 --partition dirichlet --concentration 0.001",
            "Expected concentration=0.001 to leave each of num_workers=40 an example",
        ),
        ("--num-processes 2", "A run over several processes also needs --coordinator and --proc"),
        ("--coordinator host --num-processes 2 --process-id 0", "Expected --coordinator=host to b"),
        ("--coordinator a:1 --num-processes 2 --process-id 2", "Expected --process-id=2 from 0 to"),
        ("--coordinator a:1 --num-processes 0 --process-id 0", "Expected --num-processes=0 to be"),
    ],
)
def test_errors_name_the_argument_and_what_is_allowed(tmp_path, options, message):
    assert said("compare", "digits", *options.split(), "--out", tmp_path).startswith(message)
    assert not list(tmp_path.glob("**/run.json"))  # so that the right command finds no other run


def test_an_environment_that_is_no_number_is_named(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    assert "JAX_NUM_PROCESSES=two to be a whole number" in said("run", "digits")


def test_the_environment_says_where_the_processes_meet(monkeypatch):
    for name, value in (("COORDINATOR_ADDRESS", "there:1"), ("NUM_PROCESSES", "3")):
        monkeypatch.setenv(f"JAX_{name}", value)
    assert "also needs --process-id" in said("run", "digits")
    monkeypatch.setenv("JAX_PROCESS_ID", "2")
    assert command.find_place(Run("digits")) == ("there:1", 3, 2)
    assert command.find_place(Run("digits", process_id=0)) == ("there:1", 3, 0)


def test_what_is_not_given_is_the_configurations(monkeypatch):
    own = dataclasses.replace(CONFIGS["digits"], partition="dirichlet", concentration=0.2)
    monkeypatch.setitem(CONFIGS, "digits", own)
    assert command.configure(Compare("digits")) == own
    assert command.configure(Run("digits", partition="iid", density=0.5)) == dataclasses.replace(
        own, partition="iid", density=0.5
    )


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere"])
@pytest.mark.parametrize("asked", ["run digits", "reproduce theory", "bench", "wire"])
def test_where_no_folder_can_be_made_is_named_at_once(tmp_path, asked, place):
    (tmp_path / "file").write_text("")
    line = said(*asked.split(), "--out", tmp_path / place)
    assert line.startswith("[Errno ")
    assert place in line


@pytest.mark.parametrize("name", ["run.json", "record.json", "curve.jsonl"])
def test_a_file_that_is_broken_is_named(done, tmp_path, name):
    shutil.copytree(done / "runs", tmp_path / "runs")
    path = tmp_path / "runs" / "digits-lasg-seed3" / name
    for content in ("torn\n", "{}\n", "[]\n", "3\n"):
        path.write_text(content)
        assert str(path) in said("report", tmp_path)
        if name != "curve.jsonl":  # of which other runs have no need
            asked = "run digits --method sgd --out".split()
            assert str(path) in said(*asked, tmp_path)


def test_two_data_sets_go_to_the_workers_in_turn(tmp_path):
    cli.main(["run", "digits", "--dataset", "digits+digits", *SHORT, "--out", str(tmp_path)])
    (record,) = json.loads((tmp_path / "summary.json").read_text())
    assert record["dataset"].count("digits") == 2


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.processes)]
)
def test_a_run_that_is_stopped_goes_on(tmp_path, number):
    """Ctrl-C says how; after SIGKILL, the same command is enough."""
    asked = (
        "run digits --method sparse --width 4 --iterations 700 --checkpoint-seconds 0 --out".split()
    )
    program = [sys.executable, "-m", "experiments", *asked, str(tmp_path)]
    with subprocess.Popen(program, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        while not checkpoint(tmp_path) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(number)
        _, errors = process.communicate()
    if number is signal.SIGINT:
        assert process.returncode == 1
        assert errors == f"error: interrupted. To go on: {shlex.join(['python', *program[1:]])}\n"
    else:
        assert process.returncode == -number, errors
    subprocess.run(program, check=True, cwd=ROOT)
    (files,) = Store(tmp_path).runs()
    begun = [session["round"] for session in files.about()["sessions"]]
    assert begun[0] == 0 < begun[1] < 700
    assert [point["iteration"] for point in files.curve()] == list(range(100, 701, 100))
    assert not files.checkpoints_path.exists()


def checkpoint(out):
    """The newest round from which a run could go on."""
    names = [path.name for path in out.glob("runs/*/checkpoints/*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def test_ctrl_c_without_a_folder_says_where_it_was(tmp_path, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "load_named", interrupt)
    line = said("run", "digits", "--seed", "2")
    where = line.removeprefix(
        "interrupted. To go on: python -m experiments run digits --seed 2 --out results/digits-"
    )
    assert len(where) == len("20260101-120000")


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit):
        cli.main(["compare", "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    options = "--methods --seeds --iterations --dataset --data-dir --archives --out --width"
    for option in options.split():
        assert option in text
    for words in ("sends every gradient whole", "mnist_fc", "nothing there is overwritten"):
        assert words in text


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_is_listed_and_has_a_help(name, capsys):
    for arguments in (["--help"], [name, "--help"]):
        with pytest.raises(SystemExit) as error:
            cli.main(arguments)
        assert not error.value.code
        assert name in capsys.readouterr().out


@pytest.mark.parametrize("asked", ["--help", "compare --help", "run --help", "launch --help"])
def test_help_needs_nothing_heavy(asked):
    code = (
        "import sys, contextlib; from experiments import cli\n"
        "with contextlib.suppress(SystemExit): cli.main(sys.argv[1:])\n"
        "assert not {'jax', 'numpy', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, *asked.split()], check=True, cwd=ROOT)


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch, capsys):
    monkeypatch.setattr(command, "check", lambda options: {}["no such key"])
    assert said("run", "digits") == "KeyError: 'no such key'"
    assert "Traceback" in capsys.readouterr().err


def test_a_missing_extra_is_named():
    """Without tyro, the command says what to install instead of a traceback."""
    code = (
        "import sys, runpy; sys.modules['tyro'] = None; sys.argv[1:] = ['run', 'digits']; "
        "runpy.run_module('experiments', run_name='__main__')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 1
    assert "tyro" in result.stderr
    assert 'pip install -e ".[experiments]"' in result.stderr
    assert "Traceback" not in result.stderr
