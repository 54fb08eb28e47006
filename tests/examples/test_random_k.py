"""Random-k against a NumPy loop that draws the same entries."""

import jax
import numpy as np
import problems
from problems import M

import sasg_jax
from examples import random_k

DENSITY, RATE, ROUNDS = 0.3, 0.2, 15


def _draws(key, sizes):
    """The entries of each tensor in each round. ``# shape=(ROUNDS, k)``"""

    def draw(round):
        keys = jax.random.split(jax.random.fold_in(key, round), len(sizes))
        return {
            name: jax.random.choice(keys[i], size, (int(DENSITY * size),), replace=False)
            for i, (name, size) in enumerate(sizes.items())
        }

    return problems.to_numpy(jax.jit(jax.vmap(draw))(np.arange(ROUNDS)))


def test_equals_a_loop():
    """All workers draw the same entries, from the key of the round, and keep the rest."""
    key, centres = jax.random.key(7), problems.centres(rounds=ROUNDS)
    tx = sasg_jax.compressed_sgd(RATE, random_k.random_k(DENSITY), num_workers=M, key=key)
    step = sasg_jax.make_train_step(problems.quadratic_loss, tx, num_workers=M)
    state, _ = problems.scan_rounds(step.step)(step.init(problems.quadratic_params()), (centres,))

    w = problems.to_numpy(problems.quadratic_params())
    e = {name: np.zeros((M, x.size), np.float32) for name, x in w.items()}
    draws = _draws(key, {name: w[name].size for name in sorted(w)})
    for t in range(ROUNDS):
        for name in w:
            size, drawn = w[name].size, draws[name][t]
            step_taken = np.zeros(size, np.float32)
            for m in range(M):
                p = e[name][m] + RATE * (w[name] - centres[name][t, m]).ravel()
                step_taken[drawn] += p[drawn] / M
                p[drawn] = 0
                e[name][m] = p
            w[name] = w[name] - step_taken.reshape(w[name].shape)
    residual = state.opt_state.worker.feedback.residual
    for name in w:
        np.testing.assert_allclose(state.params[name], w[name], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(residual[name].reshape(M, -1), e[name], rtol=1e-4, atol=1e-6)


def test_is_a_sum_of_values_alone():
    tx = sasg_jax.compressed_sgd(
        RATE, random_k.random_k(DENSITY), num_workers=M, key=jax.random.key(0)
    )
    ledger = sasg_jax.Ledger(tx.init(problems.quadratic_params()))
    ledger.record(np.ones(M, bool))
    values = 4 * (1 + 7)  # bytes of floor(0.3 * 6) and floor(0.3 * 24) entries
    assert tx.method.exchange.name == "psum"
    assert ledger.uplink_bytes == M * values
    assert ledger.sent_bytes == (2 * values * (M - 1) // M,) * M
