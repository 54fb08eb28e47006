"""Bytes and uploads, exact however long the run."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from problems import METHODS, M

import sasg_jax

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
    """Two rounds, three and one uploads; the way down goes to all four workers."""
    upload_bytes, paper_bits, flag, down = WIRE[name]
    ledger = _ledger(name)
    ledger.record(np.array([True, True, False, True]))
    ledger.record(jnp.array([False, False, True, False]))
    assert (ledger.rounds, ledger.uploads) == (2, 4)
    assert ledger.paper_uplink_bits == 4 * paper_bits
    assert ledger.uplink_bytes == 4 * upload_bytes + 2 * M * flag
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
    memory = sum(x.nbytes for x in jax.tree.leaves(state.server.messages))
    ledger = sasg_jax.Ledger(state)
    ledger.record([True] * M)
    k = size // 10
    assert ledger.uplink_bytes - M == memory == M * k * (4 + index_bytes)
    down = k * (4 + index_bytes) if name == "two_way" else 4 * size
    assert ledger.downlink_bytes == M * down


def test_equals_the_sum_over_a_run():
    rounds = 30
    train_step = problems.mlp_step(M, "sasg")
    images, labels = problems.mlp_batches(M)
    state = train_step.init(problems.mlp_params())
    by_round, at_once = sasg_jax.Ledger(state.opt_state), sasg_jax.Ledger(state.opt_state)
    flags = []
    for t in range(rounds):
        state, info = train_step.step(state, (images[t], labels[t]))
        by_round.record(info.uploaded)
        flags.append(np.asarray(info.uploaded))
    at_once.record(np.stack(flags))
    assert by_round.to_dict() == at_once.to_dict()
    uploads = sum(int(f) for row in flags for f in row)
    assert 10 * M <= uploads < rounds * M
    assert by_round.uploads == uploads
    # Entries 16, 5, 320, 80 at 10 %: 1, 0 -> 1, 32, 8 values; only w1 needs two bytes an index.
    assert by_round.uplink_bytes == uploads * (5 + 5 + 32 * 6 + 8 * 5) + rounds * M
    assert by_round.paper_uplink_bits == uploads * 32 * 42
    # The same from the state after the run, through any wrapper.
    wrapped = optax.chain(optax.clip(1.0), METHODS["sasg"](0.1, num_workers=M))
    assert (
        sasg_jax.Ledger(wrapped.init(problems.mlp_params())).to_dict()["wire"]
        == (sasg_jax.Ledger(state.opt_state).to_dict()["wire"])
    )


def test_exact_past_two_to_the_53():
    """Floats stop at 2**53 and int64 at 2**63."""
    saved = _ledger().to_dict()
    saved |= {
        "rounds_by_uploads": [1, 2**60, 0, 0, 2**60],
        "uploads_by_worker": [2**61] * 3 + [2**62],
    }
    ledger = sasg_jax.Ledger.from_dict(json.loads(json.dumps(saved)))
    ledger.record(np.array([True, False, False, False]))
    rounds, uploads = 2**61 + 2, 5 * 2**61 + 1
    assert ledger.rounds == rounds
    assert ledger.uploads == uploads
    assert ledger.uplink_bytes == uploads * SPARSE_BYTES + rounds * M
    assert ledger.downlink_bytes == rounds * M * DENSE
    assert ledger.paper_uplink_bits == uploads * 96
    # All but the round without an upload gather the 16 bytes that 15 are packed into.
    assert ledger.sent_bytes == ((rounds - 1) * 3 * 16 + rounds * 3,) * M
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
    ledger = _ledger()
    with pytest.raises(
        ValueError,
        match=r"^Expected uploaded to be of dtype bool and shape \(4,\) or \(rounds, 4\)",
    ):
        ledger.record(uploaded)
    assert ledger.rounds == ledger.uploads == 0


def test_state_without_ours():
    with pytest.raises(ValueError, match="exactly one state of sasg_jax"):
        sasg_jax.Ledger(optax.adam(0.1).init(jnp.zeros(3)))


@pytest.mark.parametrize(
    "key", ["wire", "uploads_by_worker", "rounds_by_uploads", "model_state_bytes"]
)
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
    """Without the rule there are no flags: an empty message moves like any other."""
    ledger = _ledger("sparse_sgd", exchange="server")
    ledger.record(np.array([True, True, False, True]))
    assert ledger.sent_bytes == (3 * DENSE, 16, 16, 16)
