"""Feedback: what becomes of the part of a direction that a message leaves out."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sasg_jax._checks import check_fraction
from sasg_jax.compressors.base import Compressed
from sasg_jax.numerics import PyTree, wide


class Residual(NamedTuple):
    """The memory of :func:`residual`."""

    residual: PyTree  # e, like params; () where nothing is ever left out


class Reconstruction(NamedTuple):
    """The memory of :func:`reconstruction`."""

    reconstruction: PyTree  # h, like params, of float32 at least: the server keeps the same


@dataclasses.dataclass(frozen=True, kw_only=True)
class Feedback:
    """Pure functions of the feedback's memory, made by the functions of this module.

    Args:
      init: ``memory = init(tree)``, before the first round, for directions like ``tree``.
      before: ``p = before(direction, memory)``: what is compressed.
      after: ``memory = after(memory, compressed, decoded)``, with the message as ``decoded()``.
      keep: ``memory = keep(memory, p)``: what a silent worker's p becomes, or None."""

    name: str  # in errors
    init: Callable[[PyTree], PyTree]
    before: Callable[[PyTree, PyTree], PyTree]
    after: Callable[[PyTree, Compressed, Callable[[], PyTree]], PyTree]
    keep: Callable[[PyTree, PyTree], PyTree] | None = None
    reconstructs: bool = False  # the server adds what arrives to what it has of the worker


def residual(decay: float = 1.0) -> Feedback:
    r"""Adds what was left out to what is sent next (error feedback).

    .. math:: p = x + \beta e, \quad e \leftarrow p - \mathcal{C}(p)

    with ``decay`` β in (0, 1]: 1 loses nothing.

    References: Stich et al., `Sparsified SGD with Memory <https://arxiv.org/abs/1809.07599>`_, 2018
    """
    decay = check_fraction("decay", decay)
    add = lambda x, e: x + e if decay == 1 else x + (decay * e).astype(x.dtype)
    return Feedback(
        name="residual()" if decay == 1 else f"residual({decay})",
        init=lambda tree: Residual(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)),
        before=lambda x, memory: jax.tree.map(add, x, memory.residual),
        after=lambda memory, compressed, decoded: Residual(compressed.remainder),
        keep=lambda memory, p: Residual(p),
    )


def none() -> Feedback:
    """Forgets what was left out: for what leaves nothing out, or is right in the mean."""
    return Feedback(
        name="none()",
        init=lambda tree: (),
        before=lambda x, memory: x,
        after=lambda memory, compressed, decoded: memory,
    )


def reconstruction() -> Feedback:
    r"""Sends differences to what the server has of this worker already (EF21, LAG).

    .. math:: p = x - h, \quad h \leftarrow h + \mathcal{C}(p)

    on both sides, where h starts at zero. The server steps with the mean of all h, of which it
    keeps only the sum; a silent worker counts as its h.

    References: Richtárik et al., `EF21 <https://arxiv.org/abs/2106.05203>`_, 2021"""
    zeros = lambda x: jnp.zeros(x.shape, wide(x.dtype))
    subtract = lambda x, h: (x - h).astype(x.dtype)
    add = lambda h, decoded: Reconstruction(jax.tree.map(jnp.add, h, decoded))
    return Feedback(
        name="reconstruction()",
        init=lambda tree: Reconstruction(jax.tree.map(zeros, tree)),
        before=lambda x, memory: jax.tree.map(subtract, x, memory.reconstruction),
        after=lambda memory, compressed, decoded: add(memory.reconstruction, decoded()),
        reconstructs=True,
    )
