"""Pictures of a language model: bits per byte against bytes, and against time on several links."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")  # writes files; needs no display
import matplotlib.pyplot as plt
import matplotlib.ticker

from experiments.methods import METHODS
from experiments.report.tables import format_bytes, format_seconds

Rows = Mapping[str, tuple[str, str, Sequence[Mapping[str, Any]]]]
"""Of each row its label, its method and its runs."""

LINKS = {"10 Mbit/s": 10e6, "100 Mbit/s": 100e6, "1 Gbit/s": 1e9}


def seconds(
    run: Mapping[str, Any],
    point: Mapping[str, Any],
    speed: float,
    *,
    step_ms: float,
    round_trip_ms: float,
) -> float:
    """When a run is at a point of its curve, on links of ``speed`` bits a second: in each round it
    computes, waits for a round trip, and moves what a worker sends and hears, one by one."""
    rounds = point["rounds"]
    computing = rounds * run["gradients"] / run["rounds"] * step_ms / 1000
    return computing + rounds * round_trip_ms / 1000 + 8 * point["bytes"] / speed


def plot_bytes(rows: Rows, path: pathlib.Path) -> None:
    """Draws the curves of all runs against a worker's bytes of both ways, with means at the end."""
    figure, axis = plt.subplots(figsize=(8, 5.2), layout="constrained")
    _curves(axis, rows, lambda run, point: point["bytes"])
    axis.xaxis.set_major_formatter(lambda size, _: format_bytes(size))
    axis.set(xlabel="bytes of a worker, both ways", ylabel="bits per byte of held-out files")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_times(rows: Rows, path: pathlib.Path, **how: float) -> None:
    """Draws the same against time, for links of three speeds. ``how`` is as in :func:`seconds`."""
    figure, axes = plt.subplots(1, len(LINKS), figsize=(14, 4.8), sharey=True, layout="constrained")
    for axis, (name, speed) in zip(axes, LINKS.items(), strict=True):
        _curves(axis, rows, lambda run, point, speed=speed: seconds(run, point, speed, **how))
        axis.xaxis.set_major_formatter(lambda time, _: format_seconds(time))
        axis.set(title=name, xlabel="time")
    axes[0].set_ylabel("bits per byte of held-out files")
    steps = f"{how['step_ms']:g} ms a gradient, {how['round_trip_ms']:g} ms a round trip"
    figure.suptitle(f"By the cost model: {steps}", fontsize=11)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _curves(axis: Any, rows: Rows, place: Callable[[Any, Any], float]) -> None:
    """One thin line a seed, and a name at the end of the first."""
    lowest, shades = float("inf"), {}
    for label, method, runs in rows.values():
        shade = shades[method] = shades.get(method, 1.25) - 0.25  # rows of one method
        for number, run in enumerate(runs):
            x = [place(run, point) for point in run["curve"]]
            y = [point["bits_per_byte"] for point in run["curve"]]
            lowest = min(lowest, *y)
            how = {"color": METHODS[method].colour, "alpha": max(0.35, shade)}
            axis.plot(x, y, linewidth=1.1, **how)
            axis.plot(x[-1:], y[-1:], "o", markersize=4, **how)
            if number == 0:
                axis.annotate(
                    label, (x[-1], y[-1]), (5, -2), textcoords="offset points", fontsize=9,
                    color=METHODS[method].colour,
                )  # fmt: skip
    axis.set(xscale="log", ylim=(lowest - 0.05, lowest + 1.3))
    axis.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axis.margins(x=0.2)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
