"""Results as pictures: curves of runs, bands over seeds, and bars."""

import contextlib
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib

matplotlib.use("Agg")  # writes files; needs no display
import matplotlib.pyplot as plt
import matplotlib.ticker
import numpy as np

from experiments.methods import METHODS
from experiments.metrics import ACCURACY, Metric, metric_of
from experiments.report.tables import format_bytes
from experiments.training.records import RunFiles

if TYPE_CHECKING:
    from experiments.wire.measure import Measurement

# A panel is as wide as a phone's screen, on which its text is then still of a size to read.
_PANEL = (5.0, 3.7)
_PANEL_STYLE: Any = {"font.size": 11.5, "axes.spines.top": False, "axes.spines.right": False}
_THOUSANDS = matplotlib.ticker.StrMethodFormatter("{x:,.0f}")


def plot_curves(runs: Sequence[RunFiles], path: pathlib.Path, title: str) -> None:
    """Draws the curves of ``runs``: how well they do and training loss, against uploads, against
    bytes up, and against bytes both ways. One line for each seed, one colour for each method.
    """
    columns = {
        "uploads": ("uploads",),
        "uplink bytes": ("uplink_bytes",),
        "uplink + downlink bytes": ("uplink_bytes", "downlink_bytes"),
    }
    done = [(files.about(), files.curve()) for files in runs]
    metric = metric_of(done[0][0]["config"])
    rows = {metric.label: metric.key, "training loss": "train_loss"}
    done.sort(key=lambda run: list(METHODS).index(run[0]["method"]))
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.4), sharey="row", layout="constrained")
    for row, (y_label, key) in enumerate(rows.items()):
        axes[row, 0].set_ylabel(y_label)
        for column, (x_label, sums) in enumerate(columns.items()):
            axis = axes[row, column]
            labels = {about["method"]: METHODS[about["method"]].label for about, _ in done}
            for about, curve in done:
                axis.plot(
                    [sum(point[name] for name in sums) for point in curve],
                    [point[key] for point in curve],
                    color=METHODS[about["method"]].colour,
                    linewidth=1.3,
                    label=labels.pop(about["method"], None),
                )
            axis.grid(alpha=0.25)
            axis.set_xscale("log" if column else "linear")
            if row == 1:
                axis.set_xlabel(x_label)
    target = done[0][0]["config"][metric.target]
    reached = [point[metric.key] for _, curve in done for point in curve]
    for axis in axes[0]:
        if target is not None:
            axis.axhline(target, color="0.5", linewidth=0.8, linestyle="--")
        axis.set_ylim(_range(metric, reached, target))
    for axis in axes[1]:
        axis.set_yscale("log")
    lines, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_wire(measurements: Sequence["Measurement"], path: pathlib.Path, title: str) -> None:
    """Draws the time and the bytes of a round of each."""
    figure, (times, moved) = plt.subplots(
        1, 2, figsize=(12, 1.6 + 0.36 * len(measurements)), sharey=True, layout="constrained"
    )
    kernel = [m.kernel_total / m.hosts for m in measurements]
    _bars(times, measurements, [m.communication_ms for m in measurements], room=2)
    _bars(moved, measurements, kernel, room=2, label="kernel")
    ledger = [sum(m.ledger_sent) / m.hosts for m in measurements]
    moved.plot(ledger, range(len(ledger)), "|", color="black", markersize=14, label="ledger")
    times.set_xlabel("exchange, ms per round")
    moved.set_xlabel("bytes sent per host and round, a mean over hosts")
    moved.legend(frameon=False)
    times.invert_yaxis()
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_times(measurements: Sequence["Measurement"], path: pathlib.Path) -> None:
    """Draws the time of each exchange."""
    times = [m.communication_ms for m in measurements]
    with _panel(path, (_PANEL[0], 1.1 + 0.29 * len(times))) as (_, axis):
        bars = _bars(axis, measurements, times, room=3)
        axis.bar_label(bars, [f"{time:,.0f}" for time in times], padding=3, fontsize=10)
        axis.invert_yaxis()
        axis.set_xlabel("exchange, ms per round")


