"""The commands ``compare`` and ``run``: training, in one process or as one of several."""

import contextlib
import dataclasses
import datetime
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import rich.console

from experiments.configs import CONFIGS, Config
from experiments.errors import resumable
from experiments.methods import METHODS, make_optimizer
from experiments.metrics import metric_of
from experiments.options import Compare, Options, Run
from experiments.processes import cluster
from experiments.report.figures import plot_curves, plot_tried
from experiments.report.tables import comparison_table, describe, tuned_table
from experiments.report.tuned import points
from experiments.training import grid, inputs, runs
from experiments.training.records import Store, session, write_json
from experiments.training.train import partition

_LEAST = {"iterations": 1, "num_workers": 1, "width": 1, "batch_size": 1, "period": 1}
_LEAST |= {"evaluate_every": 1, "local_steps": 1, "gradients": 1, "down_period": 1}
_LEAST |= {"seed": 0, "seeds": 0, "checkpoint_seconds": 0, "num_processes": 1}
_LEAST |= {"max_staleness": 1, "theta": 0, "alpha_c": 0, "outer_momentum": 0}
_FRACTIONS = "density down_density residual_decay".split()
_POSITIVE = "target concentration connect_timeout learning_rate learning_rates outer_rate".split()

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
    config, axes = configure(options, devices), grid.axes(options)
    for axis, values in axes.items():
        if len(set(values)) != len(values):
            name = grid.option_name(axis).replace("_", "-")
            raise ValueError(f"Expected --{name} to have each value once, got {values}.")
    for axis in grid.given(options):
        if not any(axis in METHODS[method].settings for method in methods):
            name = grid.option_name(axis) if isinstance(options, Compare) else axis
            takers = ", ".join(name for name, row in METHODS.items() if axis in row.settings)
            raise ValueError(f"Expected --{name.replace('_', '-')} only with one of {takers}.")
    for method in methods:
        for tuned in grid.candidates(config, method, axes, _gradients(options, config)):
            make_optimizer(tuned, method)  # refuses an exchange that it cannot take


def configure(options: Options, devices: int | None = None) -> Config:
    """The configuration that the options ask for; raises ValueError for what cannot be.

    Over several processes, ``devices`` is how many they have, and each has a worker.
    """
    given = {name: value for name, value in vars(options).items() if value is not None}
    for name, least in _LEAST.items():
        for value in np.ravel(given.get(name, ())):
            if not value >= least:
                raise ValueError(f"Expected {_option(name, value)} to be at least {least}.")
    base = CONFIGS[options.config]
    metric = metric_of(base)
    fractions = [*_FRACTIONS, *["target"] * metric.percent]
    for name in (*_FRACTIONS, *_POSITIVE):
        for value in np.ravel(given.get(name, ())):
            if not 0 < value < np.inf:
                raise ValueError(f"Expected {_option(name, value)} to be above 0 and finite.")
            if name in fractions and value > 1:
                raise ValueError(f"Expected {_option(name, value)} to be at most 1.")
    for value in np.ravel(given.get("outer_momentum", ())):
        if value >= 1:
            raise ValueError(f"Expected {_option('outer_momentum', value)} to be below 1.")
    if devices is not None and given.setdefault("num_workers", devices) != devices:
        raise ValueError(
            f"Expected {_option('num_workers', given['num_workers'])} to be the number of devices "
            f"of all processes, {devices}, or not to be given: each has one worker."
        )
    given[metric.target] = given.pop("target", getattr(base, metric.target))
    fields = {field.name for field in dataclasses.fields(Config)} - {*grid.AXES, "methods"}
    changes = {name: value for name, value in given.items() if name in fields}
    config = dataclasses.replace(base, **changes)
    for axis, values in grid.given(options).items():
        if len(values) == 1:
            config = grid.with_setting(config, axis, values[0])
    if "+" in config.dataset and config.partition != "iid":
        raise ValueError("Expected --partition=iid with several data sets: each has its workers.")
    if options.gradients is not None and options.iterations is not None:
        raise ValueError("Expected --gradients or --iterations, not both.")
    if options.optimizer and max(grid.given(options).get("local_steps", [1])) > 1:
        raise ValueError("Expected --local-steps with --inner, not --optimizer: they are its.")
    _check_kind(config)
    return config


