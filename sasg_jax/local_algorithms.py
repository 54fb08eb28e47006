r"""The named methods of training that talks little: what each worker makes of its batch, and what
is made of all workers'.

===================  =====================  =============================  ==========  ==========
.                    direction              what is sent                   rest, kept  then
===================  =====================  =============================  ==========  ==========
:func:`local_sgd`    H steps of SGD         everything                     none        the mean
:func:`diloco`       H of any optimiser     everything                     none        Nesterov's
:func:`sparse_loco`  H of any optimiser     64 of each tile, in few bits   0.95 of it  the mean
:func:`muloco`       H of Muon              everything, in 2 bits          0.95 of it  Nesterov's
:func:`demo`         a gradient             32 frequencies of each tile    0.999       its sign
===================  =====================  =============================  ==========  ==========

Each returns both halves of a training step, a :class:`LocalMethod`::

    direction, tx = sasg_jax.diloco(loss_fn, optax.adamw(4e-4), num_workers=8, steps=30)
    train_step = sasg_jax.make_train_step(direction, tx, num_workers=8)

The direction of local steps is Δ: old minus new parameters, which the outer optimiser takes for a
gradient. The outer rate is applied once, after the mean: neither message nor residual has it. Their
arguments:

Args:
  loss_fn: one worker's loss, ``loss_fn(params, batch)``, as for :func:`sasg_jax.gradient`.
  inner: the worker's own optimiser, as for :func:`sasg_jax.local_steps`: any of optax, with its
    schedule, clipping and weight decay.
  num_workers: M, the size of the mapped axis.
  steps: H, the leading axis of a worker's batch.
  outer_rate, outer_momentum: of the outer SGD; a number or an optax schedule of the round, and β.
  density, tile, values, indices: of what is sent, see :func:`sasg_jax.chunked_top_k`.
  decay: β of the residual, in (0, 1]: see :func:`sasg_jax.residual`.
  **parts: any others of :class:`LocalParts`, of which the authors have none: a ``rule`` by which
    workers may be silent, a sparse way down (``downlink=top_k(0.01, values="sign",
    indices="elias_fano")``), ``exchange``, ``silence``, ``mean``; and ``accumulate`` and what
    ``loss_fn`` takes.

ValueError for what is out of range or does not go together.
"""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple, Unpack

import jax
import optax
from optax import contrib

from sasg_jax._checks import check_learning_rate, check_real, require
from sasg_jax.coders import IndexCoder, ValueCoder
from sasg_jax.compressors import chunked_top_k, identity, top_k
from sasg_jax.directions import Direction, gradient, local_steps
from sasg_jax.feedback import residual
from sasg_jax.method import Parts
from sasg_jax.rules import Rule
from sasg_jax.transform import Transformation, aggregate, compressed_sgd, flat, pipeline

BY_ADAM = "embed", "head"
"""Words in the paths of matrices that are usually left to AdamW."""


class LocalMethod(NamedTuple):
    """Both halves of a training step: ``make_train_step(direction, tx, num_workers=M)``."""

    direction: Direction
    tx: Transformation


class LocalParts(Parts, total=False):
    """The parts of a method that need not be said, and what its direction needs to know."""

    rule: Rule | None  # when a worker sends, sasg_jax.always by default
    accumulate: int  # gradients averaged for each step, 1 by default
    has_aux: bool  # as for sasg_jax.gradient
    has_model_state: bool
    has_key: bool


def local_sgd(
    loss_fn: Callable[..., Any],
    learning_rate: optax.ScalarOrSchedule,
    *,
    num_workers: int,
    steps: int,
    **parts: Unpack[LocalParts],
) -> LocalMethod:
    r"""Local SGD: H steps of SGD by each worker alone, then the mean of their parameters.

    .. math:: w \leftarrow w - \frac{1}{M} \sum_m \Delta_m = \frac{1}{M} \sum_m w_m

    A schedule for ``learning_rate`` counts the worker's steps, H a round.

    References: Stich, `Local SGD Converges Fast and Communicates Little
    <https://arxiv.org/abs/1805.09767>`_, 2018"""
    inner = optax.sgd(check_learning_rate(learning_rate))
    return _local(loss_fn, inner, steps, identity(), optax.sgd(1.0), num_workers, parts)


