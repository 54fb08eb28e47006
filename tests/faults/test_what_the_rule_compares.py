"""Rule (6) compares like with like, whatever stands around ours.

Both gradients have gone through the same, and the threshold is made of the steps that the
parameters really took. Both are worked out anew here from the path of the parameters alone.
"""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import problems
from problems import M

import sasg_jax

ALPHA, HISTORY, CAP, ROUNDS = 3.0, 2, 4, 14


class Trace(NamedTuple):
    path: Any  # params before each round and after the last
    uploaded: np.ndarray
    innovation: np.ndarray
    threshold: np.ndarray


def _rule(alpha=ALPHA, **options):
    return sasg_jax.innovation(alpha, history=HISTORY, max_staleness=CAP, **options)


def _trace(tx, batches, direction=problems.quadratic_loss, dtype=jnp.float32, **options):
    train_step = sasg_jax.make_train_step(direction, tx, num_workers=M, **options)

    def step(state, batch):
        new, info = train_step.step(state, batch)
        return new, (state.params, info)

    state = train_step.init({"b": jnp.ones(6, dtype), "w": jnp.full((4, 6), -1, dtype)})
    state, (params, info) = problems.scan_rounds(step)(state, (batches,))
    path = [problems.at(params, t) for t in range(ROUNDS)] + [state.params]
    path = [jax.tree.map(lambda x: np.asarray(x, np.float32), params) for params in path]
    return Trace(path, *(np.asarray(x) for x in (info.uploaded, info.innovation, info.threshold)))


def _check_innovation(trace, direction):
    """``direction(worker, round, params)`` is worker's g, as it has come to ours."""
    stale, last, measured = [trace.path[0]] * M, [-CAP] * M, 0
    for t in range(ROUNDS):
        for m in range(M):
            forced = t < HISTORY or t - last[m] >= CAP
            if not forced:
                g, again = direction(m, t, trace.path[t]), direction(m, t, stale[m])
                expected = oracle.squared_norm(oracle.subtract(g, again))
                np.testing.assert_allclose(trace.innovation[t, m], expected, rtol=2e-3, atol=1e-6)
                measured += expected > 1e-6
            assert trace.uploaded[t, m] == (forced or trace.innovation[t, m] > trace.threshold[t])
            if trace.uploaded[t, m]:
                stale[m], last[m] = trace.path[t], t
    assert measured > M


def _check_threshold(trace, alpha=lambda t: ALPHA):
    """``alpha(round)`` weighs the step of that round."""
    steps = [
        oracle.squared_norm(oracle.subtract(new, old))
        for old, new in itertools.pairwise(trace.path)
    ]
    for t in range(ROUNDS):
        recent = sum(alpha(d) * steps[d] for d in range(max(0, t - HISTORY), t))
        np.testing.assert_allclose(trace.threshold[t], recent / M**2, rtol=2e-3, atol=1e-9)


def _gradient(batches):
    def g(worker, round, params):
        return {name: params[name] - batches[name][round, worker] for name in params}

    return g


def _clip(tree, norm):
    factor = min(1, norm / np.sqrt(oracle.squared_norm(tree)))
    return {name: factor * x for name, x in tree.items()}


def test_what_stands_before_and_after_in_a_pipeline_in_chunks():
    tx = sasg_jax.pipeline(
        optax.clip_by_global_norm(4.0),
        optax.masked(optax.scale(3.0), {"b": False, "w": True}),
        sasg_jax.aggregate(sasg_jax.identity(), _rule(share_stale_params=True), num_workers=M),
        optax.sgd(0.1),
        optax.ema(0.9),
    )
    batches = problems.centres(rounds=ROUNDS)
    trace = _trace(tx, batches, chunk_size=2)
    plain = _gradient(batches)

    def direction(worker, round, params):
        g = _clip(plain(worker, round, params), 4)
        return {"b": g["b"], "w": 3 * g["w"]}

    _check_innovation(trace, direction)
    _check_threshold(trace)


