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
    written: tuple[str, str] = ("plain", "plain")  # how values and indices are
    optimizer: str | None = None  # what steps with the mean, where that is what it is called after
    recipe: tuple[str, ...] = ()
    """What settings it takes of a configuration, where its function makes direction and optimiser:
    others are the authors'. With a ``down_density`` it also sends the top k of the step back."""
    exchange: str | None = None  # where the library would choose another than the authors

    @property
    def sparse(self) -> bool:
        """Whether it sends the top k, and so takes a density and a selection."""
        return self.scope is not None

    @property
    def compares(self) -> bool:
        """Whether its rule asks for a second gradient."""
        return self.rule == "innovation"

    def gradients(self, local_steps: int = 1) -> float:
        """Of a worker in a round, at most."""
        looks = 0.0 if not self.compares else 1.0 if self.alpha else 1 / LOOK_EVERY
        return local_steps * (1 + looks)

    @property
    def settings(self) -> tuple[str, ...]:
        """Fields of a configuration that can be tuned for it; others make no difference to it."""
        if self.recipe:
            return ("learning_rate", "batch_size", *self.recipe, "down_density")
        of_rule = {
            "always": (),
            "every": ("period",),
            "innovation": ("alpha_c", "max_staleness") if self.alpha else ("theta", "period"),
        }
        sparse = ("density", "scope", "values", "indices", "residual_decay") if self.sparse else ()
        down = ("down_density", "down_period", "down_rule") if self.two_way else ()
        steps = ("local_steps", "inner", "outer_rate", "outer_momentum")
        if self.alpha or self.optimizer:  # which are for gradients
            steps = ()
        silence = () if self.rule == "always" else ("silence",)
        of_message = *sparse, *down
        return ("learning_rate", "batch_size", *steps, *of_message, *of_rule[self.rule], *silence)


LOOK_EVERY = 16
"""Uploads from one second gradient to the next, as the rule without an alpha has it."""

_FEW_BITS = "sign", "elias_fano"
_DECAY = "residual_decay"
_SENT = "density", "values", "indices", _DECAY
_GATHERED = "relay", "gather", "lazy", "server"
_LAZY: Any = {"rule": "innovation", "alpha": "sasg", "scope": "tensor"}
METHODS = {
    "adamw": Method("AdamW", "#444444", "sgd", ("psum", "server"), optimizer="adamw"),
    "muon": Method("Muon", "#8c6d31", "sgd", ("psum", "server"), optimizer="muon"),
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
    "sasg_coded": Method(
        *("SASG, coded", "#7a5195", "sasg", ("server", "sharded")),
        **_LAZY,
        two_way=True,
        written=_FEW_BITS,
    ),
    "local_coded": Method(
        *("In turn, coded", "#003f5c", "turn_sgd", ("server",)),
        scope="tree",
        rule="every",
        two_way=True,
        written=_FEW_BITS,
    ),
    "diloco": Method(
        *("DiLoCo", "#0173b2", "diloco", ("psum", "server")),
        recipe=("local_steps", "inner", "outer_rate", "outer_momentum"),
    ),
    "sparse_loco": Method(
        *("SparseLoCo", "#de8f05", "sparse_loco", _GATHERED),
        recipe=("local_steps", "inner", "outer_rate", *_SENT),
        written=("sign2", "tiled"),
        exchange="relay",
    ),
    "muloco": Method(
        *("MuLoCo", "#029e73", "muloco", _GATHERED),
        recipe=("local_steps", "outer_rate", "outer_momentum", "density", "values", _DECAY),
        written=("sign2", "elias_fano"),
        exchange="relay",
    ),
    "demo": Method(
        *("DeMo", "#cc78bc", "demo", _GATHERED),
        recipe=_SENT,
        written=("plain", "tiled"),
        exchange="relay",
    ),
}
"""Two dense ones of language models; the paper's four methods, two that keep, some with a sparse
way down, and two of few bits; then those of others that talk little."""