def diloco(
    loss_fn: Callable[..., Any],
    inner: optax.GradientTransformation,
    *,
    num_workers: int,
    steps: int,
    outer_rate: optax.ScalarOrSchedule = 0.7,
    outer_momentum: float = 0.9,
    **parts: Unpack[LocalParts],
) -> LocalMethod:
    """DiLoCo: many steps of AdamW (``inner``), then one of Nesterov's with the mean of Δ.

    References: Douillard et al., `DiLoCo <https://arxiv.org/abs/2311.08105>`_, 2023"""
    outer = _outer(outer_rate, outer_momentum)
    return _local(loss_fn, inner, steps, identity(), outer, num_workers, parts)


def sparse_loco(
    loss_fn: Callable[..., Any],
    inner: optax.GradientTransformation,
    *,
    num_workers: int,
    steps: int,
    density: float = 1 / 64,
    tile: int = 64,
    values: str | ValueCoder = "sign2",
    indices: str | IndexCoder = "tiled",
    decay: float = 0.95,
    outer_rate: optax.ScalarOrSchedule = 1.0,
    **parts: Unpack[LocalParts],
) -> LocalMethod:
    r"""SparseLoCo: many steps of AdamW (``inner``), of whose way the 64 largest of each 4,096
    entries are sent, in 2 bits each and 12 for where they are.

    .. math::
        p = \Delta + 0.95\,e, \quad e \leftarrow p - \mathcal{C}(p), \quad
        w \leftarrow w - \mathrm{rate} \cdot \mathrm{mean}\ \mathcal{C}(p)

    The mean is the paper's, over M. ``mean="senders"`` is that of the production code: of each
    coordinate, over those that sent it. ``indices="elias_fano"`` takes 8 bits in place of 12.

    References: Sarfi et al., `Communication Efficient LLM Pre-training with SparseLoCo
    <https://arxiv.org/abs/2508.15706>`_, 2025"""
    compressor = chunked_top_k(density, tile=tile, values=values, indices=indices)
    outer = _outer(outer_rate, 0.0)
    return _local(loss_fn, inner, steps, compressor, outer, num_workers, _decaying(decay, parts))


def muloco(
    loss_fn: Callable[..., Any],
    inner: optax.GradientTransformation | optax.ScalarOrSchedule,
    *,
    num_workers: int,
    steps: int,
    by_adam: Collection[str] = BY_ADAM,
    density: float = 1.0,
    values: str | ValueCoder = "sign2",
    decay: float = 0.95,
    outer_rate: optax.ScalarOrSchedule = 0.7,
    outer_momentum: float = 0.9,
    **parts: Unpack[LocalParts],
) -> LocalMethod:
    """MuLoCo: many steps of Muon, whose way is sent in 2 bits an entry with error feedback, then
    one of Nesterov's.

    The 2 bits are a sign and which of two magnitudes of a tensor. Tune ``decay`` and the outer SGD.

    Args:
      inner: Muon's learning rate, or an optimiser that you have made of :func:`optax.contrib.muon`.
      by_adam: with a rate, words of which one in the path of a matrix (as in
        ``{"Embed_0": {"embedding": ...}}``, small letters or not) leaves it to AdamW, of the same
        rate, as are all that are no matrices. With an optimiser that is
        ``muon(..., muon_weight_dimension_numbers=...)``, and this is not read.
      density: less than 1 sends the largest entries of each tensor alone, and their indices.

    References: Thérien et al., `MuLoCo <https://arxiv.org/abs/2505.23725>`_, 2025"""
    if not isinstance(inner, optax.GradientTransformation):
        kinds = muon_kinds(by_adam)
        rate = check_learning_rate(inner)
        inner = contrib.muon(rate, muon_weight_dimension_numbers=kinds)
    # Of all entries, Elias-Fano writes no indices.
    compressor = top_k(density, values=values, indices="elias_fano")
    outer = _outer(outer_rate, outer_momentum)
    return _local(loss_fn, inner, steps, compressor, outer, num_workers, _decaying(decay, parts))


