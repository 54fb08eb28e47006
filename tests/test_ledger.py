"""Bytes and uploads, exact however long the run."""

import dataclasses
import json
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
import two_processes
from problems import METHODS, M

import sasg_jax
from sasg_jax.exchanges import EXCHANGES, Links

# 24 + 6 entries: 2 + 1 values at 10 %, with an index of one byte each.
DENSE = 4 * (24 + 6)
SPARSE_BYTES = 3 * (4 + 1)
WIRE = {
    "sgd": (DENSE, 32 * 30, 0, DENSE),
    "sparse_sgd": (SPARSE_BYTES, 32 * 3, 0, DENSE),
    "lasg": (DENSE, 32 * 30, 1, DENSE),
    "sasg": (SPARSE_BYTES, 32 * 3, 1, DENSE),
    "two_way": (SPARSE_BYTES, 32 * 3, 1, SPARSE_BYTES),
}


def _ledger(name="sasg", params=None, **kwargs):
    params = problems.quadratic_params() if params is None else params
    return sasg_jax.Ledger(METHODS[name](0.1, num_workers=M, **kwargs).init(params))


@pytest.mark.parametrize("name", METHODS)
def test_counts_by_hand(name):
    """Two rounds, three and one uploads, or all where nobody need tell; the way down goes to all
    four workers."""
    upload_bytes, paper_bits, flag, down = WIRE[name]
    ledger = _ledger(name)
    ledger.record(np.array([True, True, False, True]))
    ledger.record(jnp.array([False, False, True, False]))
    uploads = 4 if flag else 2 * M
    assert (ledger.rounds, ledger.uploads) == (2, uploads)
    assert ledger.paper_uplink_bits == uploads * paper_bits
    assert ledger.uplink_bytes == uploads * upload_bytes + 2 * M * flag
    assert ledger.downlink_bytes == 2 * M * down


def test_half_precision_parameters():
    ledger = _ledger(params=problems.quadratic_params(jnp.bfloat16))
    ledger.record([True] * M)
    assert ledger.uplink_bytes == M * 3 * (2 + 1) + M
    assert ledger.paper_uplink_bits == M * 32 * 3
    assert ledger.downlink_bytes == M * 2 * 30


@pytest.mark.parametrize(("size", "index_bytes"), [(256, 1), (257, 2), (65_536, 2), (65_537, 4)])
@pytest.mark.parametrize("name", ["sasg", "two_way"])
def test_upload_is_what_the_message_holds(name, size, index_bytes):
    """The server's memory of one worker's message has exactly that many bytes."""
    state: Any = METHODS[name](0.1, num_workers=M).init(jnp.zeros(size))
    memory = sum(x.nbytes for x in jax.tree.leaves(state.server.memory))
    ledger = sasg_jax.Ledger(state)
    ledger.record([True] * M)
    k = size // 10
    assert ledger.uplink_bytes - M == memory == M * k * (4 + index_bytes)
    down = k * (4 + index_bytes) if name == "two_way" else 4 * size
    assert ledger.downlink_bytes == M * down


def test_equals_the_sum_over_a_run():
    """Of a (rounds, M) array at once, of its rows, and counted by hand."""
    rounds = 10
    tx = sasg_jax.compressed_sgd(0.1, sasg_jax.top_k(0.1), sasg_jax.every(3), num_workers=M)
    train_step = sasg_jax.make_train_step(problems.quadratic_loss, tx, num_workers=M)
    start = train_step.init(problems.quadratic_params())
    state, infos = jax.lax.scan(train_step.step, start, problems.centres(rounds=rounds))
    by_round, at_once = sasg_jax.Ledger(start.opt_state), sasg_jax.Ledger(state.opt_state)
    at_once.record(infos.uploaded)
    for row in infos.uploaded:
        by_round.record(row)
    assert by_round.to_dict() == at_once.to_dict()
    uploads = [sum((t + m) % 3 == 0 for t in range(rounds)) for m in range(M)]
    assert by_round.uploads_by_worker == uploads == [4, 3, 3, 4]
    assert by_round.uplink_bytes == 14 * SPARSE_BYTES + rounds * M
    assert by_round.paper_uplink_bits == 14 * 32 * 3
    # Through any wrapper.
    wrapped = optax.chain(optax.clip(1.0), tx).init(problems.quadratic_params())
    assert sasg_jax.Ledger(wrapped).to_dict()["wire"] == by_round.to_dict()["wire"]


