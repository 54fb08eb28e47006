"""Data sets, which of their examples each worker holds, and in which order it takes them."""

from experiments.data.datasets import Dataset, combine, load, load_named
from experiments.data.partition import batch_order, by_source, dirichlet_label_skew, iid_shards
from experiments.data.text import Text, load_stdlib

__all__ = [
    "Dataset",
    "Text",
    "batch_order",
    "by_source",
    "combine",
    "dirichlet_label_skew",
    "iid_shards",
    "load",
    "load_named",
    "load_stdlib",
]
