"""Every rule, with all that a silent worker may count as, one way and both: 300 rounds beside the
NumPy oracle; and what is kept is conserved, whoever carries it."""

import functools
from typing import Any, NamedTuple

import chex
import jax
import numpy as np
import oracle
import problems
import pytest
from oracle import Measured
from problems import ALPHA, DENSITY, LEARNING_RATE, M

import sasg_jax
from sasg_jax.states import find_state

ROUNDS = 300
TOP_K = sasg_jax.top_k(DENSITY)


class Case(NamedTuple):
    """One rule, twice: made by the library, and as arguments of the oracle."""

    rule: sasg_jax.Rule
    oracle: dict[str, Any]


RULES = {
    "always": Case(sasg_jax.always(), {}),
    "every": Case(sasg_jax.every(3), {"turn": (3, True)}),
    "paper": Case(sasg_jax.innovation(ALPHA), {"alpha": ALPHA}),
    "innovation": Case(
        sasg_jax.innovation(theta=0.02), {"measured": Measured("innovation", 0.02, 4)}
    ),
    "message_share": Case(
        sasg_jax.message_share(0.45, max_staleness=5),
        {"measured": Measured("message_share", 0.45, 5)},
    ),
    "residual_norm": Case(
        sasg_jax.residual_norm(1.3, history=10, max_staleness=6),
        {"measured": Measured("residual_norm", 1.3, 6)},
    ),
    "direction_change": Case(
        sasg_jax.direction_change(2.0, max_staleness=7),
        {"measured": Measured("direction_change", 2.0, 7)},
    ),
    "held_innovation": Case(
        sasg_jax.held_rate(0.4, sasg_jax.innovation()),
        {"measured": Measured("innovation", 0, 4, rate=0.4)},
    ),
    "held_residual_norm": Case(
        sasg_jax.held_rate(0.25, sasg_jax.residual_norm(), gain=0.2),
        {"measured": Measured("residual_norm", 0, 10, rate=0.25, gain=0.2)},
    ),
}
EVERY_DAY = [("innovation", "keep", True), ("held_innovation", "keep", False)]
EVERY_DAY += [("residual_norm", "keep", False), ("message_share", "reuse", True)]
EVERY_DAY += [("direction_change", "drop", False)]
CASES = [
    (name, silence, ways)
    for name in RULES
    for silence in sasg_jax.rules.SILENCES
    for ways in (False, True)
]


@functools.cache
def _trace(name, silence, both_ways):
    images, labels = problems.softmax_batches(M, ROUNDS)
    return oracle.train(
        lambda m, t, params: oracle.softmax_grad(params, images[t, m], labels[t, m]),
        problems.softmax_params(),
        num_workers=M,
        rounds=ROUNDS,
        learning_rate=LEARNING_RATE,
        density=DENSITY,
        silence=silence,
        downlink_density=DENSITY if both_ways else None,
        **RULES[name].oracle,
    )


@pytest.mark.parametrize(
    "case",
    [case if case in EVERY_DAY else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
    ids=lambda case: "-".join([case[0], case[1], *["two_way"] * case[2]]),
)
def test_three_hundred_rounds_are_the_oracles(case):
    name, silence, both_ways = case
    tx = sasg_jax.compressed_sgd(
        LEARNING_RATE,
        TOP_K,
        RULES[name].rule,
        num_workers=M,
        silence=silence,
        downlink=TOP_K if both_ways else None,
    )
    train_step = sasg_jax.make_train_step(problems.softmax_loss, tx, num_workers=M)
    batches = problems.softmax_batches(M, ROUNDS)
    run = jax.jit(problems.scan_rounds(lambda state, *batch: train_step.step(state, batch)))
    state, infos = jax.device_get(run(train_step.init(problems.softmax_params()), batches))
    want = _trace(name, silence, both_ways)
    assert want.margin > 2e-6  # no choice hangs on rounding
    if "measured" in RULES[name].oracle or "alpha" in RULES[name].oracle:
        assert 0.005 < want.uploaded[want.innovation > 0].mean() < 0.99  # and there are some
    np.testing.assert_array_equal(infos.uploaded, want.uploaded)
    np.testing.assert_allclose(infos.innovation, want.innovation, rtol=2e-3, atol=1e-6)
    close = functools.partial(chex.assert_trees_all_close, rtol=0, atol=2e-5)
    close(state.params, want.params)
    residual = find_state(state.opt_state).worker.feedback.residual
    close(residual, jax.tree.map(lambda *xs: np.stack(xs), *want.residuals))
