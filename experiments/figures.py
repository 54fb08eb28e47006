"""Curves as pictures: accuracy and loss against uploads and bytes."""

import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")  # writes files; needs no display
import matplotlib.pyplot as plt
import numpy as np

from experiments.configs import METHODS
from experiments.records import Store

LABELS = {
    "sgd": "SGD",
    "sparse": "Sparse",
    "lasg": "LASG",
    "sasg": "SASG",
    "sparse_two_way": "Sparse, two-way",
    "sasg_two_way": "SASG, two-way",
}

# Blue, orange, green, red, brown, purple of a palette that is told apart without colour vision.
_COLOURS = dict(
    zip(
        METHODS,
        ("#0173b2", "#de8f05", "#029e73", "#d55e00", "#ca9161", "#cc78bc"),
        strict=True,
    )
)


def plot_curves(store: Store, path: pathlib.Path, title: str) -> None:
    """Draws every curve of ``store``: test accuracy and training loss, against uploads, against
    bytes up, and against bytes both ways. One line for each seed, one colour for each method.
    """
    columns = (
        ("uploads", lambda point: point["uploads"]),
        ("uplink bytes", lambda point: point["uplink_bytes"]),
        (
            "uplink + downlink bytes",
            lambda point: point["uplink_bytes"] + point["downlink_bytes"],
        ),
    )
    rows = (("test accuracy", "test_accuracy"), ("training loss", "train_loss"))
    figure, axes = plt.subplots(
        len(rows), len(columns), figsize=(12, 6.4), sharey="row", layout="constrained"
    )
    records = store.records()
    labelled = set()
    accuracies = []
    for record in sorted(records, key=lambda record: METHODS.index(record["method"])):
        method = record["method"]
        curve = store.curve(method, record["seed"])
        accuracies += [point["test_accuracy"] for point in curve]
        for row, (_, key) in enumerate(rows):
            for column, (_, position) in enumerate(columns):
                axes[row, column].plot(
                    [position(point) for point in curve],
                    [point[key] for point in curve],
                    color=_COLOURS[method],
                    linewidth=1.3,
                    label=None if method in labelled else LABELS[method],
                )
        labelled.add(method)
    target = records[0]["target_accuracy"]
    for axis in axes[0]:
        axis.axhline(target, color="0.5", linewidth=0.8, linestyle="--")
        # The start of training would press everything of interest against the top.
        axis.set_ylim(min(np.quantile(accuracies, 0.1), target - 0.03), None)
    for row, (name, _) in enumerate(rows):
        axes[row, 0].set_ylabel(name)
    for axis in axes[1]:
        axis.set_yscale("log")
    for column, (name, _) in enumerate(columns):
        axes[1, column].set_xlabel(name)
        for row in range(len(rows)):
            axes[row, column].grid(alpha=0.25)
            if column > 0:
                axes[row, column].set_xscale("log")
    axes[0, 0].legend(loc="lower right", frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_wire(measurements: Sequence[Any], path: pathlib.Path, title: str) -> None:
    """Draws, for each :class:`experiments.wire.Measurement`, the time and the bytes of a round."""
    figure, (times, moved) = plt.subplots(
        1, 2, figsize=(12, 1.6 + 0.36 * len(measurements)), sharey=True, layout="constrained"
    )
    places = range(len(measurements))
    colours = [_COLOURS[m.method] for m in measurements]
    times.barh(places, [m.communication_ms for m in measurements], color=colours)
    times.set_xlabel("exchange, ms per round")
    kernel = [m.kernel_total / m.hosts for m in measurements]
    ledger = [sum(m.ledger_sent) / m.hosts for m in measurements]
    moved.barh(places, kernel, color=colours, label="kernel")
    moved.plot(ledger, places, "|", color="black", markersize=14, label="ledger")
    moved.set_xlabel("bytes sent per host and round, a mean over hosts")
    moved.legend(frameon=False)
    times.set_yticks(places, [f"{LABELS[m.method]}, {m.exchange}" for m in measurements])
    times.invert_yaxis()
    for axis, values in ((times, [m.communication_ms for m in measurements]), (moved, kernel)):
        axis.set_xscale("log")
        axis.set_xlim(min(values) / 2, max(values) * 2)
        axis.grid(axis="x", alpha=0.25)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)
