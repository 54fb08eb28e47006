"""The command ``language``: bits per byte of a language model against what it took to send."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import rich.console
import tyro

from experiments.configs import CONFIGS, Config
from experiments.report.language import plot_bytes, plot_times
from experiments.report.tables import format_bytes, numbers_table
from experiments.training import grid, inputs
from experiments.training.records import Store, session, write_json
from experiments.training.runs import Reporter, Run, perform


@dataclasses.dataclass
class Language:
    """Trains a transformer of bytes on the sources of Python's own library with all methods: dense
    AdamW and Muon, DiLoCo, SparseLoCo, MuLoCo, DeMo, and ours, whose parts are left out in turn.

    Prints what each took, and writes language.json, a picture of bits per byte against bytes of
    both ways, one against time on links of three speeds, and a folder for each run. It can be
    stopped, and goes on. A row takes a quarter of an hour a seed on two cores.
    """

    out: pathlib.Path = pathlib.Path("results/language")
    """Where results go."""
    rows: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[NAME ...]")] = ()
    """Which rows of the table, by default all: see the first column."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """One run of every row for each."""
    partition: Literal["iid", "package"] = "iid"
    """How the text is dealt to workers: evenly at random, or a top-level package for each."""
    smoke: bool = False
    """Whether to train a small model for a minute: what that shows is that all runs."""
    step_ms: float = 50.0
    """Of a gradient of a worker, for the times on links."""
    round_trip_ms: float = 40.0
    """Of the links."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to train."""

    label: str
    method: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_OURS = {"inner": "muon", "period": 1, "learning_rate": 8e-3}
_BASE = {**_OURS, "density": 0.04}
ROWS = {
    "adamw": Row("AdamW", "adamw"),
    "muon": Row("Muon", "muon", {"learning_rate": 4e-3}),
    "diloco": Row("DiLoCo", "diloco"),
    "sparse_loco": Row("SparseLoCo", "sparse_loco"),
    "muloco": Row("MuLoCo", "muloco"),
    "demo": Row("DeMo", "demo"),
    "ours": Row("ours", "local_coded", _BASE),
    "ours_adamw": Row("ours, AdamW inside", "local_coded", {**_BASE, "inner": "adamw"}),
    "ours_fewer": Row("ours, 0.8 %", "local_coded", {**_OURS, "density": 0.008}),
    "no_local_steps": Row(
        *("without local steps", "local_coded"),
        {**_BASE, "local_steps": 1, "optimizer": "muon", "density": 0.004},
    ),
    "no_density": Row("without top k", "local_coded", {**_BASE, "density": 1.0}),
    "no_coding": Row(
        *("without coding", "local_coded"), {**_BASE, "values": "plain", "indices": "plain"}
    ),
    "no_down": Row(
        *("without a sparse way down", "sparse"),
        {**_BASE, "scope": "tree", "values": "sign", "indices": "elias_fano"},
    ),
    "in_turn": Row("in turns of 2", "local_coded", {**_BASE, "period": 2, "density": 0.08}),
}
"""Ours sends few entries in few bits, both ways, of how far ten steps have led; then the same with
one part less, at as many bytes where that can be."""


def work(command: Language, arguments: Sequence[str]) -> None:
    """Raises ValueError for a row that is none."""
    if unknown := set(command.rows) - ROWS.keys():
        expected, got = ", ".join(ROWS), ", ".join(sorted(unknown))
        raise ValueError(f"Expected --rows of {expected}, got {got}.")
    for name in ("step_ms", "round_trip_ms"):
        if not 0 <= getattr(command, name) < np.inf:
            option = f"--{name.replace('_', '-')}={getattr(command, name)}"
            raise ValueError(f"Expected {option} to be finite and at least 0.")
    base = CONFIGS["stdlib_lm_smoke" if command.smoke else "stdlib_lm"]
    base = dataclasses.replace(base, partition=command.partition)
    given = inputs.load(base)
    console, made = rich.console.Console(), {}
    with Reporter(console, plain=True) as reporter:
        for name in command.rows or ROWS:
            store, run = Store(command.out / command.partition / name), config_of(base, name)
            for seed in command.seeds:
                of_seed = Run(run, ROWS[name].method, seed)
                perform(of_seed, store, *given, arguments=arguments, reporter=reporter)
                made.setdefault(name, []).append(_outcome(store, of_seed))
            write_json(command.out / "language.json", {**session(arguments), "rows": made})
    console.print(_table(made))
    links = {"step_ms": command.step_ms, "round_trip_ms": command.round_trip_ms}
    for plot, path, how in ((plot_bytes, "bytes", {}), (plot_times, "times", links)):
        figure = command.out / f"{path}.png"
        plot(
            {name: (ROWS[name].label, ROWS[name].method, runs) for name, runs in made.items()},
            figure,
            **how,
        )
        console.print(f"Figure:  {figure}", soft_wrap=True)
    console.print(f"Results: {command.out / 'language.json'}", soft_wrap=True)


def config_of(base: Config, name: str) -> Config:
    """The configuration of a row."""
    row = ROWS[name]
    config = dataclasses.replace(base, **row.settings)
    return grid.of_method(config, row.method, base.iterations)


def _outcome(store: Store, run: Run) -> dict[str, Any]:
    """What a run took and came to, of one worker, and its curve."""
    files = store.run(run.name)
    record, workers = files.record(), run.config.num_workers
    assert record is not None
    curve = [
        {
            "rounds": point["iteration"],
            "bytes": (point["uplink_bytes"] + point["downlink_bytes"]) / workers,
            "bits_per_byte": point["bits_per_byte"],
        }
        for point in files.curve()
    ]
    return {
        "seed": run.seed,
        "rounds": record["iterations"],
        "gradients": record["gradients_per_worker"],
        "bits_per_byte": record["final_bits_per_byte"],
        "up_bytes": record["uplink_bytes"] / workers,
        "two_way_bytes": record["two_way_bytes"] / workers,
        "curve": curve,
    }


def mean(runs: Sequence[Mapping[str, Any]], key: str) -> float:
    return float(np.mean([run[key] for run in runs]))


def _table(rows: Mapping[str, Sequence[Mapping[str, Any]]]):
    """Means over seeds, beside dense AdamW."""
    columns = ("Gradients", "Rounds", "Up", "Both ways", "of AdamW", "Bits/byte", "Seeds")
    table = numbers_table("stdlib_lm: a worker's, in the end", ("Row", "Method"), columns)
    dense = mean(rows["adamw"], "two_way_bytes") if "adamw" in rows else None
    for name, runs in rows.items():
        both = mean(runs, "two_way_bytes")
        counts = [f"{mean(runs, key):,.0f}" for key in ("gradients", "rounds")]
        sizes = [format_bytes(mean(runs, "up_bytes")), format_bytes(both)]
        part = "" if dense is None else f"1/{dense / both:,.0f}"
        bits = f"{mean(runs, 'bits_per_byte'):.3f}"
        table.add_row(name, ROWS[name].label, *counts, *sizes, part, bits, f"{len(runs)}")
    table.caption = "Means over seeds. Both ways: as a star of workers and a server moves it; of "
    table.caption += "SparseLoCo, MuLoCo and DeMo every message to all others."
    return table
