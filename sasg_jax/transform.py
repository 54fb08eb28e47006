"""Methods as optax gradient transformations: worker half → exchange → server half."""

import functools
from collections.abc import Callable
from typing import Any, Unpack, cast

import jax
import jax.numpy as jnp
import optax
from jax import lax

from sasg_jax._checks import as_params, check_learning_rate, check_like, check_mapped_axis
from sasg_jax.compressors import Compressor
from sasg_jax.control_flow import refuse_collectives
from sasg_jax.method import Method, Parts, make_method
from sasg_jax.numerics import PyTree, is_masked
from sasg_jax.rules import Rule
from sasg_jax.server import Down, finish, init_server, served, spread
from sasg_jax.states import AggregateState, PipelineState, check_made_for, register_with_flax
from sasg_jax.worker import init_worker, worker_half, worker_half_with_mean


class Transformation(optax.GradientTransformationExtraArgs):
    """A gradient transformation whose two halves can be run apart, e.g. in chunks of workers."""

    method: Method
    worker_part: Callable[..., Any]  # state, post = (grads, state, params, index, present, grad_fn)
    server_part: Callable[..., Any]  # updates, state = (state, kept, down, params, extra_args)
    find_ours: Callable[[Any], AggregateState]


class Arrived(Exception):
    """Carries what has come through the transformations before ours to :func:`before_ours`."""


def before_ours(tx: Any, grads: PyTree, opt_state: PyTree, params: PyTree) -> PyTree:
    """What ``grads`` become on their way to our transformation inside ``tx``: what a worker's own
    gradient has gone through. Nothing after ours is run, and no state is changed."""
    try:
        tx.update(grads, opt_state, params, _return_at_ours=True)
    except Arrived as arrived:
        return arrived.args[0]
    raise ValueError("Expected tx to contain a transformation of sasg_jax.")


def aggregate(
    compressor: Compressor | None = None,
    rule: Rule | None = None,
    *,
    num_workers: int,
    **parts: Unpack[Parts],
) -> Transformation:
    """Replaces each worker's gradient by the mean of messages, before any optimiser.

    Stands where ``lax.pmean(grads, "workers")`` stood::

        tx = sasg_jax.pipeline(sasg_jax.aggregate(num_workers=8), optax.adamw(3e-4))

    Its ``update(grads, state, params, *, grad_fn=None, present=None)`` runs as one worker under
    ``jax.vmap``, ``jax.pmap`` or ``jax.shard_map``; the updates are the same on all workers. A rule
    that compares needs ``grad_fn(params)``, which evaluates the gradient on the same batch with the
    same randomness. ``present`` says who takes part in the round, the same on all workers (shape
    (M,), dtype bool): a worker that does not is a silent one, and nothing of its own changes.

    Args:
      compressor: what a worker sends; ``top_k(0.01)`` by default.
      rule: when it sends; :func:`sasg_jax.always` by default.
      num_workers: M, the size of the mapped axis over workers.
      **parts: any others, see :class:`sasg_jax.Parts`. ValueError for what does not go together."""
    return _from_method(make_method(compressor, rule, num_workers=num_workers, **flat(parts)))


def compressed_sgd(
    learning_rate: optax.ScalarOrSchedule,
    compressor: Compressor | None = None,
    rule: Rule | None = None,
    *,
    num_workers: int,
    **parts: Unpack[Parts],
) -> Transformation:
    """Distributed SGD with any parts: a complete optimiser, with the rate inside the compressor.

    Workers compress γ g + e, and the update is the negative mean. So a step keeps the rate γ, a
    number above 0 or an optax schedule of the round, that its gradient was made in, however long a
    residual held it back. The other arguments are those of :func:`aggregate`.

    >>> import sasg_jax
    >>> tx = compressed_sgd(0.05, sasg_jax.top_k(0.01), sasg_jax.every(4), num_workers=8)
    >>> tx.method.exchange.name, tx.method.silence
    ('lazy', 'keep')
    """
    how = {"learning_rate": check_learning_rate(learning_rate), "num_workers": num_workers}
    return _from_method(make_method(compressor, rule, **how, **flat(parts)))


