"""Runs over several processes never hang when one is gone, and go on where they were stopped."""

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from experiments import cli
from experiments.training.records import Store

ROOT = pathlib.Path(cli.__file__).parents[1]


@contextlib.contextmanager
def started(*arguments, **environment):
    """A command whose output is collected; it is killed if it does not end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def processes_of(out, timeout=120):
    """The ids of a run's processes, once it is training."""
    deadline = time.monotonic() + timeout
    while not list(out.glob("runs/*/curve.jsonl")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (about,) = out.glob("runs/*/run.json")
    (session,) = json.loads(about.read_text())["sessions"]
    return [int(name.split()[1]) for name in session["processes"]]  # "pid 123 on host"


def assert_gone(pids, timeout=20):
    deadline = time.monotonic() + timeout
    for pid in pids:
        while pathlib.Path(f"/proc/{pid}").exists() and not is_zombie(pid):
            assert time.monotonic() < deadline, f"process {pid} still runs"
            time.sleep(0.1)


def is_zombie(pid):
    with contextlib.suppress(FileNotFoundError):
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


LONG = ("run", "digits", "--iterations", "10000000", "--width", "4")


def test_two_processes_make_one_run(tmp_path):
    command = (
        "launch -- run digits --method sgd --width 4 --num-workers 2 --iterations 20 --out".split()
    )
    with started(*command, tmp_path) as launcher:
        output, _ = launcher.communicate(timeout=240)
    assert launcher.returncode == 0, output
    assert output.count("Results: ") == 1
    (record,) = Store(tmp_path).records()
    assert (record["processes"], record["num_workers"], record["driver"]) == (2, 2, "shard_map")
    (session,) = Store(tmp_path).runs()[0].about()["sessions"]
    assert session["processes"][0].startswith(f"pid {launcher.pid} on ")
    assert len(set(session["processes"])) == 2
    assert session["command"].startswith("python -m experiments launch -- run digits ")


@pytest.mark.processes
def test_all_name_a_process_that_is_killed(tmp_path):
    with started("launch", "--processes", 3, "--", *LONG, "--out", tmp_path) as launcher:
        pids = processes_of(tmp_path)
        os.kill(pids[2], signal.SIGKILL)
        output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 1
    for index in (0, 1):
        assert f"error: Lost process 2 of 3 (pid {pids[2]} on " in output
        assert f"): it was killed or crashed. Process {index} ends too.\n" in output
    assert_gone(pids)


@pytest.mark.processes
def test_processes_name_the_first_when_it_is_killed(tmp_path):
    """Started one by one, as a cluster's scheduler does."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = ["--coordinator", f"127.0.0.1:{server.getsockname()[1]}", "--num-processes", 2]
    place += ["--out", tmp_path]
    with (
        started(*LONG, *place, "--process-id", 0) as zero,
        started(*LONG, *place, "--process-id", 1) as one,
    ):
        pids = processes_of(tmp_path)
        assert pids == [zero.pid, one.pid]
        zero.kill()
        output, _ = one.communicate(timeout=60)
    assert one.returncode != 0
    assert f"error: Lost process 0 of 2 (pid {zero.pid} on " in output


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("when", ["starting", "training"])
def test_nothing_is_left_when_the_launcher_ends(tmp_path, when, number):
    # Who has not met the others when process 0 is gone waits for it so long.
    waits = ("--connect-timeout", 10) if when == "starting" else ()
    with started("launch", "--", *LONG, *waits, "--out", tmp_path) as launcher:
        if when == "starting":
            children = pathlib.Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
            deadline = time.monotonic() + 60
            while not (pids := list(map(int, children.read_text().split()))):
                assert time.monotonic() < deadline
                time.sleep(0.1)
        else:
            pids = processes_of(tmp_path)
        os.kill(launcher.pid, number)
        if number is signal.SIGKILL:
            launcher.wait(timeout=10)
        else:
            output, _ = launcher.communicate(timeout=30)
            assert launcher.returncode == 1
            assert "Traceback" not in output
            assert "error: interrupted." in output
            if when == "training":
                assert f"To go on: python -m experiments launch -- {' '.join(LONG)}" in output
        assert_gone(pids, timeout=60)


@pytest.mark.processes
def test_a_process_that_does_not_come_is_named(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        coordinator = f"127.0.0.1:{server.getsockname()[1]}"
    arguments = ("run", "digits", "--coordinator", coordinator, "--connect-timeout", 2)
    arguments += ("--num-processes", 2, "--out", tmp_path / "out")
    for index, said in enumerate(
        ("Of 2 processes, these did not come: 1.", f"No process 0 at {coordinator} in 2 s.")
    ):
        with started(*arguments, "--process-id", index) as process:
            output, _ = process.communicate(timeout=60)
        assert process.returncode == 1
        assert output == f"error: {said}\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.processes
def test_other_options_in_another_process_are_named(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = f"--coordinator 127.0.0.1:{server.getsockname()[1]} --num-processes 2".split()
    place = ["run", "digits", *place, "--connect-timeout", 30, "--out", tmp_path]
    with (
        started(*place, "--process-id", 0, "--seed", 1) as zero,
        started(*place, "--process-id", 1, "--seed", 2) as one,
    ):
        for process in (zero, one):
            output, _ = process.communicate(timeout=60)
            assert process.returncode == 1
            assert re.match(r"error: Process 1 .*seed=2.* and process 0 .*seed=1", output)


@pytest.mark.processes
def test_a_schedulers_processes_are_found(tmp_path):
    """What SLURM and Open MPI say, jax reads."""
    slurm = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": "2",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_NUM_NODES": "2",
    }
    command = "run digits --distributed --width 4 --iterations 20 --out".split()
    with (
        started(*command, tmp_path, **slurm, SLURM_PROCID="0") as zero,
        started(*command, tmp_path, **slurm, SLURM_PROCID="1") as one,
    ):
        for process in (zero, one):
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 0, output
    (record,) = Store(tmp_path).records()
    assert record["processes"] == 2


@pytest.mark.processes
def test_that_there_is_no_scheduler_is_said(tmp_path):
    with started(*"run digits --distributed --out".split(), tmp_path) as process:
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert output.startswith("error: No scheduler says where the processes meet: ")


@pytest.mark.processes
def test_a_failure_of_one_is_told_by_all(tmp_path):
    (tmp_path / "file").write_text("")
    with started(*"launch -- run digits --out".split(), tmp_path / "file" / "out") as launcher:
        output, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 1
    assert "Traceback" not in output
    assert "error: [Errno 20] Not a directory" in output
    assert re.search(r"error: Lost process 0 of 2 .*it failed: \[Errno 20\]", output)


# --- The command line ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--processes 0 -- run digits", "Expected --processes=0 to be at least 1"),
        (
            "--devices-per-process 0 -- run digits",
            "Expected --devices-per-process=0 to be at least 1",
        ),
        ("--processes 2", "Expected a command after --, `run ...` or `compare ...`, got nothing"),
        ("-- launch -- run digits", "Expected a command after --, `run ...` or `compare ...`, got"),
        ("-- run digits --process-id 1", "Expected no --coordinator, --num-processes or"),
        ("-- run digits --iterations 0", "Expected --iterations=0 to be at least 1"),
        ("-- run digits --num-workers 3", "Expected --num-workers=3 to be the number of devices"),
        ("-- run digits --exchange psum", "Expected exchange='psum' to be another where"),
    ],
)
def test_the_launcher_refuses_before_it_starts_anything(monkeypatch, arguments, message):
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(SystemExit) as error:
        cli.main(["launch", *arguments.split()])
    assert str(error.value).startswith(f"error: {message}")


def test_a_typing_error_after_the_dashes_is_told_once(capfd):
    with pytest.raises(SystemExit):
        cli.main(["launch", "--processes", "2", "--", "run", "digits", "--itertions", "3"])
    assert capfd.readouterr().err.count("--itertions") == 1


def test_the_launchers_help_shows_a_command(capsys):
    with pytest.raises(SystemExit):
        cli.main(["launch", "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "launch --processes 4 -- run mnist_fc --method sasg" in text
    for option in "--processes --devices-per-process".split():
        assert option in text


@pytest.mark.processes
def test_two_processes_go_on_where_they_were_killed(tmp_path):
    """With the curve, the record and the final parameters of processes that never were."""
    short = ("run", "digits", "--iterations", "1500", "--width", "16", "--method", "sasg")
    arguments = ("launch", "--processes", 2, "--", *short, "--checkpoint-seconds", 0, "--out")
    with started(*arguments, tmp_path / "killed") as launcher:
        pids = processes_of(tmp_path / "killed")
        deadline = time.monotonic() + 60
        # Until one is whole: while it is being written, its name has more in it than a number.
        while not any(p.name.isdigit() for p in tmp_path.glob("killed/runs/*/checkpoints/*")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        launcher.communicate(timeout=60)
    outcomes = []
    for folder in ("killed", "whole"):
        with started(*arguments, tmp_path / folder) as launcher:
            output, _ = launcher.communicate(timeout=300)
        assert launcher.returncode == 0, output
        (files,) = Store(tmp_path / folder).runs()
        record = files.record()
        assert record is not None
        del record["compute_seconds"], record["ms_per_iteration"]
        outcomes.append((files.curve(), record))
        begun = [session["round"] for session in files.about()["sessions"]]
        assert [first > 0 for first in begun] == [False, True][: len(begun)]
        assert len(begun) == (2 if folder == "killed" else 1)
    assert outcomes[0] == outcomes[1]
