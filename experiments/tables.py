"""Tables of results for a terminal."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from experiments.configs import METHODS
from experiments.figures import LABELS


def comparison_table(records: Sequence[dict[str, Any]]) -> Table:
    """Like the paper's Table II, with bytes beside its bits: means over seeds.

    A cell over fewer seeds than were run (the target was not reached by all) says how many.
    """
    target = records[0]["target_accuracy"]
    seeds = sorted({record["seed"] for record in records})
    table = Table(
        title=f"{records[0]['config']} on {records[0]['dataset']}: communication to reach "
        f"{target:.0%} test accuracy",
        caption=f"Means over seeds {', '.join(map(str, seeds))}. Paper bits: 32 for each value "
        "sent up, no indices. Uplink: values, indices, flags. Two-way: uplink and downlink. "
        "Ratios are to SGD's two-way bytes.",
    )
    for heading in (
        "Method",
        "Rounds",
        "Uploads",
        "Paper bits",
        "Uplink",
        "Two-way",
        "Ratio",
        "Final accuracy",
        "ms/round",
    ):
        table.add_column(heading, justify="left" if heading == "Method" else "right")

    def two_way(record):
        if record["uplink_bytes_at_target"] is None:
            return None
        return record["uplink_bytes_at_target"] + record["downlink_bytes_at_target"]

    def mean_of(method, value):
        values = [value(record) for record in records if record["method"] == method]
        reached = [value for value in values if value is not None]
        return (float(np.mean(reached)) if reached else None), len(reached), len(values)

    dense = mean_of("sgd", two_way)[0]
    for method in METHODS:
        if not any(record["method"] == method for record in records):
            continue

        def cell(value: Any, show: Callable[[float], str], method: str = method) -> str:
            getter = value if callable(value) else lambda record: record[value]
            mean, reached, total = mean_of(method, getter)
            if mean is None:
                return "not reached"
            return show(mean) + (f" ({reached} of {total})" if reached < total else "")

        own = mean_of(method, two_way)[0]
        table.add_row(
            LABELS[method],
            cell("iterations_at_target", lambda x: f"{x:,.0f}"),
            cell("uploads_at_target", lambda x: f"{x:,.0f}"),
            cell("paper_uplink_bits_at_target", lambda x: f"{x:.2e}"),
            cell("uplink_bytes_at_target", format_bytes),
            cell(two_way, format_bytes),
            f"1/{dense / own:.1f}" if dense and own else "-",
            cell("final_test_accuracy", lambda x: f"{x:.2%}"),
            cell("ms_per_iteration", lambda x: f"{x:.2f}"),
        )
    return table


def format_bytes(count: float) -> str:
    """``1234567`` as ``1.23 MB`` (powers of ten)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"
