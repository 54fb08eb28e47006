"""Norms, products and sums of trees that numbers of any type survive."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

PyTree = Any

LARGEST_SOUND, LARGEST_RATE = 1e24, 1e6
"""A gradient within the first and a rate within the second do not take a residual out of range: the
product is less than half of the distance between the largest two numbers of 32 bits (and bfloat16).
"""


def wide(dtype: Any) -> Any:
    """The type in which numbers of ``dtype`` are added: at least float32."""
    return jnp.promote_types(dtype, jnp.float32)


def squared_norm(tree: PyTree) -> jax.Array:
    """‖x‖² over all leaves. ``# shape=(), dtype=float32``"""
    leaves = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)]
    return sum(leaves, jnp.zeros((), jnp.float32))


def squared_distance(a: PyTree, b: PyTree) -> jax.Array:
    """‖a - b‖² over all leaves. ``# shape=(), dtype=float32``"""

    def leaf(x, y):
        return jnp.sum(jnp.square(x.astype(jnp.float32) - y.astype(jnp.float32)))

    return sum(jax.tree.leaves(jax.tree.map(leaf, a, b)), jnp.zeros((), jnp.float32))


def squared_distance_if_sound(a: PyTree, b: PyTree) -> jax.Array:
    """As :func:`squared_distance`, but infinite where an entry of ``a`` is not within
    ``LARGEST_SOUND``: what it takes to look costs nothing in the same pass."""

    def leaf(x, y):
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        return jnp.sum(jnp.where(jnp.abs(x) <= LARGEST_SOUND, jnp.square(x - y), jnp.inf))

    return sum(jax.tree.leaves(jax.tree.map(leaf, a, b)), jnp.zeros((), jnp.float32))


def all_finite(tree: PyTree) -> jax.Array:
    """Whether no entry is NaN or infinite. ``# shape=(), dtype=bool``"""

    def look():
        return jnp.all(jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]))

    # A finite sum of squares vouches for all, and takes half as long.
    return lax.cond(jnp.isfinite(squared_norm(tree)), lambda: jnp.asarray(True), look)


def scale(learning_rate: jax.Array | None, tree: PyTree) -> PyTree:
    """γ x, with the products taken in at least float32; x where there is no rate."""
    if learning_rate is None:
        return tree

    def leaf(x):
        dtype = wide(x.dtype)
        return (learning_rate.astype(dtype) * x.astype(dtype)).astype(x.dtype)

    return jax.tree.map(leaf, tree)
