"""Feedback: what becomes of the part of a direction that a message leaves out."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sasg_jax._checks import check_bool, check_fraction, is_real, require
from sasg_jax.compressors.base import Compressed
from sasg_jax.numerics import PyTree, wide


class Residual(NamedTuple):
    """The memory of :func:`residual`."""

    residual: PyTree  # e, like params; () where nothing is ever left out


class Reconstruction(NamedTuple):
    """The memory of :func:`reconstruction`."""

    reconstruction: PyTree  # h, like params, of float32 at least: the server keeps the same


class MomentumResidual(NamedTuple):
    """The memory of :func:`momentum_residual`."""

    residual: PyTree  # v, like params
    velocity: PyTree  # u, like params


class AveragedReconstruction(NamedTuple):
    """The memory of :func:`reconstruction` with a momentum."""

    reconstruction: PyTree  # h, as in Reconstruction
    average: PyTree  # v, of the same types
    started: jax.Array  # whether there is an average yet. shape=(), dtype=jnp.bool_


@dataclasses.dataclass(frozen=True, kw_only=True)
class Feedback:
    """Pure functions of the feedback's memory, made by the functions of this module.

    Args:
      init: ``memory = init(tree)``, before the first round, for directions like ``tree``.
      take_in: ``memory = take_in(direction, memory)``: what a round's direction makes of the memory
        before anything is sent, or nothing is; None where that changes nothing.
      before: ``p = before(direction, memory)``: what is compressed, after ``take_in``.
      after: ``memory = after(memory, compressed, decoded)``, with the message as ``decoded()``.
      keep: ``memory = keep(memory, p)``: what a silent worker's p becomes, or None."""

    name: str  # in errors
    init: Callable[[PyTree], PyTree]
    before: Callable[[PyTree, PyTree], PyTree]
    after: Callable[[PyTree, Compressed, Callable[[], PyTree]], PyTree]
    keep: Callable[[PyTree, PyTree], PyTree] | None = None
    take_in: Callable[[PyTree, PyTree], PyTree] | None = None
    reconstructs: bool = False  # the server adds what arrives to what it has of the worker
    damping: float = 1.0  # of that, the part that it keeps for the next round


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


def momentum_residual(momentum: float = 0.9, *, masking: bool = True) -> Feedback:
    r"""Momentum in front of the residual, and none where something was just sent (DGC).

    .. math:: u \leftarrow m u + x, \quad v \leftarrow v + u, \quad
        \text{message} = \mathcal{C}(v), \quad v \leftarrow v - \mathcal{C}(v)

    and u is zero from then on in the entries that were sent ("momentum factor masking"), of which
    the message decodes to anything but zero. Without that, momentum behind the server would apply
    a late entry with the momentum of another time. A silent worker that keeps its direction goes
    through the first two of these lines.

    Sent: C(v). Kept: u and v on each worker, twice its gradient. Behind the server comes plain SGD,
    or the momentum would count twice.

    Guarantees: with ``momentum=0`` it is :func:`residual`; with :func:`sasg_jax.identity` and
    masking plain SGD, without masking SGD with momentum.

    Take it for the top k at densities of 1 % and below, where the server would have momentum
    otherwise. Not with dithered or rotated messages, in which every entry is sent: u is then zero.
    DGC clips each worker's gradient first, to the norm that all together may have over √M
    (``sasg_jax.pipeline(optax.clip_by_global_norm(norm / M**0.5), ...)``), and lets the density
    fall in the first epochs, 25, 6.25, 1.56, 0.4, 0.1 %: a density is part of a method, so that
    each is a method, and a state, of its own.

    Args:
      momentum: m, in [0, 1).
      masking: whether u is zero where something was sent.

    ValueError for an argument out of range.

    References: Lin et al., `Deep Gradient Compression <https://arxiv.org/abs/1712.01887>`_, 2017
    """
    require(is_real(momentum) and 0 <= momentum < 1, "momentum", momentum, "in [0, 1)")
    check_bool("masking", masking)
    zeros = lambda tree: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)
    speed = lambda u, x: (momentum * u).astype(x.dtype) + x

    def take_in(x: PyTree, memory: MomentumResidual) -> MomentumResidual:
        u = jax.tree.map(speed, memory.velocity, x)
        return MomentumResidual(jax.tree.map(jnp.add, memory.residual, u), u)

    def after(memory: MomentumResidual, compressed: Compressed, decoded) -> MomentumResidual:
        u = memory.velocity
        if masking:
            u = jax.tree.map(lambda u, sent: jnp.where(sent != 0, 0, u), u, decoded())
        return MomentumResidual(compressed.remainder, u)

    return Feedback(
        name=f"momentum_residual({momentum:g}{'' if masking else ', masking=False'})",
        init=lambda tree: MomentumResidual(zeros(tree), zeros(tree)),
        take_in=take_in,
        before=lambda x, memory: memory.residual,
        after=after,
        keep=lambda memory, p: memory,
    )


