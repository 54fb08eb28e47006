"""Counting: both pictures tell of the same uploads, and nothing is moved where nothing is said."""

import jax.numpy as jnp
import numpy as np
import pytest
from problems import M

import sasg_jax

PARAMS = {"w": jnp.zeros(100)}
ALL, ONE_REFUSED = np.ones(M, bool), np.array([True, False, True, True])
TOP, EVERYTHING = sasg_jax.top_k(0.1), sasg_jax.identity()
MESSAGE, DENSE = 10 * (4 + 1), 400
COUNTS = ("uploads_by_worker", "uplink_bytes", "paper_uplink_bits", "sent_bytes", "received_bytes")


def _counts(tx, flags, present=None):
    ledger = sasg_jax.Ledger(tx.init(PARAMS))
    ledger.record(flags, present)
    return {name: getattr(ledger, name) for name in COUNTS}


@pytest.mark.parametrize("exchange", sasg_jax.exchanges.EXCHANGES)
def test_a_refused_message_is_sent_where_nobody_tells(exchange):
    """All always send, one of them zeros: that is an upload in the paper's picture and in ours."""
    tx = sasg_jax.aggregate(EVERYTHING, num_workers=M, exchange=exchange)
    assert _counts(tx, ONE_REFUSED) == _counts(tx, ALL)
    assert _counts(tx, ALL)["uplink_bytes"] == M * DENSE


@pytest.mark.parametrize("silence", ["reuse", "drop"])
@pytest.mark.parametrize("exchange", ["gather", "lazy", "server", "relay", "sharded"])
def test_a_refused_message_is_not_sent_where_all_tell(exchange, silence):
    """Then it is none in either picture."""
    tx = sasg_jax.aggregate(EVERYTHING, num_workers=M, exchange=exchange, silence=silence)
    counts = _counts(tx, ONE_REFUSED)
    assert counts["uploads_by_worker"] == [1, 0, 1, 1]
    assert counts["uplink_bytes"] == 3 * DENSE + M
    assert counts["paper_uplink_bits"] == 3 * 32 * 100
    if exchange in ("server", "relay"):  # the others' links carry all messages, or equal parts
        assert counts["sent_bytes"][1:3] == (1, DENSE + 1)


def test_who_is_absent_sends_nothing():
    tx = sasg_jax.aggregate(TOP, num_workers=M)
    present = np.array([True, True, False, False])
    assert _counts(tx, present, present)["uplink_bytes"] == 2 * MESSAGE


# Defaults and arguments ---------------------------------------------------------------------------

DEFAULTS = {
    "sgd": (sasg_jax.sgd(0.1, num_workers=M), "psum"),
    "sparse_sgd": (sasg_jax.sparse_sgd(0.1, num_workers=M), "gather"),
    "lasg": (sasg_jax.lasg(0.1, num_workers=M), "lazy"),
    "sasg": (sasg_jax.sasg(0.1, num_workers=M), "lazy"),
    "in turn": (sasg_jax.aggregate(TOP, sasg_jax.every(2), num_workers=M), "lazy"),
    "drop": (sasg_jax.aggregate(TOP, num_workers=M, silence="drop"), "lazy"),
    "reconstruction": (
        sasg_jax.aggregate(
            TOP, sasg_jax.every(2), num_workers=M, feedback=sasg_jax.reconstruction()
        ),
        "lazy",
    ),
    "two ways": (sasg_jax.sasg(0.1, num_workers=M, downlink=TOP), "server"),
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_the_default_exchange_moves_nothing_for_the_silent(name):
    tx, exchange = DEFAULTS[name]
    assert tx.method.exchange.name == exchange
    if exchange == "lazy":
        counts = _counts(tx, np.zeros(M, bool))
        assert counts["sent_bytes"] == (M - 1,) * M  # a flag for each other worker
        assert counts["uplink_bytes"] == M
        one, two = (_counts(tx, np.arange(M) < n)["sent_bytes"][0] for n in (1, 2))
        assert (M - 1) < one < two <= 2 * one


@pytest.mark.parametrize("exchange", ["psum", "gather", "lazy", "relay"])
@pytest.mark.parametrize("method", [sasg_jax.sgd, sasg_jax.sasg])
def test_a_downlink_that_moves_nothing_is_refused(exchange, method):
    with pytest.raises(ValueError, match=rf"^Expected exchange='{exchange}' to be .*'server'"):
        method(0.1, num_workers=M, downlink=TOP, exchange=exchange)


@pytest.mark.parametrize("exchange", ["server", "sharded"])
def test_a_downlink_is_what_comes_down(exchange):
    ledgers = []
    for downlink in (None, TOP):
        tx = sasg_jax.aggregate(TOP, num_workers=M, exchange=exchange, downlink=downlink)
        ledgers.append(sasg_jax.Ledger(tx.init(PARAMS)))
        ledgers[-1].record(ALL)
    plain, sparse = ledgers
    assert plain.downlink_bytes == M * DENSE
    # A shard has 25 entries, of which it sends two.
    assert sparse.downlink_bytes == M * (MESSAGE if exchange == "server" else M * 2 * (4 + 1))
    assert sum(sparse.sent_bytes) < sum(plain.sent_bytes)