def demo(
    loss_fn: Callable[..., Any],
    learning_rate: optax.ScalarOrSchedule,
    *,
    num_workers: int,
    density: float = 1 / 128,
    tile: int = 64,
    values: str | ValueCoder = "plain",
    indices: str | IndexCoder = "tiled",
    decay: float = 0.999,
    weight_decay: float = 0.0,
    **parts: Unpack[LocalParts],
) -> LocalMethod:
    r"""DeMo: a momentum of which the fast part alone is sent, of the 4,096 frequencies of each tile
    the 32 largest.

    .. math::
        d \leftarrow 0.999\,d + \gamma g, \quad d \leftarrow d - \mathcal{C}(d), \quad
        w \leftarrow (1 - \gamma\lambda) w - \gamma\,\mathrm{sign}(\mathrm{mean}\ \mathcal{C}(d))

    The momentum d is the residual, and stays with the worker. γ, ``learning_rate``, may be a
    schedule of the round, and λ is ``weight_decay``. Where nothing is sent, or a sparse way down
    leaves out, the step is weight decay's alone: sign(0) = 0. ``mean="senders"``, of each
    frequency, is what the authors' code takes.

    References: Peng et al., `DeMo <https://arxiv.org/abs/2411.19870>`_, 2024"""
    how = {"tile": tile, "transform": "dct", "values": values, "indices": indices}
    weight_decay = check_real("weight_decay", weight_decay, minimum=0)
    of_direction, rest = _split(_decaying(decay, parts))
    rate = check_learning_rate(learning_rate)
    ours = compressed_sgd(
        rate, chunked_top_k(density, **how), rest.pop("rule", None), num_workers=num_workers, **rest
    )
    # What compressed_sgd gives is to be added: minus the mean.
    sign = optax.scale_by_sign(), optax.add_decayed_weights(-weight_decay)
    to_rate = optax.scale_by_learning_rate(rate, flip_sign=False)
    return LocalMethod(gradient(loss_fn, **of_direction), pipeline(ours, *sign, to_rate))


def _local(loss_fn, inner, steps, compressor, outer, num_workers, parts) -> LocalMethod:
    """H steps of ``inner``, what all have sent of their way, and a step with its mean."""
    of_direction, rest = _split(parts)
    direction = local_steps(loss_fn, inner, steps=steps, **of_direction)
    rule = rest.pop("rule", None)
    ours = aggregate(compressor, rule, num_workers=num_workers, **rest)
    return LocalMethod(direction, pipeline(ours, outer))


_OF_DIRECTION = "accumulate", "has_aux", "has_model_state", "has_key"


def _split(parts: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What of ``parts`` is for the direction, and what is left."""
    rest = flat(parts)
    return {name: rest.pop(name) for name in _OF_DIRECTION if name in rest}, rest


def _decaying(decay: float, parts: Any) -> dict[str, Any]:
    """``parts`` with the residual of a method that has one."""
    given = flat(parts)
    allowed = "to be left out: the residual's decay is said by decay=..."
    require("feedback" not in given, "feedback", given.get("feedback"), allowed)
    return {"feedback": residual(decay), **given}


def _outer(rate: optax.ScalarOrSchedule, momentum: float) -> optax.GradientTransformation:
    check_learning_rate(rate, "outer_rate")
    momentum = check_real("outer_momentum", momentum, minimum=0, below=1)
    return optax.sgd(rate, momentum or None, nesterov=bool(momentum))


def muon_kinds(by_adam: Collection[str] = BY_ADAM) -> Callable[[Any], Any]:
    """The ``muon_weight_dimension_numbers`` of :func:`optax.contrib.muon`: matrices, but for those
    whose path has a word of ``by_adam``; AdamW takes the others."""

    def kinds(params):
        def kind(path, leaf):
            where = jax.tree_util.keystr(path).lower()
            is_left = leaf.ndim != 2 or any(word.lower() in where for word in by_adam)
            return None if is_left else contrib.MuonDimensionNumbers()

        return jax.tree_util.tree_map_with_path(kind, params)

    return kinds
