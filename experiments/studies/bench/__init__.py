"""The command ``bench``: how fast selection and rounds are, beside their floors.

Every number stands beside the least that it could be: of a selection, one pass over the vector; of
a round, two gradients of every worker and the norm of their difference, which rule (6) needs; of
coding, nothing: it stands beside the selection, and beside the round without it. All
that are compared take turns, so that what else the machine does falls on all of them; benchmark
libraries time one thing after the other. What needs memory is measured in processes of their own.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any, Literal


@dataclasses.dataclass
class Bench:
    """Measures selection, rounds, coding, and what many workers and many parameters take.

    Everything is beside its floor.
    """

    parts: tuple[Literal["selection", "round", "coding", "workers", "parameters"], ...] = (
        *("selection", "round", "coding", "workers", "parameters"),
    )
    """What to measure."""
    repeats: int = 11
    """How many times each is timed, in turn with the others."""
    out: pathlib.Path = pathlib.Path("results/bench")
    """A folder for bench.png, and for a file in JSON for each part."""


def work(command: Bench, arguments: Sequence[str]) -> None:
    """Measures, prints and writes; raises ValueError for bad options."""
    if command.repeats < 1:
        raise ValueError(f"Expected --repeats={command.repeats} to be at least 1.")
    import rich.console

    from experiments.report.figures import plot_ratios
    from experiments.studies.bench import coding, rounds, scale, selection, timing
    from experiments.training.records import session, write_json

    measure = {
        "selection": selection.measure,
        "round": rounds.measure,
        "coding": coding.measure,
        "workers": scale.measure_workers,
        "parameters": scale.measure_parameters,
    }
    console = rich.console.Console()
    for part in command.parts:
        with console.status(f"measuring: {part}"):
            measured = measure[part](command.repeats)
        content = [{**row._asdict(), "ratio": row.ratio} for row in measured]
        write_json(command.out / f"{part}.json", {**session(arguments), "rows": content})
        for title in dict.fromkeys(row.part for row in measured):
            console.print(timing.table(title, [row for row in measured if row.part == title]))
    figure = command.out / "bench.png"
    rows = read(command.out)
    plot_ratios([(f"{row['part']}: {row['case']}", row["ratio"]) for row in rows], figure)
    console.print(f"Results: {command.out}\nFigure:  {figure}", soft_wrap=True)


def read(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of all parts that were measured into a folder, now or before."""
    files = [folder / f"{part}.json" for part in Bench.parts]
    return [row for file in files if file.exists() for row in json.loads(file.read_text())["rows"]]
