"""The ring has the parameters of the last rounds, and serves as well as a copy for each worker."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from problems import ADAPTIVE, LEARNING_RATE, METHODS, M

import sasg_jax
from sasg_jax.recent_params import init_recent, read_recent, write_recent
from sasg_jax.transform import find_state


@pytest.mark.parametrize("max_staleness", [2, 3, 10])
def test_has_the_rounds_that_a_worker_may_ask_for(max_staleness):
    like = {"w": jnp.zeros(2)}
    recent = init_recent(like, max_staleness)
    for t in range(25):
        for staleness in range(1, min(max_staleness, t + 1)):
            found = read_recent(recent, jnp.int32(t - staleness))
            np.testing.assert_array_equal(found["w"], [t - staleness, -(t - staleness)])
        recent = write_recent(recent, {"w": jnp.array([t, -t], float)}, jnp.int32(t))
    assert recent["w"].shape == (max_staleness - 1, 2)  # and it keeps no more than that


def test_keeps_nothing_where_nobody_asks():
    params = jnp.zeros(3)  # a tree may be one array
    assert init_recent(params, 1) == ()
    assert write_recent((), params, jnp.int32(5)) == ()


def _optimizer(name, share, max_staleness):
    alpha = 3e3 if name == "lasg" else 1e3  # some are silent, and some until they must upload
    kwargs = {"num_workers": M, "history": 2, "max_staleness": max_staleness, "alpha": alpha}
    if name != "aggregate":
        return METHODS[name](LEARNING_RATE, share_stale_params=share, **kwargs)
    del kwargs["num_workers"], kwargs["alpha"]
    rule = sasg_jax.innovation(alpha, **kwargs)
    compressor = sasg_jax.top_k(0.1)
    tx = sasg_jax.aggregate(compressor, rule, num_workers=M, share_stale_params=share)
    return optax.chain(tx, optax.adamw(LEARNING_RATE))


@pytest.mark.parametrize("driver", ["vmap", "shard_map"])
@pytest.mark.parametrize("name", [*ADAPTIVE, "aggregate"])
def test_shared_and_own_stale_parameters_give_the_same_run(name, driver):
    """Bit for bit, also past gradients that are not finite, after which a worker is staler than
    the ring is long."""
    batches = problems.mlp_batches(M)
    sides, runs = {}, {}
    for share in (False, True):
        tx = _optimizer(name, share, max_staleness=4)
        train_step = sasg_jax.make_train_step(
            problems.mlp_loss, tx, num_workers=M, driver=driver, donate=False
        )
        step = problems.one_at_a_time(train_step.step)
        state, infos = train_step.init(problems.mlp_params()), []
        for t in range(40):
            images, labels = problems.at(batches, t)
            if 20 <= t < 27:
                images = np.where(np.arange(M)[:, None, None] == 1, np.nan, images)
            state, info = step(state, (images, labels))
            infos.append(problems.to_numpy(info._asdict()))
        sides[share], runs[share] = find_state(state.opt_state), (state.params, infos)
    chex.assert_trees_all_equal(runs[True], runs[False])
    uploaded = np.stack([info["uploaded"] for info in runs[True][1]])
    staleness = np.stack([info["staleness"] for info in runs[True][1]])
    assert 0.2 < uploaded[2:].mean() < 0.9
    assert staleness.max() > 4
    assert len(np.unique(staleness[15:20])) > 2  # workers asked for different rounds at once
    assert sides[True].worker.stale_params == ()
    assert sides[False].server.recent_params == ()
    for row in jax.tree.leaves(sides[True].server.recent_params):
        assert row.shape[0] == 3


def test_is_refused_where_all_always_upload():
    with pytest.raises(ValueError, match="Expected share_stale_params=True to be False where all"):
        sasg_jax.aggregate(num_workers=M, share_stale_params=True)


def test_stale_grads_are_refused():
    tx = sasg_jax.sasg(0.1, num_workers=M, share_stale_params=True)
    params = problems.quadratic_params()
    with pytest.raises(ValueError, match="Expected grad_fn in place of stale_grads"):
        tx.update(params, tx.init(params), params, stale_grads=params)
