"""The methods under comparison, as the optimisers of sasg_jax."""

from typing import Any

import optax

import sasg_jax
from experiments.configs import Config


def learning_rate(config: Config) -> optax.ScalarOrSchedule:
    """γ, divided by ten at every one of ``config.decay_iterations``."""
    if not config.decay_iterations:
        return config.learning_rate
    scales = dict.fromkeys(config.decay_iterations, 0.1)
    return optax.piecewise_constant_schedule(config.learning_rate, scales)


def make_optimizer(
    config: Config, method: str, *, simulated: bool = False, selection: str = "auto"
) -> optax.GradientTransformationExtraArgs:
    """The optimiser of one of :data:`experiments.configs.METHODS`.

    Where one device simulates all workers, many of them share their stale parameters. ``selection``
    is how those that send the top k find them, see :func:`sasg_jax.top_k`.
    """
    rate, workers = learning_rate(config), config.num_workers
    shared: dict[str, Any] = {"num_workers": workers}
    if config.exchange is not None:
        shared["exchange"] = config.exchange
    if method == "sgd":
        return sasg_jax.sgd(rate, **shared)
    downlink = sasg_jax.top_k(config.density) if method.endswith("two_way") else None
    sparse = {"density": config.density, "selection": selection, "downlink": downlink}
    if method in ("sparse", "sparse_two_way"):
        return sasg_jax.sparse_sgd(rate, **sparse, **shared)
    rule = {
        **shared,
        "max_staleness": config.max_staleness,
        "history": config.history,
        "alpha": sasg_jax.released_alpha(
            config.alpha_c["lasg" if method == "lasg" else "sasg"], workers
        ),
        "share_stale_params": simulated and workers > config.max_staleness,
    }
    if method == "lasg":
        return sasg_jax.lasg(rate, **rule)
    return sasg_jax.sasg(rate, **sparse, **rule)
