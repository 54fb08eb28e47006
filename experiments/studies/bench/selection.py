"""Selection of the top k, beside one pass over the vector."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.studies.bench.timing import Row, interleave, row, times_as_long
from sasg_jax.selection import MIN_FILL, approximate_top_k, magnitude_top_k

SIZES = (401_408, 2_359_296, 11_173_962)
"""Of the first layer of the paper's MLP, the largest of ResNet18, and all of ResNet18."""

BATCH = 4
"""Vectors in one selection under ``vmap`` or ``scan``."""

FEEDBACK_ROUNDS = 200
"""Rounds of error feedback; the approximate selection is judged by the second half of them. In the
first, at 1 % density, the residual still grows and the threshold with it."""

DENSITY = 0.01


def measure(repeats: int) -> list[Row]:
    found = []
    for size in SIZES:
        x = np.random.default_rng(0).normal(size=(BATCH, size)).astype(np.float32)
        vectors, k = jnp.asarray(x), int(DENSITY * size)
        ours = functools.partial(magnitude_top_k, k=k)
        reference = functools.partial(magnitude_top_k, k=k, method="lax")
        cases = {
            "one pass": _compiled(lambda x: jnp.abs(x).max(), vectors[0]),
            "ours": _compiled(ours, vectors[0]),
            "approximate": _with_memory(functools.partial(approximate_top_k, k=k), vectors[0]),
            "lax.top_k": _compiled(reference, vectors[0]),
        }
        beside = {name: "ours" for name in cases if name not in ("one pass", "ours")}
        batched = {}
        for name, over in (("vmap", jax.vmap), ("scan", _scanned)):
            batched[f"ours, {name}"] = _compiled(over(ours), vectors)
            batched[f"lax.top_k, {name}"] = _compiled(over(reference), vectors)
            beside[f"lax.top_k, {name}"] = f"ours, {name}"
        seconds = interleave(cases | batched, repeats)
        seconds |= {name: [total / BATCH for total in seconds[name]] for name in batched}
        notes = {name: times_as_long(seconds, name, other) for name, other in beside.items()}
        if size == SIZES[0]:  # it does not depend on the size
            notes["approximate"] = _judge_approximate(size, k)
        found += [
            row(f"top 1 % of {size:,}", name, times, seconds["one pass"], notes.get(name, ""))
            for name, times in seconds.items()
        ]
    return found


def _compiled(fn: Callable[[jax.Array], jax.Array], x: jax.Array) -> Callable[[], Any]:
    run = jax.jit(fn)
    return lambda: jax.block_until_ready(run(x))


def _with_memory(fn: Callable[..., Any], x: jax.Array) -> Callable[[], Any]:
    """As :func:`_compiled`, for a function that wants back the threshold that it gave last."""
    run, threshold = jax.jit(lambda x, threshold: fn(x, threshold=threshold)), jnp.float32(0)

    def once():
        nonlocal threshold
        _, threshold = jax.block_until_ready(run(x, threshold))

    for _ in range(10):
        once()
    return once


def _scanned(fn: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    return lambda rows: jax.lax.scan(lambda carried, x: (carried, fn(x)), None, rows)[1]


def _judge_approximate(size: int, k: int) -> str:
    """Its contraction factor ‖x - C(x)‖²/‖x‖² beside that of the k largest, under error feedback.

    Of gradients whose entries have scales of their own, from a lognormal distribution.
    """

    @jax.jit
    def one_round(carried, key):
        residual, threshold, scales = carried
        x = residual + scales * jax.random.normal(key, (size,))
        count = (jnp.abs(x) >= threshold).sum()
        renewed = (count < MIN_FILL * k) | (count > k)
        indices, threshold = approximate_top_k(x, k, threshold)
        squares = jnp.square(x)
        total = squares.sum()
        residual = x.at[indices].set(0)
        best = 1 - squares[magnitude_top_k(x, k)].sum() / total
        left = jnp.square(residual).sum() / total
        return (residual, threshold, scales), (left, best, renewed)

    scales = jnp.exp(jax.random.normal(jax.random.key(0), (size,)))
    start = jnp.zeros(size), jnp.float32(0), scales
    keys = jax.random.split(jax.random.key(1), FEEDBACK_ROUNDS)
    rounds = jax.lax.scan(one_round, start, keys)[1]
    left, best, renewed = (np.asarray(x)[FEEDBACK_ROUNDS // 2 :] for x in rounds)
    return (
        f"contraction {left.mean():.3f} (exact {best.mean():.3f}), "
        f"{renewed.mean():.0%} of thresholds found anew"
    )
