r"""Rules without units: a worker compares what it has with something of the same kind, so that
neither the learning rate nor the scale of the loss enters the bound.

Each also sends in its turn: worker m in rounds t with ``(t + m) % max_staleness == 0``, and at the
latest when its last upload is ``max_staleness`` rounds back. So nobody is silent for ever, not even
where all wait for each other to move, and not all come at once.
"""

import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sasg_jax._checks import check_bound, check_int
from sasg_jax.control_flow import for_all
from sasg_jax.numerics import squared_distance, squared_norm
from sasg_jax.rules.base import Decision, Rule, View


def message_share(theta: float = 0.3, *, max_staleness: int = 10) -> Rule:
    r"""A worker uploads when a message would carry enough of what it has.

    .. math:: \|p\|^2 - \|p - \mathcal{C}(p)\|^2 > \theta \|p\|^2, \quad p = \gamma g + e

    It makes a message to see, in every round: as long as sending takes, and no second gradient."""
    energy = lambda view: squared_norm(view.pending())
    carried = lambda view: jnp.maximum(energy(view) - squared_norm(view.remainder()), 0)
    measure = lambda view: (carried(view), energy(view))
    return _relative("message_share", measure, theta, max_staleness)


def residual_norm(theta: float = 30.0, *, history: int = 10, max_staleness: int = 10) -> Rule:
    r"""A worker uploads when what it has is large beside the last steps of the server.

    .. math:: \|p\|^2 > \theta \frac{M^2}{D} \sum_{d=1}^{D} \|u_{t-d}\|^2, \quad p = \gamma g + e

    with u the server's steps, of the same unit as p, and M² as each is a mean over workers. It
    needs no second gradient. ``history`` is D."""
    history = check_int("history", history, minimum=1)

    def measure(view: View) -> tuple[jax.Array, jax.Array]:
        steps = view.shared.mean() * view.round.num_workers**2
        return squared_norm(view.pending()), steps

    return _relative(
        "residual_norm",
        measure,
        theta,
        max_staleness,
        {"history": history},
        init_shared=lambda params: jnp.zeros(history, jnp.float32),
        end=lambda steps, round, step: jnp.append(steps[1:], squared_norm(step)),
    )


def direction_change(theta: float = 1.0, *, max_staleness: int = 10) -> Rule:
    r"""A worker uploads when its direction is far from the one that it has last sent with.

    .. math:: \|g - g_s\|^2 > \theta \|g\|^2

    with g_s that of its last upload, on another batch: so most of what it sees on small batches is
    their noise. It keeps a copy of g_s and needs no second gradient."""
    zeros = lambda params: jax.tree.map(jnp.zeros_like, params)
    size = lambda view: squared_norm(view.direction)
    measure = lambda view: (squared_distance(view.direction, view.memory), size(view))
    sent = lambda memory, params, direction, learning_rate: direction
    parts = {"init_worker": zeros, "sent": sent}
    return _relative("direction_change", measure, theta, max_staleness, **parts)


def ratio(measured: jax.Array, of: jax.Array) -> jax.Array:
    """0 where both are zero, and infinite where the second alone is."""
    beside = jnp.where(of == 0, jnp.inf, measured / jnp.where(of == 0, 1, of))
    return jnp.where(measured == 0, 0, beside)


def _relative(
    name: str,
    measure: Callable[[View], tuple[jax.Array, jax.Array]],
    theta: Any,
    max_staleness: int,
    settings: Mapping[str, Any] = types.MappingProxyType({}),
    **parts: Any,
) -> Rule:
    """A rule that compares the first of what ``measure`` returns with θ times the second."""
    theta = check_bound("theta", theta)
    max_staleness = check_int("max_staleness", max_staleness, minimum=1)

    beside = lambda view: ratio(*measure(view))

    def decide(view: View) -> Decision:
        if max_staleness == 1:
            return Decision(jnp.asarray(True), jnp.zeros((), jnp.float32))
        turn = view.forced | ((view.round.number + view.worker) % max_staleness == 0)
        skip = lambda: jnp.zeros((), jnp.float32)
        found = jax.lax.cond(for_all(turn), skip, lambda: beside(view))
        # Written so that what is not a number uploads.
        return Decision(turn | ~(found <= view.threshold), jnp.where(turn, 0, found))

    settings = {"max_staleness": max_staleness, **settings}
    return Rule(
        name=f"{name}({', '.join(f'{key}={value}' for key, value in settings.items())})",
        decide=decide,
        measure=beside if max_staleness > 1 else None,
        max_staleness=max_staleness,
        silence="keep",
        begin=lambda shared, round: (jnp.asarray(theta, jnp.float32), shared),
        **parts,
    )
