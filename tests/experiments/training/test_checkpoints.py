"""A run that was stopped goes on as if it had not been; half a checkpoint is none."""

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import sasg_jax
from experiments import data
from experiments.configs import CONFIGS
from experiments.training import train as training
from experiments.training.checkpoints import Checkpoints, Progress, save_params
from experiments.training.records import RunFiles


def state_of(scale):
    """A state with every kind of leaf that a run's state has."""
    tx = sasg_jax.sasg(0.1, num_workers=3, downlink=sasg_jax.top_k(0.1))
    loss_fn = lambda params, batch, *, model_state, key: (0.0, model_state)
    step = sasg_jax.make_train_step(loss_fn, tx, num_workers=3, has_model_state=True, has_key=True)
    state = step.init({"w": jnp.ones((7, 5))}, {"mean": jnp.ones(5)}, jax.random.key(scale))
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    odd = lambda x: x if is_key(x) or x.dtype == bool else x + jnp.asarray(scale, x.dtype)
    return jax.tree.map(odd, state)


def assert_same(a: Any, b: Any):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def progress_of(iteration):
    arrays: dict[str, Any] = {
        "loss": np.array([[0.1, 2, 3]], np.float32),
        "uploaded": np.array([[True, False, True]]),
        "finite": np.array([[True, True, True]]),
        "staleness": np.array([[1, 2, 3]], np.int32),
        "innovation": np.array([[1e-30, np.inf, np.nan]], np.float32),
        "threshold": np.array([1 / 3], np.float32),
        "sent_down": np.array([True]),
    }
    report = sasg_jax.RoundInfo(**arrays, aux=())
    return Progress(iteration, {"uploads": 2**70}, [(10, 0.1), (7, 1 / 3)], [report, report])


def test_what_is_saved_comes_back_bit_for_bit(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(state_of(0)) is None
        for iteration in (100, 200):
            checkpoints.save(state_of(iteration), progress_of(iteration))
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(state_of(0))
    assert restored is not None
    state, progress = restored
    assert_same(state, state_of(200))
    saved = progress_of(200)
    assert dataclasses.replace(progress, reports=[]) == dataclasses.replace(saved, reports=[])
    assert len(progress.reports) == 2
    for report in progress.reports:
        assert_same(report, saved.reports[0])


def test_a_checkpoint_is_due_when_its_time_has_come(tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with Checkpoints(tmp_path, 60) as checkpoints:
        assert not checkpoints.is_due()
        now = 1060.0
        assert checkpoints.is_due()
        checkpoints.save(state_of(0), Progress())
        assert not checkpoints.is_due()


def test_parameters_are_saved_for_others_to_load(tmp_path):
    params = {"layer": {"kernel": jnp.arange(6.0).reshape(2, 3)}}
    for _ in range(2):  # also where a process died before it said that it was done
        save_params(tmp_path / "params", params)
    with ocp.StandardCheckpointer() as checkpointer:
        assert_same(checkpointer.restore(tmp_path / "params", params), params)


SAVER = """
import pathlib, sys
import jax.numpy as jnp
from experiments.training.checkpoints import Checkpoints, Progress
with Checkpoints(pathlib.Path(sys.argv[1]), 0) as checkpoints:
    like = [jnp.zeros(200_000), jnp.zeros(3, jnp.int32)]
    restored = checkpoints.restore(like)
    iteration = 0 if restored is None else restored[1].iteration
    while True:
        iteration += 1
        state = [jnp.full_like(x, iteration) for x in like]
        checkpoints.save(state, Progress(iteration, {"iteration": iteration}))
        print(iteration, flush=True)
"""


@pytest.mark.slow
def test_one_that_was_being_written_when_the_process_died_is_never_loaded(tmp_path):
    """A process that does nothing but save is killed while it does so."""
    rng = np.random.default_rng(0)
    like = [jnp.zeros(200_000), jnp.zeros(3, jnp.int32)]
    said, seen, remains = 0, 0, 0
    for _ in range(5):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(tmp_path / "c")], stdout=subprocess.PIPE, text=True
        )
        with process:
            assert process.stdout
            for _ in range(2):
                said = int(process.stdout.readline())
            time.sleep(rng.uniform(0, 0.1))
            process.kill()
        names = [path.name for path in (tmp_path / "c").iterdir()]
        remains += any(not name.isdigit() for name in names)
        with Checkpoints(tmp_path / "c") as checkpoints:
            restored = checkpoints.restore(like)
        assert restored is not None
        (floats, integers), progress = restored
        assert progress.iteration >= said > seen
        seen = progress.iteration
        assert progress.ledger == {"iteration": seen}
        assert set(np.unique(floats)) == set(np.unique(integers)) == {seen}
    assert remains  # at least one of them died in the middle


def test_the_remains_of_half_a_checkpoint_are_not_taken_for_one(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state_of(1), progress_of(100))
    half = tmp_path / "200.orbax-checkpoint-tmp"
    (half / "state").mkdir(parents=True)
    (half / "state" / "manifest.ocdbt").write_bytes(b"\x00" * 7)
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(state_of(0))
    assert restored is not None
    assert restored[1].iteration == 100


READER = """
import pathlib, sys
import jax.numpy as jnp
from experiments.training.checkpoints import Checkpoints
from experiments.training.records import ResultsError
for name in sys.argv[1:]:
    with Checkpoints(pathlib.Path(name)) as checkpoints:
        try:
            checkpoints.restore([jnp.zeros(7), jnp.zeros(3, jnp.int32)])
        except ResultsError as error:  # not all files are needed
            print(error)
"""


