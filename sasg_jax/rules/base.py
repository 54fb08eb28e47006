"""What an upload rule is: whether a worker sends in a round, and the memory that this takes."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sasg_jax.numerics import PyTree

SILENCES = ("reuse", "keep", "drop")
"""What a silent worker counts as: its last message again, which the server keeps (the paper's); as
nothing yet, while its direction goes into its residual; or as nothing, in a mean over senders."""


class Round(NamedTuple):
    """What all workers know of a round."""

    params: PyTree  # w_t
    number: jax.Array  # t. shape=(), dtype=jnp.int32
    num_workers: int  # M
    learning_rate: jax.Array | None  # γ; None where there is none. shape=()


class View(NamedTuple):
    """What a rule sees of one worker when it decides."""

    round: Round
    worker: jax.Array  # which one, from 0. shape=(), dtype=jnp.int32
    direction: PyTree  # g, like params
    feedback: PyTree  # the feedback's memory, e.g. with the worker's residual
    staleness: jax.Array  # rounds since its last upload. shape=(), dtype=jnp.int32
    memory: PyTree  # the rule's own on this worker
    shared: PyTree  # the rule's own, the same on all workers
    threshold: jax.Array  # of Rule.begin. shape=(), dtype=jnp.float32
    forced: jax.Array  # whether it must upload whatever the rule says. shape=(), dtype=jnp.bool_
    reevaluate: Callable[[PyTree], PyTree]
    """``direction = reevaluate(params)``: the direction at other parameters, on the same batch with
    the same randomness. Takes as long as the first."""
    pending: Callable[[], PyTree]
    """``p = pending()``: of what a message would be made, e.g. γ g + e. Like params."""
    remainder: Callable[[], PyTree]
    """``rest = remainder()``: what such a message would leave out of p. Takes as long as making the
    message."""


class Decision(NamedTuple):
    """What a rule says of one worker."""

    upload: jax.Array  # shape=(), dtype=jnp.bool_
    measured: jax.Array  # for the report, in the threshold's units. shape=(), dtype=jnp.float32
    sound: jax.Array | None = None
    """Whether it has seen that the squares of the direction are finite; None if it has not looked.
    Saves looking once more. shape=(), dtype=jnp.bool_"""
    memory: PyTree | None = None
    """The rule's own on this worker after this round, in which it takes part and is not refused,
    and before :attr:`Rule.sent`; None leaves it as it was."""


_no_threshold = lambda shared, *round: (jnp.zeros((), jnp.float32), shared)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """Pure functions, e.g. those of :func:`innovation`. Only ``name`` and ``decide`` are needed.

    Args:
      decide: ``decision = decide(view)``. A comparison should let NaN upload: what is then sent is
        looked at, and refused if it is not finite.
      measure: how much there is to say, for :func:`sasg_jax.held_rate`. At least 0.
      max_staleness: an upload is forced when the last is this many rounds back, and at the start.
      needs_reconstruction: whether it reads ``view.feedback.reconstruction``: what the server has
        of the worker. :func:`sasg_jax.reconstruction` is then the default.
      foresees: whether ``decide`` asks for nothing that takes the direction: a worker that will be
        silent then need not make one. ``view.direction`` is None where it has not been made.
      silence: what a silent worker counts as by default, one of :data:`SILENCES`.
      init_worker: ``memory = init_worker(params)``: its memory on a worker, before the first round.
      init_shared: ``shared = init_shared(params)``: its memory that is the same on all workers.
      begin: ``threshold, shared = begin(shared, round)``, before anybody decides. Here the step
        that the last round made in the end can be seen in the parameters.
      sent: ``memory = sent(memory, params, direction, learning_rate)``, on a worker that uploads.
      end: ``shared = end(shared, round, step)``, when all have decided: ``step`` is the server's,
        like params and in the unit of directions, or of γ g where there is a rate."""

    name: str  # in errors, with its settings
    decide: Callable[[View], Decision]
    max_staleness: int | None = None
    always: bool = False  # everybody uploads in every round, so that nobody need tell
    measure: Callable[[View], jax.Array] | None = None
    silence: str = "reuse"
    compares: bool = False  # it asks for the direction at other parameters
    needs_learning_rate: bool = False  # it reads Round.learning_rate
    needs_reconstruction: bool = False
    foresees: bool = False
    init_worker: Callable[[PyTree], PyTree] = lambda params: ()
    init_shared: Callable[[PyTree], PyTree] = lambda params: ()
    begin: Callable[[PyTree, Round], tuple[jax.Array, PyTree]] = _no_threshold
    sent: Callable[[PyTree, PyTree, PyTree, Any], PyTree] = lambda memory, *upload: memory
    end: Callable[[PyTree, Round, PyTree], PyTree] = lambda shared, round, step: shared
