"""The sections on methods that were tuned: what each takes at its own best settings."""

import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from experiments.configs import CONFIGS
from experiments.methods import METHODS, describe_setting
from experiments.report import cells
from experiments.report.cells import NOTHING, dataset_label, percent
from experiments.report.figures import plot_tried
from experiments.report.findings import Spread
from experiments.report.page import Figure, Panel, Section, Table, number, text, words
from experiments.training.records import read_json

_FIELDS = "config picked_by picked_with_seed reported_seeds methods command"
UP, DOWN = "uplink_bytes", "downlink_bytes"


class Tuned(NamedTuple):
    """One method at its best, as ``best.json`` has it."""

    method: str
    best: dict[str, Any]  # its settings
    tried: list[dict[str, Any]]
    runs: list[dict[str, Any]]

    @property
    def reached(self) -> list[dict[str, Any]]:
        """Runs that reached the target."""
        return [run for run in self.runs if run.get("uploads_at_target") is not None]

    def at_target(self, *keys: str) -> Spread | None:
        """Of a sum, over the seeds that reached the target; None if none did."""
        values = [sum(run[f"{key}_at_target"] for key in keys) for run in self.reached]
        return _spread(values)

    @property
    def accuracy(self) -> Spread | None:
        """In the end."""
        return _spread([run["accuracy"] for run in self.runs if "accuracy" in run])


def _spread(values: list[Any]) -> Spread | None:
    if not values:
        return None
    return Spread(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None)


def read(directory: pathlib.Path) -> dict[str, list[dict[str, Any]]]:
    """What ``compare`` has left in folders ``best/*``, by experiment."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(directory.glob("best/*/best*.json")):
        content = read_json(path, _FIELDS)
        found.setdefault(content["config"], []).append(content)
    return found


def methods(contents: list[dict[str, Any]]) -> list[Tuned]:
    """All methods that were tuned on one experiment, in the order of the table of methods."""
    found = {
        name: Tuned(name, of["best"], of["tried"], of["runs"])
        for content in contents
        for name, of in content["methods"].items()
    }
    return [found[name] for name in METHODS if name in found]


def sections(directory: pathlib.Path, files: pathlib.Path) -> list[Section]:
    found = read(directory)
    if not found:
        section = Section("best", words("best.title", data="each method"))
        section.missing = (
            "python -m experiments compare NAME --learning-rates ... --out DIR/best/NAME"
        )
        return [section]
    return [_section(name, contents, files) for name, contents in found.items()]


def _section(name: str, contents: list[dict[str, Any]], files: pathlib.Path) -> Section:
    data = dataset_label(CONFIGS[name].dataset)
    section = Section(f"best-{name}", words("best.title", data=data))
    rows = methods(contents)
    first = contents[0]
    how = {
        "target": percent(first["target_accuracy"], 0),
        "by": first["picked_by"],
        "seed": first["picked_with_seed"],
        "seeds": ", ".join(map(str, first["reported_seeds"])),
    }
    section.paragraphs.append(words("best.how", **how))
    section.paragraphs += [
        words("best.command", command=content["command"]) for content in contents
    ]
    section.tables = [_table(name, rows)]
    if tried := points({row.method: row.tried for row in rows}):
        path = files / f"best-{name}.png"
        plot_tried(tried, path)
        panels = [Panel(path, words("best.alt", data=data))]
        section.figures.append(Figure(path.stem, words("best.figure"), panels))
    return section


def points(tried: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, list[tuple[int, int]]]:
    """Bytes of both ways and gradients of a worker, of all settings that reached the target."""
    found = {}
    for method, outcomes in tried.items():
        reached = [outcome for outcome in outcomes if outcome.get("uploads_at_target") is not None]
        both = lambda of: sum(of[f"{key}_at_target"] for key in (UP, DOWN))
        pairs = [(both(outcome), outcome["gradients_per_worker_at_target"]) for outcome in reached]
        found |= {method: pairs} if pairs else {}
    return found


def _table(name: str, rows: list[Tuned]) -> Table:
    sgd = next((row for row in rows if row.method == "sgd" and row.reached), None)

    def of_sgd(*keys: str) -> Callable[[Tuned], Any]:
        def cell(row: Tuned) -> Any:
            ours, base = row.at_target(*keys), sgd and sgd.at_target(*keys)
            return cells.share_cell(ours.mean / base.mean, row is sgd) if ours and base else NOTHING

        return cell

    def size(*keys: str) -> Callable[[Tuned], Any]:
        def cell(row: Tuned) -> Any:
            found = row.at_target(*keys)
            return cells.bytes_cell(found.mean) if found else NOTHING

        return cell

    to_target, beside = "to the target", "of tuned SGD’s"
    own = lambda row: ", ".join(describe_setting(*setting) for setting in row.best.items())
    gradients = lambda row: cells.mean_sd(row.at_target("gradients_per_worker"))
    columns = [
        text("method", lambda row: METHODS[row.method].label),
        text("best settings", own),
        number("tried", lambda row: cells.count(len(row.tried))),
        number("seeds at target", lambda row: f"{len(row.reached)} of {len(row.runs)}"),
        number("rounds", lambda row: cells.mean_sd(row.at_target("iterations")), to_target),
        number("gradients", gradients, to_target),
        number("uploads", lambda row: cells.mean_sd(row.at_target("uploads")), to_target),
        number("up", size(UP), to_target),
        number("both ways", size(UP, DOWN), to_target),
        number("uploads", of_sgd("uploads"), beside),
        number("bytes up", of_sgd(UP), beside),
        number("both ways", of_sgd(UP, DOWN), beside),
        number("final accuracy", lambda row: cells.mean_sd(row.accuracy, lambda p: percent(p, 2))),
    ]
    return Table(f"best-{name}", columns, rows, [words("best.note")], key="best")
