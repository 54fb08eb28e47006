"""The server's rules of LAG and LASG: whether the parameters have moved far for a worker."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from sasg_jax._checks import check_bound, check_cap, check_int, require
from sasg_jax.numerics import PyTree, squared_distance
from sasg_jax.rules.base import Decision, Rule, View
from sasg_jax.rules.past_steps import add_gradient, no_steps


class Moved(NamedTuple):
    """What :func:`lag_ps_rule` keeps on a worker."""

    stale_params: PyTree  # w_s, like params
    direction: PyTree  # g_s, like params; () where L is given
    smoothness: jax.Array  # L; -1 where it is not known yet. shape=(), dtype=jnp.float32
    started: jax.Array  # whether it has ever uploaded. shape=(), dtype=jnp.bool_


def lag_ps_rule(
    xi: float = 1.0,
    *,
    smoothness: float | Sequence[float] | None = None,
    history: int = 10,
    max_staleness: int | None = None,
) -> Rule:
    r"""A worker uploads when the parameters have moved far since it last did, for its smoothness.

    .. math:: L_m^2 \|w_t - w_s\|^2 > \xi \sum_{d=1}^{D} \|\bar g_{t-d}\|^2

    with w_s the parameters of its last upload, and ḡ the means that the server has stepped with, in
    the unit of gradients. It is LAG-PS, and with a ξ of 1/D and mini-batches LASG-PS. Where
    ``smoothness`` is not given, L is the largest that its uploads have shown,

    .. math:: L_m = \max \|g - g_s\| / \|w - w_s\|

    of its own gradients at two uploads that follow one another; until there is one, it uploads.

    The rule looks at no gradient: whoever is silent makes none. (:func:`sasg_jax.make_train_step`
    leaves it out; on one device only where all are silent. The loss of such a worker is NaN.) With
    ``silence="keep"`` all gradients are needed.

    Sent: the whole gradient, if the compressor says nothing else, or the difference to the last
    (``feedback=sasg_jax.reconstruction()``), for which the server needs one sum. Kept: w_s on each
    worker, and g_s where L is estimated; in LAG the server keeps these, which need not then send w
    to who is silent. Here the step goes to all, and is counted so.

    Guarantees: ξ has no unit; LAG's rate with true L_m, gradients of all the data, and ξ as in
    :func:`sasg_jax.lag_rule` (its authors').

    Take it where gradients are dear and workers differ in smoothness. Not with small batches unless
    L is given: the noise of two batches makes the estimate large, and it never falls. (LASG's code
    starts at 0.1, and compares L in the place of L².)

    Args:
      xi: ξ, at least 0; larger means fewer uploads. LAG's is 1 with D = 10.
      smoothness: L of each worker's loss, or of all; None to estimate it.
      history: D. Steps before the first are zero.
      max_staleness: an upload is forced when the last one is this many rounds back; by default
        never.

    ValueError for an argument out of range.

    References: Chen et al., `LAG <https://arxiv.org/abs/1805.09965>`_, 2018; Chen et al., `LASG
    <https://arxiv.org/abs/2002.11360>`_, 2020"""
    xi = check_bound("xi", xi)
    history = check_int("history", history, minimum=1)
    max_staleness = check_cap(max_staleness)
    given = smoothness is not None
    known = jnp.asarray(_check_smoothness(smoothness) if given else -1, jnp.float32)

    def init_worker(params: PyTree) -> Moved:
        kept = () if given else jax.tree.map(jnp.zeros_like, params)
        return Moved(params, kept, jnp.full((), -1, jnp.float32), jnp.asarray(False))

    def decide(view: View) -> Decision:
        memory: Moved = view.memory
        own = (known[view.worker] if known.ndim else known) if given else memory.smoothness
        forced = view.forced | ~memory.started | (own < 0)
        found = own**2 * squared_distance(view.round.params, memory.stale_params)
        # Written so that what is not a number uploads.
        return Decision(forced | ~(found <= view.threshold), jnp.where(forced, 0, found))

    def sent(memory: Moved, params: PyTree, direction: PyTree, learning_rate: Any) -> Moved:
        yes = jnp.asarray(True)
        if given:
            return Moved(params, (), memory.smoothness, yes)
        changed = squared_distance(direction, memory.direction)
        moved = squared_distance(params, memory.stale_params)
        shown = jnp.sqrt(changed / jnp.where(moved > 0, moved, 1))
        # Of what is beyond float32, and of the first upload, nothing is to be learnt.
        counts = memory.started & (moved > 0) & jnp.isfinite(shown)
        largest = jnp.where(counts, jnp.maximum(shown, memory.smoothness), memory.smoothness)
        return Moved(params, direction, largest, yes)

    capped = "" if max_staleness is None else f", max_staleness={max_staleness}"
    return Rule(
        name=f"lag_ps_rule(history={history}{capped}{', smoothness' * given})",
        decide=decide,
        foresees=True,
        max_staleness=max_staleness,
        init_worker=init_worker,
        init_shared=no_steps(history),
        begin=lambda steps, round: ((xi * steps.sum()).astype(jnp.float32), steps),
        sent=sent,
        end=add_gradient,
    )


def _check_smoothness(value: Any) -> np.ndarray:
    numbers = np.asarray(value, dtype=object)
    ok = numbers.ndim <= 1 and numbers.size
    for number in numbers.reshape(-1) if ok else ():
        check_bound("smoothness", number)
    require(ok, "smoothness", value, "to be one number, or one of each worker")
    return numbers.astype(np.float32)
