"""Norms, products and sums of trees that numbers of any type survive."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

PyTree = Any

LARGEST_RATE = 1e6
"""A rate within this and a gradient whose squares are finite do not take a residual out of range:
their product is below half of the distance between the largest two float32 (and bfloat16)."""


def wide(dtype: Any) -> Any:
    """The type in which numbers of ``dtype`` are added: at least float32."""
    return jnp.promote_types(dtype, jnp.float32)


is_masked = lambda node: isinstance(node, optax.MaskedNode)


def _sum(fn: Callable[..., jax.Array], *trees: PyTree) -> jax.Array:
    leaf = lambda *xs: jnp.sum(fn(*(x.astype(jnp.float32) for x in xs)))
    return sum(jax.tree.leaves(jax.tree.map(leaf, *trees)), jnp.zeros((), jnp.float32))


def squared_norm(tree: PyTree) -> jax.Array:
    """‖x‖² over all leaves. ``# shape=(), dtype=float32``"""
    return _sum(jnp.square, tree)


def squared_distance(a: PyTree, b: PyTree) -> jax.Array:
    """‖a - b‖² over all leaves. ``# shape=(), dtype=float32``"""
    return _sum(lambda x, y: jnp.square(x - y), a, b)


def squared_distance_of_sound(a: PyTree, b: PyTree) -> jax.Array:
    """As :func:`squared_distance`, but NaN where an entry of ``a`` is beyond 1e19, whose square
    is no float32, and infinite where only one of ``b`` is: to look costs nothing in this pass."""

    def squares(x, y):
        squared = jnp.square(x - y)
        squared = jnp.where(jnp.isnan(squared), jnp.inf, squared)
        return jnp.where(jnp.abs(x) <= 1e19, squared, jnp.nan)

    return _sum(squares, a, b)


def all_finite(tree: PyTree) -> jax.Array:
    """Whether no entry is NaN or infinite. ``# shape=(), dtype=bool``"""
    # 0 x is 0 for all others, and a sum of floats is added up faster than flags are.
    return jnp.asarray(sum(jnp.sum(0 * x) for x in jax.tree.leaves(tree)) == 0)


def scale(learning_rate: jax.Array | None, tree: PyTree) -> PyTree:
    """γ x, with the products taken in at least float32; x where there is no rate."""
    if learning_rate is None:
        return tree
    product = lambda x, dtype: learning_rate.astype(dtype) * x.astype(dtype)
    return jax.tree.map(lambda x: product(x, wide(x.dtype)).astype(x.dtype), tree)
