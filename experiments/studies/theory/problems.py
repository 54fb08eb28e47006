"""Problems whose full gradient and smoothness constant are known."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

DIMENSION = 64
EXAMPLES = 1024


class Problem(NamedTuple):
    """f, the mean of a loss over all examples."""

    name: str
    loss: Callable[[Any, Any, Any], jax.Array]
    """``loss(params, features, targets)``, the mean over a batch of examples."""
    features: np.ndarray  # shape=(EXAMPLES, DIMENSION), dtype=float32
    targets: np.ndarray  # shape=(EXAMPLES,), dtype=float32
    start: np.ndarray  # w_0. shape=(DIMENSION,), dtype=float32
    smoothness: float
    """L: the gradient of every example, and so of every batch, is L-Lipschitz."""
    rate: float
    """c of γ = c/√T with ``NUM_WORKERS`` workers, half of which is c of γ = c √(M/T)."""


def ridge_regression() -> Problem:
    """Squared errors plus x²/20: strongly convex."""
    rng = np.random.default_rng(0)
    features = _features(rng)
    targets = features @ rng.normal(size=DIMENSION) + rng.normal(size=EXAMPLES)

    def loss(params, features, targets):
        errors = features @ params - targets
        return 0.5 * jnp.mean(jnp.square(errors)) + 0.05 * jnp.sum(jnp.square(params))

    start = np.zeros(DIMENSION, np.float32)
    smoothness = _largest_squared_norm(features) + 0.1
    return Problem(
        *("ridge regression", loss, features, targets.astype(np.float32), start, smoothness),
        rate=0.4,
    )


def logistic_regression() -> Problem:
    """Logistic loss plus 0.1 x²/(1 + x²) for every parameter x: not convex where x² > 1/3."""
    rng = np.random.default_rng(1)
    features = _features(rng)
    probabilities = 1 / (1 + np.exp(-0.3 * features @ rng.normal(size=DIMENSION)))
    targets = np.where(rng.uniform(size=EXAMPLES) < probabilities, 1, -1)

    def loss(params, features, targets):
        squares = jnp.square(params)
        regulariser = 0.1 * jnp.sum(squares / (1 + squares))
        return jnp.mean(jnp.logaddexp(0.0, -targets * (features @ params))) + regulariser

    start = 1.5 * rng.normal(size=DIMENSION).astype(np.float32)
    # The second derivative of log(1 + exp(-z)) is at most 1/4, that of x²/(1 + x²) at most 2.
    smoothness = _largest_squared_norm(features) / 4 + 0.2
    name = "non-convex logistic regression"
    return Problem(name, loss, features, targets.astype(np.float32), start, smoothness, rate=2.4)


def equal_gradients() -> Problem:
    """The sum of all parameters: its gradient is all ones, so that no entry is worth more."""
    features, targets = np.zeros((EXAMPLES, DIMENSION), np.float32), np.zeros(EXAMPLES, np.float32)
    loss = lambda params, features, targets: jnp.sum(params)
    return Problem("equal gradients", loss, features, targets, features[0], 0.0, rate=1.0)


def describe(problem: Problem) -> dict[str, Any]:
    """``curvature`` is the least and the greatest of f at the start, negative if not convex."""
    hessian = jax.hessian(problem.loss)(problem.start, problem.features, problem.targets)
    curvature = np.linalg.eigvalsh(np.asarray(hessian, np.float64))
    return {
        "c": problem.rate,
        "smoothness": problem.smoothness,
        "curvature": [float(curvature[0]), float(curvature[-1])],
    }


def _features(rng: np.random.Generator) -> np.ndarray:
    """Independent features of unlike size: without error feedback the small ones are rarely sent.

    shape=(EXAMPLES, DIMENSION), dtype=float32
    """
    scales = np.geomspace(0.5, 1.5, DIMENSION)
    return (scales * rng.normal(size=(EXAMPLES, DIMENSION))).astype(np.float32)


def _largest_squared_norm(rows: np.ndarray) -> float:
    return float(np.square(rows.astype(np.float64)).sum(1).max())
