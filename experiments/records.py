"""What runs leave behind: one record each in ``summary.json``, and curves that grow as they go."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Record:
    """The outcome of one run. ``..._at_target`` is None where the target was not reached."""

    config: str
    dataset: str
    method: str
    seed: int
    num_workers: int
    exchange: str
    """How messages travelled."""
    driver: str
    """``"vmap"``: all workers simulated on one device. ``"shard_map"``: each on its own."""
    processes: int
    num_parameters: int
    iterations: int
    uploads: int
    target_accuracy: float
    iterations_at_target: int | None
    uploads_at_target: int | None
    final_test_accuracy: float
    final_train_loss: float
    """Mean over workers and over the rounds since the last but one evaluation."""
    paper_uplink_bits: int
    """32 bits for every uploaded value, nothing for indices (the paper's Table II)."""
    paper_uplink_bits_at_target: int | None
    uplink_bytes: int
    """Values, indices and flags from all workers to the server."""
    uplink_bytes_at_target: int | None
    downlink_bytes: int
    """From the server to all workers."""
    downlink_bytes_at_target: int | None
    model_state_bytes: int
    """BatchNorm statistics averaged over workers for the evaluations."""
    compute_seconds: float
    """Training alone: without compilation and evaluation."""
    ms_per_iteration: float
    """Median."""


@dataclasses.dataclass(frozen=True)
class Point:
    """One evaluation, on the curve of a run."""

    iteration: int
    uploads: int
    paper_uplink_bits: int
    uplink_bytes: int
    downlink_bytes: int
    test_accuracy: float
    train_loss: float
    upload_fraction: float
    """Of the workers, since the last evaluation."""
    mean_staleness: float


class Store:
    """A directory of results, made with the first of them. It never replaces or removes any."""

    def __init__(self, directory: pathlib.Path):
        self.directory = directory

    @property
    def summary_path(self) -> pathlib.Path:
        return self.directory / "summary.json"

    def records(self) -> list[dict[str, Any]]:
        """All records so far, as they stand in ``summary.json``."""
        return json.loads(self.summary_path.read_text()) if self.summary_path.exists() else []

    def curve_path(self, method: str, seed: int) -> pathlib.Path:
        return self.directory / f"curve-{method}-seed{seed}.jsonl"

    def check_free(self, config: str, runs: Sequence[tuple[str, int]]) -> None:
        """Raises FileExistsError if runs (method and seed) would write over or among others'."""
        for record in self.records():
            if record["config"] != config:
                raise FileExistsError(
                    f"{self.summary_path} holds results of {record['config']}. Choose another "
                    f"--out for {config}."
                )
        for method, seed in runs:
            path = self.curve_path(method, seed)
            if path.exists():
                raise FileExistsError(
                    f"{path} holds the curve of an earlier run of {method} with seed {seed}. "
                    "Choose another --out, or move it away."
                )

    def append_point(self, method: str, seed: int, point: Point) -> None:
        """Adds one line to the curve, on disk when this returns."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with self.curve_path(method, seed).open("a") as file:
            file.write(json.dumps(dataclasses.asdict(point)) + "\n")

    def curve(self, method: str, seed: int) -> list[dict[str, Any]]:
        """The points of one curve."""
        lines = self.curve_path(method, seed).read_text().splitlines()
        return [json.loads(line) for line in lines]

    def append_record(self, record: Record) -> None:
        """Adds a record to ``summary.json``, which is whole at any moment."""
        self._write(self.summary_path, [*self.records(), dataclasses.asdict(record)])

    def write_settings(self, settings: dict[str, Any]) -> None:
        """Adds how the runs were made (command, configuration, versions) to ``settings.json``."""
        path = self.directory / "settings.json"
        earlier = json.loads(path.read_text()) if path.exists() else []
        self._write(path, [*earlier, settings])

    def _write(self, path: pathlib.Path, content: Any) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(partial, path)
