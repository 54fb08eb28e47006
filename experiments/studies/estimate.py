"""The command ``estimate``: how long a whole run would take here, from a few of its rounds."""

import dataclasses
import math
import pathlib
import time
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import rich.console
import tyro

from experiments import data
from experiments.configs import CONFIGS, Config
from experiments.methods import METHODS, PAPER_METHODS, MethodName
from experiments.report.tables import format_seconds

_CLASSES = {"cifar10": 10, "cifar100": 100}


@dataclasses.dataclass
class Estimate:
    """Makes a few rounds of a setting that is too large for this machine, and says how long a whole
    run would take.

    The images are made up, as the time of a round does not depend on them; model, methods and
    settings are those of the whole run.
    """

    config: tyro.conf.Positional[Literal["cifar10_resnet18", "cifar100_resnet18"]]
    """The setting: the paper's ResNet18, with 10 or 100 classes."""
    methods: tuple[MethodName, ...] = PAPER_METHODS
    """Which methods."""
    rounds: int = 20
    """How many rounds to make; the last ten are timed. More than ten: in the first ten (D) rounds
    everybody uploads, whatever the gradients, and half of the work is saved."""
    out: pathlib.Path | None = None
    """A folder for a file in JSON for each method; none is written by default."""


def work(command: Estimate, arguments: Sequence[str]) -> None:
    """Measures, prints and writes; raises ValueError for bad options."""
    config = CONFIGS[command.config]
    if command.rounds <= config.history:
        raise ValueError(
            f"Expected --rounds={command.rounds} to be more than D={config.history}: in the first "
            "D rounds everybody uploads."
        )
    from experiments.training.records import session, write_json

    console = rich.console.Console()
    for method in command.methods:
        label = f"{config.name}, {METHODS[method].label}"
        path = command.out and command.out / f"{config.name}-{method}.json"
        if path and path.exists():
            console.print(f"{label}: done before")
            continue
        with console.status(f"{label}: compiling"):
            found = estimate(config, method, command.rounds)
        whole = format_seconds(3600 * found["estimated_hours"])
        console.print(
            f"{label}: {found['seconds_per_round']:.1f} s a round, so {whole} for "
            f"{config.iterations:,} rounds",
            highlight=False,
            soft_wrap=True,
        )
        if path:
            write_json(path, {**found, **session(arguments)})


def estimate(config: Config, method: str, rounds: int) -> dict[str, Any]:
    """Makes ``rounds`` rounds, more than D, and times the last ones.

    Returns:
      ``seconds_per_round``, the median of those after the first D; ``estimated_hours`` of all
      rounds of ``config``; and what was run.
    """
    from experiments.training.train import train

    dataset = _made_up(_CLASSES[config.dataset], 10 * config.num_workers * config.batch_size)
    times = [time.perf_counter()]
    short = dataclasses.replace(config, iterations=rounds, evaluate_every=rounds, rounds_per_call=1)
    on_rounds = lambda count: times.append(time.perf_counter())
    record = train(short, method, 1, dataset, on_rounds=on_rounds)
    if not math.isfinite(record.final_train_loss):
        raise FloatingPointError(f"The training loss of {method} is not finite.")
    per_round = float(np.median(np.diff(times)[config.history :]))
    return {
        "config": config.name,
        "method": method,
        "num_parameters": record.num_parameters,
        "rounds": rounds,
        "uploads": record.uploads,
        "seconds_per_round": per_round,
        "iterations": config.iterations,
        "estimated_hours": per_round * config.iterations / 3600,
        "dataset": dataset.name,
    }


def _made_up(num_classes: int, size: int) -> data.Dataset:
    """Noisy images, with a mean for each class so that there is something to learn."""
    rng = np.random.default_rng(0)
    means = rng.integers(64, 192, (num_classes, 32, 32, 3))

    def examples(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = (np.arange(count) % num_classes).astype(np.int32)
        images = means[labels] + rng.integers(-64, 64, (count, 32, 32, 3))
        return images.astype(np.uint8), labels

    return data.Dataset("made up", *examples(size), *examples(num_classes), num_classes)
