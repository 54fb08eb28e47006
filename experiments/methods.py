"""The methods under comparison: one table of what they are called, how they are made and what they
can take.

Importing it needs no jax: the options of the command line are made from it.
"""

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

from experiments.configs import Config

if TYPE_CHECKING:
    import optax

    import sasg_jax


@dataclasses.dataclass(frozen=True)
class Method:
    """One row of the table."""

    label: str  # its name for people
    colour: str  # of a palette that is told apart without colour vision
    maker: str  # the name of its function in sasg_jax
    exchanges: tuple[str, ...]  # those that suit it
    sparse: bool = False  # whether it sends the top k, and so takes a density and a selection
    alpha: str | None = None
    """Whose c of ``Config.alpha_c`` its upload rule takes; None: every worker always uploads."""
    two_way: bool = False  # whether it sends the top k of the step back


METHODS = {
    "sgd": Method("SGD", "#0173b2", "sgd", ("psum", "server")),
    "sparse": Method("Sparse", "#de8f05", "sparse_sgd", ("gather", "server"), sparse=True),
    "lasg": Method("LASG", "#029e73", "lasg", ("lazy", "server"), alpha="lasg"),
    "sasg": Method(
        *("SASG", "#d55e00", "sasg", ("gather", "lazy", "relay", "server")),
        sparse=True,
        alpha="sasg",
    ),
    "sparse_two_way": Method(
        *("Sparse, two-way", "#ca9161", "sparse_sgd", ("server", "sharded")),
        sparse=True,
        two_way=True,
    ),
    "sasg_two_way": Method(
        *("SASG, two-way", "#cc78bc", "sasg", ("server", "sharded")),
        sparse=True,
        alpha="sasg",
        two_way=True,
    ),
}
"""The paper's four methods, and Sparse and SASG with a sparse way down."""

PAPER_METHODS = tuple(name for name, method in METHODS.items() if not method.two_way)

EXCHANGES = ("psum", "gather", "lazy", "relay", "server", "sharded")
"""Names of the library's exchanges, known without importing it."""

if TYPE_CHECKING:
    MethodName = str
    ExchangeName = str
else:
    MethodName = Literal[tuple(METHODS)]
    ExchangeName = Literal[EXCHANGES]


def learning_rate(config: Config) -> "optax.ScalarOrSchedule":
    """γ, divided by ten at every one of ``config.decay_iterations``."""
    import optax

    if not config.decay_iterations:
        return config.learning_rate
    scales = dict.fromkeys(config.decay_iterations, 0.1)
    return optax.piecewise_constant_schedule(config.learning_rate, scales)


def make_optimizer(
    config: Config, name: str, *, simulated: bool = False, selection: str = "auto"
) -> "sasg_jax.Transformation":
    """The optimiser of one of :data:`METHODS`.

    Where one device simulates all workers, many of them share their stale parameters. ``selection``
    is how those that send the top k find them, see :func:`sasg_jax.top_k`.
    """
    import sasg_jax

    method, workers = METHODS[name], config.num_workers
    options: dict[str, Any] = {"num_workers": workers}
    if config.exchange is not None:
        options["exchange"] = config.exchange
    if method.sparse:
        options |= {"density": config.density, "selection": selection}
    if method.two_way:
        options["downlink"] = sasg_jax.top_k(config.density)
    if method.alpha:
        options |= {
            "max_staleness": config.max_staleness,
            "history": config.history,
            "alpha": sasg_jax.released_alpha(config.alpha_c[method.alpha], workers),
            "share_stale_params": simulated and workers > config.max_staleness,
        }
    return getattr(sasg_jax, method.maker)(learning_rate(config), **options)
