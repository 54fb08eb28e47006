"""How well a run does, as one number: which it is, and which way is better."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Metric:
    """A number of a point on a run's curve, with names as in a record."""

    label: str  # for people
    key: str  # of a point
    final: str  # of a record
    target: str  # of a configuration and a record
    outcome: str  # of a run in best.json
    column: str  # of a table
    is_better: Callable[[float, float], bool]  # or as good
    digits: int  # after the point, in ``show``
    percent: bool = False

    def reaches(self, value: float, target: float | None) -> bool:
        """Whether ``value`` is as good as a target, if there is one."""
        return target is not None and self.is_better(value, target)

    def cost(self, value: float) -> float:
        """Smaller where it is better."""
        return -value if self.is_better(1.0, 0.0) else value

    def show(self, value: float, digits: int | None = None) -> str:
        digits = self.digits if digits is None else digits
        return f"{value:.{digits}{'%' if self.percent else 'f'}}"

    def describe_target(self, target: float | None) -> str:
        """``98% test accuracy``"""
        if target is None:
            return f"no target of {self.label}"
        return f"{self.show(target, 0 if self.percent else 3)} {self.label}"


ACCURACY = Metric(
    *("test accuracy", "test_accuracy", "final_test_accuracy", "target_accuracy"),
    *("accuracy", "Accuracy"),
    is_better=lambda value, other: value >= other,
    digits=2,
    percent=True,
)
"""Of the whole test set, in [0, 1]."""

BITS_PER_BYTE = Metric(
    *("bits per byte", "bits_per_byte", "final_bits_per_byte", "bits_per_byte_target"),
    *("bits_per_byte", "Bits/byte"),
    is_better=lambda value, other: value <= other,
    digits=3,
)
"""Of the files that are held out."""


def metric_of(config: Mapping[str, Any] | Any) -> Metric:
    """Of a configuration, or of what ``run.json`` or a record has of one."""
    known = config if isinstance(config, Mapping) else vars(config)
    is_text = known.get("target_accuracy") is None and BITS_PER_BYTE.target in known
    return BITS_PER_BYTE if is_text else ACCURACY