def test_exact_past_two_to_the_53():
    """Floats stop at 2**53 and int64 at 2**63."""
    saved = _ledger().to_dict()
    saved |= {
        "rounds_by_uploads": [1, 2**60, 0, 0, 2**60],
        "uploads_by_worker": [2**61] * 3 + [2**62],
        "presences": M * (2**61 + 1),
        "steps": 2**61 + 1,
    }
    ledger = sasg_jax.Ledger.from_dict(json.loads(json.dumps(saved)))
    ledger.record(np.array([True, False, False, False]))
    rounds, uploads = 2**61 + 2, 5 * 2**61 + 1
    assert ledger.rounds == rounds
    assert ledger.uploads == uploads
    assert ledger.uplink_bytes == uploads * SPARSE_BYTES + rounds * M
    assert ledger.downlink_bytes == rounds * M * DENSE
    assert ledger.paper_uplink_bits == uploads * 96
    # One upload of four is summed, 2 * 3/4 of the 16 bytes that 15 are packed into; 2**60 rounds
    # had one before, and as many four, which are gathered.
    assert ledger.sent_bytes == ((2**60 + 1) * 24 + 2**60 * 3 * 16 + rounds * 3,) * M
    assert json.loads(json.dumps(ledger.to_dict())) == ledger.to_dict()


def test_model_state_has_its_own_count():
    ledger = _ledger()
    model_state = {"mean": jnp.zeros((M, 7)), "count": jnp.zeros(M, jnp.int32)}
    ledger.record_model_state(model_state)
    ledger.record_model_state(model_state)
    assert ledger.model_state_bytes == 2 * M * (7 * 4 + 4)
    assert ledger.uplink_bytes == ledger.downlink_bytes == 0
    assert sasg_jax.Ledger.from_dict(ledger.to_dict()).model_state_bytes == 2 * M * 32


def test_restored_ledger_goes_on_counting():
    ledger = _ledger()
    ledger.record(np.ones((3, M), bool))
    restored = sasg_jax.Ledger.from_dict(json.loads(json.dumps(ledger.to_dict())))
    for one in (ledger, restored):
        one.record(np.zeros(M, bool))
    assert restored.to_dict() == ledger.to_dict()
    assert restored.uplink_bytes == ledger.uplink_bytes == 12 * SPARSE_BYTES + 16


# Other workers, and gradients ---------------------------------------------------------------------


def _resized():
    """Two rounds with four workers and one way, then three with two workers, which send 5 values of
    25 bytes, and both ways."""
    ledger = _ledger()
    ledger.record(np.array([[True, True, False, True], [False, False, True, False]]))
    ledger.record_model_state(np.zeros((M, 3), np.float32))
    two = sasg_jax.sasg(0.1, num_workers=2, density=0.2, downlink=sasg_jax.top_k(0.1))
    ledger.resize(two.init(problems.quadratic_params()), gradients_per_round=3)
    ledger.record(np.array([[True, False]] * 3), np.array([[True, False]] * 2 + [[True, True]]))
    return ledger


def test_goes_on_with_other_workers():
    """Each round counts as it was when it was recorded."""
    ledger = _resized()
    assert (ledger.rounds, ledger.uploads, ledger.presences, ledger.steps) == (5, 7, 12, 5)
    assert ledger.uplink_bytes == 4 * SPARSE_BYTES + 2 * M + 3 * 25 + (2 * 1 + 2)
    assert ledger.downlink_bytes == 2 * M * DENSE + 3 * 2 * SPARSE_BYTES
    assert ledger.paper_uplink_bits == 4 * 96 + 3 * 160
    assert ledger.model_state_bytes == M * 3 * 4
    assert ledger.gradients_per_worker == 2 * 1 + 3 * 3
    assert (ledger.uploads_by_worker, ledger.rounds_by_uploads) == ([3, 0], [0, 3, 0])
    assert ledger.sent_bytes == (3 * (16 + 2), 3)  # worker 0 is the server, whose upload stays


def test_what_was_before_is_kept():
    """By worker and by link, as a ledger that was never resized has it."""
    before = _ledger()
    before.record(np.array([[True, True, False, True], [False, False, True, False]]))
    before.record_model_state(np.zeros((M, 3), np.float32))
    ledger = _resized()
    (earlier,) = ledger.earlier
    assert earlier.to_dict() == before.to_dict()
    assert earlier.sent_bytes == before.sent_bytes
    earlier.record(np.ones(M, bool))  # which is nothing to the other
    assert ledger.earlier[0].to_dict() == before.to_dict()
    ledger.resize(_state_of(3))
    assert [one.rounds for one in ledger.earlier] == [2, 3]
    assert ledger.gradients_per_worker == 11
    ledger.record(np.ones(3, bool))
    assert ledger.gradients_per_worker == 14
    with pytest.raises(ValueError, match=r"^Expected uploaded to be .*shape \(3,\)"):
        ledger.record(np.ones(M, bool))


