"""One worker's round, under a map that a user writes."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import problems
from problems import LEARNING_RATE, METHODS, M

import sasg_jax


def test_a_workers_round_under_ones_own_map_is_that_of_the_train_step():
    """Of public names only: what belongs to a worker is the optimiser state's own parts, the model
    states, the keys and the direction's state."""
    tx = METHODS["sasg"](LEARNING_RATE, num_workers=M, history=1, alpha=30.0)

    def loss_fn(params, batch, *, model_state):
        mean = 0.5 * model_state["mean"] + batch["w"].mean()
        return problems.quadratic_loss(params, batch), {"mean": mean}

    direction = sasg_jax.gradient(loss_fn, has_model_state=True)
    train_step = sasg_jax.make_train_step(direction, tx, num_workers=M)
    start = train_step.init(problems.quadratic_params(), {"mean": jnp.zeros(())})
    axes = sasg_jax.TrainState(
        params=None,
        opt_state=sasg_jax.worker_axes(start.opt_state),
        model_state=0,
        keys=0,
        direction=0,
    )
    info_axes: Any = sasg_jax.RoundInfo(*[0] * 5, threshold=None, sent_down=None, aux=0)  # pyright: ignore

    def by_hand(state, batch, present):
        return jax.vmap(
            lambda state, batch: sasg_jax.worker_round(
                direction, tx, state, batch, present, axis_name="workers"
            ),
            in_axes=(axes, 0),
            out_axes=(axes, info_axes),
            axis_name="workers",
        )(state, batch)

    present = np.random.default_rng(1).random((6, M)) < 0.8
    rounds = problems.centres(rounds=6, seed=1), present
    got = jax.jit(problems.scan_rounds(by_hand))(start, rounds)
    want = jax.jit(problems.scan_rounds(train_step.step))(start, rounds)
    chex.assert_trees_all_equal(got, want)
    assert 0 < want[1].uploaded[1:].mean() < present[1:].mean()


def test_mean_model_state():
    """Counters and keys are worker 0's."""
    state = {
        "mean": jnp.array([[1.0, 2.0], [3.0, 6.0]]),
        "count": jnp.array([7, 8]),
        "key": jax.random.split(jax.random.key(0)),
    }
    got = sasg_jax.mean_model_state(state)
    assert got["mean"].tolist() == [2.0, 4.0]
    assert int(got["count"]) == 7
    assert got["key"] == state["key"][0]
    assert sasg_jax.mean_model_state(()) == ()
