"""Curves as pictures: accuracy and loss against uploads and bytes."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")  # writes files; needs no display
import matplotlib.pyplot as plt
import matplotlib.ticker
import numpy as np

from experiments.methods import METHODS
from experiments.training.records import Store


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
    runs = [files for files in store.runs() if files.record() is not None]
    labelled = set()
    accuracies = []
    for files in sorted(runs, key=lambda files: list(METHODS).index(files.about()["method"])):
        method = files.about()["method"]
        curve = files.curve()
        accuracies += [point["test_accuracy"] for point in curve]
        for row, (_, key) in enumerate(rows):
            for column, (_, position) in enumerate(columns):
                axes[row, column].plot(
                    [position(point) for point in curve],
                    [point[key] for point in curve],
                    color=METHODS[method].colour,
                    linewidth=1.3,
                    label=None if method in labelled else METHODS[method].label,
                )
        labelled.add(method)
    target = runs[0].about()["config"]["target_accuracy"]
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
    """Draws, for each :class:`.Measurement`, the time and the bytes of a round."""
    figure, (times, moved) = plt.subplots(
        1, 2, figsize=(12, 1.6 + 0.36 * len(measurements)), sharey=True, layout="constrained"
    )
    places = range(len(measurements))
    colours = [METHODS[m.method].colour for m in measurements]
    times.barh(places, [m.communication_ms for m in measurements], color=colours)
    times.set_xlabel("exchange, ms per round")
    kernel = [m.kernel_total / m.hosts for m in measurements]
    ledger = [sum(m.ledger_sent) / m.hosts for m in measurements]
    moved.barh(places, kernel, color=colours, label="kernel")
    moved.plot(ledger, places, "|", color="black", markersize=14, label="ledger")
    moved.set_xlabel("bytes sent per host and round, a mean over hosts")
    moved.legend(frameon=False)
    times.set_yticks(places, [f"{METHODS[m.method].label}, {m.exchange}" for m in measurements])
    times.invert_yaxis()
    for axis, values in ((times, [m.communication_ms for m in measurements]), (moved, kernel)):
        axis.set_xscale("log")
        axis.set_xlim(min(values) / 2, max(values) * 2)
        axis.grid(axis="x", alpha=0.25)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)


@dataclasses.dataclass(frozen=True)
class Band:
    """A method's line, and the range around it. All four are of one length."""

    method: str
    x: Sequence[float]
    mean: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    note: str = ""
    """Follows the method's name in the legend."""


# A panel is as wide as a phone's screen, on which its text is then still of a size to read.
_PANEL = (5.0, 3.7)
_PANEL_STYLE: dict[Any, Any] = {
    "font.size": 11.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
}

_THOUSANDS = matplotlib.ticker.StrMethodFormatter("{x:,.0f}")


def accuracy_range(bands: Sequence[Band], target: float) -> tuple[float, float]:
    """The ends of an axis for accuracies, from below the target or most of a training's values.

    The start of training would press everything of interest against the top.
    """
    lowest = np.quantile([value for band in bands for value in band.mean], 0.1)
    highest = max(value for band in bands for value in band.high)
    low = min(float(lowest), target - 0.03)
    return low, max(highest, target) + 0.05 * (highest - low)


