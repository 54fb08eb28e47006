r"""The named methods: the paper's four, one grid of compressor and upload rule, and two in which a
silent worker keeps its gradient.

==========================  =================================  ======================
.                           send everything (identity)         top-k, error feedback
==========================  =================================  ======================
every worker, always        :func:`sgd`                        :func:`sparse_sgd`
only when (6) says so       :func:`lasg`                       :func:`sasg`
==========================  =================================  ======================

:func:`turn_sgd` and :func:`sasg_keep` choose among all entries of the tree, need no memory on the
server, and hold at the learning rates that are best for plain SGD, where the paper's rule, which
applies a silent worker's last message again, does not.

Then neighbours in which everybody sends few bits of everything: :func:`sign_sgd`, :func:`terngrad`,
:func:`fo_sgd`. QSGD and PowerSGD are called by their compressors,
``compressed_sgd(0.1, qsgd(7), num_workers=8, key=key)`` and
``pipeline(aggregate(power_sgd(2), num_workers=8), optax.sgd(0.1, momentum=0.9))``.

Each is a row of the table of parts, :func:`sasg_jax.compressed_sgd`, by name. Their arguments:

Args:
  learning_rate: γ, a number above 0 or an optax schedule of the round.
  num_workers: M, the size of the mapped axis.
  density, scope, selection, values, indices: see :func:`sasg_jax.top_k`; the last four by keyword,
    of :class:`SparseParts`.
  alpha, max_staleness, history, share_stale_params: see :func:`sasg_jax.innovation`. An alpha of
    None is ``released_alpha(0.5, num_workers)``, that is 0.5·M/γ.
  **parts: any others, e.g. downlink, exchange, silence: see :class:`sasg_jax.Parts`.

References: Deng et al., `Communication-Efficient Distributed Learning via Sparse and Adaptive
Stochastic Gradient <https://arxiv.org/abs/2112.04088>`_, 2021
"""

from collections.abc import Callable, Sequence
from typing import Any, Unpack, cast

import optax

from sasg_jax.coders import IndexCoder, ValueCoder
from sasg_jax.compressors import (
    Compressor,
    dithered_sign,
    grid,
    identity,
    sign,
    ternary,
    top_k,
)
from sasg_jax.feedback import momentum_residual, none, reconstruction
from sasg_jax.method import Parts
from sasg_jax.rules import (
    Rule,
    always,
    cada_rule,
    clag_rule,
    cmfl_rule,
    every,
    innovation,
    lag_ps_rule,
    lag_rule,
    laq_rule,
    released_alpha,
)
from sasg_jax.rules.innovation import Alpha, AlphaFn
from sasg_jax.transform import Transformation, aggregate, compressed_sgd, flat, pipeline


class SparseParts(Parts, total=False):
    """Of a method that sends the top k: how they are chosen and written, and the other parts."""

    scope: str
    selection: str
    values: str | ValueCoder
    indices: str | IndexCoder


def sgd(
    learning_rate: optax.ScalarOrSchedule, *, num_workers: int, **parts: Unpack[Parts]
) -> Transformation:
    """Distributed SGD: everybody sends the whole gradient in every round."""
    return compressed_sgd(learning_rate, identity(), always(), num_workers=num_workers, **parts)


def sparse_sgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    num_workers: int,
    density: float = 0.01,
    **parts: Unpack[SparseParts],
) -> Transformation:
    """Sparsified SGD with memory: everybody sends the top k in every round."""
    top, rest = _take_top_k(density, parts)
    return compressed_sgd(learning_rate, top, always(), num_workers=num_workers, **rest)


