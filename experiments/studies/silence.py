"""The command ``silence``: what becomes of a silent worker's gradient, and what that costs.

The noise that the parameters take in is measured where it is known, on a quadratic, beside its
formula; then on MNIST; and where reusing a message is the better choice.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console

import sasg_jax
from experiments import data
from experiments.configs import CONFIGS
from experiments.report.tables import numbers_table
from experiments.training.inputs import normaliser
from experiments.training.records import session, write_json
from sasg_jax.numerics import squared_distance

PERIODS, SILENCES = (2, 4, 8), ("reuse", "keep", "drop")
M, RATE, SIZE = 8, 0.01, 1000
"""Workers, learning rate and dimensions of the quadratic ½‖w‖² with unit noise."""


@dataclasses.dataclass
class Silence:
    """Measures what a silent worker's gradient costs, by what becomes of it: applied again from its
    last message (reuse), kept for its next one (keep), or left out (drop).

    Noise power on a quadratic with known noise, beside its formula; the same on MNIST; and where
    reuse is better. Prints tables and writes silence.json.
    """

    out: pathlib.Path = pathlib.Path("results/silence")
    """Where results go."""
    data_dir: pathlib.Path | None = None
    """Where tensorflow-datasets keeps prepared data."""
    archives: pathlib.Path | None = None
    """A folder with the original archives of MNIST, to prepare it from without a network."""
    skip_mnist: bool = False
    """Only the quadratics, which take a minute and need no data."""


def work(command: Silence, arguments: Sequence[str]) -> None:
    console = rich.console.Console()
    results: dict[str, Any] = {"quadratic": noise_on_a_quadratic()}
    console.print(
        _noise_table("Variance of w on a quadratic, always sending = 1", results["quadratic"])
    )
    results["small_rates"] = small_rates()
    console.print(_rates_table(results["small_rates"]))
    if not command.skip_mnist:
        dataset, _ = data.load_named("mnist", command.data_dir, command.archives)
        results["mnist"] = noise_on_mnist(dataset)
        title = "Drift apart of two runs on MNIST, always sending = 1"
        console.print(_noise_table(title, results["mnist"]))
    write_json(command.out / "silence.json", {**session(arguments), **results})
    console.print(f"Results: {command.out / 'silence.json'}", soft_wrap=True)


def _noise_table(title: str, rows: Sequence[dict[str, Any]]):
    table = numbers_table(title, ("Silence",), ("Period", "Measured", "Formula"))
    for row in rows:
        numbers = f"{row['measured']:.2f}", f"{row['formula']:.0f}"
        table.add_row(row["silence"], str(row["period"]), *numbers)
    return table


def formula(silence: str, period: int) -> float:
    """Noise power beside that of always sending, where γλP is small.

    Of M workers, one in P sends. Kept, every sample is applied once, with weight γ/M: as always.
    Reused, one sample in P is used, and applied P times: P² the power of a sample, from M/P of them
    in a round. Dropped, it is applied once, in a mean over M/P: the same.
    """
    return 1.0 if silence == "keep" else float(period)


# --- A quadratic with known noise ----------------------------------------------------------------


def noise_on_a_quadratic(rounds: int = 3000) -> list[dict[str, Any]]:
    """E‖w‖² in the end, of ½‖w‖² with noise of unit variance in every worker's gradient."""
    base = _variance(sasg_jax.always(), "keep", rounds)
    # Exact for always: γ² σ²/M of noise a round, of which (1 - γ)² is left after the next.
    exact = RATE**2 / M / (1 - (1 - RATE) ** 2)
    rows = [{"silence": "always", "period": 1, "measured": base / exact, "formula": 1.0}]
    for silence in SILENCES:
        for period in PERIODS:
            found = _variance(sasg_jax.every(period), silence, rounds)
            expected = formula(silence, period)
            row = {"silence": silence, "period": period, "measured": found / base}
            rows.append({**row, "formula": expected})
    return rows


