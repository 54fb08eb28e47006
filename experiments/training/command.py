"""The commands ``compare`` and ``run``: training, in one process or as one of several."""

import dataclasses
import datetime
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import rich.console

from experiments import data
from experiments.configs import CONFIGS, Config
from experiments.errors import resumable
from experiments.methods import make_optimizer
from experiments.options import Compare, Options, Run
from experiments.processes import cluster
from experiments.report.figures import plot_curves
from experiments.report.tables import comparison_table, describe
from experiments.training import runs
from experiments.training.records import Store
from experiments.training.train import partition

_LEAST = {"iterations": 1, "num_workers": 1, "width": 1}
_LEAST |= {"seed": 0, "seeds": 0, "checkpoint_seconds": 0, "num_processes": 1}

# What may differ between the processes of a run.
_OWN = (
    "data_dir archives out coordinator num_processes process_id distributed connect_timeout "
    "quiet checkpoint_seconds"
).split()


def work(options: Options, arguments: Sequence[str]) -> None:
    """Trains, prints and writes; raises what :func:`experiments.errors.explain` explains."""
    check(options)
    place = find_place(options)
    if place is None:
        _train(options, None, arguments)
        return
    try:
        with cluster.join(*place, _purpose(options), options.connect_timeout) as group:
            _train(options, group, arguments)
    except ValueError as error:  # of jax: one in the block has ended this process
        raise ValueError(f"No scheduler says where the processes meet: {error}") from error


def check(options: Options, devices: int | None = None) -> None:
    """Raises ValueError for options that cannot be, before anything is started."""
    methods, seeds = _methods_and_seeds(options)
    for name, values in (("--methods", methods), ("--seeds", seeds)):
        if not values or len(set(values)) != len(values):
            raise ValueError(f"Expected {name} to name one or more, each once, got {values}.")
    config = configure(options, devices)
    for method in methods:
        make_optimizer(config, method)  # refuses an exchange that it cannot take


def configure(options: Options, devices: int | None = None) -> Config:
    """The configuration that the options ask for; raises ValueError for what cannot be.

    Over several processes, ``devices`` is how many they have, and each has a worker.
    """
    given = {name: value for name, value in vars(options).items() if value is not None}
    for name, least in _LEAST.items():
        if name in given and not np.min(given[name]) >= least:
            raise ValueError(f"Expected {_option(name, given[name])} to be at least {least}.")
    for name in ("density", "concentration", "connect_timeout"):
        if name in given and not 0 < given[name] < np.inf:
            raise ValueError(f"Expected {_option(name, given[name])} to be above 0 and finite.")
    if given.get("density", 0) > 1:
        raise ValueError(f"Expected --density={options.density} to be at most 1.")
    if devices is not None and given.setdefault("num_workers", devices) != devices:
        raise ValueError(
            f"Expected {_option('num_workers', given['num_workers'])} to be the number of devices "
            f"of all processes, {devices}, or not to be given: each has one worker."
        )
    fields = {field.name for field in dataclasses.fields(Config)}
    changes = {name: value for name, value in given.items() if name in fields}
    config = dataclasses.replace(CONFIGS[options.config], **changes)
    if "+" in config.dataset and config.partition != "iid":
        raise ValueError("Expected --partition=iid with several data sets: each has its workers.")
    return config


def _option(name: str, value: Any) -> str:
    return f"--{name.replace('_', '-')}={value}"


def find_place(options: Options) -> tuple[str | None, int | None, int | None] | None:
    """Where the processes meet, how many they are and which this is; None where nothing speaks of
    several. What is None in it, jax asks a scheduler for.
    """
    coordinator, count, index = options.coordinator, options.num_processes, options.process_id
    place = {"--coordinator": coordinator, "--num-processes": count, "--process-id": index}
    missing = [option for option, value in place.items() if value is None]
    if missing and not options.distributed:
        if len(missing) < len(place):
            raise ValueError(
                f"A run over several processes also needs {' and '.join(missing)}, unless "
                "--distributed asks a scheduler."
            )
        return None
    host, _, port = (coordinator or "host:1").rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"Expected --coordinator={coordinator} to be HOST:PORT.")
    if index is not None and not 0 <= index < (count or index + 1):
        raise ValueError(f"Expected --process-id={index} from 0 to below --num-processes={count}.")
    return coordinator, count, index


def _purpose(options: Options) -> str:
    """What all processes of a run must agree on: all but what may differ between hosts."""
    items = dataclasses.asdict(options).items()
    given = [f"{key}={value!r}" for key, value in items if key not in _OWN]
    return f"{type(options).__name__.lower()}({', '.join(given)})"


def _methods_and_seeds(options: Options) -> tuple[tuple[str, ...], tuple[int, ...]]:
    if isinstance(options, Compare):
        return options.methods, options.seeds
    assert isinstance(options, Run)
    return (options.method,), (options.seed,)


def _train(options: Options, group: cluster.Group | None, arguments: Sequence[str]) -> None:
    """Trains, in one process or as one of several, of which only the first prints and writes."""
    is_main = group is None or group.is_main
    methods, seeds = _methods_and_seeds(options)
    config = configure(options, None if group is None else jax.device_count())
    planned = [runs.Run(config, method, seed) for seed in seeds for method in methods]
    now = datetime.datetime.now()
    directory = options.out or pathlib.Path("results") / f"{config.name}-{now:%Y%m%d-%H%M%S}"
    if group is not None:
        directory = pathlib.Path(group.gather(str(directory.absolute()))[0])
    store = Store(directory)
    if is_main:
        store.directory.mkdir(parents=True, exist_ok=True)
        store.check_config(config.name)
    console = rich.console.Console(quiet=not is_main)
    with resumable(arguments, directory):
        with console.status("loading data"):
            dataset, source = _load(options, config, group)
        for seed in seeds:
            partition(config, dataset, source, seed)  # raises for what cannot be dealt out
        with runs.Reporter(console, plain=options.quiet) as reporter:
            for run in planned:
                runs.perform(
                    run,
                    store,
                    dataset,
                    source,
                    arguments=arguments,
                    reporter=reporter,
                    group=group,
                    checkpoint_seconds=options.checkpoint_seconds,
                )
    if is_main:
        records = store.records()
        console.print(comparison_table(records))
        figure = directory / "curves.png"
        plot_curves(store, figure, describe(records[0]))
        console.print(f"Results: {store.summary_path}\nFigure:  {figure}", soft_wrap=True)


def _load(options: Options, config: Config, group: cluster.Group | None):
    """The data, which process 0 may have to prepare for all."""
    if group is not None and not group.is_main:
        group.gather()
    loaded = data.load_named(config.dataset, options.data_dir, options.archives)
    if group is not None and group.is_main:
        group.gather()
    return loaded