PAPER_METHODS = ("sgd", "sparse", "lasg", "sasg")
DOWN_RULES = ("every", "message_share", "residual_norm", "direction_change")
"""When the server sends a step back: in turn, or in as many rounds, those in which a rule measures
most."""

OPTIMIZERS = ("sgd", "momentum", "adamw", "muon")
"""What may step with the mean, in place of SGD with the learning rate inside the compressor; or
make a worker's own steps."""

EXCHANGES = ("psum", "gather", "lazy", "relay", "server", "sharded")
"""Names of the library's exchanges, known without importing it."""

if TYPE_CHECKING:
    MethodName = str
    ExchangeName = str
    OptimizerName = str
    DownRuleName = str
else:
    MethodName = Literal[tuple(METHODS)]
    ExchangeName = Literal[EXCHANGES]
    OptimizerName = Literal[OPTIMIZERS]
    DownRuleName = Literal[DOWN_RULES]


_WORDS = {
    "learning_rate": "rate {:g}",
    "batch_size": "{} images",
    "scope": "{} scope",
    "values": "{} values",
    "indices": "{} indices",
    "down_period": "every {} rounds down",
    "down_rule": "{} down",
    "residual_decay": "decay {:g}",
    "local_steps": "{} steps",
    "inner": "{} inside",
    "outer_rate": "outer rate {:g}",
    "outer_momentum": "outer momentum {:g}",
    "alpha_c": "c {:g}",
    "period": "period {}",
    "theta": "θ {:g}",
    "silence": "{}",
    "max_staleness": "staleness {}",
}


def describe_setting(name: str, value: Any) -> str:
    """A setting for people."""
    percent = {"density": "{:g} %", "down_density": "{:g} % down"}
    if name in percent:
        return percent[name].format(100 * value)
    return _WORDS[name].format(value)


def _down_rule(config: Config) -> "sasg_jax.Rule":
    import sasg_jax

    period = config.down_period
    if config.down_rule == "every":
        return sasg_jax.every(period)
    measuring = getattr(sasg_jax, config.down_rule)(max_staleness=4 * period)
    return sasg_jax.held_rate(1 / period, measuring)


def learning_rate(config: Config) -> "optax.ScalarOrSchedule":
    """γ, as the configuration has it fall. It counts steps, of which a round may have several."""
    import optax

    rate, steps = config.learning_rate, config.local_steps
    if config.cosine:
        total = steps * config.iterations
        warm = max(1, total // 20)
        return optax.warmup_cosine_decay_schedule(rate / 50, rate, warm, total, rate / 20)
    if not config.decay_iterations:
        return rate
    scales = {steps * rounds: 0.1 for rounds in config.decay_iterations}
    return optax.piecewise_constant_schedule(rate, scales)


def _optimizer(config: Config, name: str) -> "optax.GradientTransformation":
    """One of :data:`OPTIMIZERS`, at the configuration's rate."""
    import optax

    from sasg_jax.local_algorithms import muon_kinds

    rate, decay = learning_rate(config), config.weight_decay
    if name == "sgd":
        return optax.sgd(rate)
    if name == "momentum":
        return optax.sgd(rate, momentum=0.9)
    if name == "adamw":
        steps = optax.adamw(rate, b2=config.b2, weight_decay=decay)
    else:
        # Steps as large as AdamW's, so that one rate suits both and what is no matrix.
        steps = optax.contrib.muon(
            rate,
            weight_decay=decay,
            adam_b2=config.b2,
            muon_weight_dimension_numbers=muon_kinds(),
            consistent_rms=0.2,
        )
    if config.clip_norm is None:
        return steps
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), steps)


