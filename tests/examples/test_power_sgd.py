"""PowerSGD against a NumPy loop, and what a compressor with a mean inside goes with."""

import jax
import numpy as np
import optax
import problems
import pytest
from problems import M

import sasg_jax
from examples import power_sgd

RANK, RATE, ROUNDS = 2, 0.2, 12


def test_equals_a_loop():
    centres = problems.centres(rounds=ROUNDS)
    tx = sasg_jax.pipeline(
        sasg_jax.aggregate(power_sgd.power_sgd(RANK), num_workers=M),
        optax.sgd(RATE, momentum=0.9),
    )
    step = sasg_jax.make_train_step(problems.quadratic_loss, tx, num_workers=M)
    state, _ = problems.scan_rounds(step.step)(step.init(problems.quadratic_params()), (centres,))

    w = problems.to_numpy(problems.quadratic_params())
    momentum = {name: np.zeros_like(x) for name, x in w.items()}
    e = np.zeros((M, 4, 6), np.float32)
    # "b", a vector, is the first tensor and "w" the second.
    q = np.asarray(jax.random.normal(jax.random.fold_in(jax.random.key(0), 1), (6, RANK)))
    for t in range(ROUNDS):
        x = w["w"] - centres["w"][t] + e
        p, _ = np.linalg.qr((x @ q).mean(0))
        q = (x.transpose(0, 2, 1) @ p).mean(0)
        e = x - p @ q.T
        mean = {"b": (w["b"] - centres["b"][t]).mean(0), "w": p @ q.T}
        for name in w:
            momentum[name] = 0.9 * momentum[name] + mean[name]
            w[name] = w[name] - RATE * momentum[name]
    residual = state.opt_state.aggregate.worker.feedback.residual
    for name in w:
        np.testing.assert_allclose(state.params[name], w[name], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(residual["w"], e, rtol=1e-3, atol=1e-5)
    assert not residual["b"].any()


def test_counts_both_means():
    tx = sasg_jax.aggregate(power_sgd.power_sgd(RANK), num_workers=M)
    ledger = sasg_jax.Ledger(tx.init(problems.quadratic_params()))
    ledger.record(np.ones(M, bool))
    assert ledger.uplink_bytes == M * 4 * (6 + RANK * (4 + 6))


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("rule", sasg_jax.every(2)),
        ("silence", "reuse"),
        ("downlink", sasg_jax.top_k(0.5)),
        ("exchange", "gather"),
        ("feedback", sasg_jax.reconstruction()),
    ],
)
def test_what_a_mean_inside_does_not_go_with(argument, value):
    with pytest.raises(ValueError, match=f"^Expected {argument}="):
        sasg_jax.aggregate(power_sgd.power_sgd(RANK), num_workers=M, **{argument: value})
