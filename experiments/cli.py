"""The command line: which command does what, and its options."""

import contextlib
import dataclasses
import datetime
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import jax
import rich.console
import tyro

from experiments import data
from experiments.configs import CONFIGS, Config
from experiments.methods import PAPER_METHODS, MethodName, make_optimizer
from experiments.processes import cluster
from experiments.processes.launch import end_with_launcher, launch
from experiments.report import build as report
from experiments.report.figures import plot_curves
from experiments.report.tables import comparison_table, describe
from experiments.studies import bench, estimate, reproduce
from experiments.training import runs
from experiments.training.records import ResultsError, Store
from experiments.training.runs import Reporter, perform
from experiments.wire import measure as wire
from sasg_jax.exchange import EXCHANGES

if TYPE_CHECKING:
    ConfigName = str
    Exchange = str
else:
    ConfigName = Literal[tuple(CONFIGS)]
    Exchange = Literal[tuple(EXCHANGES)]


def _optional(metavar: str, default: str = "the configuration's") -> Any:
    """How the help shows an option whose default is not a value."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


@dataclasses.dataclass
class Options:
    """What both commands take."""

    config: tyro.conf.Positional[ConfigName]
    """The experiment: which data, model and settings. `digits` needs no download and a minute;
    `mnist_fc` is the paper's setting for MNIST (784-512-10); the ResNet18 ones want a GPU, but for
    the narrow ones."""

    iterations: Annotated[int | None, _optional("INT")] = None
    """Training rounds."""

    num_workers: Annotated[int | None, _optional("INT")] = None
    """How many workers compute gradients. Over several processes there is one for each device."""

    exchange: Annotated[Exchange | None, _optional("|".join(EXCHANGES), "the method's")] = None
    """How messages travel between workers and server. Not every method can take every one."""

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

    density: Annotated[float | None, _optional("FLOAT", "1 %")] = None
    """Part of the entries that the sparse methods send, in (0, 1]."""

    data_dir: Annotated[pathlib.Path | None, _optional("DIR", "~/tensorflow_datasets")] = None
    """Where tensorflow-datasets keeps prepared data."""

    archives: Annotated[pathlib.Path | None, _optional("DIR", "download them")] = None
    """A folder with the original archives of the data set (in it, or in a subfolder named like the
    set), to prepare it from without a network."""

    out: Annotated[pathlib.Path | None, _optional("DIR", "results/CONFIG-DATE-TIME")] = None
    """Where results go; nothing there is overwritten. The same command again skips what is done
    there and goes on with what was stopped. (Several processes must all see the folder.)"""

    quiet: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print plain lines, and no progress bars."""

    checkpoint_seconds: float = 60
    """Time between two checkpoints, from which a run that was stopped goes on."""

    coordinator: Annotated[str | None, _optional("HOST:PORT", cluster.ADDRESS)] = None
    """To run over several processes, which you start yourself, all with the same command: where
    they meet, a free port on the host of process 0. (On one machine, `launch` starts them.) The
    defaults of these three are environment variables, and then what SLURM or Open MPI say."""

    num_processes: Annotated[int | None, _optional("INT", cluster.COUNT)] = None
    """How many processes there are."""

    process_id: Annotated[int | None, _optional("INT", cluster.INDEX)] = None
    """Which of them this is, from 0. Process 0 prints and writes."""

    distributed: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Run over the processes that SLURM, Open MPI or another scheduler known to JAX has started."""

    connect_timeout: float = 60
    """Seconds to wait for the other processes at the start."""


@dataclasses.dataclass
class Compare(Options):
    """Trains several methods on the same data, in the same order, from the same parameters.

    Each of 10 workers computes a gradient on its own images in every round, simulated on one device
    unless there are several processes; the methods differ in what is sent to the server that
    averages them:

    sgd sends every gradient whole; sparse sends the 1 % largest entries and keeps the rest for
    later; lasg sends whole gradients, but only from workers whose gradient has changed enough;
    sasg does both; sparse_two_way and sasg_two_way also send only 1 % of the step back.

    Prints a table of what each needed to reach the target accuracy, and writes summary.json, a
    folder for each run, and curves.png.
    """

    methods: tuple[MethodName, ...] = PAPER_METHODS
    """Which methods to train."""

    seeds: tuple[int, ...] = (1,)
    """One run of every method for each seed."""


@dataclasses.dataclass
class Run(Options):
    """Trains one method once; the same outputs as `compare`, with one record."""

    method: MethodName = "sasg"
    """Which method to train."""

    seed: int = 1
    """Of the initial parameters, the data order and the augmentation."""


@dataclasses.dataclass
class Launch:
    """Starts `run` or `compare` in several processes on this machine, joined over its loopback:

    python -m experiments launch --processes 4 -- run mnist_fc --method sasg

    Each has one worker on each of its devices. They use CPU devices, unless JAX_PLATFORMS says
    otherwise. When one of them dies, all end.
    """

    command: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        tyro.conf.arg(metavar="-- run|compare ...", help_behavior_hint=""),
    ] = ()
    """What to run, after `--`."""

    processes: int = 2
    """How many processes to start."""

    devices_per_process: int = 1
    """How many devices, and so workers, each of them has."""


@dataclasses.dataclass
class Report:
    """Makes one page of all that `reproduce` has left in a folder, beside what the paper says.

    Writes report.html, which needs nothing else to be looked at, and the figures and tables by
    themselves (PNG, CSV) in a folder `report`. What is not there yet is said to be missing.
    """

    directory: tyro.conf.Positional[pathlib.Path]
    """The folder of the results, as given to `reproduce --out`."""


def main(arguments: list[str] | None = None) -> None:
    """Runs a command; what the user can mend ends it with a message and status 1."""
    end_with_launcher()
    command = _parse(arguments)
    given = arguments or sys.argv[1:]
    if isinstance(command, Launch):
        try:
            _check_launch(command)
        except (ValueError, OSError) as error:
            sys.exit(f"error: {error}")
        launch(command.command, command.processes, command.devices_per_process)
        return
    if not isinstance(command, Options):
        try:
            if isinstance(command, wire.Wire):
                wire.work(command, given)
            elif isinstance(command, reproduce.Reproduce):
                reproduce.work(command, given)
            elif isinstance(command, estimate.Estimate):
                estimate.work(command, given)
            elif isinstance(command, bench.Bench):
                bench.work(command, given)
            else:
                print(f"Report: {report.write_report(command.directory)}")
        except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
            sys.exit(f"error: {error}")
        return
    try:
        _check(command)
        place = cluster.find_place(
            detect=command.distributed,
            coordinator=command.coordinator,
            count=command.num_processes,
            index=command.process_id,
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    try:
        with contextlib.ExitStack() as stack:
            group = None
            if place is not None:
                purpose = _purpose(command)
                group = stack.enter_context(cluster.join(place, purpose, command.connect_timeout))
            _work(command, group, given)
    except cluster.ClusterError as error:
        sys.exit(f"error: {error}")


Command = (
    Compare
    | Run
    | Launch
    | wire.Wire
    | reproduce.Reproduce
    | estimate.Estimate
    | bench.Bench
    | Report
)


def _parse(arguments: list[str] | None) -> Command:
    return tyro.cli(
        Annotated[Compare, tyro.conf.subcommand("compare")]
        | Annotated[Run, tyro.conf.subcommand("run")]
        | Annotated[reproduce.Reproduce, tyro.conf.subcommand("reproduce")]
        | Annotated[Report, tyro.conf.subcommand("report")]
        | Annotated[estimate.Estimate, tyro.conf.subcommand("estimate")]
        | Annotated[bench.Bench, tyro.conf.subcommand("bench")]
        | Annotated[wire.Wire, tyro.conf.subcommand("wire")]
        | Annotated[Launch, tyro.conf.subcommand("launch")],
        prog="python -m experiments",
        description="Train with little communication, and count what it takes.",
        args=arguments,
    )


def _check_launch(command: Launch) -> None:
    """Raises for what would fail in every process, or for nothing to start."""
    for name in ("processes", "devices_per_process"):
        value = getattr(command, name)
        if value < 1:
            raise ValueError(f"Expected --{name.replace('_', '-')}={value} to be at least 1.")
    if not command.command or command.command[0] not in ("run", "compare"):
        got = shlex.join(command.command) or "nothing"
        raise ValueError(f"Expected a command after --, `run ...` or `compare ...`, got {got}.")
    inner = _parse(list(command.command))
    assert isinstance(inner, Options)
    given = (inner.coordinator, inner.num_processes, inner.process_id, inner.distributed or None)
    if given != (None,) * 4:
        raise ValueError(
            "Expected the command after -- to have no --coordinator, --num-processes, --process-id "
            "or --distributed: launch sets them."
        )
    _check(inner, devices=command.processes * command.devices_per_process)


def _check(command: Options, devices: int | None = None) -> None:
    """Raises ValueError or OSError for options that cannot be, before anything is started."""
    methods, seeds = _methods_and_seeds(command)
    config = configure(command, devices)
    for name, values in (("--methods", methods), ("--seeds", seeds)):
        if not values or len(set(values)) != len(values):
            raise ValueError(f"Expected {name} to name one or more, each once, got {values}.")
    if min(seeds) < 0:
        raise ValueError(f"Expected seeds of at least 0, got {seeds}.")
    if not command.connect_timeout > 0:
        raise ValueError(f"Expected --connect-timeout={command.connect_timeout} to be above 0.")
    for method in methods:
        make_optimizer(config, method)  # refuses an exchange that it cannot take
    if not command.checkpoint_seconds >= 0:
        raise ValueError(
            f"Expected --checkpoint-seconds={command.checkpoint_seconds} to be at least 0."
        )


def _purpose(command: Options) -> str:
    """What all processes of a run must agree on: all but what may differ between hosts."""
    own = (
        "data_dir archives out coordinator num_processes process_id distributed connect_timeout "
        "quiet checkpoint_seconds"
    )
    options = dataclasses.asdict(command).items()
    given = [f"{key}={value!r}" for key, value in options if key not in own.split()]
    return f"{type(command).__name__.lower()}({', '.join(given)})"


def _methods_and_seeds(command: Options) -> tuple[tuple[str, ...], tuple[int, ...]]:
    if isinstance(command, Compare):
        return command.methods, command.seeds
    assert isinstance(command, Run)
    return (command.method,), (command.seed,)


def _work(command: Options, group: cluster.Group | None, arguments: Sequence[str]) -> None:
    """Trains, in one process or as one of several, of which only the first prints and writes."""
    is_main = group is None or group.is_main
    methods, seeds = _methods_and_seeds(command)
    console = rich.console.Console(quiet=not is_main)
    try:
        config = configure(command, None if group is None else jax.device_count())
        planned = [runs.Run(config, method, seed) for seed in seeds for method in methods]
        now = datetime.datetime.now()
        directory = command.out or pathlib.Path("results") / f"{config.name}-{now:%Y%m%d-%H%M%S}"
        if group is not None:
            directory = pathlib.Path(group.gather(str(directory.absolute()))[0])
        store = Store(directory)
        if is_main:
            store.check_config(config.name)
        if group is not None:
            group.doing = "while loading the data"
        with console.status("loading data"):
            if group is not None and not is_main:  # process 0 may have to prepare the data for all
                group.gather()
            dataset, source = data.load_named(config.dataset, command.data_dir, command.archives)
            if group is not None and is_main:
                group.gather()
    except (ValueError, ImportError, OSError, ResultsError) as error:
        sys.exit(f"error: {error}")
    try:
        with Reporter(console, plain=command.quiet) as reporter:
            for run in planned:
                perform(
                    run,
                    store,
                    dataset,
                    source,
                    arguments=arguments,
                    reporter=reporter,
                    group=group,
                    checkpoint_seconds=command.checkpoint_seconds,
                )
    except (FloatingPointError, ResultsError) as error:
        sys.exit(f"error: {error}")
    if not is_main:
        return
    records = store.records()
    console.print(comparison_table(records))
    figure = store.directory / "curves.png"
    plot_curves(store, figure, describe(records[0]))
    console.print(f"Results: {store.summary_path}\nFigure:  {figure}", soft_wrap=True)


def configure(options: Options, devices: int | None = None) -> Config:
    """The configuration that the options ask for; raises ValueError for what cannot be.

    Over several processes, ``devices`` is how many they have, and each has a worker.
    """
    config = CONFIGS[options.config]
    for name in ("iterations", "width", "num_workers"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"Expected --{name.replace('_', '-')}={value} to be at least 1.")
    if devices is not None and options.num_workers not in (None, devices):
        raise ValueError(
            f"Expected --num-workers={options.num_workers} to be the number of devices of all "
            f"processes, {devices}, or not to be given: each has one worker."
        )
    if options.density is not None and not 0 < options.density <= 1:
        raise ValueError(f"Expected --density={options.density} in (0, 1].")
    if not options.concentration > 0:
        raise ValueError(f"Expected --concentration={options.concentration} to be above 0.")
    changes: dict[str, Any] = {
        "iterations": options.iterations,
        "dataset": options.dataset,
        "width": options.width,
        "density": options.density,
        "num_workers": options.num_workers if devices is None else devices,
        "exchange": options.exchange,
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
