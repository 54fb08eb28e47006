"""The command ``reproduce``: the runs behind each table and figure of the paper."""

import dataclasses
import itertools
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import rich.console
import tyro

from experiments import data
from experiments.configs import CONFIGS
from experiments.methods import PAPER_METHODS
from experiments.studies import estimate, theory
from experiments.training.records import Store, session, write_json
from experiments.training.runs import Reporter, Run, perform
from experiments.wire import measure as wire

DENSITIES = (0.001, 0.01, 0.05, 0.1)
"""Of figure 4."""


def _runs(
    config: str, seeds: int, methods: Sequence[str] = PAPER_METHODS, density: float | None = None
) -> list[Run]:
    changes = {} if density is None else {"density": density}
    chosen = dataclasses.replace(CONFIGS[config], **changes)
    return [Run(chosen, method, seed) for seed in range(1, seeds + 1) for method in methods]


_TABLE2 = [
    *_runs("mnist_fc", 5),
    *_runs("mnist_fc", 1, ("sasg_two_way",)),
    *_runs("cifar10_narrow", 2),
]

RUNS: dict[str, list[Run]] = {
    "table2": _TABLE2,
    "figure2": _TABLE2,
    "figure4": [
        run for density in DENSITIES for run in _runs("mnist_fc", 1, ("sparse", "sasg"), density)
    ],
    "figure5": _runs("hetero_narrow", 1),
}
"""The runs of each target that is made of runs: the paper's four methods, and beside them on MNIST
SASG with a sparse way down, for the honest table. Figure 2 draws the curves of those of table 2,
and one of figure 4's densities is theirs too: no run is made twice."""

OTHERS = {"figure3": "wire", "table3": "wire", "theory": "theory", "estimates": "estimates"}
"""What is measured for each other target. Figure 3 and table 3 show the same measurement."""

Target = Literal[
    "table2",
    "figure2",
    "figure3",
    "table3",
    "figure4",
    "figure5",
    "theory",
    "estimates",
    "all",
]


