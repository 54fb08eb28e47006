"""A server that is silent where there is little to say: what it keeps, sends, tells and counts."""

import dataclasses

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from problems import M

import sasg_jax
from sasg_jax.exchanges import shards
from sasg_jax.states import find_state

ROUNDS, RATE, SIZE = 24, 0.1, 40
TOP_K = sasg_jax.top_k(0.25)
RULES = {
    "every": sasg_jax.every(3),
    "residual_norm": sasg_jax.residual_norm(1.5, history=4, max_staleness=6),
    "message_share": sasg_jax.message_share(0.72, max_staleness=6),
    "direction_change": sasg_jax.direction_change(2.0, max_staleness=6),
    "held_rate": sasg_jax.held_rate(0.4, sasg_jax.message_share()),
}
CENTRES = np.random.default_rng(3).normal(size=(ROUNDS, M, SIZE)).astype(np.float32)


def _step(rule, driver="vmap", exchange="server", downlink=TOP_K, **parts):
    tx = sasg_jax.compressed_sgd(
        RATE,
        sasg_jax.identity(),
        num_workers=M,
        downlink=downlink,
        downlink_rule=rule,
        exchange=exchange,
        **parts,
    )
    chunked = driver == "chunks"
    return sasg_jax.make_train_step(
        problems.quadratic_loss,
        tx,
        num_workers=M,
        driver="vmap" if chunked else driver,
        chunk_size=3 if chunked else None,
        donate=False,
    )


def _run(train_step, centres=CENTRES):
    """The state after each round, and who sent."""
    state = train_step.init({"w": np.zeros(SIZE, np.float32)})
    states, sent = [state], []
    for batch in centres:
        state, info = jax.block_until_ready(train_step.step(state, {"w": batch}))
        states.append(state)
        sent.append(bool(info.sent_down))
    return states, sent


