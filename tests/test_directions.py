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


# Several gradients a step -------------------------------------------------------------------------

ACCUMULATED = 2


def test_accumulated_local_steps():
    """The mean of each step's gradients; state, keys and reports go through all of them."""
    inner = optax.sgd(0.5, momentum=0.5)
    has = {"has_aux": True, "has_model_state": True, "has_key": True}
    way = sasg_jax.local_steps(_loss, inner, steps=STEPS, accumulate=ACCUMULATED, **has)
    assert (way.steps, way.accumulate, way.gradients) == (STEPS, ACCUMULATED, 6)
    centres = problems.centres(ACCUMULATED, rounds=STEPS)
    model_state = {"sum": np.ones(6, np.float32)}
    made = jax.jit(way.evaluate)(PARAMS, way.init(PARAMS), model_state, KEY, centres)
    noise = np.asarray(made.aux["noise"])
    assert noise.shape == (STEPS, ACCUMULATED, 6)
    assert len({row.tobytes() for row in noise.reshape(-1, 6)}) == STEPS * ACCUMULATED

    local, total = PARAMS, model_state["sum"]
    velocity = {key: np.zeros_like(x) for key, x in PARAMS.items()}
    losses = []
    for step in range(STEPS):
        grads = []
        for i in range(ACCUMULATED):
            centre = problems.at(problems.at(centres, step), i)
            grad = {key: local[key] - centre[key] for key in local}
            grads.append(grad | {"b": grad["b"] + 0.1 * noise[step, i]})
            losses.append(
                0.5 * sum(np.sum((local[key] - centre[key]) ** 2) for key in local)
                + 0.1 * noise[step, i] @ local["b"]
            )
            total = 2 * total + local["b"] + centre["b"]
        mean = {key: np.mean([grad[key] for grad in grads], axis=0) for key in local}
        velocity = {key: 0.5 * velocity[key] + mean[key] for key in local}
        local = {key: local[key] - 0.5 * velocity[key] for key in local}
    for key in PARAMS:
        np.testing.assert_allclose(made.direction[key], PARAMS[key] - local[key], atol=1e-5)
    np.testing.assert_allclose(made.loss, np.mean(losses), rtol=1e-4)
    np.testing.assert_allclose(made.model_state["sum"], total, rtol=1e-4)


def test_batches_of_accumulated_local_steps():
    way = sasg_jax.local_steps(
        problems.quadratic_loss, optax.sgd(0.1), steps=STEPS, accumulate=ACCUMULATED
    )
    train_step = sasg_jax.make_train_step(way, sasg_jax.sgd(1.0, num_workers=4), num_workers=4)
    state = train_step.init(problems.quadratic_params())
    batch = {"b": jnp.zeros((4, STEPS, ACCUMULATED, 6)), "w": jnp.zeros((4, STEPS, 3, 4, 6))}
    leading = "a leading axis of num_workers=4, and then one of steps=3, and then one of accumulate"
    with pytest.raises(ValueError, match=rf"^Expected batch\['w'\] to have {leading}=2, got shape"):
        train_step.step(state, batch)


# The inner optimiser ------------------------------------------------------------------------------

INNERS: dict[str, Any] = {
    "schedule, clipping, decay": optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.exponential_decay(0.3, 1, 0.7), weight_decay=0.1),
    ),
    "muon": optax.contrib.muon(0.1, weight_decay=0.1),
    "value": optax.chain(optax.sgd(0.2), optax.contrib.reduce_on_plateau(0.5, patience=1)),
    "schedule-free": optax.contrib.schedule_free_sgd(0.1, warmup_steps=4),
}


def _alone(inner, centres, rounds):
    """Each worker's own steps from the mean of all, with a state of its own."""
    inner = optax.with_extra_args_support(inner)

    @jax.jit
    def step(local, state, centre):
        loss, grads = jax.value_and_grad(problems.quadratic_loss)(local, centre)
        updates, state = inner.update(grads, state, local, value=loss)
        return optax.apply_updates(local, updates), state

    params = problems.quadratic_params()
    states = [inner.init(params) for _ in range(problems.M)]
    for t in range(rounds):
        ends = []
        for m in range(problems.M):
            local = params
            for h in range(STEPS):
                centre = jax.tree.map(lambda x, place=(t, m, h): x[place], centres)
                local, states[m] = step(local, states[m], centre)
            ends.append(local)
        params = jax.tree.map(lambda *xs: sum(xs) / problems.M, *ends)
    return params, jax.tree.map(lambda *xs: np.stack(xs), *states)


@pytest.mark.parametrize("driver", ["vmap", "shard_map"])
@pytest.mark.parametrize("name", INNERS)
def test_any_inner_optimiser_goes_on_from_round_to_round(name, driver):
    """Its schedule counts a worker's steps, and each worker has its own."""
    rounds, inner = 3, INNERS[name]
    rng = np.random.default_rng(0)
    leading = (rounds, problems.M, STEPS)
    centres = {
        "b": rng.normal(size=(*leading, 6)).astype(np.float32),
        "w": rng.normal(size=(*leading, 4, 6)).astype(np.float32),
    }
    direction, tx = sasg_jax.diloco(
        problems.quadratic_loss,
        inner,
        num_workers=problems.M,
        steps=STEPS,
        outer_rate=1.0,
        outer_momentum=0.0,
    )
    train_step = sasg_jax.make_train_step(direction, tx, num_workers=problems.M, driver=driver)
    state = train_step.init(problems.quadratic_params())
    for t in range(rounds):
        state, _ = jax.block_until_ready(train_step.step(state, problems.at(centres, t)))
    params, states = _alone(inner, centres, rounds)
    for got, want in ((state.params, params), (state.direction, states)):
        leaves = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
        for x, y in leaves:
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)
    counts = [x for x in jax.tree.leaves(state.direction) if jnp.issubdtype(x.dtype, jnp.integer)]
    counts = [x for x in counts if x.tolist() == [rounds * STEPS] * problems.M]
    assert counts or name == "value"


def test_bfloat16_inside_a_flax_model_keeps_float32_outside():
    """Parameters, what is sent, residuals and moments; its loss may be bfloat16, too."""
    nn = pytest.importorskip("flax.linen")
    model = nn.Dense(3, dtype=jnp.bfloat16)  # computes in it, has float32 parameters

    def loss_fn(params, batch):
        out = model.apply(params, batch)
        assert out.dtype == jnp.bfloat16
        return jnp.mean((out - 1) ** 2)

    direction, tx = sasg_jax.sparse_loco(
        loss_fn,
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.05)),
        num_workers=2,
        steps=STEPS,
        accumulate=ACCUMULATED,
        tile=2,
        density=0.5,
        downlink=sasg_jax.top_k(0.5),
    )
    train_step = sasg_jax.make_train_step(direction, tx, num_workers=2)
    state = train_step.init(model.init(jax.random.key(0), jnp.ones((1, 4))))
    batch = np.random.default_rng(0).normal(size=(2, STEPS, ACCUMULATED, 8, 4)).astype(np.float32)
    losses = []
    for _ in range(10):
        state, info = train_step.step(state, batch)
        assert info.finite.all()
        losses.append(float(info.loss.mean()))
    assert losses[-1] < 0.7 * losses[0]
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {x.dtype for x in floats} == {jnp.dtype("float32")}


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
            lambda loss: sasg_jax.local_steps(loss, optax.sgd(0.1), steps=1, accumulate=0),
            "accumulate=0 to be an integer of at least 1",
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