def _variance(rule: sasg_jax.Rule, silence: str, rounds: int) -> float:
    loss = lambda w, noise: 0.5 * jnp.sum((w + noise) ** 2)
    tx = sasg_jax.compressed_sgd(RATE, sasg_jax.identity(), rule, num_workers=M, silence=silence)
    step = sasg_jax.make_train_step(loss, tx, num_workers=M)

    def one(state, key):
        state, _ = step.step(state, jax.random.normal(key, (M, SIZE)))
        return state, jnp.mean(state.params**2)

    keys = jax.random.split(jax.random.key(0), rounds)
    run = jax.jit(lambda state: jax.lax.scan(one, state, keys)[1])
    return float(run(step.init(jnp.zeros(SIZE)))[rounds // 3 :].mean())


# --- Where reuse is better ------------------------------------------------------------------------


def small_rates(rounds: int = 4000) -> list[dict[str, Any]]:
    """Rounds until the loss of a quadratic has fallen a hundredfold, with the top 5 % and turns of
    4, by the rate and the noise."""
    rows = []
    for noise in (0.0, 0.3):
        for rate in (0.003, 0.01, 0.03, 0.1, 0.3):
            row: dict[str, Any] = {"noise": noise, "rate": rate}
            for silence in ("reuse", "keep"):
                row[silence] = _rounds_to_a_hundredth(rate, noise, silence, rounds)
            rows.append(row)
    return rows


def _rounds_to_a_hundredth(rate: float, noise: float, silence: str, rounds: int) -> int | None:
    """Of Σ λ w²/2 with λ from 0.1 to 1; None where it does not within ``rounds``."""
    curvature = jnp.geomspace(0.1, 1, SIZE)
    loss = lambda w, noise: 0.5 * jnp.sum(curvature * w**2) + jnp.sum(w * noise)
    tx = sasg_jax.compressed_sgd(
        rate, sasg_jax.top_k(0.05), sasg_jax.every(4), num_workers=M, silence=silence
    )
    step = sasg_jax.make_train_step(loss, tx, num_workers=M)

    def one(state, key):
        state, _ = step.step(state, noise * jax.random.normal(key, (M, SIZE)))
        return state, jnp.sum(curvature * state.params**2)

    keys = jax.random.split(jax.random.key(0), rounds)
    losses = jax.jit(lambda state: jax.lax.scan(one, state, keys)[1])(step.init(jnp.ones(SIZE)))
    below = np.flatnonzero(np.asarray(losses) < 0.01 * float(curvature.sum()))
    return int(below[0]) + 1 if below.size else None


def _rates_table(rows: Sequence[dict[str, Any]]):
    title = "Rounds to a hundredth of the loss of a quadratic, top 5 % in turns of 4"
    table = numbers_table(title, (), ("Noise", "Rate", "Reuse", "Keep"))
    for row in rows:
        found = ["never" if row[name] is None else f"{row[name]:,}" for name in ("reuse", "keep")]
        table.add_row(f"{row['noise']:g}", f"{row['rate']:g}", *found)
    return table


# --- MNIST ----------------------------------------------------------------------------------------


def noise_on_mnist(dataset: data.Dataset, pairs: int = 4) -> list[dict[str, Any]]:
    """‖w - w'‖² of two runs that go on from the same parameters on different batches, whole
    gradients, at a tenth of the best rate of SGD; beside that of always sending."""
    from experiments.training.models import make_model

    config = CONFIGS["mnist_fc"]
    normalise, model = normaliser(dataset.train_images), make_model(config, dataset.num_classes)
    images, labels = map(jnp.asarray, (dataset.train_images, dataset.train_labels))

    def loss(params, batch):
        logits: Any = model.apply({"params": params}, normalise(images[batch]), train=True)
        log_probabilities = jax.nn.log_softmax(logits)
        return -jnp.take_along_axis(log_probabilities, labels[batch][:, None], 1).mean()

    draw = lambda key: jax.random.randint(
        key, (config.num_workers, config.batch_size), 0, len(labels)
    )
    run = functools.partial(_run_on, loss, draw, config.num_workers)
    first = model.init(jax.random.key(1), normalise(dataset.train_images[:2]), train=False)
    begun = run(sasg_jax.always(), "keep", 0.2, 1000)(first["params"], jax.random.key(2))

    def drift(rule: sasg_jax.Rule, silence: str) -> float:
        go_on = run(rule, silence, 0.04, 200)
        ends = [go_on(begun, jax.random.key(seed)) for seed in range(10, 10 + 2 * pairs)]
        apart = lambda a, b: float(squared_distance(a, b))
        return float(np.mean([apart(ends[i], ends[i + 1]) for i in range(0, 2 * pairs, 2)]))

    base = drift(sasg_jax.always(), "keep")
    rows = []
    for silence in SILENCES:
        for period in PERIODS:
            measured = drift(sasg_jax.every(period), silence) / base
            row = {"silence": silence, "period": period, "measured": measured}
            rows.append({**row, "formula": formula(silence, period)})
    return rows


def _run_on(
    loss: Callable[..., Any], draw: Callable[..., Any], workers: int, rule, silence, rate, rounds
) -> Callable[..., Any]:
    """Parameters after more rounds, as a function of those before and of a key."""
    tx = sasg_jax.compressed_sgd(
        rate, sasg_jax.identity(), rule, num_workers=workers, silence=silence
    )
    step = sasg_jax.make_train_step(loss, tx, num_workers=workers)
    one = lambda state, key: (step.step(state, draw(key))[0], None)

    def go_on(params, key):
        return jax.lax.scan(one, step.init(params), jax.random.split(key, rounds))[0].params

    return jax.jit(go_on)