def lasg(
    learning_rate: optax.ScalarOrSchedule,
    *,
    num_workers: int,
    alpha: Alpha | AlphaFn | None = None,
    max_staleness: int = 10,
    history: int = 10,
    share_stale_params: bool = False,
    **parts: Unpack[Parts],
) -> Transformation:
    """Lazily aggregated SGD: whole gradients, from workers whose gradient has changed enough.

    The server keeps the last gradient of every worker: M copies of the parameters' size."""
    rule = _rule(alpha, num_workers, max_staleness, history, share_stale_params)
    return compressed_sgd(learning_rate, identity(), rule, num_workers=num_workers, **parts)


def sasg(
    learning_rate: optax.ScalarOrSchedule,
    *,
    num_workers: int,
    density: float = 0.01,
    alpha: Alpha | AlphaFn | None = None,
    max_staleness: int = 10,
    history: int = 10,
    share_stale_params: bool = False,
    **parts: Unpack[SparseParts],
) -> Transformation:
    """Sparse and adaptive SGD: the top k, from workers whose gradient has changed enough.

    Stands where ``lax.pmean(grads, "workers")`` and ``optax.sgd`` stood::

        tx = sasg_jax.sasg(0.05, num_workers=10)

        def worker_step(params, opt_state, batch):  # one worker's view, under a map over workers
            grad_fn = lambda p: jax.grad(loss_fn)(p, batch)
            updates, opt_state = tx.update(grad_fn(params), opt_state, params, grad_fn=grad_fn)
            return optax.apply_updates(params, updates), opt_state"""
    rule = _rule(alpha, num_workers, max_staleness, history, share_stale_params)
    top, rest = _take_top_k(density, parts)
    return compressed_sgd(learning_rate, top, rule, num_workers=num_workers, **rest)


def turn_sgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    num_workers: int,
    density: float = 0.01,
    period: int = 8,
    **parts: Unpack[SparseParts],
) -> Transformation:
    """Sparse SGD in turns: each worker sends the top k in every ``period``-th round, and keeps what
    it has not sent. See :func:`sasg_jax.every`."""
    top, rest = _take_top_k(density, parts, scope="tree")
    return compressed_sgd(learning_rate, top, every(period), num_workers=num_workers, **rest)


def sasg_keep(
    learning_rate: optax.ScalarOrSchedule,
    *,
    num_workers: int,
    density: float = 0.01,
    theta: float = 1.0,
    max_staleness: int = 8,
    share_stale_params: bool = False,
    **parts: Unpack[SparseParts],
) -> Transformation:
    """Sparse and adaptive SGD that keeps: the top k, in turns whose period follows how fast a
    worker's gradient changes. See :func:`sasg_jax.innovation` without an alpha."""
    rule = innovation(
        theta=theta, max_staleness=max_staleness, share_stale_params=share_stale_params
    )
    top, rest = _take_top_k(density, parts, scope="tree")
    return compressed_sgd(learning_rate, top, rule, num_workers=num_workers, **rest)


def sign_sgd(
    learning_rate: optax.ScalarOrSchedule, *, num_workers: int, **parts: Unpack[Parts]
) -> Transformation:
    """EF-signSGD: everybody sends signs, a mean magnitude for each tensor, and keeps the rest. With
    ``downlink=sign()`` the server does, too. See :func:`sasg_jax.sign`."""
    return compressed_sgd(learning_rate, sign(), always(), num_workers=num_workers, **parts)


def terngrad(
    learning_rate: optax.ScalarOrSchedule,
    *,
    num_workers: int,
    clip: float | None = 2.5,
    **parts: Unpack[Parts],
) -> Transformation:
    """TernGrad: everybody sends -1, 0 or 1 for each entry, drawn with the ``key``, and keeps
    nothing, also not what ``clip`` standard deviations cut off. See :func:`sasg_jax.ternary`."""
    rest = cast(Parts, {"feedback": none(), **flat(parts)})
    return compressed_sgd(learning_rate, ternary(clip), num_workers=num_workers, **rest)