def _check_kind(config: Config) -> None:
    """Raises ValueError where text is treated like images, or the other way round."""
    is_text = config.model == "transformer"
    if is_text != (config.dataset == "stdlib"):
        kind = "'stdlib'" if is_text else "of images"
        raise ValueError(f"Expected {_option('dataset', config.dataset)} to be {kind}.")
    if config.partition == ("dirichlet" if is_text else "package"):
        allowed = "iid or package for text" if is_text else "iid or dirichlet for images"
        raise ValueError(f"Expected {_option('partition', config.partition)} to be {allowed}.")
    if is_text and config.width % 32:
        raise ValueError(f"Expected {_option('width', config.width)} to be a multiple of 32.")


def _gradients(options: Options, config: Config) -> int | None:
    """Of a worker, where that is what methods are compared at."""
    by_gradients = config.by_gradients and options.iterations is None
    return config.iterations if by_gradients and not options.gradients else options.gradients


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
        return options.methods or CONFIGS[options.config].methods, options.seeds
    assert isinstance(options, Run)
    return (options.method,), (options.seed,)


def _train(options: Options, group: cluster.Group | None, arguments: Sequence[str]) -> None:
    """Trains, in one process or as one of several, of which only the first prints and writes."""
    is_main = group is None or group.is_main
    methods, seeds = _methods_and_seeds(options)
    config = configure(options, None if group is None else jax.device_count())
    axes = grid.axes(options)
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
            perform = functools.partial(
                runs.perform,
                store=store,
                dataset=dataset,
                source=source,
                arguments=arguments,
                reporter=reporter,
                group=group,
                checkpoint_seconds=options.checkpoint_seconds,
            )
            if axes:
                picks = [_pick(config, method, axes, options, store, perform) for method in methods]
                shown = [pick.run(seed) for seed in seeds[1:] for pick in picks]
                shown = shown or [pick.tried[pick.place] for pick in picks]
            else:
                picks = []
                made = {m: grid.of_method(config, m, _gradients(options, config)) for m in methods}
                shown = [runs.Run(made[m], m, seed) for seed in seeds for m in methods]
            for run in shown:
                perform(run)
    if is_main and picks:
        tuned = grid.report(options, picks, shown, store)
        best = grid.path(directory, methods)
        write_json(best, {**session(arguments), **tuned})
        console.print(tuned_table(tuned))
        console.print(f"Settings: {best}", soft_wrap=True)
        if tried := points({name: of["tried"] for name, of in tuned["methods"].items()}):
            plot_tried(tried, best.with_suffix(".png"))
            console.print(f"Tried:    {best.with_suffix('.png')}", soft_wrap=True)
    elif is_main:
        console.print(comparison_table(store.records()))
    if is_main:
        done = [store.run(run.name) for run in shown] if picks else store.runs()
        figure = directory / "curves.png"
        plot_curves([files for files in done if files.record()], figure, _title(store, picks))
        console.print(f"Results:  {store.summary_path}\nFigure:   {figure}", soft_wrap=True)


def _title(store: Store, picks: Sequence[grid.Pick]) -> str:
    return describe(store.records()[0]) + (", each method at its best" if picks else "")


def _pick(config, method, axes, options, store, perform) -> grid.Pick:
    """The best setting of a method, by runs with the first seed that end at the target. One that
    diverges is not the best."""
    configs = grid.candidates(config, method, axes, _gradients(options, config))
    seed, others = options.seeds[0], options.seeds[1:]
    tried = [runs.Run(dataclasses.replace(c, until_target=True), method, seed) for c in configs]
    if len(tried) == 1 and others:
        return grid.Pick(tried, 0)
    for run in tried:
        with contextlib.suppress(FloatingPointError):
            perform(run)
    records = [store.run(run.name).record() for run in tried]  # which all processes see
    return grid.Pick(tried, grid.best(records, options.pick))


def _load(options: Options, config: Config, group: cluster.Group | None):
    """The data, which process 0 may have to prepare for all."""
    if group is not None and not group.is_main:
        group.gather()
    loaded = inputs.load(config, options.data_dir, options.archives)
    if group is not None and group.is_main:
        group.gather()
    return loaded
