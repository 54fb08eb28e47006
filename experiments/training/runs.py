"""Runs, each with a folder of its own: begun, gone on with where they were stopped, or done."""

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import rich.console
import rich.progress

from experiments.configs import CONFIGS, Config
from experiments.data import Dataset, Text
from experiments.methods import METHODS, describe_setting
from experiments.metrics import metric_of
from experiments.processes.cluster import Group
from experiments.report.tables import format_seconds
from experiments.training.agreement import digest
from experiments.training.checkpoints import Checkpoints, save_params
from experiments.training.records import Point, Store, session
from experiments.training.train import train

# A plain line about a run no more often than this.
_SECONDS_BETWEEN_LINES = 30.0


@dataclasses.dataclass(frozen=True)
class Run:
    """One method on one experiment, once."""

    config: Config
    method: str
    seed: int

    @property
    def name(self) -> str:
        """The name of its folder, unlike that of any other run of the same options."""
        own = [f"{name}{_shown(value)}" for name, value in self._own_settings.items()]
        return "-".join([self.config.name, self.method, *own, f"seed{self.seed}"])

    @property
    def label(self) -> str:
        """Its name for people."""
        own = ", ".join(describe_setting(*setting) for setting in self._own_settings.items())
        return f"{METHODS[self.method].label}{f' at {own}' if own else ''}, seed {self.seed}"

    def settings(self, names: Sequence[str]) -> dict[str, Any]:
        """What the method has of the fields ``names`` of a configuration: of α's c, its own."""
        row = METHODS[self.method]
        found = {name: getattr(self.config, name) for name in row.settings if name in names}
        if "alpha_c" in found:
            found["alpha_c"] = self.config.alpha_c[str(row.alpha)]
        return found

    @property
    def _own_settings(self) -> dict[str, Any]:
        """Those that are not the experiment's."""
        names = METHODS[self.method].settings
        standard = Run(CONFIGS[self.config.name], self.method, self.seed).settings(names)
        here = self.settings(names)
        return {name: here[name] for name in names if here[name] != standard[name]}

    def spec(self, dataset: Dataset | Text, group: Group | None) -> dict:
        """What must be the same for a run that is gone on with."""
        sha256 = digest([*dataset.train, *dataset.test])
        return {
            "name": self.name,
            "config": {**dataclasses.asdict(self.config), "alpha_c": dict(self.config.alpha_c)},
            "method": self.method,
            "seed": self.seed,
            "data": {"name": dataset.name, "sha256": sha256},
            "processes": 1 if group is None else group.count,
        }


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


class Reporter:
    """Says how runs are doing: bars on a terminal, and now and then a plain line elsewhere.

    Args:
      console: where to.
      plain: whether to print plain lines also on a terminal.
    """

    def __init__(self, console: rich.console.Console, *, plain: bool = False):
        self._console = console
        self._plain = plain or not console.is_terminal
        self._bars = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(bar_width=16),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeRemainingColumn(elapsed_when_finished=True),
            rich.progress.TextColumn("{task.fields[status]}"),
            console=console,
            disable=console.quiet or self._plain,
        )

    def __enter__(self) -> "Reporter":
        self._bars.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._bars.stop()

    def say(self, text: str) -> None:
        """Prints a line of its own."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def follow(self, run: Run, before: int) -> None:
        """Begins to report on a run, of whose rounds some were made before."""
        label, total = run.label, run.config.iterations
        self._label, self._total, self._before = label, total, before
        self._metric = metric_of(run.config)
        self._bar = self._bars.add_task(label, total=total, completed=before, status="")
        self._began = self._said = time.monotonic()
        if before:
            self.say(f"{label}: goes on after round {before:,}")

    def on_rounds(self, rounds: int) -> None:
        self._bars.advance(self._bar, rounds)

    def on_point(self, point: Point) -> None:
        moved = point.uplink_bytes + point.downlink_bytes
        metric = self._metric
        status = (
            f"{metric.label} {metric.show(getattr(point, metric.key))}, {point.uploads:,} uploads, "
            f"1/{point.dense_bytes / moved:,.1f} of dense bytes both ways"
        )
        self._bars.update(self._bar, status=status)
        now, to_go = time.monotonic(), self._total - point.iteration
        if self._plain and (not to_go or now - self._said > _SECONDS_BETWEEN_LINES):
            self._said = now
            left = (now - self._began) / (point.iteration - self._before) * to_go
            left = f", {format_seconds(left)} left" if to_go else ""
            rounds = f"{point.iteration:,} of {self._total:,}"
            self.say(f"{self._label}: round {rounds}, {status}{left}")


def perform(
    run: Run,
    store: Store,
    dataset: Dataset | Text,
    source: np.ndarray | None,
    *,
    arguments: Sequence[str],
    reporter: Reporter,
    group: Group | None = None,
    checkpoint_seconds: float = 60.0,
) -> None:
    """Makes a run, or what is left of it, and leaves its record in the store.

    Args:
      run: the run.
      store: where its folder is or will be. Over several processes, a folder that all of them see.
      dataset: the data of its configuration.
      source: of a combination of data sets, see :func:`experiments.training.train.train`.
      arguments: of the command line, for the record.
      reporter: is told of its progress.
      group: the processes that make it together.
      checkpoint_seconds: how much time passes between two checkpoints.

    Raises:
      ResultsError: its folder holds another run, or another process is at work on it.
      FloatingPointError: the training loss is not finite.
      ClusterError: as :func:`experiments.training.train.train`.
    """
    files = store.run(run.name)
    is_main = group is None or group.is_main
    with contextlib.ExitStack() as stack:
        if is_main:
            spec = run.spec(dataset, group)
            stack.enter_context(files.claimed(spec))
            files.adopt(spec)
        record = files.record() if is_main else None
        if group is not None:
            record = group.gather(record)[0]
        if record is not None:
            if is_main:
                store.write_summary()
            reporter.say(f"{run.label}: done before, {record['uploads']:,} uploads")
            return
        checkpoints = stack.enter_context(Checkpoints(files.checkpoints_path, checkpoint_seconds))
        final_params: Any = None

        def on_start(iteration: int) -> None:
            reporter.follow(run, iteration)
            if is_main:
                processes = {} if group is None else {"processes": group.names}
                files.add_session({**session(arguments), **processes, "round": iteration})

        def on_point(point: Point) -> None:
            if is_main:
                files.append_point(point)
            reporter.on_point(point)

        def on_evaluation(params: Any, reports: Any) -> None:
            nonlocal final_params
            del reports
            final_params = params

        record = train(
            run.config,
            run.method,
            run.seed,
            dataset,
            source=source,
            group=group,
            checkpoints=checkpoints,
            on_start=on_start,
            on_point=on_point,
            on_rounds=reporter.on_rounds,
            on_evaluation=on_evaluation,
        )
        jax.clear_caches()  # hundreds of runs in one process would run out of memory for code
        if is_main:
            save_params(files.params_path, final_params)
            files.finish(record)
            store.write_summary()
        if record.iterations < run.config.iterations:
            rounds = f"{record.iterations:,} rounds and {record.uploads:,} uploads"
            reporter.say(f"{run.label}: at the target after {rounds}")
