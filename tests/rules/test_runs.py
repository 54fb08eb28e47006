"""Every rule, with all that a silent worker may count as, one way and both: 300 rounds beside the
NumPy oracle; and what is kept is conserved, whoever carries it."""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import problems
import pytest
from oracle import Measured, OwnPeriod
from problems import ALPHA, DENSITY, LEARNING_RATE, M

import sasg_jax
from sasg_jax.exchanges import shards
from sasg_jax.rules import SILENCES
from sasg_jax.states import find_state

ROUNDS = 300
TOP_K = sasg_jax.top_k(DENSITY)
# Of all 30 entries 12: fewer would be written as they are.
CODED = sasg_jax.top_k(0.4, scope="tree", values="sign", indices="elias_fano")


class Case(NamedTuple):
    """One rule, twice: made by the library, and as arguments of the oracle."""

    rule: sasg_jax.Rule
    oracle: dict[str, Any]


RULES = {
    "always": Case(sasg_jax.always(), {}),
    "every": Case(sasg_jax.every(3), {"turn": (3, True)}),
    "paper": Case(sasg_jax.innovation(ALPHA), {"alpha": ALPHA}),
    "innovation": Case(
        sasg_jax.innovation(theta=0.05, max_staleness=4, look_every=3),
        {"own_period": OwnPeriod(0.05, 4, 3)},
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
        sasg_jax.held_rate(0.55, sasg_jax.innovation()),
        {"measured": Measured("innovation", 0, 10**6, rate=0.55)},
    ),
    "held_residual_norm": Case(
        sasg_jax.held_rate(0.25, sasg_jax.residual_norm(), gain=0.2),
        {"measured": Measured("residual_norm", 0, 10, rate=0.25, gain=0.2)},
    ),
}
EVERY_DAY = [("innovation", "keep", True), ("held_innovation", "keep", False)]
EVERY_DAY += [("residual_norm", "keep", False), ("message_share", "reuse", True)]
EVERY_DAY += [("direction_change", "drop", False)]
CASES = [(name, silence, ways) for name in RULES for silence in SILENCES for ways in (False, True)]


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
    assert name == "always" or 0.1 < want.uploaded.mean() < 0.9
    np.testing.assert_array_equal(infos.uploaded, want.uploaded)
    np.testing.assert_allclose(infos.innovation, want.innovation, rtol=2e-3, atol=1e-6)
    close = functools.partial(chex.assert_trees_all_close, rtol=0, atol=2e-5)
    close(state.params, want.params)
    residual = find_state(state.opt_state).worker.feedback.residual
    close(residual, jax.tree.map(lambda *xs: np.stack(xs), *want.residuals))


# What is kept is conserved ------------------------------------------------------------------------

SHORT = 12
PRESENT = np.random.default_rng(5).random((SHORT, M)) < 0.8
ABSENT: dict[str, Any] = {"present": PRESENT}


def _adds_up():
    """What the server's steps come to, in its state; they pass as they are."""

    def update(updates, state, params=None):
        return updates, jax.tree.map(lambda t, u: t + u.astype(jnp.float32), state, updates)

    zeros = lambda params: jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    return optax.GradientTransformation(zeros, update)


def _kept(
    rule="innovation", exchange="lazy", driver="vmap", optimizer="sgd", **more: Any
) -> dict[str, Any]:
    return {"rule": rule, "exchange": exchange, "driver": driver, "optimizer": optimizer} | more


CONSERVING = [
    *(_kept(exchange=exchange) for exchange in ("gather", "lazy", "relay", "server")),
    _kept(exchange="server", two_way=True),
    _kept(exchange="sharded", two_way=True, driver="shard_map"),
    _kept(rule="every", optimizer="momentum"),
    _kept(rule="residual_norm", optimizer="adamw", **ABSENT),
    _kept(rule="held_innovation", dtype=jnp.bfloat16, **ABSENT),
    _kept(rule="every", exchange="server", two_way=True, compressor=CODED),
    _kept(rule="every", exchange="sharded", two_way=True, driver="shard_map", compressor=CODED),
]
SLOW_CONSERVING = [
    _kept(rule, exchange, driver, two_way=two_way)
    for rule in ("innovation", "paper", "message_share", "direction_change")
    for exchange in ("gather", "lazy", "relay", "server", "sharded")
    for driver in ("vmap", "chunks", "shard_map", "pmap")
    for two_way in (False, True)
    if two_way <= (exchange in ("server", "sharded"))
    and (driver, exchange) != ("chunks", "sharded")
]
SLOW_CONSERVING += [
    _kept("every", exchange, driver, compressor=CODED)
    for exchange in ("gather", "lazy", "relay", "server", "sharded")
    for driver in ("vmap", "shard_map", "pmap")
]
OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.02, momentum=0.9),
    "adamw": optax.adamw(0.01),
}


def _named(case):
    more = ["two_way"] * case.get("two_way", False) + ["coded"] * ("compressor" in case)
    return "-".join([*(x for x in case.values() if isinstance(x, str)), *more])


@pytest.mark.parametrize(
    "case",
    [*CONSERVING, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW_CONSERVING)],
    ids=_named,
)
def test_what_is_kept_is_conserved(case):
    """Σ steps + what the server has left + mean residual = Σ directions, mean over workers: those
    of who was there."""
    two_way, dtype = case.get("two_way", False), case.get("dtype", jnp.float32)
    compressor = case.get("compressor", TOP_K)
    tx = sasg_jax.pipeline(
        sasg_jax.aggregate(
            compressor,
            RULES[case["rule"]].rule,
            num_workers=M,
            silence="keep",
            exchange=case["exchange"],
            downlink=compressor if two_way else None,
        ),
        _adds_up(),
        OPTIMIZERS[case["optimizer"]],
    )
    driver = case["driver"]
    train_step = sasg_jax.make_train_step(
        problems.quadratic_loss,
        tx,
        num_workers=M,
        driver="vmap" if driver == "chunks" else driver,
        chunk_size=3 if driver == "chunks" else None,  # with a remainder
        donate=False,
    )
    state = train_step.init(problems.quadratic_params(dtype))
    centres = jax.tree.map(lambda x: x.astype(dtype), problems.centres(rounds=SHORT))
    given = jax.tree.map(lambda x: np.zeros(x.shape[1:], np.float64), centres)
    uploads = 0
    for t in range(SHORT):
        present = case["present"][t] if "present" in case else None
        here = np.ones(M, bool) if present is None else present
        batch, params = problems.at(centres, t), state.params
        state, info = jax.block_until_ready(train_step.step(state, batch, present))
        assert info.finite.all()
        uploads += int(info.uploaded.sum())
        for name in given:
            g = (np.asarray(params[name]) - np.asarray(batch[name])).astype(np.float64)
            given[name] += g * here.reshape(M, *[1] * (g.ndim - 1))
    assert uploads < SHORT * M  # or nobody has kept anything
    ours = find_state(state.opt_state)
    left = ours.server.downlink_feedback.residual if two_way else None
    if case["exchange"] == "sharded" and two_way:
        left = shards.join(left, state.params)
    total = state.opt_state.after[1]
    for name in given:
        got = np.asarray(total[name], np.float64)
        got += np.asarray(ours.worker.feedback.residual[name], np.float64).mean(0)
        got += 0 if left is None else np.asarray(left[name], np.float64)
        tolerance = 1e-5 if dtype == jnp.float32 else 0.1
        np.testing.assert_allclose(got, given[name].mean(0), rtol=0, atol=tolerance)