def flat(parts: Any) -> dict[str, Any]:
    """``parts``, which ``optax.inject_hyperparams`` hands on as one argument of that name."""
    return {**parts.pop("parts", {}), **parts}


def pipeline(*transformations: optax.GradientTransformation) -> Transformation:
    """``optax.chain`` for transformations of which one is ours, with clear ownership.

    What stands before ours sees each worker's own gradient and belongs to the worker: its state is
    kept as it is in a round in which the worker's gradient counts for nothing. What stands after
    ours sees the same on all workers. The gradient with which a rule compares goes through what
    stands before, too. ValueError unless exactly one is ours::

        tx = sasg_jax.pipeline(
            optax.clip_by_global_norm(1.0), sasg_jax.aggregate(num_workers=8), optax.adamw(3e-4)
        )"""
    places = [i for i, tx in enumerate(transformations) if isinstance(tx, Transformation)]
    if len(places) != 1:
        why = "Expected transformations to contain exactly one of sasg_jax (aggregate, sasg, ...), "
        raise ValueError(why + f"got {len(places)}.")
    (place,) = places
    ours: Any = transformations[place]
    # optax.chain() of nothing is an error.
    before = optax.chain(optax.identity(), *transformations[:place])
    after = optax.chain(optax.identity(), *transformations[place + 1 :])

    def worker_part(grads, state, params, index, present, grad_fn):
        _check_kind(state, PipelineState)
        passed, new_before = before.update(grads, state.before, params)
        pass_on = lambda at: before.update(grad_fn(at), state.before, at)[0]
        again = grad_fn and pass_on
        worker, post = ours.worker_part(passed, state.aggregate, params, index, present, again)
        keep = lambda new, old: jnp.where(ours.find_ours(worker).worker.used, new, old)
        new_before = jax.tree.map(keep, new_before, state.before)
        return PipelineState(new_before, worker, state.after), post

    def server_part(state, kept, down, params, extra_args):
        updates, aggregated = ours.server_part(state.aggregate, kept, down, params, extra_args)
        updates, new_after = after.update(updates, state.after, params, **extra_args)
        return updates, PipelineState(state.before, aggregated, new_after)

    parts: Any = before, ours, after
    init = lambda params: PipelineState(*(part.init(params) for part in parts))
    find_ours = lambda state: ours.find_ours(state.aggregate)
    return _transformation(ours.method, init, worker_part, server_part, find_ours)


def _from_method(method: Method) -> Transformation:
    def init(params):
        register_with_flax()
        params = as_params(params)
        worker, server = init_worker(method, params), init_server(method, params)
        if jax.tree.leaves(params):
            return AggregateState(worker, server, method.wire(params))
        # The placeholder of optax.tree.map_params: one leaf for what is not like params.
        leaf = jnp.zeros(())
        memory = leaf if method.remembers else server.memory
        server = server._replace(memory=memory, downlink_memory=leaf)
        return AggregateState(worker._replace(compressor_memory=leaf), server, cast(Any, leaf))

    def worker_part(grads, state, params, index, present, grad_fn):
        _check_state(method, state)
        check_like("grads", grads, params)
        direction = jax.tree.map(lambda g, p: jnp.asarray(g, p.dtype), grads, params)

        def reevaluate(at):
            try:
                again = grad_fn(at)
            except Exception as error:
                if _find_masked(params) or isinstance(params, jax.Array):
                    note = "grad_fn gets params as they reach sasg_jax: without what optax.masked "
                    error.add_note(note + "hides, or as the one vector that optax.flatten makes.")
                raise
            if _find_masked(params) and not _find_masked(again):  # grad_fn gives hidden ones, too
                hide = lambda p, g: p if is_masked(p) else g
                again = jax.tree.map(hide, params, again, is_leaf=is_masked)
            check_like("grad_fn(params)", again, params)
            return again

        half: Any = worker_half
        if method.compressor.compress_mean is not None:
            assert method.exchange.mean is not None
            mean = functools.partial(method.exchange.mean, axis_name=method.axis_name)
            half = functools.partial(worker_half_with_mean, mean=mean)
        elif grad_fn is not None:
            again = refuse_collectives(reevaluate, method.axis_name)
            half = functools.partial(worker_half, reevaluate=again)
        states = state.worker, state.server
        worker, post = half(method, *states, direction, params, index=index, present=present)
        return AggregateState(worker, state.server, state.wire), post

    def server_part(state, kept, down, params, extra_args):
        step, server = finish(method, state.server, kept, down, params)
        updates = jax.tree.map(jnp.negative, step) if method.learning_rate is not None else step
        return updates, AggregateState(state.worker, server, state.wire)

    return _transformation(method, init, worker_part, server_part, lambda state: state)


