r"""The paper's four methods, one grid of compressor and upload rule.

==========================  =================================  ======================
.                           send everything (identity)         top-k, error feedback
==========================  =================================  ======================
every worker, always        :func:`sgd`                        :func:`sparse_sgd`
only when (6) says so       :func:`lasg`                       :func:`sasg`
==========================  =================================  ======================

Each is a complete optimiser with the learning rate inside the compressor. With ``downlink``, the
server's step is compressed too. They share these arguments:

Args:
  learning_rate: γ, a number above 0 or an optax schedule of the round.
  num_workers: M, the size of the mapped axis.
  density: kept fraction k/d of every tensor, in (0, 1].
  selection: how those entries are found, see :func:`sasg_jax.top_k`.
  max_staleness: an upload is forced when the last one is this many rounds back.
  history: D, how many past steps the threshold sums over.
  alpha: the α_d of the upload rule (6): a number, D numbers, or a function of the learning rate.
    None is ``released_alpha(0.5, num_workers)``, that is 0.5·M/γ.
  downlink: compressor of the way down; None sends it dense.
  exchange: how messages travel, see :mod:`sasg_jax.exchange`.
  share_stale_params: whether the parameters of the last ``max_staleness`` rounds are kept once, in
    place of a copy of those of its last upload for each worker: less memory where a device
    simulates more workers than that.
  axis_name: name of the mapped axis over workers.

References: Deng et al., `Communication-Efficient Distributed Learning via Sparse and Adaptive
Stochastic Gradient <https://arxiv.org/abs/2112.04088>`_, 2021
"""

import optax

from sasg_jax._checks import check_learning_rate
from sasg_jax.compressors import Compressor, identity, top_k
from sasg_jax.transform import make_transform
from sasg_jax.upload_rules import Alpha, AlphaFn, always, innovation, released_alpha


def sgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    num_workers: int,
    downlink: Compressor | None = None,
    exchange: str = "psum",
    axis_name: str = "workers",
) -> optax.GradientTransformationExtraArgs:
    """Distributed SGD: everybody sends the whole gradient in every round."""
    return make_transform(
        identity(),
        always(),
        learning_rate=check_learning_rate(learning_rate),
        num_workers=num_workers,
        downlink=downlink,
        exchange=exchange,
        share_stale_params=False,
        axis_name=axis_name,
    )


def sparse_sgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    num_workers: int,
    density: float = 0.01,
    selection: str = "auto",
    downlink: Compressor | None = None,
    exchange: str = "gather",
    axis_name: str = "workers",
) -> optax.GradientTransformationExtraArgs:
    """Sparsified SGD with memory: everybody sends the top k in every round."""
    return make_transform(
        top_k(density, selection=selection),
        always(),
        learning_rate=check_learning_rate(learning_rate),
        num_workers=num_workers,
        downlink=downlink,
        exchange=exchange,
        share_stale_params=False,
        axis_name=axis_name,
    )


def lasg(
    learning_rate: optax.ScalarOrSchedule,
    *,
    num_workers: int,
    max_staleness: int = 10,
    history: int = 10,
    alpha: Alpha | AlphaFn | None = None,
    downlink: Compressor | None = None,
    exchange: str = "gather",
    share_stale_params: bool = False,
    axis_name: str = "workers",
) -> optax.GradientTransformationExtraArgs:
    """Lazily aggregated SGD: whole gradients, from workers whose gradient has changed enough.

    The server keeps the last gradient of every worker: M copies of the parameters' size.
    """
    alpha = released_alpha(0.5, num_workers) if alpha is None else alpha
    return make_transform(
        identity(),
        innovation(alpha, max_staleness=max_staleness, history=history),
        learning_rate=check_learning_rate(learning_rate),
        num_workers=num_workers,
        downlink=downlink,
        exchange=exchange,
        share_stale_params=share_stale_params,
        axis_name=axis_name,
    )


def sasg(
    learning_rate: optax.ScalarOrSchedule,
    *,
    num_workers: int,
    density: float = 0.01,
    selection: str = "auto",
    max_staleness: int = 10,
    history: int = 10,
    alpha: Alpha | AlphaFn | None = None,
    downlink: Compressor | None = None,
    exchange: str = "gather",
    share_stale_params: bool = False,
    axis_name: str = "workers",
) -> optax.GradientTransformationExtraArgs:
    """Sparse and adaptive SGD: the top k, from workers whose gradient has changed enough.

    Stands where ``lax.pmean(grads, "workers")`` and ``optax.sgd`` stood::

        tx = sasg_jax.sasg(0.05, num_workers=10)

        def worker_step(params, opt_state, batch):  # one worker's view, under a map over workers
            grad_fn = lambda p: jax.grad(loss_fn)(p, batch)
            updates, opt_state = tx.update(grad_fn(params), opt_state, params, grad_fn=grad_fn)
            return optax.apply_updates(params, updates), opt_state
    """
    alpha = released_alpha(0.5, num_workers) if alpha is None else alpha
    return make_transform(
        top_k(density, selection=selection),
        innovation(alpha, max_staleness=max_staleness, history=history),
        learning_rate=check_learning_rate(learning_rate),
        num_workers=num_workers,
        downlink=downlink,
        exchange=exchange,
        share_stale_params=share_stale_params,
        axis_name=axis_name,
    )
