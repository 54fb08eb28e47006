"""Data that are made up, of the shapes of an experiment's: to time rounds, not to learn from."""

import numpy as np

from experiments.configs import Config
from experiments.data.datasets import Dataset
from experiments.data.text import Text

_IMAGE_SHAPES = {"mlp": (28, 28, 1), "resnet18": (32, 32, 3)}
_COUNT = 1000


def made_up(config: Config, seed: int) -> Dataset | Text:
    """Noisy images, of ten classes that are the same for every seed; or text of random bytes."""
    rng = np.random.default_rng([1, seed])
    if config.model == "transformer":
        windows = rng.integers(0, 256, (_COUNT, config.context + 1), np.uint8)
        return Text("made up", windows, windows[:1], np.full(1, config.context, np.int32))
    shape = _IMAGE_SHAPES[config.model]
    means = np.random.default_rng(0).normal(128, 20, (10, *shape))
    labels = rng.integers(10, size=_COUNT, dtype=np.int32)
    noisy = rng.normal(means[labels], 40).clip(0, 255).astype(np.uint8)
    return Dataset("made up", noisy, labels, noisy[:1], labels[:1], num_classes=10)
