"""LAG against a NumPy loop."""

import itertools

import numpy as np
import optax
import oracle
import problems
from problems import M

import sasg_jax
from examples import lag

XI, RATE, HISTORY, ROUNDS = 0.4, 0.1, 3, 40
CURVATURES = np.array([0.1, 0.5, 1, 4], np.float32)


def _loss(params, batch):
    curvature, centre = batch
    return curvature * problems.quadratic_loss(params, centre)


def test_equals_a_loop():
    """A worker sends what has changed; the server steps with the mean of all that it has got."""
    tx = sasg_jax.pipeline(
        sasg_jax.aggregate(
            sasg_jax.identity(),
            lag.lag(XI, RATE, HISTORY),
            feedback=sasg_jax.reconstruction(),
            num_workers=M,
        ),
        optax.sgd(RATE),
    )
    step = sasg_jax.make_train_step(_loss, tx, num_workers=M)
    centres = problems.centres()
    batch = CURVATURES, centres
    state, infos = problems.scan_rounds(lambda state, _: step.step(state, batch))(
        step.init(problems.quadratic_params()), (np.arange(ROUNDS),)
    )

    w = problems.to_numpy(problems.quadratic_params())
    h = [oracle.zeros_like(w) for _ in range(M)]
    path, uploaded = [w], np.zeros((ROUNDS, M), bool)
    for t in range(ROUNDS):
        recent = path[-HISTORY - 1 :]
        steps = sum(
            oracle.squared_norm(oracle.subtract(new, old))
            for old, new in itertools.pairwise(recent)
        )
        for m in range(M):
            g = {name: CURVATURES[m] * (w[name] - centres[name][m]) for name in w}
            change = oracle.squared_norm(oracle.subtract(g, h[m]))
            uploaded[t, m] = change >= XI / (RATE * M) ** 2 * steps
            if uploaded[t, m]:
                h[m] = g
        mean = {name: sum(x[name] for x in h) / np.float32(M) for name in w}
        w = {name: w[name] - np.float32(RATE) * mean[name] for name in w}
        path.append(w)

    assert uploaded[0].all()
    assert 0.2 < uploaded.mean() < 0.8
    np.testing.assert_array_equal(infos.uploaded, uploaded)
    for name in w:
        np.testing.assert_allclose(state.params[name], w[name], rtol=1e-4, atol=1e-5)
