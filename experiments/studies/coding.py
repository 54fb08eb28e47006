"""The command ``coding``: how many bits an entry takes, beside its entropy, and what is lost."""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console

from experiments.report.tables import numbers_table
from experiments.training.records import session, write_json
from sasg_jax.coders import INDEX_CODERS, VALUE_CODERS

SIZES = (407_050, 11_173_962)
"""Parameters of the paper's MLP for MNIST, and of its ResNet18."""
DENSITIES = (0.001, 0.01, 0.1, 0.5)
TAILS = {
    "normal": lambda rng, size: rng.standard_normal(size),
    "Laplace": lambda rng, size: rng.laplace(size=size),
    "t, 3 degrees": lambda rng, size: rng.standard_t(3, size),
}
"""Distributions of the entries of which the largest are sent."""


@dataclasses.dataclass
class Coding:
    """Measures how many bits the coders take for an entry, beside the entropy of a random choice of
    as many, and what part of the squared values they lose.

    Sizes are those of arrays that were encoded. Prints two tables and writes coding.json.
    """

    out: pathlib.Path = pathlib.Path("results/coding")
    """Where results go."""


def work(command: Coding, arguments: Sequence[str]) -> None:
    console = rich.console.Console()
    indices = [_bits_of_indices(size, d) for size in SIZES for d in DENSITIES]
    values = [_loss_of_values(name) for name in VALUE_CODERS]
    console.print(_indices_table(indices))
    console.print(_values_table(values))
    path = command.out / "coding.json"
    write_json(path, {**session(arguments), "indices": indices, "values": values})
    console.print(f"Results: {path}", soft_wrap=True)


def _bits_of_indices(size: int, density: float) -> dict[str, Any]:
    """Bits for each of the indices; checks that they come back."""
    kept = int(density * size)
    chosen = np.random.default_rng(0).choice(size, kept, replace=False)
    indices = jnp.asarray(np.sort(chosen), jnp.int32)
    found: dict[str, Any] = {"size": size, "density": density, "entropy": entropy(kept, size)}
    for name, coder in INDEX_CODERS.items():
        code = jax.jit(coder.encode, static_argnums=1)(indices, size)
        back = jax.jit(coder.decode, static_argnums=(1, 2))(code, kept, size)
        if not (back == indices).all():
            raise AssertionError(f"{name} does not come back: {kept} of {size}.")
        found[name] = _bits(code) / kept
    return found


def entropy(kept: int, size: int) -> float:
    """Bits for each of ``kept`` entries of ``size`` whose choice is any with the same chance."""
    log = lambda n: math.lgamma(n + 1) / math.log(2)
    return (log(size) - log(kept) - log(size - kept)) / kept


def _loss_of_values(name: str) -> dict[str, Any]:
    """Bits for each value, and the part of the sum of squares that is lost, by distribution."""
    coder, size, kept = VALUE_CODERS[name], SIZES[0], SIZES[0] // 100
    found: dict[str, Any] = {"values": name}
    for tail, draw in TAILS.items():
        entries = draw(np.random.default_rng(0), size)
        largest = np.argpartition(-np.abs(entries), kept)[:kept]
        x = jnp.asarray(entries[largest], jnp.float32)
        code = jax.jit(coder.encode)(x)
        error = np.asarray(coder.decode(code, kept, x.dtype), np.float64) - np.asarray(x)
        found[tail] = float(np.sum(error**2) / np.sum(entries[largest] ** 2))
        found["bits"] = _bits(code) / kept
    return found


def _bits(code: Any) -> int:
    return 8 * sum(x.nbytes for x in jax.tree.leaves(code))


def _indices_table(rows: Sequence[dict[str, Any]]):
    columns = ("Entropy", *INDEX_CODERS)
    table = numbers_table("Bits for an index", ("Of", "Density"), columns)
    for row in rows:
        bits = [f"{row[name]:.2f}" for name in ("entropy", *INDEX_CODERS)]
        table.add_row(f"{row['size']:,}", f"{row['density']:.1%}", *bits)
    return table


def _values_table(rows: Sequence[dict[str, Any]]):
    table = numbers_table("Bits for a value, and loss", ("Values",), ("Bits", *TAILS))
    for row in rows:
        lost = [f"{row[tail]:.2%}" for tail in TAILS]
        table.add_row(row["values"], f"{row['bits']:.2f}", *lost)
    return table
