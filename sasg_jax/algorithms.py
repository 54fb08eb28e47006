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

from typing import Any, Unpack, cast

import optax

from sasg_jax.coders import IndexCoder, ValueCoder
from sasg_jax.compressors import Compressor, dithered_sign, identity, sign, ternary, top_k
from sasg_jax.feedback import none
from sasg_jax.method import Parts
from sasg_jax.rules import Rule, always, every, innovation, released_alpha
from sasg_jax.rules.innovation import Alpha, AlphaFn
from sasg_jax.transform import Transformation, compressed_sgd, flat


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
