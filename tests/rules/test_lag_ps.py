"""The server's rules of LAG and LASG beside a loop written from the papers' formulas, and what is
not computed for them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import recipes

import sasg_jax
from sasg_jax.rules.lag_ps import Moved

ROUNDS, RATE, HISTORY = 40, 0.1, 4


def _loop(given, xi, *, smoothness=None, cap=None, present=None):
    """For the sum of M losses at a rate α = γ / M: w ← w - α Σ h."""
    rounds, M = given.targets.shape[:2]
    alpha = RATE / M
    w, path = recipes.start(), [recipes.start()]
    h, g_s, stale = np.zeros((M, recipes.SIZE)), [None] * M, [None] * M
    L = np.zeros(M) if smoothness is None else np.broadcast_to(smoothness, M).astype(float)
    uploaded, last = np.zeros((rounds, M), bool), np.full(M, -(cap or 1))
    compare = recipes.compared()
    for t in range(rounds):
        steps = list(zip(path[1:], path, strict=False))[-HISTORY:]
        bound = xi / (alpha**2 * M**2) * sum(recipes.squared(a - b) for a, b in steps)
        for m in range(M):
            if present is not None and not present[t, m]:
                continue
            forced = stale[m] is None or L[m] == 0 or (cap is not None and t - last[m] >= cap)
            if not forced and not compare(L[m] ** 2 * recipes.squared(w - stale[m]), bound):
                continue  # before a gradient is made, so none can be refused
            g = given.grad(t, m, w)
            if not np.isfinite(g).all():
                continue
            if smoothness is None and stale[m] is not None:
                L[m] = max(L[m], np.linalg.norm(g - g_s[m]) / np.linalg.norm(w - stale[m]))
            h[m], g_s[m], stale[m], last[m], uploaded[t, m] = g, g, w, t, True
        w = w - alpha * h.sum(0)
        path.append(w)
    return np.array(path), uploaded, compare, L


def _check(run, want):
    path, uploaded, compare, _ = want
    assert compare.margin > 2e-4  # nothing hangs on rounding
    assert 0.1 < uploaded.mean() < 0.9
    np.testing.assert_array_equal(run.uploaded, uploaded)
    recipes.assert_same_path(run, path)


@pytest.mark.parametrize(
    ("num_workers", "smoothness", "xi", "cap"),
    [(1, None, 0.01, None), (4, None, 0.1, 8), (4, (1.0, 2.0, 3.0, 9.0), 0.1, None)],
)
def test_lag_ps(num_workers, smoothness, xi, cap):
    given = recipes.data(num_workers, ROUNDS)
    how = {"xi": xi, "history": HISTORY, "max_staleness": cap, "smoothness": smoothness}
    run = recipes.run(sasg_jax.lag_ps(RATE, num_workers=num_workers, **how), given)
    want = _loop(given, xi, smoothness=smoothness, cap=cap)
    _check(run, want)
    if smoothness is None:
        np.testing.assert_allclose(run.state.worker.rule.smoothness, want[3], rtol=1e-3)


def test_lasg_ps():
    """Mini-batches, the rate inside, and last messages used again; absent and refused workers are
    as far from their last upload as ever."""
    given = recipes.data(4, ROUNDS, noise=0.1)
    present = np.random.default_rng(1).random((ROUNDS, 4)) < 0.8
    given.targets[[0, 1, 12], [0, 2, 3], 0] = np.nan
    rule = sasg_jax.lag_ps_rule(0.3, history=HISTORY, max_staleness=6)
    tx = sasg_jax.compressed_sgd(RATE, sasg_jax.identity(), rule, num_workers=4)
    assert tx.method.remembers
    run = recipes.run(tx, given, present=present)
    _check(run, _loop(given, 0.3, cap=6, present=present))


# What is not computed -----------------------------------------------------------------------------


def _counting(made):
    def loss(params, batch):
        jax.debug.callback(lambda: made.append(1))
        return recipes.loss(params, batch)

    return loss


def _steps(rounds, *, made, **how):
    given = recipes.data(4, rounds)
    rule = sasg_jax.lag_ps_rule(1e6, smoothness=1.0, max_staleness=3)
    parts = {"silence": how.pop("silence", None)}
    ours = sasg_jax.aggregate(sasg_jax.identity(), rule, num_workers=4, **parts)
    tx = sasg_jax.pipeline(optax.clip_by_global_norm(0.5), ours, optax.sgd(RATE))
    train_step = sasg_jax.make_train_step(_counting(made), tx, num_workers=4, donate=False, **how)
    state, counts, infos = train_step.init(recipes.params()), [], []
    for t in range(rounds):
        state, info = train_step.step(state, (given.rows[t], given.targets[t]))
        jax.block_until_ready(state)
        jax.effects_barrier()
        counts.append(len(made))
        made.clear()
        infos.append(jax.device_get(info))
    return state, counts, infos


def test_who_is_silent_makes_no_gradient():
    """All upload in every third round; in between nothing is evaluated, by any driver."""
    state, counts, infos = _steps(7, made=[])
    assert [count > 0 for count in counts] == [True, False, False] * 2 + [True]
    for info in infos:
        np.testing.assert_array_equal(np.isnan(info.loss), ~info.uploaded)
        assert info.finite.all()
    in_chunks, counts, _ = _steps(7, made=[], chunk_size=2)
    assert [count > 0 for count in counts] == [True, False, False] * 2 + [True]
    for x, y in zip(*map(jax.tree.leaves, (state.params, in_chunks.params)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)


def test_who_keeps_a_direction_makes_one():
    _, counts, infos = _steps(4, made=[], silence="keep")
    assert all(counts)
    assert not np.isnan([info.loss for info in infos]).any()


def test_a_loop_of_ones_own_may_ask():
    rule = sasg_jax.lag_ps_rule(1e6, smoothness=1.0, max_staleness=3)
    how = {"index": jnp.int32(0)}
    ask = lambda method, staleness, **more: sasg_jax.needs_direction(
        method,
        sasg_jax.init_worker(method, recipes.params())._replace(
            staleness=jnp.int32(staleness),
            rule=Moved(recipes.params(), (), jnp.float32(-1), jnp.asarray(True)),
        ),
        sasg_jax.init_server(method, recipes.params()),
        recipes.params(),
        **how,
        **more,
    )
    method = sasg_jax.make_method(sasg_jax.identity(), rule, num_workers=2)
    assert ask(method, 3)
    assert not ask(method, 2)
    assert not ask(method, 3, present=False)
    kept = sasg_jax.make_method(sasg_jax.identity(), rule, num_workers=2, silence="keep")
    assert ask(kept, 3) is None
    other = sasg_jax.make_method(sasg_jax.identity(), sasg_jax.every(2), num_workers=2)
    assert ask(other, 3) is None


# What is compared ---------------------------------------------------------------------------------


def test_what_equals_the_threshold_is_silent():
    """9 times 5 entries that have moved by 1."""
    rule = sasg_jax.lag_ps_rule(smoothness=(3.0, 1e9))
    zeros = jax.tree.map(jnp.zeros_like, recipes.params())
    ones = jax.tree.map(jnp.ones_like, zeros)
    memory = Moved(zeros, (), jnp.float32(-1), jnp.asarray(True))
    decide = lambda threshold, memory=memory, **more: rule.decide(
        recipes.view(None, params=ones, memory=memory, threshold=threshold, **more)
    )
    assert not decide(45.0).upload
    assert decide(45.0).measured == 45
    assert decide(np.nextafter(np.float32(45), np.float32(44))).upload
    assert decide(45.0, worker=jnp.int32(1)).upload
    assert decide(1e30, memory._replace(started=jnp.asarray(False))).upload
    nan = jax.tree.map(lambda x: x * jnp.nan, zeros)
    assert decide(1e30, memory._replace(stale_params=nan)).upload


def test_names_and_bad_arguments():
    make = sasg_jax.lag_ps_rule
    assert make().name == "lag_ps_rule(history=10)"
    assert make(smoothness=1, max_staleness=7, history=3).name == (
        "lag_ps_rule(history=3, max_staleness=7, smoothness)"
    )
    for name, value in (("xi", -1), ("smoothness", -1), ("smoothness", math.inf)):
        with pytest.raises(ValueError, match=rf"^Expected {name}={value} to be a finite number of"):
            make(**{name: value})  # pyright: ignore
    for value in ((), [[1.0]]):
        with pytest.raises(ValueError, match=r"^Expected smoothness=.* to be one number, or"):
            make(smoothness=value)  # pyright: ignore
    for name in ("history", "max_staleness"):
        with pytest.raises(ValueError, match=rf"^Expected {name}=0 to be an integer of at least 1"):
            make(**{name: 0})