def fo_sgd(
    learning_rate: optax.ScalarOrSchedule, *, num_workers: int, **parts: Unpack[Parts]
) -> Transformation:
    """FO-SGD: a bit for each entry up and down, drawn with the ``key``, and no memory anywhere. See
    :func:`sasg_jax.dithered_sign`."""
    rest = cast(Parts, {"downlink": dithered_sign(), **flat(parts)})
    return compressed_sgd(learning_rate, dithered_sign(), num_workers=num_workers, **rest)


def _take_top_k(density: float, parts: SparseParts, **defaults: Any) -> tuple[Compressor, Parts]:
    """The compressor that ``parts`` ask for, and those that are left."""
    rest: dict[str, Any] = {**defaults, **flat(parts)}
    own = {name: rest.pop(name) for name in _OF_TOP_K if name in rest}
    return top_k(density, **own), cast(Parts, rest)


_OF_TOP_K = "scope", "selection", "values", "indices"


def _rule(alpha: Any, num_workers: int, max_staleness: int, history: int, share: bool) -> Rule:
    alpha = released_alpha(0.5, num_workers) if alpha is None else alpha
    return innovation(alpha, max_staleness=max_staleness, history=history, share_stale_params=share)


# The neighbours, by the names that their authors gave them ------------------------------------


def cada(
    learning_rate: optax.ScalarOrSchedule,
    *,
    num_workers: int,
    c: float = 1.0,
    history: int = 10,
    max_staleness: int = 50,
    snapshot: bool = False,
    b1: float = 0.9,
    b2: float = 0.999,
    **parts: Unpack[Parts],
) -> Transformation:
    """CADA2, and with ``snapshot`` CADA1: AMSGrad, from the last gradients of workers that send
    when theirs has changed enough. See :func:`sasg_jax.cada_rule`. (optax's AMSGrad corrects the
    bias of its first rounds; the authors' does not.)"""
    rule = cada_rule(c, history=history, max_staleness=max_staleness, snapshot=snapshot)
    ours = aggregate(identity(), rule, num_workers=num_workers, **flat(parts))
    return pipeline(ours, optax.amsgrad(learning_rate, b1, b2))


def lag(
    learning_rate: optax.ScalarOrSchedule,
    *,
    num_workers: int,
    xi: float = 0.1,
    history: int = 10,
    max_staleness: int | None = None,
    **parts: Unpack[Parts],
) -> Transformation:
    """LAG-WK: gradient descent, from workers whose gradient the server lacks much of. See
    :func:`sasg_jax.lag_rule`."""
    rule = lag_rule(xi, history=history, max_staleness=max_staleness)
    return _before_sgd(learning_rate, identity(), rule, num_workers, parts)


def lag_ps(
    learning_rate: optax.ScalarOrSchedule,
    *,
    num_workers: int,
    xi: float = 1.0,
    smoothness: float | Sequence[float] | None = None,
    history: int = 10,
    max_staleness: int | None = None,
    **parts: Unpack[Parts],
) -> Transformation:
    """LAG-PS: gradient descent, from workers for whose smoothness the parameters have moved far.
    Whoever is silent makes no gradient. See :func:`sasg_jax.lag_ps_rule`."""
    how = {"smoothness": smoothness, "history": history, "max_staleness": max_staleness}
    rest = {"feedback": reconstruction()} | flat(parts)
    return _before_sgd(learning_rate, identity(), lag_ps_rule(xi, **how), num_workers, rest)


def csgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    num_workers: int,
    slack: float | Callable[[Any], Any],
    xi: float = 1 / 600,
    history: int = 10,
    **parts: Unpack[Parts],
) -> Transformation:
    """CSGD: LAG with a slack that shrinks, e.g. ``lambda t: 0.1 * 0.991**t``, for batches that
    grow; these are yours to make. See :func:`sasg_jax.lag_rule`."""
    rule = lag_rule(xi, history=history, slack=slack)
    return _before_sgd(learning_rate, identity(), rule, num_workers, parts)


