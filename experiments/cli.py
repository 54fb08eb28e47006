"""The commands ``compare`` and ``run``."""

import dataclasses
import datetime
import pathlib
import platform
import shlex
import sys
from typing import Annotated, Any, Literal

import jax
import numpy as np
import rich.console
import rich.progress
import tyro

from experiments import data
from experiments.configs import CONFIGS, PAPER_METHODS, Config
from experiments.figures import LABELS, plot_curves
from experiments.records import Point, Store
from experiments.tables import comparison_table, describe
from experiments.training import train

ConfigName = Literal["digits", "mnist_fc", "fashion_fc", "cifar10_resnet18", "cifar100_resnet18"]
Method = Literal["sgd", "sparse", "lasg", "sasg", "sasg_two_way"]


def _optional(metavar: str, default: str = "the configuration's") -> Any:
    """How the help shows an option whose default is not a value."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


@dataclasses.dataclass
class Options:
    """What both commands take."""

    config: tyro.conf.Positional[ConfigName]
    """The experiment: which data, model and settings. `digits` needs no download and a minute;
    `mnist_fc` is the paper's setting for MNIST (784-512-10); the ResNet18 ones want a GPU."""

    iterations: Annotated[int | None, _optional("INT")] = None
    """Training rounds."""

    dataset: Annotated[str | None, _optional("NAME")] = None
    """`digits` or the name of an image classification set of tensorflow-datasets; several joined by
    `+` (`cifar10+mnist`) go to the workers in turn."""

    partition: Literal["iid", "dirichlet"] = "iid"
    """How training images are dealt to workers: evenly at random, or with skewed labels."""

    concentration: float = 0.5
    """Of the Dirichlet distribution of labels over workers; smaller is more skewed."""

    width: Annotated[int | None, _optional("INT")] = None
    """Hidden units of the fully connected network, or channels of the ResNet18's first stage (64 in
    the paper; 8 is small enough for a CPU)."""

    data_dir: Annotated[pathlib.Path | None, _optional("DIR", "~/tensorflow_datasets")] = None
    """Where tensorflow-datasets keeps prepared data."""

    archives: Annotated[pathlib.Path | None, _optional("DIR", "download them")] = None
    """A folder with the original archives of the data set (in it, or in a subfolder named like the
    set), to prepare it from without a network."""

    out: Annotated[pathlib.Path | None, _optional("DIR", "results/CONFIG-DATE-TIME")] = None
    """Where results go; nothing there is overwritten."""


@dataclasses.dataclass
class Compare(Options):
    """Trains several methods on the same data, in the same order, from the same parameters.

    Each of 10 simulated workers computes a gradient on its own images in every round; the methods
    differ in what is sent to the server that averages them:

    sgd sends every gradient whole; sparse sends the 1 % largest entries and keeps the rest for
    later; lasg sends whole gradients, but only from workers whose gradient has changed enough;
    sasg does both; sasg_two_way also sends only 1 % of the step back.

    Prints a table of what each needed to reach the target accuracy, and writes summary.json, a
    curve for each run, and curves.png.
    """

    methods: tuple[Method, ...] = PAPER_METHODS
    """Which methods to train."""

    seeds: tuple[int, ...] = (1,)
    """One run of every method for each seed."""


@dataclasses.dataclass
class Run(Options):
    """Trains one method once; the same outputs as `compare`, with one record."""

    method: Method = "sasg"
    """Which method to train."""

    seed: int = 1
    """Of the initial parameters, the data order and the augmentation."""


