"""What ``lazy`` moves."""

import jax.numpy as jnp
import numpy as np
import pytest

import sasg_jax
from sasg_jax.exchanges import Traffic, lazy
from sasg_jax.exchanges.lazy import LAZY


def test_links_by_hand():
    """Six workers. One or two uploads fill slots of a sum, which sends 2 * 5/6 of them; three and
    six are gathered, to five others each; without any nothing moves."""
    traffic = Traffic(
        upload_bytes=12,
        downlink_bytes=120,
        flag_bytes=1,
        uploads_by_worker=[2, 3, 3, 2, 1, 1],
        rounds_by_uploads=[2, 1, 1, 1, 0, 0, 1],
        steps=6,
    )
    moved = 20 * 1 + 20 * 2 + 2 * 5 * 12
    assert LAZY.links(traffic) == ([moved] * 6, [moved] * 6)
    assert LAZY.flag_links(6) == ([5] * 6, [5] * 6)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 33])
def test_it_never_moves_more_than_a_gather_nor_than_a_sum_of_slots(size):
    for uploads in range(size + 1):
        rounds = [int(count == uploads) for count in range(size + 1)]
        by_worker = [int(worker < uploads) for worker in range(size)]
        sent = LAZY.links(Traffic(size * 100, 0, 1, by_worker, rounds, 1)).sent
        gathered = (size - 1) * size * 100
        slots = uploads * 2 * (size - 1) * 100
        assert sent == [min(gathered, slots)] * size


@pytest.mark.parametrize("size", [34, 100, 1000])
def test_of_many_workers_it_moves_at_most_an_eighth_more(size):
    for uploads in range(size + 1):
        rounds = [int(count == uploads) for count in range(size + 1)]
        by_worker = [int(worker < uploads) for worker in range(size)]
        sent = LAZY.links(Traffic(size * 100, 0, 1, by_worker, rounds, 1)).sent[0]
        gathered = (size - 1) * size * 100
        slots = uploads * 2 * (size - 1) * 100
        assert min(gathered, slots) <= sent <= min(gathered, slots * 9 // 8)
    assert len(lazy._slot_counts(size)) < 50


@pytest.mark.parametrize("senders", [[5], [2, 6], [0, 3, 7], [0, 1, 2, 3]])
def test_empty_slots_change_nothing(monkeypatch, senders):
    """Two uploads in three slots; four are gathered."""
    monkeypatch.setattr(lazy, "_slot_counts", lambda num_workers: [0, 1, 3])
    loss_fn = lambda params, batch: ((params["w"] - batch) ** 2).sum()
    present = jnp.zeros(8, bool).at[jnp.array(senders)].set(True)
    batch = jnp.arange(8.0)
    params = []
    for exchange in ("lazy", "gather"):
        tx = sasg_jax.sparse_sgd(0.1, num_workers=8, density=0.5, exchange=exchange)
        train_step = sasg_jax.make_train_step(loss_fn, tx, num_workers=8, driver="shard_map")
        state = train_step.init({"w": jnp.arange(6.0)})
        state, _ = train_step.step(state, batch, present)
        state, info = train_step.step(state, batch, present)
        np.testing.assert_array_equal(info.uploaded, present)
        params.append(np.asarray(state.params["w"]))
    np.testing.assert_array_equal(*params)
    assert not np.array_equal(params[0], np.arange(6.0))
