"""Tables of results for a terminal."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import rich.box
from rich.table import Table

from experiments.methods import METHODS, describe_setting
from experiments.metrics import ACCURACY, metric_of


def comparison_table(records: Sequence[dict[str, Any]]) -> Table:
    """Like the paper's Table II, with bytes beside its bits: means over seeds. Of a text with a
    worker's gradients in place of these, and where there is no target, what it took in all.

    The caption says of a method that did not reach the target with every seed with how many.
    """
    metric, first = metric_of(records[0]), records[0]
    target = first[metric.target]
    end = "" if target is None else "_at_target"
    goal = "in the end" if target is None else f"to reach {metric.describe_target(target)}"
    seeds = ", ".join(map(str, sorted({record["seed"] for record in records})))
    columns = _COUNTED if metric is ACCURACY else _COUNTED_OF_TEXT
    table = numbers_table(
        f"{describe(first)}: what it took {goal}, at one rate",
        ("Method",),
        (*columns, metric.column, "ms/round"),
    )
    notes = [
        f"Means over seeds {seeds}." if "," in seeds else f"Seed {seeds}.",
        *(_NOTES[column] for column in columns if column in _NOTES),
        f"{metric.column}: at the end of training.",
    ]

    def mean(rows: Sequence[dict[str, Any]], *keys: str) -> float:
        return float(np.mean([sum(row[key] for key in keys) for row in rows]))

    for name, method in METHODS.items():
        runs = [record for record in records if record["method"] == name]
        if not runs:
            continue
        reached = [run for run in runs if run[f"uploads{end}"] is not None]
        cells = ["not reached"] + [""] * (len(columns) - 1)
        if reached:
            cells = [
                show(mean(reached, *(f"{key}{end}" for key in keys)))
                for *keys, show in columns.values()
            ]
        if 0 < len(reached) < len(runs):
            notes.append(
                f"{method.label}: {len(reached)} of {len(runs)} seeds reached the target; the "
                "means are over these."
            )
        score, time = mean(runs, metric.final), mean(runs, "ms_per_iteration")
        table.add_row(method.label, *cells, metric.show(score), f"{time:.2f}")
    table.caption = " ".join(notes)
    return table


def tuned_table(tuned: dict[str, Any]) -> Table:
    """What each method took at its best, as ``best.json`` has it: means over the reported seeds,
    uploads with their standard deviation."""
    seeds, metric = tuned["reported_seeds"], metric_of(tuned)
    table = numbers_table(
        f"{tuned['config']}: to {metric.describe_target(tuned[metric.target])}, each at its best",
        ("Method",),
        ("Rounds", "Uploads", "Gradients", "Both ways", metric.column),
    )
    notes = [
        f"Best: fewest {tuned['picked_by']} with seed {tuned['picked_with_seed']}. Means over "
        f"{'seeds' if len(seeds) > 1 else 'seed'} {', '.join(map(str, seeds))}. Gradients: of each "
        f"worker, at most. {metric.column}: at the end of training.",
    ]
    for name, found in tuned["methods"].items():
        label, runs = METHODS[name].label, found["runs"]
        reached = [run for run in runs if run.get("uploads_at_target") is not None]
        mean = lambda *keys: float(np.mean([sum(run[key] for key in keys) for run in reached]))  # noqa: B023
        cells = ["not reached"] + [""] * 3
        if reached:
            uploads = [run["uploads_at_target"] for run in reached]
            spread = f" ± {np.std(uploads, ddof=1):,.0f}" if len(uploads) > 1 else ""
            cells = [
                f"{mean('iterations_at_target'):,.0f}",
                f"{mean('uploads_at_target'):,.0f}{spread}",
                f"{mean('gradients_per_worker_at_target'):,.0f}",
                format_bytes(mean("uplink_bytes_at_target", "downlink_bytes_at_target")),
            ]
        ended = [run[metric.outcome] for run in runs if metric.outcome in run]
        score = metric.show(float(np.mean(ended))) if ended else "diverged"
        table.add_row(label, *cells, score)
        own = ", ".join(describe_setting(*setting) for setting in found["best"].items())
        tried = len(found["tried"])
        notes.append(f"{label}: {own}{f', of {tried} settings' if tried > 1 else ''}.")
        if len(reached) < len(runs):
            notes.append(f"{label}: {len(reached)} of {len(runs)} seeds reached the target.")
    table.caption = "\n".join(notes)
    return table


def numbers_table(title: str, texts: Sequence[str], numbers: Sequence[str]) -> Table:
    """An empty table, with columns of text and then of numbers, for 80 columns."""
    table = Table(title=title, box=rich.box.SIMPLE_HEAD, padding=0)
    for heading in texts:
        table.add_column(heading, no_wrap=True)
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


_whole = "{:,.0f}".format


def describe(record: dict[str, Any]) -> str:
    """Names a run's experiment, and its data where that is not the experiment's own name."""
    config, dataset = record["config"], record["dataset"]
    return config if config == dataset else f"{config} on {dataset}"


def format_bytes(count: float) -> str:
    """``1234567`` as ``1.23 MB`` (powers of ten)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


_COUNTED: dict[str, tuple[Any, ...]] = {
    "Rounds": ("iterations", _whole),
    "Uploads": ("uploads", _whole),
    "Paper bits": ("paper_uplink_bits", "{:.2e}".format),
    "Uplink": ("uplink_bytes", format_bytes),
    "Both ways": ("uplink_bytes", "downlink_bytes", format_bytes),
}
"""Columns of :func:`comparison_table`: sums of what a record has, and how they are shown."""

_COUNTED_OF_TEXT: dict[str, tuple[Any, ...]] = {
    "Rounds": ("iterations", _whole),
    "Gradients": ("gradients_per_worker", _whole),
    "Uploads": ("uploads", _whole),
    "Uplink": ("uplink_bytes", format_bytes),
    "Both ways": ("uplink_bytes", "downlink_bytes", format_bytes),
}
_NOTES = {
    "Gradients": "Gradients: of each worker, at most.",
    "Paper bits": "Paper bits: 32 for each value sent up, without indices.",
    "Uplink": "Uplink: values, indices and flags.",
    "Both ways": "Both ways: uplink and downlink.",
}


def format_seconds(seconds: float) -> str:
    """``5000`` as ``1 h 23 min``; two units at most."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