def _state_of(workers):
    return METHODS["sasg"](0.1, num_workers=workers).init(problems.quadratic_params())


def test_resized_ledger_is_restored():
    ledger = _resized()
    restored = sasg_jax.Ledger.from_dict(json.loads(json.dumps(ledger.to_dict())))
    for one in (ledger, restored):
        one.record(np.ones(2, bool))
    assert restored.to_dict() == ledger.to_dict()
    for name in ("uploads", "uplink_bytes", "downlink_bytes", "sent_bytes", "gradients_per_worker"):
        assert getattr(restored, name) == getattr(ledger, name)
    assert restored.earlier[0].uploads_by_worker == [1, 1, 1, 1]


def test_counts_gradients():
    state = _state_of(M)
    ledgers = sasg_jax.Ledger(state), sasg_jax.Ledger(state, gradients_per_round=8)
    for ledger in ledgers:
        ledger.record(np.ones((3, M), bool))
    assert [ledger.gradients_per_worker for ledger in ledgers] == [3, 24]
    values: list[Any] = [0, 1.5, None]
    for value in values:
        with pytest.raises(ValueError, match=rf"^Expected gradients_per_round={value} to be an in"):
            sasg_jax.Ledger(state, gradients_per_round=value)


@pytest.mark.parametrize("key", list(_ledger().to_dict()["wire"]))
def test_saved_earlier_counts_are_checked(key):
    saved = _resized().to_dict()
    del saved["earlier"][0]["wire"][key]
    with pytest.raises(ValueError, match=r"^Expected saved\['wire'\] to have the keys"):
        sasg_jax.Ledger.from_dict(saved)


# Bad arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "uploaded",
    [
        np.ones(M + 1, bool),
        np.ones(M),
        np.ones(M, np.int32),
        np.array(True),
        np.ones((2, 3, M), bool),
        np.ones((M, 2), bool),
    ],
    ids=lambda x: f"{x.dtype}{x.shape}",
)
def test_flags_of_another_shape_or_type(uploaded):
    ledger, right = _ledger(), np.ones(M, bool)
    before = ledger.to_dict()
    for name, flags in (("uploaded", (uploaded,)), ("present", (right, uploaded))):
        with pytest.raises(
            ValueError,
            match=rf"^Expected {name} to be of dtype bool and shape \(4,\) or \(rounds, 4\)",
        ):
            ledger.record(*flags)
    assert ledger.to_dict() == before


def test_presence_of_other_rounds():
    ledger = _ledger()
    with pytest.raises(ValueError, match=r"^Expected present to have the shape of uploaded, \(3"):
        ledger.record(np.ones((3, M), bool), np.ones((2, M), bool))
    assert ledger.rounds == 0


def test_state_without_ours():
    with pytest.raises(ValueError, match="exactly one state of sasg_jax"):
        sasg_jax.Ledger(optax.adam(0.1).init(jnp.zeros(3)))


@pytest.mark.parametrize("key", list(_ledger().to_dict()))
def test_saved_ledger_with_a_missing_count(key):
    saved = _ledger().to_dict()
    del saved[key]
    with pytest.raises(ValueError, match=rf"^Expected saved to have the keys \['{key}'\]"):
        sasg_jax.Ledger.from_dict(saved)


@pytest.mark.parametrize("value", [-1, 1.5, None, "3", True])
def test_saved_ledger_with_a_bad_count(value):
    saved = _ledger().to_dict() | {"uploads_by_worker": [0, 0, value, 0]}
    with pytest.raises(
        ValueError, match=rf"^Expected uploads_by_worker\[2\]={value!r} to be an integer of at le"
    ):
        sasg_jax.Ledger.from_dict(saved)


def test_saved_ledger_of_another_number_of_workers():
    saved = _ledger().to_dict() | {"rounds_by_uploads": [0] * M}
    with pytest.raises(ValueError, match=r"^Expected rounds_by_uploads=\[0, 0, 0, 0\] to have 5 "):
        sasg_jax.Ledger.from_dict(saved)


