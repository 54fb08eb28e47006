"""Compressors: what a worker sends of its direction."""

from sasg_jax.compressors.base import Compressed, Compressor, MessageSize
from sasg_jax.compressors.chunked import chunked_top_k
from sasg_jax.compressors.grid import GridMessage, grid
from sasg_jax.compressors.identity import identity
from sasg_jax.compressors.top_k import TopKMessage, top_k

__all__ = [
    "Compressed",
    "Compressor",
    "GridMessage",
    "MessageSize",
    "TopKMessage",
    "chunked_top_k",
    "grid",
    "identity",
    "top_k",
]
