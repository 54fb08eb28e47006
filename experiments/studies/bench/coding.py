"""What writing entries in few bits takes: beside the selection of as many, and in a round."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.configs import CONFIGS
from experiments.studies.bench import rounds
from experiments.studies.bench.timing import Row, interleave, row
from sasg_jax.coders import INDEX_CODERS, VALUE_CODERS
from sasg_jax.selection import magnitude_top_k

SIZE = 11_173_962
"""Parameters of the paper's ResNet18."""
KEPT = SIZE // 100


def measure(repeats: int) -> list[Row]:
    return [*_beside_the_selection(repeats), *_in_a_round(repeats)]


def _beside_the_selection(repeats: int) -> list[Row]:
    x = jnp.asarray(np.random.default_rng(0).standard_normal(SIZE), jnp.float32)
    select = functools.partial(magnitude_top_k, k=KEPT)
    indices = jax.jit(select)(x)
    values = x[indices]
    cases = {"selection": _compiled(select, x), "sort": _compiled(jnp.sort, indices)}
    indices = jnp.sort(indices)
    for name in ("fixed", "tiled", "bitmap", "elias_fano"):
        coder: Any = INDEX_CODERS[name]
        encode = functools.partial(lambda indices, coder: coder.encode(indices, SIZE), coder=coder)
        decode = functools.partial(lambda code, coder: coder.decode(code, KEPT, SIZE), coder=coder)
        cases |= _both(name, encode, decode, indices)
    for name in ("bfloat16", "sign", "sign4"):
        coder = VALUE_CODERS[name]
        decode = functools.partial(
            lambda code, coder: coder.decode(code, KEPT, jnp.float32), coder=coder
        )
        cases |= _both(name, coder.encode, decode, values)
    seconds = interleave(cases, repeats)
    title = f"coding of 1 % of {SIZE:,}"
    return [row(title, name, times, seconds["selection"]) for name, times in seconds.items()]


def _both(name: str, encode: Callable, decode: Callable, x: jax.Array) -> dict[str, Any]:
    code = jax.jit(encode)(x)
    return {f"{name}, encode": _compiled(encode, x), f"{name}, decode": _compiled(decode, code)}


def _compiled(fn: Callable[..., Any], x: Any) -> Callable[[], Any]:
    run = jax.jit(fn)
    return lambda: jax.block_until_ready(run(x))


def _in_a_round(repeats: int) -> list[Row]:
    config = CONFIGS["mnist_fc"]
    shape = config.num_workers, config.batch_size, rounds.ROUNDS
    data = rounds.calls(*rounds.examples(*shape, rounds.SEPARATIONS["many upload"]))
    loops = {
        "SASG, two-way": rounds.Simulated(config, "sasg_two_way", data),
        "SASG, coded": rounds.Simulated(config, "sasg_coded", data),
    }
    seconds = interleave({name: loop.run for name, loop in loops.items()}, repeats)
    plain = seconds["SASG, two-way"]
    return [
        row("coded round of MNIST-FC", name, times, plain, f"{loops[name].fraction():.0%} upload",
            rounds.ROUNDS_PER_CALL)
        for name, times in seconds.items()
    ]  # fmt: skip
