"""The server's half of a round: its memory, the mean, and the way down."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import problems
import pytest
from problems import M

import sasg_jax
from sasg_jax.server import init_server, replace_messages

PARAMS = problems.quadratic_params()


def test_replaces_the_messages_that_arrived():
    old = {"values": jnp.arange(12.0).reshape(4, 3), "n": jnp.arange(4)}
    fresh = jax.tree.map(lambda x: -x - 1, old)
    got = replace_messages(old, fresh, jnp.array([True, False, False, True]))
    want = {
        "values": np.array([[-1, -2, -3], [3, 4, 5], [6, 7, 8], [-10, -11, -12]], np.float32),
        "n": np.array([-1, 1, 2, -4], np.int32),
    }
    chex.assert_trees_all_equal(got, want)


@pytest.mark.parametrize("compressor", [sasg_jax.identity(), sasg_jax.top_k(0.25)])
def test_memory_of_the_server(compressor):
    """One message of each worker where workers may be silent; none where they never are."""
    rule = sasg_jax.innovation(1.0, history=7)

    def init(rule, downlink, keep_params):
        return init_server(
            compressor, rule, downlink, PARAMS, num_workers=M, keep_params=keep_params
        )

    state = init(rule, sasg_jax.top_k(0.1), True)
    message, _, _ = compressor.compress(PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        state.messages, jax.tree.map(lambda x: jnp.stack([x] * M), message)
    )
    chex.assert_shape(state.history, (7,))
    chex.assert_trees_all_equal(state.downlink_residual, PARAMS)
    chex.assert_trees_all_equal(state.previous_params, PARAMS)

    state = init(sasg_jax.always(), sasg_jax.identity(), False)
    assert state.messages == state.downlink_residual == state.previous_params == ()
    assert init(rule, sasg_jax.identity(), False).downlink_residual == ()


def test_a_round_is_the_oracles_loop():
    """The update is minus the mean of everybody's last message, fresh or stale."""
    density, rate = 0.25, 0.5
    tx = sasg_jax.sasg(rate, num_workers=M, density=density, history=1, alpha=1e9)
    run = problems.start(tx, PARAMS)
    step = problems.map_workers(tx, run)
    first, second = (problems.centres(seed=seed) for seed in (1, 2))
    run = step(run, first)  # everybody uploads in round 0

    def message(centre, params):
        gradient = {k: rate * (np.asarray(params[k]) - centre[k]) for k in params}
        return oracle.compress(gradient, density)

    messages = [message(problems.at(first, m), problems.to_numpy(PARAMS)) for m in range(M)]
    decoded = [oracle.decode(x, problems.to_numpy(PARAMS)) for x in messages]
    mean = {k: np.mean([tree[k] for tree in decoded], axis=0) for k in PARAMS}
    want = {k: PARAMS[k] - mean[k] for k in PARAMS}
    chex.assert_trees_all_close(run.params, want, atol=1e-6)

    run = step(run, second)  # nobody does in round 1, and the same step is made again
    assert not np.any(sasg_jax.diagnostics(run.opt_state).uploaded)
    want = {k: PARAMS[k] - 2 * mean[k] for k in PARAMS}
    chex.assert_trees_all_close(run.params, want, atol=1e-6)