def plot_ratios(ratios: Sequence[tuple[str, float]], path: pathlib.Path) -> None:
    """Draws bars of how far each named thing is above its floor."""
    names, values = zip(*ratios, strict=True)
    with _panel(path, (1.8 * _PANEL[0], 1.1 + 0.29 * len(ratios))) as (_, axis):
        bars = axis.barh(range(len(values)), values, color="#0173b2")
        axis.bar_label(bars, [f"{ratio:,.2f}" for ratio in values], padding=3, fontsize=10)
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        axis.axvline(1, color="0.4", linewidth=0.9, linestyle="--")
        axis.set(xlabel="times the floor", xscale="log", xlim=(min(values) / 1.5, 2 * max(values)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.margins(y=0.01)
        axis.grid(axis="x", alpha=0.25)


def plot_tried(tried: Mapping[str, Sequence[tuple[float, float]]], path: pathlib.Path) -> None:
    """Draws what each setting that was tried took to the target, by method: bytes of both ways
    against gradients of a worker. A line joins those than which no other took less of both."""
    points = [point for found in tried.values() for point in found]
    with _panel(path, (1.5 * _PANEL[0], 1.3 * _PANEL[1])) as (_, axis):
        front = pareto_front(points)
        axis.plot(*zip(*front, strict=True), color="0.75", linewidth=1.2, zorder=1)
        for method, found in tried.items():
            row = METHODS[method]
            axis.scatter(*zip(*found, strict=True), s=22, color=row.colour, label=row.label)
            least = min(found)
            axis.annotate(
                row.label, least, (-6, 5), textcoords="offset points", ha="right",
                fontsize=10, color=row.colour,
            )  # fmt: skip
        axis.set(xscale="log", yscale="log")
        axis.set_xlim(min(x for x, _ in points) / 12, 1.6 * max(x for x, _ in points))
        axis.xaxis.set_major_formatter(lambda size, _: format_bytes(size))
        for which in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            which(_THOUSANDS)
        axis.tick_params(axis="y", which="minor", labelsize=9)
        axis.set(xlabel="bytes both ways to the target", ylabel="gradients of a worker")
        axis.grid(alpha=0.25)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of pairs, those than which no other is less in one and no more in the other."""
    front: list[tuple[float, float]] = []
    for point in sorted(set(points)):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


class Band(NamedTuple):
    """A method's line, and the range around it. All four are of one length."""

    method: str
    x: Sequence[float]
    mean: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    note: str = ""  # follows the method's name in the legend

    @classmethod
    def over(cls, method: str, x: Sequence[float], values: Sequence[Sequence[float]]) -> "Band":
        """Of the values of all seeds at each place."""
        means = [float(np.mean(of_seeds)) for of_seeds in values]
        return cls(method, x, means, [min(v) for v in values], [max(v) for v in values])


def accuracy_range(bands: Sequence[Band], target: float) -> tuple[float, float]:
    """The ends of an axis for accuracies."""
    low = _lowest_accuracy([value for band in bands for value in band.mean], target)
    highest = max(value for band in bands for value in band.high)
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

    ``x_ticks`` are places on the axis, and what to write there; ``accuracies`` the ends of an axis
    in per cent, where it shows them, and ``target`` one at which to draw a line; ``slope`` that of
    a dashed line to compare with, on two logarithmic axes. A marker is for lines of few points.
    """
    with _panel(path, _PANEL) as (figure, axis):
        for band in bands:
            known = METHODS.get(band.method)
            label, colour = (known.label, known.colour) if known else (band.method, "0.4")
            style = {"color": colour, "marker": marker, "label": label + band.note}
            axis.plot(band.x, band.mean, linewidth=1.5, **style)
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


@contextlib.contextmanager
def _panel(path: pathlib.Path, size: tuple[float, float]) -> Iterator[tuple[Any, Any]]:
    """A figure of one axis in the style of the report, written at the end."""
    with plt.rc_context(_PANEL_STYLE):
        figure, axis = plt.subplots(figsize=size, layout="constrained")
        yield figure, axis
        figure.savefig(path, dpi=160)
        plt.close(figure)


def _bars(
    axis: Any,
    measurements: Sequence["Measurement"],
    values: Sequence[float],
    *,
    room: float,
    **how: Any,
) -> Any:
    """A bar for each measurement, in its method's colour, with room for what is written behind."""
    places, colours = range(len(values)), [METHODS[m.method].colour for m in measurements]
    bars = axis.barh(places, values, color=colours, **how)
    axis.set_yticks(places, [f"{METHODS[m.method].label}, {m.exchange}" for m in measurements])
    axis.set(xscale="log", xlim=(min(values) / 2, max(values) * room))
    axis.grid(axis="x", alpha=0.25)
    return bars


def _range(metric: Metric, values: Sequence[float], target: float | None) -> tuple[float, float]:
    """The ends of an axis."""
    best = min(values if target is None else [*values, target], key=metric.cost)
    if metric is ACCURACY:
        assert target is not None
        lowest = _lowest_accuracy(values, target)
        return lowest, min(1.0, best + 0.05 * (best - lowest) + 1e-3)
    worst = float(np.quantile(values, 0.9))
    return best - 0.05 * (worst - best), worst


def _lowest_accuracy(accuracies: Sequence[float], target: float) -> float:
    """The start of training would press everything of interest against the top."""
    return min(float(np.quantile(accuracies, 0.1)), target - 0.03)
