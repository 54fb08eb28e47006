"""Runs over several processes: as in the simulation, and never hanging when one is gone."""

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

import numpy as np
import pytest

from experiments import cli
from experiments.processes import cluster, launch
from experiments.training import train as training
from experiments.training.records import Store
from tests.experiments import replicas

ROOT = pathlib.Path(cli.__file__).parent.parent
SCRIPT = (replicas.__file__,)
EXPERIMENTS = (sys.executable, "-m", "experiments")


@pytest.fixture(scope="module", autouse=True)
def paths_of_children():
    """Processes that tests start find the same packages."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, sys.path)]))
        flags = os.environ["XLA_FLAGS"]  # with one device, where the launcher does not say
        patch.setenv("XLA_FLAGS", f"{flags} --xla_force_host_platform_device_count=1")
        yield


@pytest.fixture(scope="module")
def dataset():
    return replicas.mnist()


COMPARED = ("sasg-lazy", *replicas.NARROW)
"""The paper's network once, and every method and exchange with one that takes less time."""


@pytest.fixture(scope="module")
def four_processes(tmp_path_factory, paths_of_children):
    """A folder with what four processes have seen."""
    folder = tmp_path_factory.mktemp("four")
    launch.launch([str(folder), *COMPARED], 4, program=SCRIPT)
    return folder


@pytest.fixture(scope="module")
def simulations(tmp_path_factory, paths_of_children):
    return simulate(tmp_path_factory.mktemp("simulated"), COMPARED)


def simulate(folder, names):
    """What the simulation of four workers sees, by name.

    It runs in a process as new as those that it is compared with: in one that has run other tests,
    sums were seen to be rounded differently. All exchanges but one have the same mathematics, and
    share the simulation of one of them.
    """
    shares = {}  # the name of the simulation that each name shares
    for name in names:
        same = (other for other in shares if mathematics(other) == mathematics(name))
        shares[name] = next(same, name)
    command = [sys.executable, replicas.__file__, str(folder), *dict.fromkeys(shares.values())]
    subprocess.run(command, check=True)
    return {name: np.load(folder / f"{first}-simulated.npz") for name, first in shares.items()}


def mathematics(name):
    method, exchange, *width = name.split("-")
    return method, exchange == "sharded", *width