@dataclasses.dataclass
class Reproduce:
    """Makes the runs behind a table or a figure of the paper, as many as are not done yet.

    It can be stopped at any time, and goes on where it was stopped when it is given again. `report`
    then shows what is there beside what the paper says.
    """

    target: tyro.conf.Positional[Target]
    """`table2`: uploads and bits to the accuracy baseline; `figure2`: accuracy and loss against
    uploads; `figure3` and `table3`: time of communication, on a test network; `figure4`: densities
    of 0.1 %, 1 %, 5 % and 10 %; `figure5`: workers with different data; `theory`: the lemmas and
    rates as numbers; `estimates`: how long the full ResNet18 would take here."""

    out: pathlib.Path = pathlib.Path("results/paper")
    """Where results go."""

    configs: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[NAME ...]")] = ()
    """Only the runs of these experiments, e.g. `mnist_fc`."""

    seeds: tuple[int, ...] = ()
    """Only the runs with these seeds."""

    data_dir: pathlib.Path | None = None
    """Where tensorflow-datasets keeps prepared data."""

    archives: pathlib.Path | None = None
    """A folder with the original archives of the data sets, to prepare them from without a
    network."""

    quiet: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print plain lines, and no progress bars."""

    checkpoint_seconds: float = 60
    """Time between two checkpoints, from which a run that was stopped goes on."""


def work(command: Reproduce, arguments: Sequence[str]) -> None:
    """Makes what is missing. Of several targets, one that fails does not keep the others.

    Raises:
      ValueError: an option names what the target has not.
      ReproduceError: some of it failed; the message says what, and why.
    """
    console = rich.console.Console()
    runs = _chosen(command)
    others = {OTHERS[name] for name in OTHERS if command.target in (name, "all")}
    if command.configs or command.seeds:  # they ask for runs
        others = set()
    failures: list[str] = []

    def attempt(what: str, make: Callable[[], None]) -> None:
        try:
            make()
        except (ValueError, ImportError, OSError, RuntimeError, FloatingPointError) as error:
            console.print(f"{what} failed: {error}", style="red", soft_wrap=True)
            failures.append(f"{what}: {error}")

    by_dataset = itertools.groupby(runs, lambda run: run.config.dataset)
    for name, group in by_dataset:
        attempt(name, lambda name=name, group=list(group): _train(command, arguments, name, group))
    measure = {
        "wire": lambda: _measure_wire(command, arguments),
        "theory": lambda: _measure_theory(command, arguments, console),
        "estimates": lambda: _measure_estimates(command, arguments),
    }
    for name in measure:
        if name in others:
            attempt(name, measure[name])
    if failures:
        raise ReproduceError("; ".join(failures))
    console.print(
        f"All of {command.target} is there. For the page: "
        f"python -m experiments report {command.out}",
        soft_wrap=True,
    )


class ReproduceError(RuntimeError):
    """A part of a target could not be made."""


def _chosen(command: Reproduce) -> list[Run]:
    """Each run once, however many targets show it; raises ValueError for options that fit none."""
    targets = [name for name in RUNS if command.target in (name, "all")]
    planned = {run.name: run for target in targets for run in RUNS[target]}.values()
    for option, given, there in (
        ("configs", command.configs, {run.config.name for run in planned}),
        ("seeds", command.seeds, {run.seed for run in planned}),
    ):
        if not set(given) <= there:
            raise ValueError(
                f"Expected --{option}={' '.join(map(str, given))} to be of those of "
                f"{command.target}: {', '.join(map(str, sorted(there))) or 'it has none'}."
            )
    return [
        run
        for run in planned
        if (not command.configs or run.config.name in command.configs)
        and (not command.seeds or run.seed in command.seeds)
    ]


def _train(command: Reproduce, arguments: Sequence[str], name: str, runs: Sequence[Run]) -> None:
    dataset, source = data.load_named(name, command.data_dir, command.archives)
    store = Store(command.out)
    with Reporter(rich.console.Console(), plain=command.quiet) as reporter:
        for number, run in enumerate(runs, 1):
            reporter.say(f"{run.config.name}, run {number} of {len(runs)}: {run.label}")
            perform(
                run,
                store,
                dataset,
                source,
                arguments=arguments,
                reporter=reporter,
                checkpoint_seconds=command.checkpoint_seconds,
            )


def _measure_wire(command: Reproduce, arguments: Sequence[str]) -> None:
    """As the paper's table: ten workers on 1 Gbit/s, messages of the full ResNet18."""
    measurement = wire.Wire(
        "cifar10_resnet18", hosts=10, rounds=9, compute=False, out=command.out / "wire"
    )
    wire.work(measurement, arguments)


def _measure_theory(
    command: Reproduce, arguments: Sequence[str], console: rich.console.Console
) -> None:
    path = command.out / "theory" / "theory.json"
    if path.exists():
        console.print("theory: done before")
        return
    about, began = session(arguments), time.monotonic()
    plain = command.quiet or not console.is_terminal
    with console.status("theory") as status:

        def on_step(what: str, done: int, total: int) -> None:
            text = f"theory, {done} of {total}: {what}"
            console.print(text) if plain else status.update(text)

        results = theory.measure(on_step=on_step)
    seconds = time.monotonic() - began
    write_json(path, {**about, "seconds": seconds, "results": results})
    for check in results["checks"]:
        verdict = "holds" if check["holds"] else "DOES NOT HOLD"
        tolerance = f" (tolerance {check['tolerance']:.3g})" if check["tolerance"] else ""
        found = f"{check['measured']:.3g} {check['relation']} {check['bound']:.3g}{tolerance}"
        console.print(
            f"{check['source']}, {check['name']}, {check['problem']}, {check['method']}: "
            f"{found} {verdict}",
            highlight=False,
            soft_wrap=True,
        )


def _measure_estimates(command: Reproduce, arguments: Sequence[str]) -> None:
    """Of the lightest and the heaviest method."""
    for config in ("cifar10_resnet18", "cifar100_resnet18"):
        options = estimate.Estimate(config, methods=("sgd", "sasg"), out=command.out / "estimates")
        estimate.work(options, arguments)