@pytest.mark.parametrize("change", [{"upload_bytes": None}, {"another": 3}, {"flag_bytes": -1}])
def test_saved_ledger_with_bad_sizes(change):
    saved = _ledger().to_dict()
    wire = {name: value for name, value in (saved["wire"] | change).items() if value is not None}
    with pytest.raises(ValueError, match=r"^Expected (saved|wire)\['"):
        sasg_jax.Ledger.from_dict(saved | {"wire": wire})


def test_saved_ledger_of_an_exchange_that_is_none_of_ours():
    """Counts as its own functions say, but what is saved has only its name."""
    gather = EXCHANGES["gather"]

    def twice(traffic):
        return Links(*([2 * moved for moved in side] for side in gather.links(traffic)))

    doubled = dataclasses.replace(gather, name="doubled", links=twice)
    ours, theirs = _ledger(exchange="gather"), _ledger(exchange=doubled)
    for ledger in (ours, theirs):
        ledger.record(np.ones(M, bool))
    assert theirs.sent_bytes == tuple(2 * sent - 3 for sent in ours.sent_bytes)
    assert ours.sent_bytes == (3 * 16 + 3,) * M
    with pytest.raises(ValueError, match=r"^Expected wire\['exchange'\]='doubled' to be one of '"):
        sasg_jax.Ledger.from_dict(theirs.to_dict())


# What the workers' links carry --------------------------------------------------------------------


def test_links_by_hand():
    """Rounds with uploads of workers 0 and 2, of worker 1, and of nobody; 15 bytes packed in 16."""
    flags = np.array([[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]], bool)

    def links(name="sasg", **kwargs):
        ledger = _ledger(name, **kwargs)
        ledger.record(flags)
        told = [[3 * 3] * M] * 2  # three rounds, to and from three others
        if kwargs["exchange"] in ("server", "relay"):  # a flag to the root, and from it all four
            told = [[3 * 3 * 4, 3, 3, 3], [3 * 3, 3 * 4, 3 * 4, 3 * 4]]
        return [
            [moved - flag for moved, flag in zip(*sides, strict=True)]
            for sides in zip((ledger.sent_bytes, ledger.received_bytes), told, strict=True)
        ]

    step = 3 * DENSE
    assert links(exchange="server") == [[3 * step, 16, 16, 0], [32, step, step, step]]
    assert links("two_way", exchange="server") == [[3 * 3 * 16, 16, 16, 0], [32, 48, 48, 48]]
    # Worker 0's upload goes to three, those of 1 and 2 to the two others that are not the root.
    assert links(exchange="relay") == [[7 * 16, 16, 16, 0], [32, 32, 32, 48]]
    assert links(exchange="gather") == [[2 * 3 * 16] * M] * 2
    # Two uploads of four are gathered; one is summed, which sends 2 * 3/4 of it.
    assert links(exchange="lazy") == [[3 * 16 + 24] * M] * 2
    # Shards of 6 and 2 entries: one value and index of each, 10 bytes in 12; 8 floats back.
    assert links(exchange="sharded") == [[2 * 3 * 12 + 3 * 3 * 32] * M] * 2


def test_relay_sends_uploads_down_instead_of_the_step():
    ledger = _ledger(exchange="relay")
    ledger.record(np.array([[True, False, True, False], [False] * M]))
    assert ledger.uplink_bytes == 2 * SPARSE_BYTES + 2 * M
    assert ledger.downlink_bytes == 2 * 3 * SPARSE_BYTES


def test_messages_of_refused_gradients_move_where_no_flag_says_so():
    """Without the rule there are no flags: an empty message moves like any other. Who is absent is
    known to all, and sends nothing."""
    ledger = _ledger("sparse_sgd", exchange="server")
    ledger.record(np.array([True, True, False, True]))
    assert ledger.sent_bytes == (3 * DENSE, 16, 16, 16)
    ledger.record(np.array([True, True, False, False]), np.array([True, True, True, False]))
    assert ledger.sent_bytes == (2 * 3 * DENSE, 32, 32, 16)
    assert (ledger.uploads, ledger.uploads_by_worker) == (7, [2, 2, 2, 1])
    assert (ledger.uplink_bytes, ledger.presences) == (7 * SPARSE_BYTES, 7)


def test_absent_workers_send_no_flag_to_the_paper_s_server():
    """Where there are flags an upload counts as it is reported."""
    ledger = _ledger()
    ledger.record(np.array([True, False, False, False]), np.array([True, True, False, False]))
    assert (ledger.uploads, ledger.presences) == (1, 2)
    assert ledger.uplink_bytes == SPARSE_BYTES + 2


