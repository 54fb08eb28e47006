"""A round in which a worker's direction counts for nothing leaves no trace but in our counters.

That is a round in which its gradient is refused, or it is absent, or it is silent and does not keep
its direction. All that it carries is looked at: the model state, a key in it, the state of an inner
optimiser, momentum, averages and accumulators in front of ours, the residual.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from problems import M

import sasg_jax

COUNTERS = (".staleness", ".uploaded", ".used", ".finite", ".innovation")
ROUNDS, STEPS = 4, 2
# What happens to a worker in a round beside what its turn says: two come on even rounds.
REFUSED, ABSENT = {(1, 1), (2, 0), (3, 2)}, {(0, 2), (1, 3), (3, 0)}


def _accumulator():
    """What it has seen is added up, and passed on as it is."""

    def update(updates, state, params=None):
        return updates, {"seen": optax.tree.add(state["seen"], updates)}

    zeros = lambda params: {"seen": jax.tree.map(jnp.zeros_like, params)}
    return optax.GradientTransformation(zeros, update)


def _loss(params, batch, *, model_state):
    new = {
        "mean": 0.9 * model_state["mean"] + 0.1 * batch["b"].mean(),
        "count": model_state["count"] + 1,
        "key": jax.random.wrap_key_data(jax.random.key_data(model_state["key"]) + 1),
    }
    return problems.quadratic_loss(params, batch), new


def _transformation(put_together, silence):
    ours = sasg_jax.aggregate(
        sasg_jax.top_k(0.5), sasg_jax.every(2), num_workers=M, silence=silence
    )
    return put_together(optax.trace(0.9), optax.ema(0.9), _accumulator(), ours, optax.sgd(0.1))


def _rounds():
    rng = np.random.default_rng(0)
    shape = {"b": (6,), "w": (4, 6)}
    batches = {
        name: rng.normal(size=(ROUNDS, M, STEPS, *s)).astype(np.float32)
        for name, s in shape.items()
    }
    present = np.ones((ROUNDS, M), bool)
    for t, m in REFUSED:
        batches["b"][t, m, 1, 0] = np.nan
    for t, m in ABSENT:
        present[t, m] = False
    return batches, present


def _own_arrays(state):
    """What each worker carries, by name, without our counters."""
    leaves = jax.tree_util.tree_leaves_with_path(
        state._replace(params=(), opt_state=_own(state.opt_state))
    )
    arrays = {jax.tree_util.keystr(path): x for path, x in leaves}
    return {name: x for name, x in arrays.items() if not name.endswith(COUNTERS)}


def _own(opt_state):
    return jax.tree.map(lambda own, x: x if own else (), sasg_jax.per_worker(opt_state), opt_state)


def _bits(x):
    return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)


CASES = {
    "chain, reuse": (optax.chain, "reuse", {}),
    "pipeline in chunks, keep": (sasg_jax.pipeline, "keep", {"chunk_size": 2}),
    "pipeline on devices, drop": (sasg_jax.pipeline, "drop", {"driver": "shard_map"}),
}


@pytest.mark.parametrize("name", CASES)
def test_only_what_counts_moves(name):
    put_together, silence, options = CASES[name]
    way = sasg_jax.local_steps(_loss, optax.adam(0.1), steps=STEPS, has_model_state=True)
    train_step = sasg_jax.make_train_step(
        way, _transformation(put_together, silence), num_workers=M, donate=False, **options
    )
    model_state = {"mean": 0.0, "count": 0, "key": jax.random.key(1)}
    state = train_step.init(problems.quadratic_params(), model_state)
    batches, present = _rounds()
    for t in range(ROUNDS):
        before = _own_arrays(state)
        state, info = train_step.step(state, problems.at(batches, t), present[t])
        after = _own_arrays(state)
        assert len(before) >= 15
        for m in range(M):
            turn = (t + m) % 2 == 0
            used = (turn or silence == "keep") and (t, m) not in REFUSED | ABSENT
            refused = (turn or silence == "keep") and (t, m) in REFUSED - ABSENT
            assert bool(info.uploaded[m]) == (turn and used)
            assert bool(info.finite[m]) == (not refused)
            for part, x in after.items():
                moved = not np.array_equal(_bits(x[m]), _bits(before[part][m]))
                assert moved == used, (t, m, part)


def test_refused_under_always_in_ones_own_loop():
    """Nobody tells that its gradient is refused, but a worker's momentum does not take it in."""
    tx = sasg_jax.pipeline(optax.trace(0.9), sasg_jax.sgd(0.1, num_workers=M))
    run = problems.start(tx, problems.quadratic_params())
    step, batch = problems.map_workers(tx, run), problems.centres()
    run = step(run, batch)
    batch["w"][2] = np.inf
    after = step(run, batch)
    for name in ("b", "w"):
        old, new = (np.asarray(optax.tree.get(r.opt_state, "trace")[name]) for r in (run, after))
        np.testing.assert_array_equal(new[2], old[2])
        assert not (new[[0, 1, 3]] == old[[0, 1, 3]]).any()
    assert sasg_jax.diagnostics(after.opt_state).finite.tolist() == [True, True, False, True]
