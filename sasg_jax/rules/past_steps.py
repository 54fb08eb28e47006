"""How far the server's last steps went, with which several rules compare what is new: before plain
SGD at a constant rate these are γ times shorter than the parameters' own.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sasg_jax.numerics import PyTree, squared_norm
from sasg_jax.rules.base import Round


def no_steps(history: int) -> Callable[[PyTree], jax.Array]:
    """``steps = init(params)``: ‖u‖² of as many steps, none of which was made."""
    return lambda params: jnp.zeros(history, jnp.float32)


def add_step(steps: jax.Array, round: Round, step: PyTree) -> jax.Array:
    """‖u‖² of the last steps, the newest last, in the unit of γ g where there is a rate. One that
    is beyond float32 counts for nothing: who compares with it sends. ``# dtype=float32``"""
    return _append(steps, squared_norm(step))


def add_gradient(steps: jax.Array, round: Round, step: PyTree) -> jax.Array:
    """As :func:`add_step`, in the unit of g: of the mean gradient ḡ, whatever the rate."""
    rate, squared = round.learning_rate, squared_norm(step)
    return _append(steps, squared if rate is None else squared / rate.astype(jnp.float32) ** 2)


def _append(steps: jax.Array, squared: jax.Array) -> jax.Array:
    return jnp.append(steps[1:], jnp.where(jnp.isfinite(squared), squared, 0))