def assert_same_run(folder, name, processes, simulated):
    seen = [np.load(folder / f"{name}-{index}.npz") for index in range(processes)]
    assert simulated["uploaded"].shape == (300, 4)
    for other in seen:
        np.testing.assert_array_equal(other["uploaded"], simulated["uploaded"])
        np.testing.assert_array_equal(other["params"], seen[0]["params"])
        assert other["uploads"] == simulated["uploads"]
        assert other["accuracy"] == pytest.approx(simulated["accuracy"], abs=2e-3)
    assert len(simulated["params"]) == 3
    np.testing.assert_allclose(seen[0]["params"], simulated["params"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", COMPARED)
def test_four_processes_do_what_the_simulation_does(four_processes, simulations, name):
    """The same uploads in every round, and the same parameters up to rounding; between processes
    the parameters are the same bit for bit."""
    assert_same_run(four_processes, name, 4, simulations[name])


@pytest.mark.slow
def test_four_processes_with_every_exchange_and_the_papers_network(tmp_path):
    launch.launch([str(tmp_path), *replicas.PAIRS], 4, program=SCRIPT)
    simulations = simulate(tmp_path, replicas.PAIRS)
    for name in replicas.PAIRS:
        assert_same_run(tmp_path, name, 4, simulations[name])


@pytest.fixture(scope="module")
def two_by_two(tmp_path_factory, paths_of_children):
    """A folder with what two processes of two devices each have seen."""
    folder = tmp_path_factory.mktemp("two_by_two")
    launch.launch([str(folder), *replicas.NARROW], 2, 2, program=SCRIPT)
    return folder


@pytest.mark.parametrize("name", replicas.NARROW)
def test_several_devices_in_a_process(two_by_two, simulations, name):
    assert_same_run(two_by_two, name, 2, simulations[name])


# --- Failures -----------------------------------------------------------------------------------


@contextlib.contextmanager
def started(*arguments, **environment):
    """A command whose output is collected; it is killed if it does not end."""
    process = subprocess.Popen(
        [*EXPERIMENTS, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
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


def test_the_launcher_names_a_process_that_is_killed(tmp_path):
    arguments = ("launch", "--processes", 3, "--", *LONG, "--out", tmp_path)
    with started(*arguments) as launcher:
        pids = processes_of(tmp_path)
        os.kill(pids[2], signal.SIGKILL)
        output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 1
    assert output.endswith("error: process 2 was killed by SIGKILL; the other 2 were stopped.\n")
    for start in ("error: ", "[process 1] error: "):
        assert re.search(rf"^{re.escape(start)}Lost process 2 of 3 .* in rounds", output, re.M)
    assert_gone(pids)


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
    assert one.returncode == cluster.ENDED_WITH_ANOTHER
    assert f"error: Lost process 0 of 2 (pid {zero.pid} on " in output
    assert re.search(r" in rounds [\d,]+ to [\d,]+ of sasg: it was killed or crashed", output)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_when_the_launcher_ends(tmp_path, number):
    arguments = ("launch", "--processes", 2, "--", *LONG, "--out", tmp_path)
    with started(*arguments) as launcher:
        children = pathlib.Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
        pids = []
        deadline = time.monotonic() + 60
        while len(pids) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
            pids = [int(pid) for pid in children.read_text().split()]
        os.kill(launcher.pid, number)
        if number is signal.SIGKILL:
            launcher.wait(timeout=10)
        else:
            output, _ = launcher.communicate(timeout=30)
            assert launcher.returncode == 1
            assert output.endswith("error: interrupted; stopped 2 processes.\n")
        assert_gone(pids, timeout=30)


def test_a_process_that_does_not_come_is_named(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        coordinator = f"127.0.0.1:{server.getsockname()[1]}"
    arguments = ("run", "digits", "--coordinator", coordinator, "--connect-timeout", 2)
    arguments += ("--num-processes", 2, "--out", tmp_path / "out")
    with started(*arguments, "--process-id", 0) as zero:
        output, _ = zero.communicate(timeout=60)
    assert zero.returncode == 1
    assert output == (
        f"error: Waited 2 s at {coordinator} for 2 processes, but process 1 did not come. Was "
        "--num-processes=2 meant?\n"
    )
    with started(*arguments, "--process-id", 1) as one:
        output, _ = one.communicate(timeout=60)
    assert one.returncode == 1
    assert output == (
        f"error: Process 1 tried for 2 s to reach process 0 at --coordinator={coordinator}: "
        "Connection refused.\n"
    )
    assert not (tmp_path / "out").exists()


def test_a_failure_of_all_processes_is_told_once_by_each(tmp_path):
    with started(
        *("launch", "--", "run", "digits", "--dataset", "no_such_set", "--out", tmp_path)
    ) as launcher:
        output, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 1
    assert "Traceback" not in output
    assert output.startswith("error: ")
    assert "[process 1] error: Lost process 0 of 2" in output


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
        ("-- run digits --process-id 1", "Expected the command after -- to have no --coordinator"),
        ("-- run digits --iterations 0", "Expected --iterations=0 to be at least 1"),
        ("-- run digits --num-workers 3", "Expected --num-workers=3 to be the number of devices"),
        ("-- run digits --exchange psum", "Expected exchange='psum' only for identity"),
    ],
)
def test_the_launcher_refuses_before_it_starts_anything(monkeypatch, arguments, message):
    monkeypatch.setattr(cli, "launch", None)
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


# --- Agreement ----------------------------------------------------------------------------------


class Others:
    """A group of three in which the other two say what a test wants."""

    index, count = 0, 3

    def __init__(self, *others):
        self.others = others

    def gather(self, value):
        return [value, *(value if other is None else other for other in self.others)]


def test_parameters_that_differ_are_an_error_that_names_processes_and_round():
    params = {"w": training.jnp.arange(3.0)}
    devices = training.jax.local_device_count
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.jax, "local_device_count", lambda: 1)
        training.check_replicas(Others(None, None), params, 100)  # pyright: ignore
        with pytest.raises(cluster.ClusterError, match=r"after round 1,100 .* processes \[2\]"):
            training.check_replicas(Others(None, ["another"]), params, 1100)  # pyright: ignore
    assert devices is training.jax.local_device_count


def test_data_that_differs_is_an_error_that_names_processes(dataset):
    training.check_same_data(Others(None, None), dataset)  # pyright: ignore
    with pytest.raises(cluster.ClusterError, match=r"that of processes \[1\] is not"):
        training.check_same_data(Others(["other"], None), dataset)  # pyright: ignore


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
