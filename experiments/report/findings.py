"""What a folder of results holds: runs by experiment and method, with means over seeds."""

import pathlib
import statistics
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from experiments.configs import CONFIGS
from experiments.methods import METHODS, PAPER_METHODS
from experiments.report import paper
from experiments.studies.plan import RUNS
from experiments.training.records import Store, read_json
from experiments.wire.measure import Measurement


class Run(NamedTuple):
    """One run, done or not."""

    about: dict[str, Any]  # what ``run.json`` holds
    curve: list[dict[str, Any]]
    record: dict[str, Any] | None  # None while it is not done

    @property
    def rounds(self) -> int:
        """Up to which it was evaluated."""
        return self.curve[-1]["iteration"] if self.curve else 0


class Spread(NamedTuple):
    """Of a number over seeds."""

    mean: float
    sd: float | None = None  # of the sample; None for a single seed


class Group(NamedTuple):
    """The runs of one method on one experiment that are done, of which there is at least one."""

    method: str
    density: float | None  # None for a method that sends everything
    config: dict[str, Any]
    runs: list[Run]

    @property
    def label(self) -> str:
        return METHODS[self.method].label

    @property
    def records(self) -> list[dict[str, Any]]:
        return [run.record for run in self.runs if run.record is not None]

    @property
    def reached(self) -> list[dict[str, Any]]:
        """The records of those that reached the target accuracy."""
        return [record for record in self.records if record["uploads_at_target"] is not None]

    def at_target(self, *keys: str) -> Spread | None:
        """Of a sum of record fields, over the seeds that reached the target; None if none did."""
        return _spread(self.reached, [f"{key}_at_target" for key in keys])

    def mean_at_target(self, *keys: str) -> float:
        """As :meth:`at_target`, of a group that has reached it."""
        spread = self.at_target(*keys)
        assert spread is not None
        return spread.mean

    def in_the_end(self, key: str) -> Spread:
        """Of a record field, over all seeds."""
        spread = _spread(self.records, [key])
        assert spread is not None  # a group has a run
        return spread

    @property
    def is_comparable(self) -> bool:
        """Whether the paper's Table II has the same setting, as far as the paper tells it."""
        same = all(self.config[key] == value for key, value in paper.MNIST_SETTING.items())
        return same and self.density in (None, paper.DENSITY) and self.method in PAPER_METHODS


class Results(NamedTuple):
    """All that is in a folder. None or empty where nothing is there yet."""

    directory: pathlib.Path
    runs: list[Run]
    wire: dict[str, Any] | None
    theory: dict[str, Any] | None

    def groups(self, name: str, methods: Collection[str] = METHODS) -> list[Group]:
        """Of the experiment ``name``, by density and then in the order of the table of methods."""
        by_key: dict[tuple[float, str], list[Run]] = {}
        for run in self.runs:
            config, method = run.about["config"], run.about["method"]
            if config["name"] == name and method in methods and run.record is not None:
                density = config["density"] if METHODS[method].sparse else 0.0
                by_key.setdefault((density, method), []).append(run)
        order = lambda key: (key[0], list(METHODS).index(key[1]))
        return [
            Group(method, density or None, by_key[density, method][0].about["config"], runs)
            for density, method in sorted(by_key, key=order)
            for runs in [by_key[density, method]]
        ]

    def standard_groups(self, name: str) -> list[Group]:
        """One for each method, at the experiment's own density."""
        standard = CONFIGS[name].density
        found = [group for group in self.groups(name) if group.density in (None, standard)]
        return sorted(found, key=lambda group: list(METHODS).index(group.method))

    @property
    def measurements(self) -> list[Measurement]:
        """Of the exchanges."""
        return [Measurement(**found) for found in (self.wire or {}).get("measurements", [])]

    @property
    def not_run(self) -> dict[str, list[str]]:
        """The planned runs that are not done, by target; those of table 2 are figure 2's too."""
        seen = {run.about["name"] for run in self.runs if run.record is not None}
        missing: dict[str, list[str]] = {}
        for target, planned in RUNS.items():
            names = [run.name for run in planned if run.name not in seen]
            seen.update(names)
            if names:
                missing[target] = names
        return missing


def read(directory: pathlib.Path) -> Results:
    """Reads a folder that ``reproduce``, ``compare`` or ``run`` has written to. FileNotFoundError
    where it holds no results; ResultsError names a file in it that is not what it should be."""

    def read_if_there(name: str, fields: str) -> Any:
        path = directory / name / f"{name}.json"
        return read_json(path, f"{fields} machine versions") if path.exists() else None

    results = Results(
        directory=directory,
        runs=[Run(f.about(), f.curve(), f.record()) for f in Store(directory).runs()],
        wire=read_if_there("wire", "setting network measurements"),
        theory=read_if_there("theory", "results"),
    )
    if not (results.runs or results.wire or results.theory):
        raise FileNotFoundError(
            f"Expected {directory} to be a folder with results. "
            f"`python -m experiments reproduce all --out {directory}` makes them."
        )
    return results


def fastest_exchanges(measurements: Sequence[Measurement]) -> dict[str, Measurement]:
    """Of each of the paper's methods."""
    fastest: dict[str, Measurement] = {}
    for found in sorted(measurements, key=lambda found: found.communication_ms):
        if found.method in PAPER_METHODS:
            fastest.setdefault(found.method, found)
    return {method: fastest[method] for method in PAPER_METHODS if method in fastest}


def _spread(records: Sequence[dict[str, Any]], keys: Sequence[str]) -> Spread | None:
    if not records:
        return None
    values = [sum(record[key] for key in keys) for record in records]
    return Spread(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None)