def test_what_stands_around_a_complete_optimiser_in_a_chain():
    """With momentum in front, both gradients are added to the same momentum."""
    tx = optax.chain(
        optax.inject_hyperparams(optax.clip)(max_delta=0.5),
        optax.add_decayed_weights(0.1),
        optax.chain(
            optax.trace(0.9),
            sasg_jax.compressed_sgd(
                0.05, sasg_jax.top_k(0.5), _rule(), num_workers=M, exchange="server"
            ),
        ),
        optax.scale(0.1),
        optax.freeze({"b": True, "w": False}),
    )
    batches = problems.centres(rounds=ROUNDS)
    trace = _trace(tx, batches)
    plain = _gradient(batches)

    def direction(worker, round, params):
        g = plain(worker, round, params)
        return {name: np.clip(x, -0.5, 0.5) + 0.1 * params[name] for name, x in g.items()}

    _check_innovation(trace, direction)
    _check_threshold(trace)
    np.testing.assert_array_equal(trace.path[-1]["b"], 1)


def test_accumulated_gradients_and_parameters_that_are_kept_positive():
    tx = optax.chain(
        optax.freeze({"b": True, "w": False}),
        sasg_jax.aggregate(sasg_jax.top_k(0.5), _rule(), num_workers=M),
        optax.adamw(0.2, weight_decay=0.1),
        optax.keep_params_nonnegative(),
    )
    twice = problems.centres(rounds=2 * ROUNDS)
    batches = {
        name: x.reshape(ROUNDS, 2, M, *x.shape[2:]).swapaxes(1, 2) for name, x in twice.items()
    }
    trace = _trace(tx, batches, sasg_jax.gradient(problems.quadratic_loss, accumulate=2))

    def direction(worker, round, params):
        w = params["w"] - batches["w"][round, worker].mean(0)
        return {"b": np.zeros(6, np.float32), "w": w}

    _check_innovation(trace, direction)
    _check_threshold(trace)
    assert any((params["w"] == 0).any() for params in trace.path)


def test_local_steps_and_half_precision():
    """Steps of which some are lost in rounding weigh what is left of them."""
    rate = 0.006
    way = sasg_jax.local_steps(problems.quadratic_loss, optax.sgd(0.25), steps=2)
    tx = sasg_jax.pipeline(
        sasg_jax.aggregate(sasg_jax.identity(), _rule(), num_workers=M), optax.sgd(rate)
    )
    twice = problems.centres(rounds=2 * ROUNDS)
    batches = {
        name: x.reshape(ROUNDS, 2, M, *x.shape[2:]).swapaxes(1, 2) for name, x in twice.items()
    }
    trace = _trace(tx, batches, way, dtype=jnp.bfloat16)
    _check_threshold(trace)
    steps = [new["b"] - old["b"] for old, new in itertools.pairwise(trace.path)]
    assert (np.stack(steps) == 0).mean() > 0.1


def test_masked_and_injected_with_a_rate_that_ends_at_zero():
    """Where the rate is zero, or below it by a rounding, all upload and steps weigh nothing."""
    rates = np.append(np.linspace(0.2, 0.02, ROUNDS - 4), [-1e-9, 0, 0, 0]).astype(np.float32)
    schedule = lambda round: jnp.asarray(rates)[round]
    make = optax.inject_hyperparams(
        sasg_jax.sasg, static_args=("num_workers", "density", "history", "max_staleness")
    )
    ours = make(schedule, num_workers=M, density=0.5, history=HISTORY, max_staleness=CAP)
    mask = {"b": False, "w": True}
    tx = optax.chain(
        optax.masked(ours, mask), optax.masked(optax.set_to_zero(), {"b": True, "w": False})
    )
    batches = problems.centres(rounds=ROUNDS)
    trace = _trace(tx, batches)
    _check_threshold(trace, lambda t: 0.5 * M / rates[t] if rates[t] > 1e-6 else 0)
    assert trace.uploaded[rates < 1e-6].all()
    assert not trace.uploaded.all()
