"""Collectives in the loss: refused where not all workers run them, right where all do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from jax import lax
from problems import M

import sasg_jax

AXIS = "workers"
REFUSED = r"^Expected a loss without collectives over axis 'workers', found"
RING = [(m, (m + 1) % M) for m in range(M)]

COLLECTIVES = {
    "psum": lambda x: lax.psum(x, AXIS),
    "pmean": lambda x: lax.pmean(x, AXIS),
    "pmax": lambda x: lax.pmax(lax.stop_gradient(x), AXIS),
    "all_gather": lambda x: lax.all_gather(x, AXIS).sum(0),
    "ppermute": lambda x: lax.ppermute(x, AXIS, RING),
    "psum_scatter": lambda x: lax.psum_scatter(jnp.stack([x] * M), AXIS),
}


def _psum(x):
    return lax.psum(x, AXIS)


@jax.custom_vjp
def _own_derivative(x):
    return x


_own_derivative.defvjp(lambda x: (x, None), lambda _, g: (_psum(g),))

AROUND = {
    "jit": jax.jit(_psum),
    "remat": jax.checkpoint(_psum),
    "scan": lambda x: lax.scan(lambda total, _: (_psum(total), None), x, length=2)[0],
    "while": lambda x: lax.while_loop(lambda y: y < 1, _psum, lax.stop_gradient(x)),
    "cond": lambda x: lax.cond(x > 0, _psum, jnp.sin, x),
    "vmap": lambda x: jax.vmap(_psum)(jnp.stack([x, x])).sum(),
    "two axes": lambda x: jax.vmap(lambda y: lax.psum(y, ("inner", AXIS)), axis_name="inner")(
        jnp.stack([x, x])
    ).sum(),
    "derivative of one's own": _own_derivative,
}
NONE = {
    "over an axis inside": lambda x: jax.vmap(lambda y: lax.psum(y, "inner"), axis_name="inner")(
        jnp.stack([x, x])
    ).sum(),
    "which worker this is": lambda x: x * lax.axis_index(AXIS),
    "how many there are": lambda x: x * lax.axis_size(AXIS),
}


def _loss(inside):
    return lambda params, batch: jnp.sum(params["w"] * inside(batch.sum()) * inside(params["w"][0]))


def _round_of_ones_own(inside, rule):
    """The shapes of one's own simulated round: all that is refused is refused as it is traced."""
    tx = sasg_jax.aggregate(sasg_jax.identity(), rule, num_workers=M)
    run = problems.start(tx, {"w": jnp.ones(3)})
    step = problems.map_workers(tx, run, loss=_loss(inside))
    return jax.eval_shape(step, run, jnp.ones((M, 2)))


@pytest.mark.parametrize(
    "inside", [*COLLECTIVES.values(), *AROUND.values()], ids=[*COLLECTIVES, *AROUND]
)
def test_refused_where_a_rule_compares(inside):
    with pytest.raises(ValueError, match=REFUSED):
        _round_of_ones_own(inside, sasg_jax.innovation(1.0))


@pytest.mark.parametrize("inside", NONE.values(), ids=NONE)
def test_what_is_no_collective_over_workers_is_not_refused(inside):
    _round_of_ones_own(inside, sasg_jax.innovation(1.0))


@pytest.mark.parametrize("rule", [sasg_jax.always(), sasg_jax.every(2)], ids=lambda rule: rule.name)
def test_not_refused_where_none_compares(rule):
    """Every worker evaluates its gradient, also one that is silent."""
    _round_of_ones_own(_psum, rule)


@pytest.mark.parametrize(
    "options", [{}, {"driver": "shard_map"}, {"driver": "pmap"}, {"chunk_size": 2}]
)
@pytest.mark.parametrize("around", [optax.identity(), optax.clip(1.0)], ids=["ours", "pipeline"])
def test_refused_with_every_driver(options, around):
    """Before anything is run, whatever stands in front of ours."""
    tx = sasg_jax.pipeline(around, sasg_jax.sasg(0.1, num_workers=M, density=0.5))
    train_step = sasg_jax.make_train_step(_loss(_psum), tx, num_workers=M, **options)
    state = train_step.init({"w": jnp.ones(3)})
    with pytest.raises(ValueError, match=REFUSED):
        train_step.step(state, np.ones((M, 2), np.float32))
    assert not state.params["w"].is_deleted()


def test_refused_in_chunks_that_would_not_be_all_workers():
    """Also where no rule compares: the sum would be over the chunk."""
    tx = sasg_jax.sgd(0.1, num_workers=M)
    train_step = sasg_jax.make_train_step(_loss(_psum), tx, num_workers=M, chunk_size=2)
    with pytest.raises(ValueError, match=REFUSED):
        train_step.step(train_step.init({"w": jnp.ones(3)}), np.ones((M, 2), np.float32))


@pytest.mark.parametrize("driver", ["vmap", "shard_map"])
def test_right_where_all_always_send(driver):
    """A gradient that depends on the mean over workers, with statistics that they share."""

    def loss(params, batch, *, model_state):
        mean = lax.pmean(batch, AXIS)
        return jnp.sum(params * batch * mean), model_state + mean.sum()

    train_step = sasg_jax.make_train_step(
        loss, sasg_jax.sgd(0.5, num_workers=M), num_workers=M, driver=driver, has_model_state=True
    )
    batch = np.arange(M * 3, dtype=np.float32).reshape(M, 3)
    state = train_step.init(jnp.ones(3), jnp.zeros(()))
    state, info = train_step.step(state, batch)
    np.testing.assert_allclose(state.params, 1 - 0.5 * batch.mean(0) ** 2, rtol=1e-6)
    np.testing.assert_allclose(state.model_state, [batch.mean(0).sum()] * M, rtol=1e-6)
    np.testing.assert_allclose(info.loss, batch @ batch.mean(0), rtol=1e-6)
