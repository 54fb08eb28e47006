"""What runs leave behind: curves that grow as they go, and a record of each when it is done."""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import filelock
import jax

from experiments.methods import METHODS
from experiments.metrics import ACCURACY, BITS_PER_BYTE, Metric, metric_of


@dataclasses.dataclass(frozen=True)
class Record:
    """The outcome of one run. On disk, :func:`derived` is added to it."""

    config: str
    dataset: str
    method: str
    seed: int
    num_workers: int
    exchange: str  # how messages travelled
    driver: str
    """``"vmap"``: all workers simulated on one device. ``"shard_map"``: each on its own."""
    processes: int
    num_parameters: int
    iterations: int
    uploads: int
    final_train_loss: float
    """Mean over workers and over the rounds since the last but one evaluation."""
    paper_uplink_bits: int
    """32 bits for every uploaded value, nothing for indices (the paper's Table II)."""
    uplink_bytes: int  # values, indices and flags from all workers to the server
    downlink_bytes: int  # from the server to all workers
    model_state_bytes: int  # BatchNorm statistics averaged over workers for the evaluations
    params_sha256: str
    """Of the final parameters: equal for runs that ended in the same ones, bit for bit."""
    compute_seconds: float  # training alone: without compilation and evaluation
    ms_per_iteration: float  # median
    final_test_accuracy: float | None = None
    final_bits_per_byte: float | None = None


@dataclasses.dataclass(frozen=True)
class Point:
    """One evaluation, on the curve of a run."""

    iteration: int
    uploads: int
    paper_uplink_bits: int
    uplink_bytes: int
    downlink_bytes: int
    dense_bytes: int
    """What would have crossed, both ways, with everything sent whole after every gradient."""
    train_loss: float
    upload_fraction: float  # of the workers, since the last evaluation
    mean_staleness: float
    test_accuracy: float | None = None
    bits_per_byte: float | None = None