def test_one_that_is_broken_is_named(tmp_path):
    """In a process of its own: a reader that met a broken file leaves coroutines behind, which warn
    when they are collected, whichever test that may be in."""
    with Checkpoints(tmp_path / "whole") as checkpoints:
        checkpoints.save([jnp.ones(7), jnp.ones(3, jnp.int32)], progress_of(100))
    torn = []
    for path in sorted(tmp_path.glob("whole/100/**/*")):
        if path.is_file():
            torn.append(tmp_path / f"torn{len(torn)}")
            shutil.copytree(tmp_path / "whole", torn[-1])
            (torn[-1] / path.relative_to(tmp_path / "whole")).write_bytes(b"")
    command = [sys.executable, "-c", READER, *map(str, torn)]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split("\n")
    named = [f"{folder}/100 is broken; without it the run begins anew." for folder in torn]
    assert said.pop() == ""
    assert len(said) > 2
    assert set(said) <= set(named)


# --- Whole runs -----------------------------------------------------------------------------------

MLP = dataclasses.replace(
    CONFIGS["digits"],
    iterations=42,
    evaluate_every=14,
    rounds_per_call=7,
    augment=True,
    decay_iterations=(20,),
    target_accuracy=0.3,
)
RESNET = dataclasses.replace(
    CONFIGS["cifar10_narrow"], width=2, iterations=18, evaluate_every=9, rounds_per_call=3
)


class Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def untimed(record):
    return dataclasses.replace(record, compute_seconds=0.0, ms_per_iteration=0.0)


@pytest.mark.parametrize(
    ("config", "method", "stops"),
    [
        (MLP, "sasg_two_way", (7, 21, 28)),
        (MLP, "sasg_keep", (21,)),
        (MLP, "lasg", (28,)),
        # With statistics of BatchNorm.
        pytest.param(RESNET, "sasg", (12,), marks=pytest.mark.slow),
    ],
    ids=["sasg_two_way", "sasg_keep", "lasg", "resnet"],
)
def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path, digits, config, method, stops):
    """The same curve and record, the same report of every round, and the same final parameters;
    also where it was stopped between evaluations."""

    def run(checkpoints, stop=None):
        points, losses, rounds = [], {}, 0

        def on_start(iteration):
            nonlocal rounds
            rounds = iteration

        def on_rounds(count):
            nonlocal rounds
            rounds += count
            if rounds == stop:
                raise Stopped

        def on_evaluation(params, reports):
            losses[len(losses)] = reports.loss

        record = None
        with contextlib.suppress(Stopped):
            record = training.train(
                config,
                method,
                1,
                digits,
                checkpoints=checkpoints,
                on_start=on_start,
                on_rounds=on_rounds,
                on_point=points.append,
                on_evaluation=on_evaluation,
            )
        return record, points, list(losses.values())

    whole, whole_points, whole_losses = run(None)
    points, losses = [], []
    for stop in stops:
        with Checkpoints(tmp_path, 0) as checkpoints:
            record, some, some_losses = run(checkpoints, stop)
        assert record is None
        points += some
        losses += some_losses
    with Checkpoints(tmp_path, 0) as checkpoints:
        record, some, some_losses = run(checkpoints)
    assert record is not None
    assert whole is not None
    assert untimed(record) == untimed(whole)
    assert [*points, *some] == whole_points
    for one, other in zip([*losses, *some_losses], whole_losses, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_ten_kills_at_random_moments_change_nothing(tmp_path):
    """The command is killed (SIGKILL) ten times, started again each time, and at last left alone:
    curve, record and final parameters are those of a run that was never stopped."""
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "experiments", "run", "digits", "--method", "sasg_two_way"]
    command += ["--iterations", "8000", "--width", "16", "--checkpoint-seconds", "0"]

    def run(out, checkpoints=None, seconds=0.0):
        """Runs the command, and kills it so many checkpoints and seconds after it has begun."""
        process = subprocess.Popen(
            [*command, "--out", str(out)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        with process:
            if checkpoints is not None:
                seen, start = sessions(out), newest(out)
                while sessions(out) == seen or newest(out) < start + 100 * checkpoints:
                    assert process.poll() is None, process.stderr and process.stderr.read()
                    time.sleep(0.01)
                time.sleep(seconds)
                process.kill()
            assert process.stderr
            process.stderr.read()
        return process.returncode

    def folder(out):
        return out / "runs" / "digits-sasg_two_way-seed1"

    def sessions(out):
        about = folder(out) / "run.json"
        return len(RunFiles(folder(out)).about()["sessions"]) if about.exists() else 0

    def newest(out):
        names = [path.name for path in (folder(out) / "checkpoints").glob("*")]
        return max([int(name) for name in names if name.isdigit()], default=0)

    def outcome(out):
        files = RunFiles(folder(out))
        record = files.record()
        assert record is not None
        del record["compute_seconds"], record["ms_per_iteration"]
        return files.curve_path.read_bytes(), record

    assert run(tmp_path / "whole") == 0
    rng = np.random.default_rng(1)
    for checkpoints, seconds in zip(rng.integers(0, 10, 10), rng.uniform(0, 0.2, 10), strict=True):
        assert run(tmp_path / "killed", checkpoints, seconds) == -signal.SIGKILL
    assert run(tmp_path / "killed") == 0
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
    rounds = [
        session["round"] for session in RunFiles(folder(tmp_path / "killed")).about()["sessions"]
    ]
    assert rounds == sorted(rounds)
    assert len(set(rounds)) > 5  # most of them had gone on from where the one before was
    assert 0 < rounds[-1] < 8000
