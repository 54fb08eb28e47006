"""Times of cases that take turns, memory of processes, and rows of them beside their floors."""

import multiprocessing
import pathlib
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import rich.box
import rich.table


class Row(NamedTuple):
    """One thing that was measured, beside its floor."""

    part: str
    case: str
    seconds: float  # median
    low: float
    high: float
    floor: float
    note: str = ""

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


def row(part: str, case: str, seconds: Any, floor: Any, note: str = "", per: float = 1) -> Row:
    """``per`` is how many rounds, say, each time of a case and of its floor is of."""
    low, high = min(seconds) / per, max(seconds) / per
    median, least = statistics.median(seconds) / per, statistics.median(floor) / per
    return Row(part, case, median, low, high, least, note)


def times_as_long(seconds: Mapping[str, Sequence[float]], name: str, other: str) -> str:
    """How many times as long as another case one takes."""
    ratio = statistics.median(seconds[name]) / statistics.median(seconds[other])
    return f"{ratio:.2g} × {other}"


def table(title: str, shown: Sequence[Row]) -> rich.table.Table:
    """The rows of one part, for a terminal: medians, the range, and how far above the floor."""
    result = rich.table.Table(title=title, title_justify="left", box=rich.box.SIMPLE_HEAD)
    result.add_column("Case", no_wrap=True)
    for heading in ("Median", "Range", "× floor"):
        result.add_column(heading, justify="right", no_wrap=True)
    result.add_column("")
    for row in shown:
        low, high = _milliseconds(row.low), _milliseconds(row.high)
        times = _milliseconds(row.seconds), f"{low} – {high}", f"{row.ratio:.2f}"
        result.add_row(row.case, *times, row.note)
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


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.3g} ms" if seconds < 1 else f"{1000 * seconds:,.0f} ms"
