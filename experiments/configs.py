"""The settings of each experiment, as plain dataclasses."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment. Rates and thresholds are for a mean over workers (the server averages)."""

    name: str
    dataset: str  # name of a data set, or several joined by "+", which go to the workers in turn
    model: str  # ``"mlp"``, ``"resnet18"`` or ``"transformer"``
    width: int  # hidden units of the MLP; channels of the first stage of the ResNet, or of all
    iterations: int
    learning_rate: float  # γ
    target_accuracy: float | None
    """The accuracy baseline of the tables, in [0, 1], on the whole test set; None for a text."""
    alpha_c: Mapping[str, float]  # c of α_d = c·M/γ, for each adaptive method
    bits_per_byte_target: float | None = None  # the same of a text, on files that are held out
    methods: tuple[str, ...] = ("sgd", "sparse", "lasg", "sasg")  # that a comparison is of
    num_workers: int = 10
    batch_size: int = 10  # samples per worker and gradient
    decay_iterations: tuple[int, ...] = ()  # rounds at which γ is divided by ten
    cosine: bool = False
    """Whether γ warms up over the first twentieth of all gradients, and falls to a twentieth."""
    context: int = 128  # bytes that a text is predicted from
    by_gradients: bool = False
    """Whether ``iterations`` are gradients of a worker, so that methods are compared at as many."""
    density: float | None = 0.01  # None: as the method has it
    scope: str | None = None
    """Where the largest entries are chosen, in each ``"tensor"`` or the ``"tree"``; None: as the
    method has it."""
    values: str | None = None  # how kept values are written; None: as the method has it
    indices: str | None = None  # and which they are
    down_density: float | None = None  # of the way down, where it is sparse; None: as that up
    down_period: int = 1  # rounds to a step that the server sends
    down_rule: str = "every"  # in which of them, see experiments.methods.DOWN_RULES
    residual_decay: float | None = None
    """β of the workers' residuals, of methods that keep any; None: as the method has it."""
    local_steps: int = 1  # H, steps of a worker's own in a round
    inner: str = "sgd"  # with what it makes them, one of experiments.methods.OPTIMIZERS
    outer_rate: float | None = None  # of what steps with their mean; None: as the method has it
    outer_momentum: float | None = None  # of Nesterov's; None: as the method has it
    weight_decay: float = 1e-4  # of AdamW and Muon
    b2: float = 0.999  # of AdamW
    clip_norm: float | None = None  # of gradients, before AdamW and Muon
    max_staleness: int = 10  # of the rule with an alpha
    history: int = 10  # D
    period: int | None = None  # of turns, or the longest; None: as the method has it
    theta: float | None = None  # of the rule without an alpha; None: as the rule has it
    silence: str | None = None  # what a silent worker counts as; None: as the rule has it
    optimizer: str | None = None
    """What steps with the mean, one of :data:`experiments.methods.OPTIMIZERS`; None: SGD with the
    learning rate inside the compressor, as in the paper."""
    augment: bool = False  # random crops of images padded by 4 pixels, and horizontal flips
    partition: str = "iid"  # ``"iid"`` or ``"dirichlet"`` (label skew)
    concentration: float = 0.5  # of the Dirichlet distribution; smaller is more skewed
    exchange: str | None = None
    """How messages travel, one of ``sasg_jax.exchanges.EXCHANGES``; None: what suits the method."""
    until_target: bool = False  # whether a run ends at the first evaluation at the target
    evaluate_every: int = 100
    rounds_per_call: int = 100
    """Rounds in one call of compiled code, which allocates its memory anew each time."""


_MNIST_FC = Config(
    name="mnist_fc",
    dataset="mnist",
    model="mlp",
    width=512,
    iterations=8000,
    learning_rate=0.05,
    target_accuracy=0.98,
    alpha_c={"lasg": 0.5, "sasg": 0.5},
)

# The authors' rates and epochs: 500 rounds of 10 x 10 images are one epoch of CIFAR.
_CIFAR10_RESNET18 = Config(
    name="cifar10_resnet18",
    dataset="cifar10",
    model="resnet18",
    width=64,
    iterations=15_000,
    learning_rate=0.1,
    target_accuracy=0.92,
    alpha_c={"lasg": 1.0, "sasg": 1.0},
    decay_iterations=(10_000,),
    augment=True,
    rounds_per_call=10,
)

# Small enough for a CPU: a run takes minutes. So early in training the gradients of a network with
# BatchNorm change much from round to round: with the authors' rate and c, every worker uploads in
# every round. With half of the rate and these c the rule (6) has something to decide. The rate does
# not drop: a c that is right for the rule before a drop of it is ten times too large after it.
_CIFAR10_NARROW = dataclasses.replace(
    _CIFAR10_RESNET18,
    name="cifar10_narrow",
    width=8,
    iterations=600,
    learning_rate=0.05,
    target_accuracy=0.42,
    alpha_c={"lasg": 45.0, "sasg": 18.0},
    decay_iterations=(),
    evaluate_every=50,
)

# A transformer of bytes on the sources of Python's own library, which need no download.
_STDLIB_LM = Config(
    name="stdlib_lm",
    dataset="stdlib",
    model="transformer",
    width=128,
    iterations=1500,
    learning_rate=2e-3,
    target_accuracy=None,
    methods=("adamw", "diloco", "sparse_loco", "muloco", "demo", "local_coded"),
    density=None,
    period=2,
    alpha_c={"lasg": 0.5, "sasg": 0.5},
    num_workers=4,
    batch_size=4,
    cosine=True,
    by_gradients=True,
    local_steps=10,
    inner="adamw",
    optimizer="adamw",
    weight_decay=0.1,
    b2=0.99,
    clip_norm=1.0,
    evaluate_every=250,
    rounds_per_call=50,
)

CONFIGS: dict[str, Config] = {
    config.name: config
    for config in (
        Config(
            name="digits",
            dataset="digits",
            model="mlp",
            width=64,
            iterations=3000,
            learning_rate=0.1,
            target_accuracy=0.95,
            alpha_c={"lasg": 0.5, "sasg": 0.5},
        ),
        _MNIST_FC,
        dataclasses.replace(
            _MNIST_FC, name="fashion_fc", dataset="fashion_mnist", target_accuracy=0.88
        ),
        _CIFAR10_RESNET18,
        dataclasses.replace(
            _CIFAR10_RESNET18,
            name="cifar100_resnet18",
            dataset="cifar100",
            iterations=25_000,
            target_accuracy=0.70,
            alpha_c={"lasg": 5.0, "sasg": 1.25},
            decay_iterations=(10_000, 20_000),
        ),
        _CIFAR10_NARROW,
        # The workers hold one data set each, in turn.
        dataclasses.replace(
            _CIFAR10_NARROW,
            name="hetero_narrow",
            dataset="cifar10+mnist",
            iterations=400,
            target_accuracy=0.45,
        ),
        _STDLIB_LM,
        # The same in minutes: what it shows is that all runs, and no more.
        dataclasses.replace(
            _STDLIB_LM,
            name="stdlib_lm_smoke",
            width=64,
            context=64,
            iterations=240,
            evaluate_every=120,
        ),
    )
}
