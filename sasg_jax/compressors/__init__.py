"""Compressors: what a worker sends of its direction."""

from sasg_jax.compressors.atomo import atomo
from sasg_jax.compressors.base import Compressed, Compressor, MessageSize
from sasg_jax.compressors.by_leaf import by_leaf
from sasg_jax.compressors.chunked import chunked_top_k
from sasg_jax.compressors.grid import GridMessage, grid
from sasg_jax.compressors.identity import identity
from sasg_jax.compressors.induced import induced
from sasg_jax.compressors.learned_levels import FittedLevels, LearnedMessage, learned_levels
from sasg_jax.compressors.low_rank import LowRankMessage, low_rank, power_sgd
from sasg_jax.compressors.natural import natural
from sasg_jax.compressors.qsgd import QuantisedMessage, qsgd
from sasg_jax.compressors.random_k import random_k
from sasg_jax.compressors.rotate import RotatedMessage, dithered_sign, eden
from sasg_jax.compressors.sign import SignMessage, one_bit, sign
from sasg_jax.compressors.ternary import TernaryMessage, ternary
from sasg_jax.compressors.top_k import TopKMessage, top_k
from sasg_jax.compressors.wangni import DrawnMessage, wangni

__all__ = [
    "Compressed",
    "Compressor",
    "DrawnMessage",
    "FittedLevels",
    "GridMessage",
    "LearnedMessage",
    "LowRankMessage",
    "MessageSize",
    "QuantisedMessage",
    "RotatedMessage",
    "SignMessage",
    "TernaryMessage",
    "TopKMessage",
    "atomo",
    "by_leaf",
    "chunked_top_k",
    "dithered_sign",
    "eden",
    "grid",
    "identity",
    "induced",
    "learned_levels",
    "low_rank",
    "natural",
    "one_bit",
    "power_sgd",
    "qsgd",
    "random_k",
    "sign",
    "ternary",
    "top_k",
    "wangni",
]