_REQUIRED = {
    cls: [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
    for cls in (Record, Point)
}


def at_target(
    curve: Sequence[Mapping[str, Any]], target: float | None, metric: Metric = ACCURACY
) -> dict[str, Any]:
    """What it took to reach a target: a question to a curve, whatever the run aimed at.

    That is ``target_accuracy`` or ``bits_per_byte_target``, and ``iterations_at_target``,
    ``uploads_at_target`` and so on of the first evaluation that reached it, each None where none
    did.
    """
    first = next((point for point in curve if metric.reaches(point[metric.key], target)), {})
    names = "uploads paper_uplink_bits uplink_bytes downlink_bytes".split()
    reached = {f"{name}_at_target": first.get(name) for name in names}
    return {metric.target: target, "iterations_at_target": first.get("iteration"), **reached}


def derived(
    record: Mapping[str, Any], about: Mapping[str, Any], curve: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What follows from a record and its curve: :func:`at_target`, and in the end and there the
    bytes of both ways and a worker's gradients, at the most."""
    config = about["config"]
    metric = metric_of(config)
    reached = at_target(curve, config[metric.target], metric)
    each = METHODS[about["method"]].gradients(config["local_steps"])
    for end in ("", "_at_target"):
        up, down, rounds = ({**record, **reached}[f"{name}{end}"] for name in _SUMMED)
        reached[f"two_way_bytes{end}"] = None if rounds is None else up + down
        reached[f"gradients_per_worker{end}"] = None if rounds is None else math.ceil(rounds * each)
    return reached


_SUMMED = "uplink_bytes", "downlink_bytes", "iterations"


class ResultsError(RuntimeError):
    """Results on disk do not go with the run that is to be added to them."""


class Store:
    """A directory of results: a folder for each run, and a summary of those that are done."""

    def __init__(self, directory: pathlib.Path):
        self.directory = directory

    @property
    def summary_path(self) -> pathlib.Path:
        return self.directory / "summary.json"

    def run(self, name: str) -> "RunFiles":
        """The files of one run, which need not exist yet."""
        return RunFiles(self.directory / "runs" / name)

    def runs(self) -> list["RunFiles"]:
        """All runs that have begun, in the order of their configurations, seeds and methods."""
        found = [RunFiles(path.parent) for path in self.directory.glob("runs/*/run.json")]
        return sorted(found, key=lambda files: _order(files.about()))

    def records(self) -> list[dict[str, Any]]:
        """The records of all runs that are done, in the order of :meth:`runs`."""
        records = [files.record() for files in self.runs()]
        return [record for record in records if record is not None]

    def check_config(self, name: str) -> None:
        """Raises ResultsError if there are runs of another experiment than ``name``, or broken."""
        self.records()
        for files in self.runs():
            there = files.about()["config"]["name"]
            if there != name:
                raise ResultsError(
                    f"{self.directory} holds results of {there}. Choose another --out for {name}."
                )

    def write_summary(self) -> None:
        """Writes all records to ``summary.json``, which is whole at any moment."""
        write_json(self.summary_path, self.records())


class RunFiles:
    """The folder of one run.

    ``run.json`` says what is run and how; ``curve.jsonl`` has a line for each evaluation;
    ``checkpoints`` is there while the run is not done, and ``record.json`` and ``params`` (saved by
    orbax) after it. Nothing in it is ever written over.
    """

    def __init__(self, directory: pathlib.Path):
        self.directory = directory
        self.checkpoints_path = directory / "checkpoints"
        self.params_path = directory / "params"
        self.curve_path = directory / "curve.jsonl"
        self._about_path = directory / "run.json"
        self._record_path = directory / "record.json"

    @property
    def name(self) -> str:
        return self.directory.name

    def about(self) -> dict[str, Any]:
        """What ``run.json`` holds."""
        about = read_json(self._about_path, "name config method seed sessions")
        try:
            _order(about)
        except (KeyError, TypeError, ValueError) as error:
            raise ResultsError(f"Expected {self._about_path} to be of a run: {error!r}.") from error
        return about

    def check(self, spec: Mapping[str, Any]) -> None:
        """Raises ResultsError if the folder holds a run other than ``spec`` describes.

        Another target accuracy or another method's c makes no other run, see :meth:`adopt`.
        """
        if not self._about_path.exists():
            return
        from flax import traverse_util  # whose import takes a second

        there, here = (
            traverse_util.flatten_dict(tree, sep=".") for tree in (self.about(), _as_json(spec))
        )
        del there["sessions"]
        different = [
            f"{key} is {there.get(key)!r} there and {here.get(key)!r} here"
            for key in sorted((there.keys() | here.keys()) - _without_effect(spec))
            if there.get(key) != here.get(key)
        ]
        if different:
            raise ResultsError(
                f"{self.directory} holds another run: {'; '.join(different)}. Choose another --out."
            )

    def adopt(self, spec: Mapping[str, Any]) -> None:
        """Takes over what of ``spec`` has no effect on the run, also if it is done: asks for what
        it took to reach another target accuracy."""
        about, record, config = self.about(), self.record(), _as_json(spec["config"])
        if about["config"] == config:
            return
        write_json(self._about_path, {**about, "config": config})
        if record is not None:
            more = derived(record, {**about, "config": config}, self.curve())
            write_json(self._record_path, {**record, **more})

    @contextlib.contextmanager
    def claimed(self, spec: Mapping[str, Any]) -> Iterator[None]:
        """Keeps the run to this process; begins it, or goes on with it. Raises ResultsError where
        the folder holds another run, or another process is at work on it."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(filelock.FileLock(self.directory / "lock", timeout=0))
            except filelock.Timeout:
                raise ResultsError(f"Another process is at work on {self.directory}.") from None
            self.check(spec)
            if not self._about_path.exists():
                write_json(self._about_path, {**spec, "sessions": []})
            yield

    def add_session(self, session: Mapping[str, Any]) -> None:
        """Adds where, when and from which round the run is made."""
        about = self.about()
        about["sessions"].append(dict(session))
        write_json(self._about_path, about)

    def append_point(self, point: Point) -> None:
        """Adds one line to the curve, on disk when this returns.

        Raises ResultsError where a point that is there already, from before the run was stopped,
        does not come again as it was.
        """
        curve, new = self.curve(), _as_json(dataclasses.asdict(point))
        if new in curve:
            return
        if any(earlier["iteration"] == point.iteration for earlier in curve):
            raise ResultsError(
                f"Round {point.iteration:,} of {self.directory} did not come again as it was "
                "before the run was stopped. Is this another machine, or another version of jax? "
                "Choose another --out."
            )
        _write(self.curve_path, "".join(json.dumps(point) + "\n" for point in [*curve, new]))

    def curve(self) -> list[dict[str, Any]]:
        """The points of the curve so far."""
        if not self.curve_path.exists():
            return []
        lines = self.curve_path.read_text().splitlines()
        points = [_checked(self.curve_path, line, _REQUIRED[Point]) for line in lines]
        return [_scored(self.curve_path, point, "key") for point in points]

    def record(self) -> dict[str, Any] | None:
        """The outcome; None while the run is not done."""
        if not self._record_path.exists():
            return None
        record = read_json(self._record_path, " ".join(_REQUIRED[Record]))
        return _scored(self._record_path, record, "final")

    def finish(self, record: Record) -> None:
        """Writes the outcome, with what reaching the target took, and removes what was only needed
        to go on."""
        outcome = dataclasses.asdict(record)
        more = derived(outcome, self.about(), self.curve())
        write_json(self._record_path, {**outcome, **more})
        shutil.rmtree(self.checkpoints_path, ignore_errors=True)


def read_json(path: pathlib.Path, fields: str) -> dict[str, Any]:
    """Reads a file that holds, among others, the fields named; else a ResultsError names it."""
    return _checked(path, path.read_text(), fields.split())


def _checked(path: pathlib.Path, text: str, fields: Sequence[str]) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ResultsError(f"Expected {path} to be JSON: {error}.") from None
    known = content if isinstance(content, dict) else {}
    missing = [field for field in fields if field not in known]
    if missing:
        raise ResultsError(f"Expected {path} to hold {', '.join(missing)}.")
    return content


def _scored(path: pathlib.Path, content: dict[str, Any], kind: str) -> dict[str, Any]:
    """``content``; a ResultsError where it says of no metric how well the run does."""
    names = [getattr(metric, kind) for metric in (ACCURACY, BITS_PER_BYTE)]
    if all(content.get(name) is None for name in names):
        raise ResultsError(f"Expected {path} to hold {' or '.join(names)}.")
    return content


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes a file that is whole at any moment."""
    _write(path, json.dumps(content, indent=1) + "\n")


def _write(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def session(arguments: Sequence[str]) -> dict[str, Any]:
    """The command that is running, when it began, on which machine and with which versions."""
    packages = ("jax", "jaxlib", "optax", "flax", "sasg_jax")
    return {
        "command": shlex.join(["python", "-m", "experiments", *arguments]),
        "started": datetime.datetime.now().isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {jax.devices()[0].device_kind}",
        "versions": {
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in packages},
        },
    }


def _without_effect(spec: Mapping[str, Any]) -> set[str]:
    """Names of what may differ in a run that is the same."""
    config, row = spec.get("config", {}), METHODS[spec["method"]]
    others = {name for name in config.get("alpha_c", {}) if name != row.alpha}
    unused = {name for method in METHODS.values() for name in method.settings} - {*row.settings}
    return {
        "config.target_accuracy",
        "config.bits_per_byte_target",
        *(f"config.alpha_c.{name}" for name in others),
        *(f"config.{name}" for name in unused),
    }


def _order(about: dict[str, Any]) -> tuple[Any, ...]:
    config = about["config"]
    place = about["seed"], list(METHODS).index(about["method"]), config["density"] or 0.0
    return config["name"], *place, config["learning_rate"]


def _as_json(content: Any) -> Any:
    """As it comes back from a file: lists for tuples, and so on."""
    return json.loads(json.dumps(content))
