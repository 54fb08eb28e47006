"""Methods at their best: settings that are tried with one seed, and which of them is best."""

import dataclasses
import itertools
import pathlib
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.configs import Config
from experiments.methods import METHODS
from experiments.metrics import metric_of
from experiments.options import Compare, Options
from experiments.training.records import Store, read_json
from experiments.training.runs import Run

AXES = (
    "learning_rate alpha_c local_steps inner outer_rate outer_momentum "
    "density down_density down_period down_rule scope values indices residual_decay "
    "batch_size period theta max_staleness silence"
).split()
"""Fields of a configuration that can have several values in a comparison."""

MEASURES = {
    "uploads": ("uploads",),
    "bytes": ("uplink_bytes", "downlink_bytes"),
    "rounds": ("iterations",),
}
"""What of a record :func:`best` compares."""


def given(options: Options) -> dict[str, Sequence[Any]]:
    """The values of each axis for which there are any."""
    if isinstance(options, Compare):
        values = {axis: getattr(options, option_name(axis)) for axis in AXES}
        return {axis: found for axis, found in values.items() if found}
    values = {axis: getattr(options, axis, None) for axis in AXES}
    return {axis: (value,) for axis, value in values.items() if value is not None}


def axes(options: Options) -> dict[str, Sequence[Any]]:
    """The values of each axis for which there are several."""
    return {axis: values for axis, values in given(options).items() if len(values) > 1}


def option_name(axis: str) -> str:
    """Of an axis, in a comparison."""
    return "learning_rates" if axis == "learning_rate" else axis


def with_setting(config: Config, axis: str, value: Any) -> Config:
    """``config`` with another value; an α's c is that of all methods that take one."""
    value = dict.fromkeys(config.alpha_c, value) if axis == "alpha_c" else value
    return dataclasses.replace(config, **{axis: value})


def of_method(config: Config, method: str, gradients: int | None) -> Config:
    """``config`` without what the method does not take, with as many rounds as take ``gradients``
    of a worker, and evaluated as often as a method that takes one in a round. None leaves these as
    they are."""
    # All others are not asked for where they are not taken.
    read = {"local_steps": 1, "residual_decay": None}
    unused = read.keys() - {*METHODS[method].settings}
    config = dataclasses.replace(config, **{name: read[name] for name in unused})
    if gradients is None:
        return config
    each = METHODS[method].gradients(config.local_steps)
    rounds = {"iterations": int(gradients / each)}
    for name in ("evaluate_every", "rounds_per_call"):
        rounds[name] = max(1, round(getattr(config, name) / each))
    if not rounds["iterations"]:
        raise ValueError(f"Expected --gradients={gradients} to be enough for a round, {each:g}.")
    return dataclasses.replace(config, **rounds)


def candidates(
    config: Config,
    method: str,
    axes: Mapping[str, Sequence[Any]] = types.MappingProxyType({}),
    gradients: int | None = None,
) -> list[Config]:
    """All combinations of values, of the axes that make a difference to the method."""
    own = [axis for axis in axes if axis in METHODS[method].settings]
    found = []
    for values in itertools.product(*(axes[axis] for axis in own)):
        tuned = config
        for axis, value in zip(own, values, strict=True):
            tuned = with_setting(tuned, axis, value)
        found.append(of_method(tuned, method, gradients))
    return found


class Pick(NamedTuple):
    """The settings of a method that were tried, and which of them is the best."""

    tried: list[Run]
    place: int

    def run(self, seed: int) -> Run:
        """A whole run of the best."""
        best = self.tried[self.place]
        return Run(dataclasses.replace(best.config, until_target=False), best.method, seed)


def best(records: Sequence[Mapping[str, Any] | None], by: str) -> int:
    """Which of the records took least of ``by`` to the target, or came nearest to it in the end.
    None is of a run that diverged."""

    def cost(record: Mapping[str, Any] | None) -> tuple[float, float]:
        if record is None:
            return np.inf, 0.0
        if record["uploads_at_target"] is None:
            metric = metric_of(record)
            return np.inf, metric.cost(record[metric.final])
        return sum(record[f"{key}_at_target"] for key in MEASURES[by]), 0.0

    return min(range(len(records)), key=lambda place: cost(records[place]))


def report(
    options: Options, picks: Sequence[Pick], shown: Sequence[Run], store: Store
) -> dict[str, Any]:
    """All that was tried, and what the best of each method took with the seeds that are reported,
    for ``best.json``."""
    assert isinstance(options, Compare)
    names = list(axes(options))
    tried_seed = options.seeds[0]
    methods = {}
    for pick in picks:
        chosen = pick.tried[pick.place]
        runs = [run for run in shown if run.method == chosen.method]
        methods[chosen.method] = {
            "best": chosen.settings(names),
            "runs": [_outcome(run, store) for run in runs],
            "tried": [
                {**run.settings(names), **_outcome(run, store)}
                for run in pick.tried
                if store.run(run.name).record() is not None or len(pick.tried) > 1
            ],
        }
    config = picks[0].tried[0].config
    return {
        "config": config.name,
        (metric := metric_of(config)).target: getattr(config, metric.target),
        "picked_by": options.pick,
        "picked_with_seed": tried_seed,
        "reported_seeds": list(options.seeds[1:] or options.seeds),
        "methods": methods,
    }


def path(directory: pathlib.Path, methods: Sequence[str]) -> pathlib.Path:
    """Where the outcome of tuning ``methods`` goes: ``best.json``, unless that is of others."""
    for number in itertools.count(1):
        found = directory / ("best.json" if number == 1 else f"best-{number}.json")
        if not found.exists() or {*read_json(found, "methods")["methods"]} == {*methods}:
            return found
    raise AssertionError  # the numbers have no end


OUTCOME = "iterations uploads uplink_bytes downlink_bytes gradients_per_worker".split()
"""What is reported of a run at its target."""


def _outcome(run: Run, store: Store) -> dict[str, Any]:
    """What a run took to its target; ``diverged`` where it has none."""
    record = store.run(run.name).record()
    if record is None:
        return {"seed": run.seed, "diverged": True}
    taken = {f"{key}_at_target": record[f"{key}_at_target"] for key in OUTCOME}
    metric = metric_of(record)
    return {"seed": run.seed, **taken, metric.outcome: record[metric.final]}
