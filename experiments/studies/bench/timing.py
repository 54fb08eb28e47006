"""Times of cases that take turns, memory of processes, and rows of them beside their floors."""

import dataclasses
import multiprocessing
import pathlib
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import rich.box
import rich.table

_NOTE_WIDTH = 22  # of a terminal of 80 columns


@dataclasses.dataclass(frozen=True)
class Row:
    """One thing that was measured, beside its floor."""

    part: str
    case: str
    seconds: float
    """Median."""
    low: float
    high: float
    floor: float
    note: str = ""

    @classmethod
    def of(
        cls,
        part: str,
        case: str,
        seconds: Sequence[float],
        *,
        floor: float | None = None,
        per: float = 1,
        note: str = "",
    ) -> "Row":
        """``per`` is how many rounds, say, each time is of; without a floor it is its own."""
        median = statistics.median(seconds) / per
        low, high = min(seconds) / per, max(seconds) / per
        return cls(part, case, median, low, high, median if floor is None else floor, note)

    @property
    def ratio(self) -> float:
        return self.seconds / self.floor


def interleave(cases: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds that each case takes, ``repeats`` times, in turn. The first time is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for case in cases.values():
        case()
    for _ in range(repeats):
        for name, case in cases.items():
            began = time.perf_counter()
            case()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def rows(
    part: str,
    seconds: Mapping[str, Sequence[float]],
    floor: str,
    notes: Mapping[str, str],
    per: float = 1,
) -> list[Row]:
    """A row for each case, beside one of them."""
    least = statistics.median(seconds[floor]) / per
    return [
        Row.of(part, case, times, floor=least, per=per, note=notes.get(case, ""))
        for case, times in seconds.items()
    ]


def times_as_long(seconds: Mapping[str, Sequence[float]], name: str, other: str) -> str:
    """How many times as long as another case one takes."""
    ratio = statistics.median(seconds[name]) / statistics.median(seconds[other])
    return f"{ratio:.2g} × {other}"


def table(title: str, shown: Sequence[Row]) -> rich.table.Table:
    """The rows of one part, for a terminal: medians, the range, and how far above the floor."""
    long = [f"{row.case}: {row.note}" for row in shown if len(row.note) > _NOTE_WIDTH]
    result = rich.table.Table(
        title=title,
        title_justify="left",
        caption="\n".join(long),
        caption_justify="left",
        box=rich.box.SIMPLE_HEAD,
    )
    result.add_column("Case", no_wrap=True)
    for heading in ("Median", "Range", "× floor"):
        result.add_column(heading, justify="right", no_wrap=True)
    result.add_column("")
    for row in shown:
        result.add_row(
            row.case,
            _milliseconds(row.seconds),
            f"{_milliseconds(row.low)} – {_milliseconds(row.high)}",
            f"{row.ratio:.2f}",
            row.note if len(row.note) <= _NOTE_WIDTH else "below",
        )
    return result


def in_a_process(fn: Callable[..., Any], *arguments: Any) -> Any:
    """What ``fn`` returns in a new process, whose memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(fn, arguments)


def peak_bytes() -> int:
    """The most memory that this process has had, where the system tells, else 0."""
    # getrusage would count the memory of the process that started this one too: Linux hands its
    # high-water mark on.
    status = pathlib.Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return 1024 * int(found[1]) if found else 0


def gibibytes(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size else "unknown"


def torch() -> Any:
    """PyTorch, or None where it is not installed."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    return torch


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.3g} ms" if seconds < 1 else f"{1000 * seconds:,.0f} ms"
