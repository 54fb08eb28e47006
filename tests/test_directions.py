"""What a worker makes of its batch: a gradient, the mean of several, the way of its own steps."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

import sasg_jax

STEPS = 3
PARAMS = problems.to_numpy(problems.quadratic_params())
CENTRES = problems.centres(STEPS)  # for each step
KEY = jax.random.key(3)


def _loss(params, batch, *, model_state, key):
    """A quadratic with a bit of noise in its gradient, and a state that tells the order of steps
    and at which parameters they were made."""
    noise = jax.random.normal(key, params["b"].shape)
    loss = problems.quadratic_loss(params, batch) + 0.1 * jnp.vdot(noise, params["b"])
    new_state = {"sum": 2 * model_state["sum"] + params["b"] + batch["b"]}
    return loss, (new_state, {"noise": noise})


MAKERS: dict[str, Any] = {
    "gradient": functools.partial(sasg_jax.gradient, accumulate=STEPS),
    "local_steps": functools.partial(
        sasg_jax.local_steps, inner=optax.sgd(0.5, momentum=0.5), steps=STEPS
    ),
}


@functools.cache
def _evaluate(name):
    direction = MAKERS[name](_loss, has_aux=True, has_model_state=True, has_key=True)
    return direction, jax.jit(direction.evaluate)


def _start(name):
    direction, evaluate = _evaluate(name)
    return evaluate, direction.init(PARAMS), {"sum": np.ones(6, np.float32)}


def _grad(params, step, noise):
    """Of one step's batch."""
    grad = {key: params[key] - CENTRES[key][step] for key in params}
    return grad | {"b": grad["b"] + 0.1 * noise}


def _loss_at(params, step, noise):
    squares = sum(np.sum((params[key] - CENTRES[key][step]) ** 2) for key in params)
    return 0.5 * squares + 0.1 * noise @ params["b"]


def test_one_gradient():
    """A batch has no axis of steps then."""
    direction = sasg_jax.gradient(problems.quadratic_loss)
    batch = problems.at(CENTRES, 1)
    made = direction.evaluate(PARAMS, (), (), (), batch)
    for key in PARAMS:
        np.testing.assert_allclose(made.direction[key], PARAMS[key] - batch[key], rtol=1e-6)
    assert (made.own, made.model_state, made.aux) == ((), (), ())
    assert (direction.steps, direction.gradients) == (None, 1)


def test_accumulated_gradients():
    """Their mean at the same parameters; a state goes from one to the next."""
    evaluate, own, model_state = _start("gradient")
    params = problems.at(problems.centres(1, seed=4), 0)
    made = evaluate(params, own, model_state, KEY, CENTRES)
    noise = np.asarray(made.aux["noise"])
    assert noise.shape == (STEPS, 6)
    grads = [_grad(params, step, noise[step]) for step in range(STEPS)]
    for key in params:
        want = np.mean([grad[key] for grad in grads], axis=0)
        np.testing.assert_allclose(made.direction[key], want, rtol=1e-5, atol=1e-6)
    losses = [_loss_at(params, step, noise[step]) for step in range(STEPS)]
    np.testing.assert_allclose(made.loss, np.mean(losses), rtol=1e-5)
    total = model_state["sum"]
    for step in range(STEPS):
        total = 2 * total + params["b"] + CENTRES["b"][step]
    np.testing.assert_allclose(made.model_state["sum"], total, rtol=1e-5)
    assert made.own == ()


