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
    scope: str | None = None
    """Where it chooses the top k: in each ``"tensor"`` or the ``"tree"``. None: it sends all."""
    alpha: str | None = None  # whose c of ``Config.alpha_c`` its upload rule takes, of those with α
    rule: str = "always"  # the name of its rule's function in sasg_jax
    two_way: bool = False  # whether it sends the top k of the step back

    @property
    def sparse(self) -> bool:
        """Whether it sends the top k, and so takes a density and a selection."""
        return self.scope is not None

    @property
    def compares(self) -> bool:
        """Whether its rule asks for a second gradient."""
        return self.rule == "innovation"

    @property
    def gradients(self) -> float:
        """Of a worker in a round, at most."""
        return 1.0 if not self.compares else 2.0 if self.alpha else 1 + 1 / LOOK_EVERY

    @property
    def settings(self) -> tuple[str, ...]:
        """Fields of a configuration that can be tuned for it; others make no difference to it."""
        of_rule = {
            "always": (),
            "every": ("period",),
            "innovation": ("alpha_c", "max_staleness") if self.alpha else ("theta", "period"),
        }
        sparse = ("density", "scope") if self.sparse else ()
        silence = () if self.rule == "always" else ("silence",)
        return ("learning_rate", "batch_size", *sparse, *of_rule[self.rule], *silence)


LOOK_EVERY = 16
"""Uploads from one second gradient to the next, as the rule without an alpha has it."""

_LAZY: Any = {"rule": "innovation", "alpha": "sasg", "scope": "tensor"}
METHODS = {
    "sgd": Method("SGD", "#0173b2", "sgd", ("psum", "server")),
    "sparse": Method("Sparse", "#de8f05", "sparse_sgd", ("gather", "server"), scope="tensor"),
    "lasg": Method(
        *("LASG", "#029e73", "lasg", ("lazy", "server")), rule="innovation", alpha="lasg"
    ),
    "sasg": Method("SASG", "#d55e00", "sasg", ("gather", "lazy", "relay", "server"), **_LAZY),
    "turn": Method(
        *("In turn", "#56b4e9", "turn_sgd", ("gather", "lazy", "relay", "server")),
        scope="tree",
        rule="every",
    ),
    "sasg_keep": Method(
        *("SASG, keep", "#5e4fa2", "sasg_keep", ("gather", "lazy", "relay", "server")),
        scope="tree",
        rule="innovation",
    ),
    "sparse_two_way": Method(
        *("Sparse, two-way", "#ca9161", "sparse_sgd", ("server", "sharded")),
        scope="tensor",
        two_way=True,
    ),
    "sasg_two_way": Method(
        *("SASG, two-way", "#cc78bc", "sasg", ("server", "sharded")), **_LAZY, two_way=True
    ),
    "turn_two_way": Method(
        *("In turn, two-way", "#949494", "turn_sgd", ("server",)),
        scope="tree",
        rule="every",
        two_way=True,
    ),
}
"""The paper's four methods, two that keep, and some with a sparse way down."""

PAPER_METHODS = ("sgd", "sparse", "lasg", "sasg")
OPTIMIZERS = ("sgd", "momentum", "adamw")
"""What may step with the mean, in place of SGD with the learning rate inside the compressor."""

EXCHANGES = ("psum", "gather", "lazy", "relay", "server", "sharded")
"""Names of the library's exchanges, known without importing it."""

if TYPE_CHECKING:
    MethodName = str
    ExchangeName = str
    OptimizerName = str
else:
    MethodName = Literal[tuple(METHODS)]
    ExchangeName = Literal[EXCHANGES]
    OptimizerName = Literal[OPTIMIZERS]


_WORDS = {
    "learning_rate": "rate {:g}",
    "batch_size": "{} images",
    "scope": "{} scope",
    "alpha_c": "c {:g}",
    "period": "period {}",
    "theta": "θ {:g}",
    "silence": "{}",
    "max_staleness": "staleness {}",
}


def describe_setting(name: str, value: Any) -> str:
    """A setting for people."""
    return f"{100 * value:g} %" if name == "density" else _WORDS[name].format(value)


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
    import optax

    import sasg_jax

    method, workers, rate = METHODS[name], config.num_workers, learning_rate(config)
    parts: dict[str, Any] = {"num_workers": workers, "exchange": config.exchange}
    if method.rule != "always":
        parts["silence"] = config.silence
    top: dict[str, Any] = {}
    if method.sparse:
        top = {"density": config.density, "selection": selection}
        top["scope"] = config.scope or method.scope
    if method.two_way:
        parts["downlink"] = sasg_jax.top_k(**top)
    rule: dict[str, Any] = {}
    if method.rule == "every":
        rule = {"period": config.period or 8}
    elif method.compares:
        rule = {"share_stale_params": simulated and workers > config.max_staleness}
        if method.alpha:
            rule |= {"max_staleness": config.max_staleness, "history": config.history}
        else:
            rule |= {"max_staleness": config.period, "theta": config.theta}
    rule = {setting: value for setting, value in rule.items() if value is not None}
    if method.alpha:
        alpha = sasg_jax.released_alpha(config.alpha_c[method.alpha], workers)
        inside = config.optimizer is None  # where the rule knows the rate
        rule["alpha"] = alpha if inside else alpha(config.learning_rate)
    if config.optimizer is None:
        return getattr(sasg_jax, method.maker)(rate, **top, **rule, **parts)
    compressor = sasg_jax.top_k(**top) if method.sparse else sasg_jax.identity()
    aggregate = sasg_jax.aggregate(compressor, getattr(sasg_jax, method.rule)(**rule), **parts)
    momentum = lambda rate: optax.sgd(rate, momentum=0.9)
    after = {"sgd": optax.sgd, "momentum": momentum, "adamw": optax.adamw}
    return sasg_jax.pipeline(aggregate, after[config.optimizer](rate))
