"""The command ``scale_free``: the rule without an alpha as it comes, on tasks that differ in all
that it should not have to be told about, beside always sending."""

import dataclasses
import itertools
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import rich.console
import tyro

from experiments import data
from experiments.configs import CONFIGS, Config
from experiments.methods import LOOK_EVERY
from experiments.report.tables import numbers_table
from experiments.training.records import Store, session, write_json
from experiments.training.runs import Reporter, Run, perform

THETAS = (0.01, 0.1, 1.0, 10.0, 100.0)


@dataclasses.dataclass
class Scale_free:
    """Trains with `innovation()` as it comes and with everybody always sending, for the same number
    of gradients: data sets, densities, optimisers, skewed data and a tenfold drop of the rate.

    Prints the accuracy of both in the end and the part of the uploads that the rule took; then
    sweeps its one number over four powers of ten before momentum and AdamW. Writes
    scale_free.json, and a folder for each task. It can be stopped, and goes on.
    """

    out: pathlib.Path = pathlib.Path("results/scale_free")
    """Where results go."""
    configs: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[NAME ...]")] = ("digits",)
    """Which data: digits, mnist_fc, cifar10_narrow."""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """One run of every task for each."""
    iterations: int | None = None
    """Training rounds of always sending; by default 1,500, of cifar10_narrow 600."""
    data_dir: pathlib.Path | None = None
    """Where tensorflow-datasets keeps prepared data."""
    archives: pathlib.Path | None = None
    """A folder with the original archives of the data sets."""