# A rule that lets nobody upload -------------------------------------------------------------------

CAP = 3


def _rounds(text):
    return np.array([[flag == "1" for flag in row] for row in text.split()])


FORCED_ONLY = _rounds("1111 0000 0000 1111 0000 0000 1111 0000 0000")


def _warnings(ledger, *record):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ledger.record(*record)
    return [str(warning.message) for warning in caught]


def test_warns_of_a_rule_that_lets_nobody_upload():
    """Once, after six rounds in which workers were free to: in every third all are forced."""
    ledger = _ledger(max_staleness=CAP)
    assert not _warnings(ledger, FORCED_ONLY[:8])
    (message,) = _warnings(ledger, FORCED_ONLY[8])
    assert message.startswith("In 6 rounds in which it was asked the rule has let nobody upload")
    assert "every 3 rounds" in message
    assert "smaller alpha" in message
    assert not _warnings(ledger, np.tile(FORCED_ONLY, (9, 1)))


@pytest.mark.parametrize(
    "rounds",
    [
        "1111 0000 0100 1011 0000 0000 1111 0000 0000",  # worker 1 once when it was free
        "1111 1111 0000 0000 1111 0000 0000",
        "1111 1111 1111 1111 1111 1111 1111",
    ],
)
def test_does_not_warn_where_one_upload_was_not_forced(rounds):
    assert not _warnings(_ledger(max_staleness=CAP), _rounds(rounds))


def test_waits_anew_after_an_upload_that_was_not_forced():
    ledger = _ledger(max_staleness=CAP)
    assert not _warnings(ledger, FORCED_ONLY[:8])
    assert not _warnings(ledger, _rounds("0100"))
    assert not _warnings(ledger, _rounds("1011 0000 0100 1011 0000"))
    assert _warnings(ledger, _rounds("0000"))


def test_does_not_warn_of_workers_that_are_never_asked():
    """Who is absent until it is forced does not say anything about the rule."""
    present = np.tile(_rounds("1000 0100 0010 0001"), (6, 1))
    assert not _warnings(_ledger(max_staleness=CAP), present, present)


@pytest.mark.parametrize("name", ["sgd", "sparse_sgd"])
def test_does_not_warn_where_there_is_no_rule_to_speak_of(name):
    assert not _warnings(_ledger(name), np.zeros((99, M), bool))
    turn = sasg_jax.compressed_sgd(0.1, rule=sasg_jax.every(50), num_workers=M)
    assert not _warnings(sasg_jax.Ledger(turn.init(jnp.zeros(3))), np.zeros((99, M), bool))
    forced = sasg_jax.sasg(0.1, num_workers=M, max_staleness=1)
    assert not _warnings(sasg_jax.Ledger(forced.init(jnp.zeros(3))), np.ones((99, M), bool))


# Several processes --------------------------------------------------------------------------------

PROCESS = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[1]))
import sasg_jax
tx = sasg_jax.compressed_sgd(0.1, rule=sasg_jax.every(3), num_workers=4)
loss = lambda params, batch: jnp.sum(params * batch)
train_step = sasg_jax.make_train_step(loss, tx, num_workers=4, driver="shard_map", donate=False)
state = train_step.init(jnp.ones(3))
ledger, flags = sasg_jax.Ledger(state.opt_state), []
for _ in range(4):
    state, info = jax.block_until_ready(train_step.step(state, np.ones(4, np.float32)))
    assert not info.uploaded.is_fully_addressable
    ledger.record(info.uploaded, np.array([True, True, True, False]))
    flags.append(info.uploaded)
ledger.record(jax.jit(lambda *rows: jnp.stack(rows))(*flags))
print(json.dumps(ledger.to_dict()))
"""


@pytest.mark.processes
def test_flags_that_lie_on_the_devices_of_several_processes(tmp_path):
    """Every process counts all of them, round by round and at once."""
    outputs = two_processes.outputs(PROCESS, timeout=120)
    want = sasg_jax.Ledger(
        sasg_jax.compressed_sgd(0.1, rule=sasg_jax.every(3), num_workers=M).init(jnp.ones(3))
    )
    turns = _rounds("1001 0010 0100 1001")
    want.record(turns, np.tile([True, True, True, False], (4, 1)))
    want.record(turns)
    assert [json.loads(output.splitlines()[-1]) for output in outputs] == [want.to_dict()] * 2