class _Loop:
    """The server's half in NumPy, of dense workers that always send."""

    def __init__(self, name):
        self.name, self.residual = name, np.zeros(SIZE, np.float32)
        self.steps, self.last, self.staleness = np.zeros(4), np.zeros(SIZE), 10**6
        self.log, self.started = 0.0, False

    def _compress(self, p):
        sent = np.zeros_like(p)
        largest = np.argsort(-np.abs(p), kind="stable")[: SIZE // 4]
        sent[largest] = p[largest]
        return sent, p - sent

    def _wants(self, t, step, p):
        square = lambda x: float(np.sum(np.square(x, dtype=np.float64)))
        share = (square(p) - square(self._compress(p)[1])) / square(p)
        if self.name == "every":
            return t % 3 == 0
        if self.name == "held_rate":  # no longer forced after the first of its own rounds
            if self.staleness >= 10:
                return True
            threshold = self.log if self.started else np.log(share)
            wants = not self.started or np.log(share) > threshold
            self.log, self.started = threshold + 0.3 * (wants - 0.4), True
            return wants
        if t % 6 == 0 or self.staleness >= 6:
            return True
        if self.name == "residual_norm":
            return square(p) > 1.5 * self.steps.mean()
        if self.name == "message_share":
            return share > 0.72
        return square(step - self.last) > 2.0 * square(step)

    def round(self, t, step):
        p = step + self.residual
        sends = self._wants(t, step, p)
        sent, self.residual = self._compress(p) if sends else (np.zeros_like(p), p)
        self.staleness = 1 if sends else self.staleness + 1
        self.last = step if sends else self.last
        self.steps = np.append(self.steps[1:], np.sum(np.square(sent)))
        return sent, sends


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("driver", ["vmap", "chunks", "shard_map"])
def test_against_a_loop(name, driver):
    states, sent = _run(_step(RULES[name], driver))
    loop, w = _Loop(name), np.zeros(SIZE, np.float32)
    for t in range(ROUNDS):
        down, sends = loop.round(t, np.float32(RATE) * (w - CENTRES[t].mean(0)))
        w = w - down
        assert sent[t] == sends, t
        np.testing.assert_allclose(states[t + 1].params["w"], w, atol=2e-6)
    left = find_state(states[-1].opt_state).server.downlink_feedback.residual["w"]
    np.testing.assert_allclose(left, loop.residual, atol=2e-6)
    assert 0.2 < np.mean(sent) < 0.9


@pytest.mark.parametrize("name", ["every", "message_share"])
@pytest.mark.parametrize("driver", ["vmap", "shard_map"])
def test_shards_send_where_one_of_them_would(name, driver):
    """Each decides for its own part; nothing is lost."""
    states, sent = _run(_step(RULES[name], driver, "sharded"))
    given = np.zeros(SIZE)
    for t in range(ROUNDS):
        w = np.asarray(states[t].params["w"])
        given += RATE * (w - CENTRES[t].mean(0))
        assert sent[t] == bool(np.any(states[t + 1].params["w"] != w))
    ours = find_state(states[-1].opt_state).server
    left = shards.join(ours.downlink_feedback.residual, states[-1].params)["w"]
    total = left - np.asarray(states[-1].params["w"])
    np.testing.assert_allclose(total, given, atol=1e-5)
    assert ours.downlink_rule.staleness.shape == (M,)


def test_always_is_as_before():
    with_rule = _step(sasg_jax.always())
    state = with_rule.init({"w": np.zeros(SIZE, np.float32)})
    assert find_state(state.opt_state).server.downlink_rule == ()
    assert find_state(state.opt_state).wire.downlink_flag_bytes == 0
    _, sent = _run(with_rule, CENTRES[:3])
    assert sent == [True] * 3


@pytest.mark.parametrize("driver", ["vmap", "shard_map"])
def test_a_step_that_is_not_finite_is_told_at_once_and_leaves_no_trace(driver):
    """Also in a round in which the server would be silent: messages that decode to no numbers."""
    parts = {"downlink": TOP_K, "downlink_rule": sasg_jax.every(4), "num_workers": M}
    identity = sasg_jax.identity()

    def decompress_sum(messages, like, key):
        total = identity.decompress_sum(messages, like, key)
        return jax.tree.map(lambda x: jnp.where(jnp.abs(x) > 1e15, jnp.inf, x), total)

    breaks = dataclasses.replace(identity, decompress_sum=decompress_sum)
    tx = sasg_jax.pipeline(sasg_jax.aggregate(breaks, **parts), optax.sgd(RATE))
    train_step = sasg_jax.make_train_step(
        problems.quadratic_loss, tx, num_workers=M, driver=driver, donate=False
    )
    state = train_step.init({"w": np.zeros(SIZE, np.float32)})
    huge = np.full((M, SIZE), -1e17, np.float32)
    infos = []
    for batch in (CENTRES[0], CENTRES[1], huge, CENTRES[3], CENTRES[4]):
        before = state
        state, info = jax.block_until_ready(train_step.step(state, {"w": batch}))
        infos.append((bool(info.sent_down), bool(info.finite.all())))
        if batch is huge:
            server = lambda state: find_state(state.opt_state).server
            np.testing.assert_array_equal(state.params["w"], before.params["w"])
            for new, old in zip(server(state)[:3], server(before)[:3], strict=True):
                jax.tree.map(np.testing.assert_array_equal, new, old)
    assert infos == [(True, True), (False, True), (True, False), (False, True), (True, True)]


@pytest.mark.parametrize(("exchange", "tells"), [("server", M - 1), ("sharded", M * (M - 1))])
def test_only_a_flag_moves_where_it_is_silent(exchange, tells):
    """The ledger counts what the compiled program moves, silent or not."""
    train_step = _step(sasg_jax.every(2), "shard_map", exchange)
    state = train_step.init({"w": np.zeros(SIZE, np.float32)})
    batch = {"w": jnp.asarray(CENTRES[0])}
    compiled = train_step.step.lower(state, batch).compile()
    moved = []
    for _ in range(2):
        (state, info), links = hlo.moved(compiled, state, batch, num_devices=M)
        ledger = sasg_jax.Ledger(state.opt_state)
        ledger.record(info.uploaded, sent_down=info.sent_down)
        assert (ledger.sent_bytes, ledger.received_bytes) == links
        size = find_state(state.opt_state).wire.downlink_bytes
        assert ledger.downlink_bytes == M * (1 + size * bool(info.sent_down))
        moved.append(sum(links.sent))
    step = find_state(state.opt_state).wire.moved_downlink_bytes
    assert moved[0] - moved[1] == tells * step


def test_ledger_needs_to_be_told():
    ledger = sasg_jax.Ledger(_step(sasg_jax.every(2)).init({"w": np.zeros(SIZE)}).opt_state)
    everybody = np.ones((2, M), bool)
    for wrong in (None, [True], np.ones(3, bool), np.ones(2)):
        with pytest.raises(ValueError, match=r"^Expected sent_down to be of dtype bool and shape"):
            ledger.record(everybody, sent_down=wrong)
    assert ledger.rounds == ledger.steps == 0
    ledger.record(everybody, sent_down=np.array([True, False]))
    assert (ledger.rounds, ledger.steps) == (2, 1)
    again = sasg_jax.Ledger.from_dict(ledger.to_dict())
    assert again.downlink_bytes == ledger.downlink_bytes


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ({"downlink": None}, "to be None for downlink=identity()"),
        ({"rule": sasg_jax.innovation()}, "to be one that compares no directions at two parame"),
        ({"rule": 3}, "to be made by sasg_jax.every, sasg_jax.residual_norm"),
    ],
)
def test_what_it_does_not_go_with(parts, why):
    with pytest.raises(ValueError, match=r"^Expected downlink_rule=") as error:
        _step(**{"rule": sasg_jax.every(2), "exchange": None, **parts})
    assert why in str(error.value)