def _transformation(method, init, worker_part, server_part, find_ours) -> Transformation:
    """``update`` of one worker, with the exchange between the two halves."""
    axis_name, exchange = method.axis_name, method.exchange

    def update(
        updates, state, params=None, *, grad_fn=None, present=None, _return_at_ours=False, **extra
    ):
        if _return_at_ours:
            raise Arrived(updates)
        if params is None:
            raise ValueError("Expected params in update(grads, state, params), got None.")
        params = as_params(params)
        check_mapped_axis(axis_name, method.num_workers)
        _check_not_summed(updates, axis_name)
        present = check_present(present, method.num_workers)
        index = lax.axis_index(axis_name)
        mine = True if present is None else present[index]
        state, post = worker_part(updates, state, params, index, mine, grad_fn)
        fn, kept, operands = served(method, find_ours(state).server, params)
        message, down = post.message, Down(post.message, ())  # of means, that of all
        if method.compressor.compress_mean is None:
            flags = exchange.tell(post.uploaded, axis_name) if method.tells else present
            rows = exchange.collect(message, flags, axis_name)
            kept, down = exchange.serve(fn, axis_name, kept, rows, flags, *operands)
            down = spread(method, down)
        return server_part(state, kept, down, params, extra)

    tx = Transformation(init, update)
    tx.method, tx.find_ours = method, find_ours
    tx.worker_part, tx.server_part = worker_part, server_part
    return tx


def _check_kind(state: Any, kind: type) -> None:
    if not isinstance(state, kind):
        why = f"Expected a state that this optimiser has made, {kind.__name__}, got one of "
        raise ValueError(why + f"{type(state).__name__}. Make a state with tx.init.")


def _check_state(method: Method, state: Any) -> None:
    _check_kind(state, AggregateState)
    check_made_for(method.settings, state.wire)


def check_present(present: Any, num_workers: int) -> jax.Array | None:
    present = None if present is None else jnp.asarray(present)
    if present is not None and (present.shape, present.dtype) != ((num_workers,), jnp.bool_):
        why = f"Expected present to be of dtype bool and shape ({num_workers},), the same on all "
        raise ValueError(why + f"workers, got {present.dtype} and {present.shape}.")
    return present


_find_masked = lambda tree: any(map(is_masked, jax.tree.leaves(tree, is_leaf=is_masked)))


def _check_not_summed(grads: PyTree, axis_name: str) -> None:
    """Raises where shard_map has already summed the gradients over workers, silently: with
    check_vma=True, that with respect to replicated parameters does not vary over the axis."""
    varies = lambda x: axis_name in jax.typeof(x).manual_axis_type.varying
    if varies(lax.axis_index(axis_name)) and not all(map(varies, jax.tree.leaves(grads))):
        why = "Expected grads to be this worker's own, got gradients that jax.shard_map has summed "
        raise ValueError(why + f"over axis {axis_name!r}. Pass check_vma=False to jax.shard_map.")
