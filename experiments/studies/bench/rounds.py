"""Rounds of the paper's MLP for MNIST, ten workers of ten images, beside their gradients alone."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sasg_jax
from experiments.configs import CONFIGS, Config
from experiments.methods import METHODS, PAPER_METHODS, make_optimizer
from experiments.studies.bench.timing import Row, interleave, row
from experiments.training.train import chunk_size

Calls = Sequence[tuple[jax.Array, jax.Array]]
"""The images and labels of the rounds of each call."""

SEPARATIONS = {"few upload": 0.5, "many upload": 0.1}
"""Of the classes of made-up images, beside noise with a standard deviation of 1 in each pixel. The
harder they are to tell apart, the more workers upload: one in ten, which is as seldom as they may,
or half of them. On MNIST it is 0.82 of them in the first hundred rounds and 0.27 in the last."""

WARM_UP_CALLS = 20
ROUNDS_PER_CALL = 20
ROUNDS = 600  # with ten workers of ten images an epoch of MNIST


def measure(repeats: int) -> list[Row]:
    return [row for how in SEPARATIONS for row in _measure_where(how, repeats)]


def _measure_where(how: str, repeats: int) -> list[Row]:
    config = CONFIGS["mnist_fc"]
    shape = config.num_workers, config.batch_size, ROUNDS
    data = calls(*examples(*shape, SEPARATIONS[how]))
    loops: dict[str, Any] = {
        METHODS[method].label: Simulated(config, method, data) for method in PAPER_METHODS
    }
    loops["SASG, approximate"] = Simulated(config, "sasg", data, selection="approximate")
    cases = {"floor": _floor(config, data)} | {name: loop.run for name, loop in loops.items()}
    seconds = interleave(cases, repeats)
    notes = {name: f"{loop.fraction():.0%} upload" for name, loop in loops.items()}
    floor, per = seconds["floor"], ROUNDS_PER_CALL
    return [
        row(f"round of MNIST-FC, {how}", name, times, floor, notes.get(name, ""), per)
        for name, times in seconds.items()
    ]


def examples(
    num_workers: int, batch_size: int, rounds: int, separation: float
) -> tuple[jax.Array, jax.Array]:
    """Noisy images of ten classes.

    shape=(rounds, M, B, 784), dtype=float32 and shape=(rounds, M, B), dtype=int32
    """
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, (rounds, num_workers, batch_size), np.int32)
    means = rng.normal(size=(10, 784)).astype(np.float32)
    images = rng.standard_normal((*labels.shape, 784), np.float32)
    images += separation * means[labels]
    return jnp.asarray(images), jnp.asarray(labels)


def calls(images: jax.Array, labels: jax.Array) -> Calls:
    """After the last call comes the first again, in another epoch."""
    count = len(images) // ROUNDS_PER_CALL
    return list(zip(jnp.split(images, count), jnp.split(labels, count), strict=True))


def start() -> dict[str, jax.Array]:
    """The parameters that all begin with."""
    rng = np.random.default_rng(1)
    uniform = lambda *shape: jnp.asarray(rng.uniform(-1, 1, shape) / np.sqrt(shape[0]), jnp.float32)
    w1, w2 = uniform(784, 512), uniform(512, 10)
    return {"w1": w1, "b1": jnp.zeros(512), "w2": w2, "b2": jnp.zeros(10)}


def loss(params: Any, batch: Any) -> jax.Array:
    images, labels = batch
    hidden = jax.nn.relu(images @ params["w1"] + params["b1"])
    logits = hidden @ params["w2"] + params["b2"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def make_train_step(config: Config, method: str, **options: Any) -> sasg_jax.TrainStep:
    """All workers simulated on one device, as the experiments do."""
    return sasg_jax.make_train_step(
        loss,
        make_optimizer(config, method, simulated=True, **options),
        num_workers=config.num_workers,
        chunk_size=chunk_size(config),
    )


def _floor(config: Config, data: Calls) -> Callable[[], Any]:
    """Two gradients of every worker, one at parameters of its own, and their distance."""
    params = start()
    own = jax.tree.map(lambda x: jnp.stack([x] * config.num_workers), params)
    grad = jax.grad(loss)

    def one_worker(params, stale, batch):
        difference = jax.tree.map(jnp.subtract, grad(params, batch), grad(stale, batch))
        return optax.tree.norm(difference, squared=True)

    @jax.jit
    def run(params, own, images, labels):
        def one_round(total, batch):
            return total + jax.vmap(one_worker, (None, 0, 0))(params, own, batch).sum(), None

        return jax.lax.scan(one_round, 0.0, (images, labels))[0]

    batches = itertools.cycle(data)
    return lambda: jax.block_until_ready(run(params, own, *next(batches)))


class Simulated:
    """A run of a method that is under way."""

    def __init__(self, config: Config, method: str, data: Calls, **options: Any):
        train_step = make_train_step(config, method, **options)

        @functools.partial(jax.jit, donate_argnums=0)
        def rounds(state, images, labels):
            state, info = jax.lax.scan(train_step.step, state, (images, labels))
            return state, info.uploaded

        self.state = train_step.init(start())
        self._rounds, self._batches = rounds, itertools.cycle(data)
        self._uploaded: list[jax.Array] = []
        for _ in range(WARM_UP_CALLS):
            self.run()

    def run(self) -> None:
        """Makes the rounds of a call."""
        self.state, uploaded = jax.block_until_ready(self._rounds(self.state, *next(self._batches)))
        self._uploaded.append(uploaded)

    def fraction(self) -> float:
        """The part of the workers that upload."""
        return float(np.mean(self._uploaded[WARM_UP_CALLS:]))