def plot_bands(
    bands: Sequence[Band],
    path: pathlib.Path,
    *,
    title: str,
    x_label: str,
    y_label: str,
    x_scale: str = "linear",
    y_scale: str = "linear",
    x_ticks: Mapping[float, str] | None = None,
    marker: str | None = None,
    accuracies: tuple[float, float] | None = None,
    target: float | None = None,
    slope: float | None = None,
) -> None:
    """Draws one panel.

    Args:
      bands: what to draw, at least one.
      path: where to.
      title: of the panel.
      x_label: of the axis.
      y_label: of the axis.
      x_scale: ``"linear"`` or ``"log"``.
      y_scale: as ``x_scale``.
      x_ticks: places on the axis, and what to write there; None leaves it to matplotlib.
      marker: at each point of a line, for those with few.
      accuracies: the ends of an axis in per cent; None is for one that shows something else.
      target: accuracy at which to draw a line.
      slope: of a dashed line to compare with, on two logarithmic axes.
    """
    with plt.rc_context(_PANEL_STYLE):
        figure, axis = plt.subplots(figsize=_PANEL, layout="constrained")
        for band in bands:
            known = METHODS.get(band.method)
            label, colour = (known.label, known.colour) if known else (band.method, "0.4")
            label += band.note
            axis.plot(band.x, band.mean, color=colour, marker=marker, linewidth=1.5, label=label)
            axis.fill_between(band.x, band.low, band.high, color=colour, alpha=0.2, linewidth=0)
        axis.set(xlabel=x_label, ylabel=y_label, xscale=x_scale, yscale=y_scale)
        figure.suptitle(title, fontsize="medium")  # which may be wider than the axes
        if target is not None:
            axis.axhline(target, color="0.4", linewidth=0.9, linestyle="--")
        if slope is not None:
            x = np.array([min(min(band.x) for band in bands), max(max(band.x) for band in bands)])
            highest = max(band.mean[0] for band in bands)
            label = f"slope {slope:g}".replace("-", "−")
            axis.plot(x, 1.4 * highest * (x / x[0]) ** slope, "--", color="0.4", label=label)
        if accuracies is not None:
            axis.set_ylim(accuracies)
            axis.yaxis.set_major_formatter(lambda y, _: f"{100 * y:g} %")
        elif y_scale == "linear":
            axis.set_ylim(0, None)
            axis.yaxis.set_major_formatter(_THOUSANDS)
        if x_ticks is not None:
            axis.set_xticks(list(x_ticks), list(x_ticks.values()))
            axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        elif x_scale == "linear":
            axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
            axis.xaxis.set_major_formatter(_THOUSANDS)
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, fontsize=10)
        figure.savefig(path, dpi=160)
        plt.close(figure)


def plot_times(measurements: Sequence[Any], path: pathlib.Path) -> None:
    """Draws, for each :class:`.Measurement`, the time of its exchange."""
    height = 1.1 + 0.29 * len(measurements)
    with plt.rc_context(_PANEL_STYLE):
        figure, axis = plt.subplots(figsize=(_PANEL[0], height), layout="constrained")
        times = [m.communication_ms for m in measurements]
        bars = axis.barh(
            range(len(times)), times, color=[METHODS[m.method].colour for m in measurements]
        )
        axis.bar_label(bars, [f"{time:,.0f}" for time in times], padding=3, fontsize=10)
        axis.set_yticks(
            range(len(times)), [f"{METHODS[m.method].label}, {m.exchange}" for m in measurements]
        )
        axis.invert_yaxis()
        axis.set(xlabel="exchange, ms per round", xscale="log")
        axis.set_xlim(min(times) / 2, max(times) * 3)
        axis.grid(axis="x", alpha=0.25)
        figure.savefig(path, dpi=160)
        plt.close(figure)


def plot_ratios(ratios: Sequence[tuple[str, float]], path: pathlib.Path) -> None:
    """Draws bars of how far each named thing is above its floor."""
    height = 1.1 + 0.29 * len(ratios)
    with plt.rc_context(_PANEL_STYLE):
        figure, axis = plt.subplots(figsize=(1.8 * _PANEL[0], height), layout="constrained")
        bars = axis.barh(range(len(ratios)), [ratio for _, ratio in ratios], color="#0173b2")
        axis.bar_label(bars, [f"{ratio:,.2f}" for _, ratio in ratios], padding=3, fontsize=10)
        axis.set_yticks(range(len(ratios)), [name for name, _ in ratios])
        axis.invert_yaxis()
        axis.axvline(1, color="0.4", linewidth=0.9, linestyle="--")
        axis.set(xlabel="times the floor", xscale="log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_xlim(0.7, 2 * max(ratio for _, ratio in ratios))
        axis.margins(y=0.01)
        axis.grid(axis="x", alpha=0.25)
        figure.savefig(path, dpi=160)
        plt.close(figure)