def make(
    config: Config, name: str, loss: Any, *, simulated: bool = False, **has: bool
) -> "tuple[sasg_jax.Direction, sasg_jax.Transformation]":
    """What a worker makes of its batch, a gradient or how far several steps have led, and the
    optimiser of one of :data:`METHODS`. ``loss`` and ``has`` are as for ``sasg_jax.gradient``."""
    import sasg_jax

    if METHODS[name].recipe:
        return _make_recipe(config, METHODS[name], loss, has)
    if config.local_steps == 1:
        direction = sasg_jax.gradient(loss, **has)
    else:
        inner = _optimizer(config, config.inner)
        direction = sasg_jax.local_steps(loss, inner, steps=config.local_steps, **has)
    return direction, make_optimizer(config, name, simulated=simulated)


def _make_recipe(config: Config, method: Method, loss: Any, has: dict[str, bool]) -> Any:
    """As the authors have it, but for what the configuration says."""
    import sasg_jax

    parts: dict[str, Any] = {"num_workers": config.num_workers, **has}
    if config.down_density is not None:
        few = {"values": _FEW_BITS[0], "indices": _FEW_BITS[1]}
        parts["downlink"] = sasg_jax.top_k(config.down_density, scope="tree", **few)
    exchange = method.exchange if config.down_density is None else None
    parts["exchange"] = config.exchange or exchange
    names = {_DECAY: "decay", "local_steps": "steps"}
    given = {setting: getattr(config, setting) for setting in method.recipe if setting != "inner"}
    parts |= {names.get(name, name): value for name, value in given.items() if value is not None}
    if method.maker == "demo":
        decay, rate = config.weight_decay, learning_rate(config)
        return sasg_jax.demo(loss, rate, weight_decay=decay, **parts)
    inner = _optimizer(config, "muon" if method.maker == "muloco" else config.inner)
    return getattr(sasg_jax, method.maker)(loss, inner, **parts)


def make_optimizer(
    config: Config, name: str, *, simulated: bool = False, selection: str = "auto"
) -> "sasg_jax.Transformation":
    """The optimiser of one of :data:`METHODS`.

    Where one device simulates all workers, many of them share their stale parameters. ``selection``
    is how those that send the top k find them, see :func:`sasg_jax.top_k`.
    """
    import optax

    import sasg_jax

    method, workers = METHODS[name], config.num_workers
    if method.recipe:
        return make(config, name, lambda params, batch: 0.0)[1]
    parts: dict[str, Any] = {"num_workers": workers, "exchange": config.exchange}
    if method.rule != "always":
        parts["silence"] = config.silence
    top: dict[str, Any] = {}
    if method.sparse:
        top = {"density": config.density or 0.01, "selection": selection}
        top["scope"] = config.scope or method.scope
        values, indices = method.written
        top["values"], top["indices"] = config.values or values, config.indices or indices
    if method.two_way:
        density = config.down_density or top["density"]
        parts["downlink"] = sasg_jax.top_k(**{**top, "density": density})
        if config.down_period > 1:
            parts["downlink_rule"] = _down_rule(config)
    if config.residual_decay is not None:
        parts["feedback"] = sasg_jax.residual(config.residual_decay)
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
    optimizer = method.optimizer or config.optimizer
    if method.alpha:
        alpha = sasg_jax.released_alpha(config.alpha_c[method.alpha], workers)
        inside = optimizer is None  # where the rule knows the rate
        rule["alpha"] = alpha if inside else alpha(config.learning_rate)
    local = config.local_steps > 1  # which have made γ g of their gradients
    if optimizer is None or local:
        rate, momentum = config.outer_rate or 1.0, config.outer_momentum
        if local and momentum:
            after = optax.sgd(rate, momentum=momentum, nesterov=True)
        else:
            rate = rate if local else learning_rate(config)
            return getattr(sasg_jax, method.maker)(rate, **top, **rule, **parts)
    else:
        after = _optimizer(config, optimizer)
    compressor = sasg_jax.top_k(**top) if method.sparse else sasg_jax.identity()
    aggregate = sasg_jax.aggregate(compressor, getattr(sasg_jax, method.rule)(**rule), **parts)
    return sasg_jax.pipeline(aggregate, after)
