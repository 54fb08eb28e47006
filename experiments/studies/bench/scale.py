"""What many workers and many parameters take, in time and memory."""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp

import sasg_jax
from experiments.configs import CONFIGS
from experiments.studies.bench import rounds
from experiments.studies.bench.timing import Row, gibibytes, in_a_process, peak_bytes, row

WORKERS = (100, 1000)
PARAMETERS = 100_000_000


def measure_workers(repeats: int) -> list[Row]:
    """Time for each worker in a round of SASG, beside that of the fewest workers."""
    found = {count: in_a_process(many_workers, count, repeats) for count in WORKERS}
    per_worker = {count: [s / count for s in seconds] for count, (seconds, _) in found.items()}
    part, floor = "SASG round of MNIST-FC, per worker", per_worker[WORKERS[0]]
    notes = {count: f"peak memory {gibibytes(peak)}" for count, (_, peak) in found.items()}
    return [row(part, f"{n:,} workers", per_worker[n], floor, notes[n]) for n in WORKERS]


def many_workers(count: int, repeats: int) -> tuple[list[float], int]:
    """Seconds of rounds after those in which all must upload, and this process's peak memory."""
    config = dataclasses.replace(CONFIGS["mnist_fc"], num_workers=count)
    separation = rounds.SEPARATIONS["many upload"]
    images, labels = rounds.examples(count, config.batch_size, config.history, separation)
    train_step = rounds.make_train_step(config, "sasg")
    state = train_step.init(rounds.start())
    seconds = []
    for t in range(config.history + repeats):
        batch = images[t % len(images)], labels[t % len(images)]
        began = time.perf_counter()
        state, _ = jax.block_until_ready(train_step.step(state, batch))
        seconds.append(time.perf_counter() - began)
    return seconds[config.history :], peak_bytes()


def measure_parameters(repeats: int) -> list[Row]:
    """One worker's step with 100 M parameters: time, and memory in arrays of that size."""
    seconds, peak, needed = in_a_process(many_parameters, PARAMETERS, max(3, repeats // 3))
    note = (
        f"{needed / (4 * PARAMETERS):.1f} arrays of that size by the compiler's count; peak memory "
        f"of the process {gibibytes(peak)}"
    )
    case = f"{PARAMETERS:,} parameters"
    return [row("SASG step of one worker", case, seconds, floor=seconds, note=note)]


def many_parameters(size: int, repeats: int) -> tuple[list[float], int, int]:
    """Seconds, this process's peak memory, and the bytes that the compiler counts."""
    width = 10_000
    shape = (width, size // (2 * width))

    def loss(params, batch):
        return jnp.square(jax.nn.relu(batch @ params["w1"]) @ params["w2"]).mean()

    def start():
        return {"w1": jnp.full(shape, 1e-3), "w2": jnp.full(shape[::-1], 1e-3)}

    tx = sasg_jax.sasg(1e-3, num_workers=1, density=0.01, history=1)
    train_step = sasg_jax.make_train_step(loss, tx, num_workers=1, driver="shard_map")
    step: Any = train_step.step
    shapes = jax.eval_shape(train_step.init, jax.eval_shape(start))
    compiled = step.lower(shapes, jax.ShapeDtypeStruct((1, 4, width), jnp.float32)).compile()
    memory = compiled.memory_analysis()
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes  # outputs are donated inputs
    state = jax.block_until_ready(train_step.init(start()))
    seconds = []
    for t in range(1 + repeats):
        batch = jax.random.normal(jax.random.key(t), (1, 4, width))
        began = time.perf_counter()
        state, _ = jax.block_until_ready(compiled(state, batch))
        seconds.append(time.perf_counter() - began)
    return seconds[1:], peak_bytes(), needed
