"""The rule without units against a NumPy loop."""

import jax
import numpy as np
import optax
import oracle
import problems
from problems import M

import sasg_jax
from examples import relative_rule

THETA, CAP, RATE, DENSITY, ROUNDS = 0.1, 5, 0.2, 0.5, 30


def test_equals_a_loop():
    # Steps that are large at first and small in the end.
    centres = jax.tree.map(lambda x: x + 2, problems.centres(rounds=ROUNDS))
    tx = sasg_jax.pipeline(
        sasg_jax.aggregate(
            sasg_jax.top_k(DENSITY), relative_rule.relative(THETA, CAP), num_workers=M
        ),
        optax.sgd(RATE),
    )
    step = sasg_jax.make_train_step(problems.quadratic_loss, tx, num_workers=M)
    state, infos = problems.scan_rounds(step.step)(
        step.init(problems.quadratic_params()), (centres,)
    )

    w = problems.to_numpy(problems.quadratic_params())
    stale, tau = [w] * M, [CAP] * M
    e = [oracle.zeros_like(w) for _ in range(M)]
    uploaded, forced = np.zeros((ROUNDS, M), bool), np.zeros((ROUNDS, M), bool)
    ratio = np.zeros((ROUNDS, M), np.float32)
    for t in range(ROUNDS):
        total = oracle.zeros_like(w)
        for m in range(M):
            g = {name: w[name] - centres[name][t, m] for name in w}
            again = {name: stale[m][name] - centres[name][t, m] for name in w}
            ratio[t, m] = oracle.squared_norm(oracle.subtract(g, again)) / oracle.squared_norm(g)
            forced[t, m] = tau[m] >= CAP
            uploaded[t, m] = forced[t, m] or ratio[t, m] > THETA
            p = oracle.add(g, e[m])  # silent or not: nothing is lost
            tau[m] = 1 if uploaded[t, m] else tau[m] + 1
            if uploaded[t, m]:
                sent = oracle.decode(oracle.compress(p, DENSITY), p)
                total, p, stale[m] = oracle.add(total, sent), oracle.subtract(p, sent), w
            e[m] = p
        w = {name: w[name] - np.float32(RATE) * total[name] / M for name in w}

    assert not uploaded.all()
    assert (uploaded & ~forced).any()  # by the rule
    assert forced[1:].any()  # by the cap
    np.testing.assert_array_equal(infos.uploaded, uploaded)
    np.testing.assert_allclose(infos.innovation, ratio, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(infos.threshold, THETA)
    for name in w:
        np.testing.assert_allclose(state.params[name], w[name], rtol=1e-4, atol=1e-6)
