"""The command ``reproduce``: the runs and measurements behind the paper's tables and figures."""

import dataclasses
import itertools
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import rich.console
import tyro

from experiments import data
from experiments.wire import measure as wire

if TYPE_CHECKING:
    from experiments.training.runs import Run

Target = Literal["table2", "figure2", "figure3", "table3", "figure4", "figure5", "theory", "all"]

OTHERS = {"figure3": "wire", "table3": "wire", "theory": "theory"}
"""What is measured for each target that is not made of runs. Figure 3 and table 3 show the same."""


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
    rates as numbers."""
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


class ReproduceError(RuntimeError):
    """A part of a target could not be made."""


def work(command: Reproduce, arguments: Sequence[str]) -> None:
    """Makes what is missing. Of several targets, one that fails does not keep the others: in the
    end a ReproduceError says what, and why. ValueError for an option that the target has not."""
    console = rich.console.Console()
    failures: list[str] = []

    def attempt(what: str, make: Callable[..., None], *given: Any) -> None:
        try:
            make(command, arguments, console, *given)
        except (ValueError, ImportError, OSError, RuntimeError, FloatingPointError) as error:
            console.print(f"{what} failed: {error}", style="red", soft_wrap=True)
            failures.append(f"{what}: {error}")

    for name, runs in itertools.groupby(_chosen(command), lambda run: run.config.dataset):
        attempt(name, _train, name, list(runs))
    others = {OTHERS[name] for name in OTHERS if command.target in (name, "all")}
    for name, make in _MEASURE.items():
        if name in others and not (command.configs or command.seeds):  # which ask for runs
            attempt(name, make)
    if failures:
        raise ReproduceError("; ".join(failures))
    console.print(
        f"All of {command.target} is there. For the page: "
        f"python -m experiments report {command.out}",
        soft_wrap=True,
    )


def _chosen(command: Reproduce) -> list["Run"]:
    """Each run once, however many targets show it; raises ValueError for options that fit none."""
    from experiments.studies.plan import RUNS

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
    configs, seeds = command.configs, command.seeds
    chosen = [run for run in planned if not configs or run.config.name in configs]
    return [run for run in chosen if not seeds or run.seed in seeds]


def _train(command: Reproduce, arguments, console, name: str, runs: Sequence["Run"]) -> None:
    from experiments.training.records import Store
    from experiments.training.runs import Reporter, perform

    dataset, source = data.load_named(name, command.data_dir, command.archives)
    store = Store(command.out)
    with Reporter(console, plain=command.quiet) as reporter:
        how = {"reporter": reporter, "checkpoint_seconds": command.checkpoint_seconds}
        for number, run in enumerate(runs, 1):
            reporter.say(f"{run.config.name}, run {number} of {len(runs)}: {run.label}")
            perform(run, store, dataset, source, arguments=arguments, **how)


def _wire(command: Reproduce, arguments, console) -> None:
    """As the paper's table: ten workers on 1 Gbit/s, messages of the full ResNet18."""
    setting = {"hosts": 10, "rounds": 9, "compute": False}
    wire.work(wire.Wire("cifar10_resnet18", **setting, out=command.out / "wire"), arguments)


def _theory(command: Reproduce, arguments, console) -> None:
    path = command.out / "theory" / "theory.json"
    if path.exists():
        console.print("theory: done before")
        return
    from experiments.studies import theory
    from experiments.training.records import session, write_json

    about, began = session(arguments), time.monotonic()
    with console.status("theory") as status:

        def on_step(what: str, done: int, total: int) -> None:
            text = f"theory, {done} of {total}: {what}"
            if command.quiet or not console.is_terminal:
                console.print(text)
            else:
                status.update(text)

        results = theory.measure(on_step=on_step)
    write_json(path, {**about, "seconds": time.monotonic() - began, "results": results})
    for check in results["checks"]:
        verdict = "holds" if check["holds"] else "DOES NOT HOLD"
        tolerance = f" (tolerance {check['tolerance']:.3g})" if check["tolerance"] else ""
        where = f"{check['source']}, {check['name']}, {check['problem']}, {check['method']}"
        found = f"{check['measured']:.3g} {check['relation']} {check['bound']:.3g}{tolerance}"
        console.print(f"{where}: {found} {verdict}", highlight=False, soft_wrap=True)


_MEASURE = {"wire": _wire, "theory": _theory}