def reconstruction(*, damping: float = 1.0, momentum: float | None = None) -> Feedback:
    r"""Sends differences to what the server has of this worker already (EF21, LAG, DIANA).

    .. math:: p = x - h, \quad h \leftarrow h + a\,\mathcal{C}(p), \quad
        \hat x = h + \mathcal{C}(p)

    on both sides, where h starts at zero, and that of :math:`\hat x` is the one from before. The
    server steps with the mean of all :math:`\hat x`; of the h it keeps only the sum. A silent
    worker counts as its h. With ``damping`` a = 1 the two are the same: that is EF21, for biased
    compressors. DIANA is for unbiased ones, of variance ω: with a = 1/(1 + ω) their noise vanishes
    as the gradients of all workers come to rest.

    With a ``momentum`` η, x is a moving average of directions, which silent workers keep up, too:

    .. math:: x = v, \quad v \leftarrow (1 - \eta)\,v + \eta\,x_{\text{round}}

    starting at the first direction. EF21 needs that for mini-batches, whose noise h would follow
    otherwise. It is momentum already: plain SGD comes behind the server.

    Sent: C(x - h). Kept: h on each worker, and v; the sum of all h at the server, whatever M is.

    Args:
      damping: a, in (0, 1].
      momentum: η, in (0, 1]: smaller averages over more rounds; None for none.

    ValueError for an argument out of range. Not with a silence that counts as anything else.

    References: Richtárik et al., `EF21 <https://arxiv.org/abs/2106.05203>`_, 2021; Fatkhullin et
    al., `Momentum Provably Improves Error Feedback! <https://arxiv.org/abs/2305.15155>`_, 2023;
    Mishchenko et al., `DIANA <https://arxiv.org/abs/1901.09269>`_, 2019"""
    damping = check_fraction("damping", damping)
    settings = [f"damping={damping:g}"] * (damping != 1)
    wide_zeros = lambda x: jnp.zeros(x.shape, wide(x.dtype))
    zeros = lambda tree: jax.tree.map(wide_zeros, tree)
    part = lambda x: x if damping == 1 else damping * x
    add = lambda h, decoded: jax.tree.map(lambda h, x: h + part(x.astype(h.dtype)), h, decoded)
    subtract = lambda x, h: (x - h).astype(x.dtype)
    if momentum is None:
        return Feedback(
            name=f"reconstruction({', '.join(settings)})",
            init=lambda tree: Reconstruction(zeros(tree)),
            before=lambda x, memory: jax.tree.map(subtract, x, memory.reconstruction),
            after=lambda memory, compressed, decoded: Reconstruction(
                add(memory.reconstruction, decoded())
            ),
            reconstructs=True,
            damping=damping,
        )
    share = check_fraction("momentum", momentum)

    def take_in(x: PyTree, memory: AveragedReconstruction) -> AveragedReconstruction:
        moved = lambda v, x: jnp.where(memory.started, (1 - share) * v + share * x, x)
        average = jax.tree.map(moved, memory.average, x)
        return memory._replace(average=average, started=jnp.asarray(True))

    lacks = lambda x, v, h: (v - h).astype(x.dtype)
    return Feedback(
        name=f"reconstruction({', '.join([*settings, f'momentum={share:g}'])})",
        init=lambda tree: AveragedReconstruction(zeros(tree), zeros(tree), jnp.asarray(False)),
        take_in=take_in,
        before=lambda x, memory: jax.tree.map(lacks, x, memory.average, memory.reconstruction),
        after=lambda memory, compressed, decoded: memory._replace(
            reconstruction=add(memory.reconstruction, decoded())
        ),
        keep=lambda memory, p: memory,
        reconstructs=True,
        damping=damping,
    )
