"""Draws among entries by given probabilities, of which never more than a fixed number comes."""

from typing import Any

import jax
import jax.numpy as jnp

_STEPS = 3  # of rescaling: what one more would add is below a hundredth on heavy tails
SLACK = 2.0**-10
"""By how much of it the sum of probabilities stays below the number of places, for rounding."""


def factor_of(magnitudes: jax.Array, places: int) -> jax.Array:
    """c, such that min(1, c·magnitude) adds up to at most ``places``, nearly: the probabilities
    with which drawing adds the least error. Magnitudes are in [0, 1]; c is 0 where all are 0.
    ``# shape=()``"""
    budget = places * (1 - SLACK)
    start = budget / jnp.maximum(magnitudes.sum(), 1e-30)

    def rescale(_, factor):
        sure = factor * magnitudes >= 1
        rest = jnp.where(sure, 0, magnitudes).sum()
        new = (budget - sure.sum()) / jnp.where(rest > 0, rest, 1)
        return jnp.where((rest > 0) & (new > factor), new, factor)

    factor = jax.lax.fori_loop(0, _STEPS, rescale, start)
    return jnp.where(magnitudes.max() > 0, factor, 0)


def draw(probabilities: jax.Array, key: Any) -> jax.Array:
    """Which are drawn: each with its own probability, to 2⁻³², and in all as many as these add up
    to, rounded up or down. (A random start, to which probabilities are added one after another:
    those are drawn that take it past a whole number.) ``# shape=(n,), dtype=bool``"""
    # Modulo 2³², where a carry is a whole number, sums are exact.
    steps = (jnp.minimum(probabilities, 1 - 2.0**-24) * 2.0**32).astype(jnp.uint32)
    start = jax.random.bits(key, (), jnp.uint32)
    after = start + jnp.cumsum(steps, dtype=jnp.uint32)
    return (after < after - steps) | (probabilities >= 1)
