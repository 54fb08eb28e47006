"""The runs behind the paper's tables and figures."""

import dataclasses
from collections.abc import Sequence

from experiments.configs import CONFIGS
from experiments.methods import PAPER_METHODS
from experiments.training.runs import Run

DENSITIES = (0.001, 0.01, 0.05, 0.1)
"""Of figure 4."""


def _runs(
    config: str, seeds: int, methods: Sequence[str] = PAPER_METHODS, density: float | None = None
) -> list[Run]:
    changes = {} if density is None else {"density": density}
    chosen = dataclasses.replace(CONFIGS[config], **changes)
    return [Run(chosen, method, seed) for seed in range(1, seeds + 1) for method in methods]


_TABLE2 = [
    *_runs("mnist_fc", 5),
    *_runs("mnist_fc", 1, ("sasg_two_way",)),
    *_runs("cifar10_narrow", 2),
]

RUNS: dict[str, list[Run]] = {
    "table2": _TABLE2,
    "figure2": _TABLE2,
    "figure4": [
        run for density in DENSITIES for run in _runs("mnist_fc", 1, ("sparse", "sasg"), density)
    ],
    "figure5": _runs("hetero_narrow", 1),
}
"""The runs of each target that is made of runs: the paper's four methods, and beside them on MNIST
SASG with a sparse way down, for the honest table. Figure 2 draws the curves of those of table 2,
and one of figure 4's densities is theirs too: no run is made twice."""