def laq(
    learning_rate: optax.ScalarOrSchedule,
    *,
    num_workers: int,
    bits: int = 3,
    xi: float = 0.08,
    history: int = 10,
    max_staleness: int = 100,
    errors: float = 3.0,
    **parts: Unpack[Parts],
) -> Transformation:
    """LAQ, and with mini-batches SLAQ: LAG with messages of ``bits`` bits for each entry. See
    :func:`sasg_jax.laq_rule`."""
    rule = laq_rule(xi, history=history, max_staleness=max_staleness, errors=errors)
    return _before_sgd(learning_rate, grid(bits, scope="tree"), rule, num_workers, parts)


def ef21(
    learning_rate: optax.ScalarOrSchedule,
    *,
    num_workers: int,
    density: float = 0.01,
    momentum: float | None = None,
    **parts: Unpack[SparseParts],
) -> Transformation:
    """EF21: everybody sends the top k of what the server lacks, and with ``momentum`` η of what it
    lacks of a moving average. See :func:`sasg_jax.reconstruction`."""
    top, rest = _take_top_k(density, parts)
    rest = cast(Parts, {"feedback": reconstruction(momentum=momentum)} | rest)
    return _before_sgd(learning_rate, top, always(), num_workers, rest)


def diana(
    learning_rate: optax.ScalarOrSchedule,
    compressor: Compressor,
    *,
    num_workers: int,
    damping: float,
    **parts: Unpack[Parts],
) -> Transformation:
    """DIANA: everybody sends what the server lacks, by an unbiased compressor of variance ω and
    with a ``damping`` of at most 1/(1 + ω). See :func:`sasg_jax.reconstruction`."""
    rest = cast(Parts, {"feedback": reconstruction(damping=damping)} | flat(parts))
    return _before_sgd(learning_rate, compressor, always(), num_workers, rest)


def dgc(
    learning_rate: optax.ScalarOrSchedule,
    *,
    num_workers: int,
    density: float = 0.001,
    momentum: float = 0.9,
    masking: bool = True,
    **parts: Unpack[SparseParts],
) -> Transformation:
    """Deep gradient compression: everybody sends the top k of momentum and residual in one. See
    :func:`sasg_jax.momentum_residual`; clipping and the density's warm-up are yours."""
    top, rest = _take_top_k(density, parts)
    rest = cast(Parts, {"feedback": momentum_residual(momentum, masking=masking)} | rest)
    return compressed_sgd(learning_rate, top, always(), num_workers=num_workers, **rest)


def clag(
    learning_rate: optax.ScalarOrSchedule,
    *,
    num_workers: int,
    density: float = 0.01,
    zeta: float = 10.0,
    max_staleness: int | None = None,
    **parts: Unpack[SparseParts],
) -> Transformation:
    """CLAG: EF21 from workers whose gradient the server lacks much of. See
    :func:`sasg_jax.clag_rule`."""
    top, rest = _take_top_k(density, parts)
    rule = clag_rule(zeta, max_staleness=max_staleness)
    return _before_sgd(learning_rate, top, rule, num_workers, rest)


def cmfl(
    learning_rate: optax.ScalarOrSchedule,
    *,
    num_workers: int,
    relevance: float | Callable[[Any], Any] | None = None,
    max_staleness: int | None = None,
    **parts: Unpack[Parts],
) -> Transformation:
    """CMFL: the mean over workers that agree with where all went last. See
    :func:`sasg_jax.cmfl_rule`, which serves local steps, too."""
    rule = cmfl_rule(relevance, max_staleness=max_staleness)
    return compressed_sgd(learning_rate, identity(), rule, num_workers=num_workers, **parts)


def _before_sgd(
    learning_rate: Any, compressor: Compressor, rule: Rule, num_workers: int, parts: Any
) -> Transformation:
    """With the rate outside, as it is where both sides keep gradients."""
    ours = aggregate(compressor, rule, num_workers=num_workers, **flat(parts))
    return pipeline(ours, optax.sgd(learning_rate))
