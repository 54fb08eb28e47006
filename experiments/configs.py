"""The settings of each experiment, as plain dataclasses."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment. Rates and thresholds are for a mean over workers (the server averages)."""

    name: str
    dataset: str  # name of a data set, or several joined by "+", which go to the workers in turn
    model: str  # ``"mlp"`` or ``"resnet18"``
    width: int  # hidden units of the MLP; channels of the first stage of the ResNet
    iterations: int
    learning_rate: float  # γ
    target_accuracy: float  # the accuracy baseline of the tables, in [0, 1], on the whole test set
    alpha_c: Mapping[str, float]  # c of α_d = c·M/γ, for each adaptive method
    num_workers: int = 10
    batch_size: int = 10  # samples per worker and round
    decay_iterations: tuple[int, ...] = ()  # rounds at which γ is divided by ten
    density: float = 0.01
    scope: str | None = None
    """Where the largest entries are chosen, in each ``"tensor"`` or the ``"tree"``; None: as the
    method has it."""
    values: str | None = None  # how kept values are written; None: as the method has it
    indices: str | None = None  # and which they are
    down_density: float | None = None  # of the way down, where it is sparse; None: as that up
    down_period: int = 1  # rounds to a step that the server sends
    down_rule: str = "every"  # in which of them, see experiments.methods.DOWN_RULES
    residual_decay: float = 1.0  # β of the workers' residuals, of methods that send the top k
    local_steps: int = 1  # H, steps of a worker's own SGD in a round
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
    )
}
