"""A run whose messages are coded both ways, beside a loop in NumPy."""

import jax
import numpy as np
import problems
import pytest
from problems import M

import sasg_jax
from sasg_jax.states import find_state

ROUNDS, RATE, PERIOD, SIZE = 60, 0.3, 2, 40


def _send(p, density):
    """Signs of the largest entries of a vector, and their mean magnitude; the rest stays."""
    kept = int(density * p.size)
    largest = np.argsort(-np.abs(p), kind="stable")[:kept]
    sent = np.zeros_like(p)
    sent[largest] = np.where(p[largest] < 0, -1, 1) * np.abs(p[largest]).mean()
    return sent.astype(np.float32), (p - sent).astype(np.float32)


def _loop(centres, silence):
    """Workers send in turn; the server adds up, and sends in the same way."""
    w = np.zeros(SIZE, np.float32)
    residuals, left = [np.zeros_like(w) for _ in range(M)], np.zeros_like(w)
    last = [np.zeros_like(w) for _ in range(M)]
    for t in range(ROUNDS):
        messages = []
        for m in range(M):
            p = np.float32(RATE) * (w - centres[t, m])
            if (t + m) % PERIOD == 0:
                last[m], residuals[m] = _send(p + residuals[m], 0.25)
                messages.append(last[m])
            elif silence == "keep":
                residuals[m] = residuals[m] + p
            else:
                messages.append(last[m])
        step, left = _send(np.sum(messages, 0) / np.float32(M) + left, 0.5)
        w = w - step
    return w, residuals, left


@pytest.mark.parametrize("silence", ["keep", "reuse"])
@pytest.mark.parametrize("driver", ["vmap", "shard_map"])
def test_a_coded_run_is_the_loops(silence, driver):
    def coded(density):
        return sasg_jax.top_k(density, values="sign", indices="elias_fano")

    tx = sasg_jax.compressed_sgd(
        RATE,
        coded(0.25),
        sasg_jax.every(PERIOD),
        num_workers=M,
        silence=silence,
        downlink=coded(0.5),
    )
    train_step = sasg_jax.make_train_step(
        problems.quadratic_loss, tx, num_workers=M, driver=driver, donate=False
    )
    centres = np.random.default_rng(3).normal(size=(ROUNDS, M, SIZE)).astype(np.float32)
    state = train_step.init({"w": np.zeros(SIZE, np.float32)})
    for t in range(ROUNDS):
        state, _ = jax.block_until_ready(train_step.step(state, {"w": centres[t]}))
    w, residuals, left = _loop(centres, silence)
    ours = find_state(state.opt_state)
    np.testing.assert_allclose(state.params["w"], w, atol=2e-5)
    np.testing.assert_allclose(ours.worker.feedback.residual["w"], residuals, atol=2e-5)
    np.testing.assert_allclose(ours.server.downlink_feedback.residual["w"], left, atol=2e-5)
    if silence == "reuse":  # the server keeps messages as they came: M × (10 signs, a mean, ...)
        kept = sum(x.nbytes for x in jax.tree.leaves(ours.server.memory))
        assert kept == M * coded(0.25).message_size(state.params).bytes < M * 10 * 4