@dataclasses.dataclass(frozen=True)
class Task:
    """One setting of what the rule is not told about."""

    optimizer: str | None = None
    density: float = 0.01
    partition: str = "iid"
    drops: bool = False  # the rate falls tenfold after two thirds

    @property
    def name(self) -> str:
        parts = [self.optimizer or "inside", f"density{self.density:g}"]
        parts += [self.partition] * (self.partition != "iid") + ["drop"] * self.drops
        return "-".join(parts)

    def config(self, base: Config) -> Config:
        rate = _RATES[base.name][self.optimizer]
        decay = (2 * base.iterations // 3,) if self.drops else ()
        own = {"optimizer": self.optimizer, "density": self.density, "partition": self.partition}
        changes = {"learning_rate": rate, "scope": "tree", "decay_iterations": decay, "period": 2}
        return dataclasses.replace(base, **own, **changes)


_RATES = {
    "digits": {None: 1.0, "sgd": 1.0, "momentum": 0.1, "adamw": 0.005},
    "mnist_fc": {None: 0.3, "sgd": 0.3, "momentum": 0.03, "adamw": 0.001},
    "cifar10_narrow": {None: 0.1, "sgd": 0.1, "momentum": 0.01, "adamw": 0.003},
}
TASKS = [
    *(Task(density=density) for density in (0.001, 0.01, 0.1, 1.0)),
    *(Task(optimizer, density) for optimizer in ("momentum", "adamw") for density in (0.01, 1.0)),
    *(Task(optimizer, partition="dirichlet") for optimizer in (None, "adamw")),
    *(Task(optimizer, drops=True) for optimizer in (None, "momentum")),
]
SWEEP = [Task(optimizer, d) for optimizer in ("momentum", "adamw") for d in (0.01, 1.0)]


def work(command: Scale_free, arguments: Sequence[str]) -> None:
    """Raises ValueError for a name of no configuration here."""
    if unknown := set(command.configs) - _RATES.keys():
        expected = ", ".join(_RATES)
        raise ValueError(f"Expected --configs of {expected}, got {', '.join(sorted(unknown))}.")
    console = rich.console.Console()
    rows: dict[str, list[dict[str, Any]]] = {"tasks": [], "sweep": []}
    with Reporter(console, plain=True) as reporter:
        for name in command.configs:
            base = CONFIGS[name]
            rounds = command.iterations or min(1500, base.iterations)
            base = dataclasses.replace(base, iterations=rounds)
            given = data.load_named(base.dataset, command.data_dir, command.archives)
            make = _Maker(command.out, given, arguments, reporter)
            for task in TASKS:
                config = task.config(base)
                seeds = command.seeds if name != "cifar10_narrow" else command.seeds[:2]
                always = [make(name, task, config, "sparse", seed) for seed in seeds]
                rule = [make(name, task, config, "sasg_keep", seed) for seed in seeds]
                rows["tasks"].append(_row(name, task, always, rule))
                write_json(command.out / "scale_free.json", {**session(arguments), **rows})
            for task, theta in itertools.product(SWEEP if name == "digits" else (), THETAS):
                # At three times the rate, nearer to where always sending diverges.
                config = task.config(base)
                config = dataclasses.replace(
                    config, learning_rate=3 * config.learning_rate, theta=theta
                )
                pair = [make(name, task, config, method, 1) for method in ("sparse", "sasg_keep")]
                row = _row(name, task, pair[:1], pair[1:])
                rows["sweep"].append({**row, "theta": theta})
    write_json(command.out / "scale_free.json", {**session(arguments), **rows})
    console.print(_table(rows["tasks"]))
    if rows["sweep"]:
        console.print(_sweep_table(rows["sweep"]))
    console.print(f"Results: {command.out / 'scale_free.json'}", soft_wrap=True)


class _Maker:
    """Makes a run, or reads it: accuracy in the end, and uploads of a worker and round."""

    def __init__(self, out: pathlib.Path, given: Any, arguments: Sequence[str], reporter: Reporter):
        self.out, self.given, self.arguments, self.reporter = out, given, arguments, reporter

    def __call__(self, name: str, task: Task, config: Config, method: str, seed: int):
        if method == "sasg_keep":  # whose second gradients count as well
            rounds = config.iterations * LOOK_EVERY // (LOOK_EVERY + 1)
            config = dataclasses.replace(config, iterations=rounds)
        store, run = Store(self.out / name / task.name), Run(config, method, seed)
        dataset, source = self.given
        perform(run, store, dataset, source, arguments=self.arguments, reporter=self.reporter)
        files = store.run(run.name)
        record, curve = files.record(), files.curve()
        assert record is not None
        share = record["uploads"] / (record["iterations"] * config.num_workers)
        # Of the last evaluations: one alone is noisier than what is looked for.
        return np.mean([point["test_accuracy"] for point in curve[-3:]]), share


def _row(name: str, task: Task, always: Sequence[Any], rule: Sequence[Any]) -> dict[str, Any]:
    mean = lambda runs, place: float(np.mean([run[place] for run in runs]))
    return {
        "config": name,
        **dataclasses.asdict(task),
        "seeds": len(always),
        "always": mean(always, 0),
        "rule": mean(rule, 0),
        "share": mean(rule, 1),
    }


def _table(rows: Sequence[dict[str, Any]]):
    columns = ("Always", "Rule", "Points", "Uploads")
    table = numbers_table("innovation() and always sending, equal gradients", ("Task",), columns)
    for row in rows:
        points = 100 * (row["rule"] - row["always"])
        numbers = f"{row['always']:.2%}", f"{row['rule']:.2%}", f"{points:+.2f}"
        table.add_row(_describe(row), *numbers, f"{row['share']:.0%}")
    return table


def _sweep_table(rows: Sequence[dict[str, Any]]):
    title = "The same at three times the rates, by θ"
    table = numbers_table(title, ("Task",), ("θ", "Always", "Rule", "Uploads"))
    for row in rows:
        numbers = f"{row['theta']:g}", f"{row['always']:.2%}", f"{row['rule']:.2%}"
        table.add_row(_describe(row), *numbers, f"{row['share']:.0%}")
    return table


def _describe(row: dict[str, Any]) -> str:
    words = [row["config"], row["optimizer"] or "SGD", f"{100 * row['density']:g} %"]
    words += ["skewed"] * (row["partition"] != "iid") + ["drop"] * row["drops"]
    return ", ".join(words)
