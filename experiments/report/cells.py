"""Numbers in words, and the cells and labels that several sections of the report share."""

import dataclasses
import re
from collections.abc import Callable, Sequence

from experiments.configs import CONFIGS
from experiments.methods import METHODS
from experiments.report import paper
from experiments.report.findings import Group, Spread
from experiments.report.page import Cell, words
from experiments.report.tables import format_bytes

NOTHING, NOT_AT_HAND = "–", "not at hand"

_SETS = {
    "cifar100": "CIFAR-100",
    "cifar10": "CIFAR-10",
    "fashion_mnist": "Fashion-MNIST",
    "mnist": "MNIST",
    "digits": "scikit-learn’s digits",
}

percent = lambda part, digits=1: f"{100 * part:.{digits}f}\u00a0%"  # 0.0123 as 1.2 %
density_label = lambda density: f"{100 * density:g}\u00a0%"
signed_percent = lambda part: f"{100 * part:+,.1f}\u00a0%".replace("-", "−")
share = lambda ratio: f"1/{1 / ratio:.1f}" if ratio < 1 else f"{ratio:.1f}"  # 0.1 as 1/10.0
scientific = lambda value: f"{value:.2e}".replace("e+0", "e").replace("e+", "e")  # 2.97e9
reproduce = lambda target: f"python -m experiments reproduce {target} --out DIR"

count = lambda value: Cell(f"{value:,}", value)
significant = lambda value: Cell(f"{value:.3g}".replace("-", "−"), value)
bytes_cell = lambda size: Cell(format_bytes(size), size)
share_cell = lambda ratio, is_one: Cell("1" if is_one else share(ratio), ratio)
reached = lambda group: Cell(f"{len(group.reached)} of {len(group.records)}", len(group.reached))


def mean_sd(spread: Spread | None, text: Callable[[float], str] = "{:,.0f}".format) -> Cell:
    if spread is None:
        return Cell("not reached")
    sd = "" if spread.sd is None else f" ± {text(spread.sd)}"
    return Cell(f"{text(spread.mean)}{sd}", spread.mean)


def at_target(*keys: str, text: Callable[[float], str] = "{:,.0f}".format) -> Callable:
    """The cell of a group in a column of what it took to reach the target."""
    return lambda group: mean_sd(group.at_target(*keys), text)


def final_accuracy(group: Group) -> Cell:
    return mean_sd(group.in_the_end("final_test_accuracy"), lambda part: percent(part, 2))


def deviation(ours: float | None, papers: float, is_bound: bool = False) -> Cell:
    """In per cent; says so where it is outside of the tolerance and that matters."""
    if ours is None:
        return Cell(NOTHING)
    off = ours / papers - 1
    is_outside = is_bound and abs(off) > paper.UPLOADS_TOLERANCE
    return Cell(signed_percent(off) + " outside" * is_outside, off, is_outside)


def method_label(method: str) -> str:
    """Its name for people; as it is where it is none of ours."""
    return METHODS[method].label if method in METHODS else method


def dataset_label(name: str) -> str:
    """``cifar10 (JPEG)`` as ``CIFAR-10 (JPEG)``."""
    return re.sub("|".join(_SETS), lambda match: _SETS[match[0]], name)


def data_label(groups: Sequence[Group], name: str = "") -> str:
    """The data set for people, and that the ResNet18 is a narrow one."""
    config = groups[0].config if groups else dataclasses.asdict(CONFIGS[name])
    dataset = groups[0].records[0]["dataset"] if groups else config["dataset"]
    is_narrow = config["model"] == "resnet18" and config["width"] < 64
    return dataset_label(dataset) + (", narrow ResNet18" if is_narrow else "")


def describe(groups: Sequence[Group]) -> str:
    """What was run, in a sentence."""
    config, record = groups[0].config, groups[0].records[0]
    network, unit = "ResNet18 with", "channels in its first stage (64 in the paper)"
    if config["model"] == "mlp":
        network, unit = "fully connected, one hidden layer of", "units"
    seeds = sorted({record["seed"] for group in groups for record in group.records})
    adaptive = [group for group in groups if METHODS[group.method].alpha == group.method]
    weights = [f"{group.label} {group.config['alpha_c'][group.method]:g}" for group in adaptive]
    return words(
        "curves.setting",
        config=config,
        data=data_label(groups),
        network=f"{network} {config['width']} {unit}",
        parameters=record["num_parameters"],
        density=density_label(config["density"]),
        rule=f" The rule’s c (α = c·M/γ): {', '.join(weights)}." if weights else "",
        target=percent(config["target_accuracy"], 0),
        seeds=f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}",
    )