def test_local_steps():
    """Old minus new parameters; momentum goes on from round to round, parameters do not."""
    evaluate, own, model_state = _start("local_steps")
    velocity = {key: np.zeros_like(x) for key, x in PARAMS.items()}
    total = model_state["sum"]
    for round in range(2):
        made = evaluate(PARAMS, own, model_state, jax.random.fold_in(KEY, round), CENTRES)
        noise = np.asarray(made.aux["noise"])
        local, losses = PARAMS, []
        for step in range(STEPS):
            losses.append(_loss_at(local, step, noise[step]))
            total = 2 * total + local["b"] + CENTRES["b"][step]
            grad = _grad(local, step, noise[step])
            velocity = {key: 0.5 * velocity[key] + grad[key] for key in local}
            local = {key: local[key] - 0.5 * velocity[key] for key in local}
        for key in PARAMS:
            want = PARAMS[key] - local[key]
            np.testing.assert_allclose(made.direction[key], want, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(made.loss, np.mean(losses), rtol=1e-4)
        np.testing.assert_allclose(made.model_state["sum"], total, rtol=1e-4)
        own, model_state = made.own, made.model_state


@pytest.mark.parametrize("name", MAKERS)
def test_every_step_draws_anew(name):
    """And the same again at other parameters."""
    evaluate, own, model_state = _start(name)
    noise = evaluate(PARAMS, own, model_state, KEY, CENTRES).aux["noise"]
    assert len({row.tobytes() for row in np.asarray(noise)}) == STEPS
    elsewhere = problems.at(problems.centres(1, seed=4), 0)
    again = evaluate(elsewhere, own, model_state, KEY, CENTRES).aux["noise"]
    np.testing.assert_array_equal(noise, again)


def test_mean_in_half_precision_is_that_of_the_numbers():
    """Three times 30,000 is no number of float16; their mean is."""
    direction = sasg_jax.gradient(
        lambda params, batch: jnp.sum(params["w"] * batch.astype(jnp.float16)), accumulate=STEPS
    )
    params = {"w": jnp.zeros(2, jnp.float16)}
    made = direction.evaluate(params, (), (), (), jnp.full((STEPS, 2), 30_000.0))
    assert made.direction["w"].dtype == jnp.float16
    assert made.direction["w"].tolist() == [30_000, 30_000]


def test_inner_optimiser_gets_the_loss():
    """Of its own step, as those that look at it need."""

    def update(updates, state, params=None, **extra_args):
        del params
        value = extra_args["value"]
        return jax.tree.map(lambda u: -value * jnp.ones_like(u), updates), state + value

    inner = optax.GradientTransformationExtraArgs(lambda params: jnp.zeros(()), update)
    direction = sasg_jax.local_steps(
        lambda params, batch: batch + 0 * params["w"].sum(), inner, steps=2
    )
    params = {"w": jnp.zeros(2)}
    made = direction.evaluate(params, direction.init(params), (), (), jnp.array([1.0, 10.0]))
    assert made.direction["w"].tolist() == [11, 11]
    assert float(made.own) == 11


def test_counts_of_gradients():
    loss = problems.quadratic_loss
    assert sasg_jax.gradient(loss, accumulate=4).gradients == 4
    local = sasg_jax.local_steps(loss, optax.sgd(0.1), steps=5)
    assert (local.gradients, local.steps) == (5, 5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda loss: sasg_jax.gradient(loss, accumulate=0), "accumulate=0 to be an integer of a"),
        (lambda loss: sasg_jax.gradient(loss, accumulate=True), "accumulate=True to be an integer"),
        (
            lambda loss: sasg_jax.local_steps(loss, optax.sgd(0.1), steps=0),
            "steps=0 to be an integer of at least 1",
        ),
        (
            lambda loss: sasg_jax.local_steps(loss, 0.1, steps=2),  # pyright: ignore
            "inner=0.1 to be an optax optimiser",
        ),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=f"^Expected {message}"):
        make(problems.quadratic_loss)


# How large batches should be ----------------------------------------------------------------------


def test_norm_test_equals_its_formula():
    """T = ⌈b / (M - 1) · Σ‖g_m - ḡ‖² / (M η² ‖ḡ‖²)⌉ over a whole tree."""
    rng = np.random.default_rng(0)
    grads = {"a": rng.normal(1, 1, (5, 3)), "b": rng.normal(0.2, 2, (5, 2, 2))}
    flat = np.concatenate([x.reshape(5, -1) for x in grads.values()], 1)
    mean = flat.mean(0)
    for eta in (0.1, 0.8, 1e-9, 1e9):
        want = math.ceil(16 / 4 * ((flat - mean) ** 2).sum() / (5 * eta**2 * (mean**2).sum()))
        got = jax.jit(functools.partial(sasg_jax.norm_test, batch_size=16, eta=eta))(grads)
        assert got == min(want, 2**30)
        assert got.dtype == jnp.int32


def test_norm_test_where_there_is_no_mean_or_no_noise():
    opposite, same = jnp.asarray([[1.0], [-1.0]]), jnp.ones((2, 1), jnp.bfloat16)
    assert sasg_jax.norm_test(opposite, 8, eta=1.0) == 2**30
    assert sasg_jax.norm_test(same, 8, eta=1.0) == 1
    assert sasg_jax.norm_test(0 * same, 8, eta=1.0) == 1
    for bad in (jnp.nan, jnp.inf):
        assert sasg_jax.norm_test(opposite.at[0].set(bad), 8, eta=1.0) == 8


def test_norm_test_refuses_what_it_cannot_answer():
    for eta in (0, -1, math.inf, True):
        with pytest.raises(ValueError, match=rf"^Expected eta={eta!r} to be a finite number above"):
            sasg_jax.norm_test(jnp.ones((2, 3)), 8, eta=eta)
    for grads in (jnp.ones((1, 3)), {}, jnp.ones(()), [jnp.ones(2), jnp.ones(3)]):
        with pytest.raises(ValueError, match=r"^Expected the leading axes of gradients=.* to be"):
            sasg_jax.norm_test(grads, 8, eta=1.0)


def test_outer_optimisers_are_slowmos():
    """u ← β u + Δ/γ, w ← w - a γ u."""
    tx = optax.sgd(0.5, momentum=0.7)
    w, u = np.float32(1), np.float32(0)
    state, gamma = tx.init(jnp.float32(1)), 0.1
    got: Any = jnp.float32(1)
    for delta in (1.0, -2.0, 0.5):
        updates, state = tx.update(jnp.float32(delta), state)
        got = optax.apply_updates(got, updates)
        u = 0.7 * u + delta / gamma
        w = w - 0.5 * gamma * u
    np.testing.assert_allclose(got, w, rtol=1e-6)