def main(arguments: list[str] | None = None) -> None:
    """Runs a command; what the user can mend ends it with a message and status 1."""
    command = tyro.cli(
        Annotated[Compare, tyro.conf.subcommand("compare")]
        | Annotated[Run, tyro.conf.subcommand("run")],
        prog="python -m experiments",
        description="Train with little communication, and count what it takes.",
        args=arguments,
    )
    if isinstance(command, Compare):
        methods, seeds = command.methods, command.seeds
    else:
        methods, seeds = (command.method,), (command.seed,)
    runs = [(method, seed) for seed in seeds for method in methods]
    console = rich.console.Console()
    try:
        config = configure(command)
        for name, values in (("--methods", methods), ("--seeds", seeds)):
            if not values or len(set(values)) != len(values):
                raise ValueError(f"Expected {name} to name one or more, each once, got {values}.")
        if min(seeds) < 0:
            raise ValueError(f"Expected seeds of at least 0, got {seeds}.")
        now = datetime.datetime.now()
        default = pathlib.Path("results") / f"{config.name}-{now:%Y%m%d-%H%M%S}"
        store = Store(command.out or default)
        store.check_free(config.name, runs)
        with console.status("loading data"):
            dataset, source = load(config, command.data_dir, command.archives)
    except (ValueError, ImportError, OSError) as error:
        sys.exit(f"error: {error}")
    store.write_settings(
        {
            "command": shlex.join(["python", "-m", "experiments", *(arguments or sys.argv[1:])]),
            "started": now.isoformat(timespec="seconds"),
            "config": {**dataclasses.asdict(config), "alpha_c": dict(config.alpha_c)},
            "methods": methods,
            "seeds": seeds,
            "versions": {"python": platform.python_version(), "jax": jax.__version__},
            "machine": f"{platform.machine()}, {jax.devices()[0].device_kind}",
        }
    )
    try:
        with _progress(console) as progress:
            for method, seed in runs:
                _one_run(config, method, seed, dataset, source, store, progress)
    except FloatingPointError as error:
        sys.exit(f"error: {error}")
    records = store.records()
    console.print(comparison_table(records))
    figure = store.directory / "curves.png"
    plot_curves(store, figure, describe(records[0]))
    console.print(f"Results: {store.summary_path}\nFigure:  {figure}", soft_wrap=True)


def configure(options: Options) -> Config:
    """The configuration that the options ask for; raises ValueError for what cannot be."""
    config = CONFIGS[options.config]
    for name in ("iterations", "width"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"Expected --{name}={value} to be at least 1.")
    if not options.concentration > 0:
        raise ValueError(f"Expected --concentration={options.concentration} to be above 0.")
    changes: dict[str, Any] = {
        "iterations": options.iterations,
        "dataset": options.dataset,
        "width": options.width,
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    config = dataclasses.replace(
        config,
        partition=options.partition,
        concentration=options.concentration,
        **changes,
    )
    if "+" in config.dataset and config.partition != "iid":
        raise ValueError("Expected --partition=iid with several data sets: each has its workers.")
    return config


def load(
    config: Config, data_dir: pathlib.Path | None, archives: pathlib.Path | None
) -> tuple[data.Dataset, np.ndarray | None]:
    """The data of a configuration, and for several sets joined by "+" where examples come from."""
    names = config.dataset.split("+")
    datasets = [data.load(name, data_dir=data_dir, archives=archives) for name in names]
    return data.combine(datasets) if len(datasets) > 1 else (datasets[0], None)


def _one_run(config, method, seed, dataset, source, store, progress):
    label = f"{LABELS[method]}, seed {seed}"
    task = progress.add_task(label, total=config.iterations, status="compiling")

    def on_point(point: Point) -> None:
        store.append_point(method, seed, point)
        status = f"accuracy {point.test_accuracy:.2%}, {point.uploads:,} uploads"
        progress.update(task, status=status)
        if not progress.console.is_terminal and point.iteration % (10 * config.evaluate_every) == 0:
            progress.console.print(f"{label}: round {point.iteration:,}, {status}")

    record = train(
        config,
        method,
        seed,
        dataset,
        source=source,
        on_point=on_point,
        on_rounds=lambda rounds: progress.advance(task, rounds),
    )
    store.append_record(record)


def _progress(console: rich.console.Console) -> rich.progress.Progress:
    return rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeRemainingColumn(elapsed_when_finished=True),
        rich.progress.TextColumn("{task.fields[status]}"),
        console=console,
        disable=not console.is_terminal,
    )
