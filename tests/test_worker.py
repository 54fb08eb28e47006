"""One worker's half of a round: when it uploads, what it sends, and what it keeps."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sasg_jax
from sasg_jax.worker import init_worker, squared_distance, squared_norm, worker_round

RULE = sasg_jax.innovation(1.0, max_staleness=5, history=3)
COMPRESSORS = {"identity": sasg_jax.identity(), "top_k": sasg_jax.top_k(0.25)}


def _tree(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {
        "a": jnp.asarray(rng.normal(size=(3, 4)), dtype),
        "b": jnp.asarray(rng.normal(size=5), dtype),
    }


PARAMS, GRADS, STALE_GRADS, STALE_PARAMS = map(_tree, range(4))
INNOVATION = sum(
    float(np.sum(np.square(np.asarray(GRADS[k]) - np.asarray(STALE_GRADS[k])))) for k in GRADS
)


def _state(compressor, rule=RULE, staleness=2, residual_seed=9):
    """A worker in the middle of a run."""
    state = init_worker(compressor, rule, PARAMS, keep_params=rule.adaptive)
    return state._replace(
        residual=() if compressor.lossless else _tree(residual_seed),
        stale_params=STALE_PARAMS if rule.adaptive else (),
        staleness=jnp.int32(staleness),
    )


@functools.cache
def _compiled(compressor, rule):
    def fn(state, grads, stale_grads, **arguments):
        return worker_round(
            compressor,
            rule,
            state,
            grads,
            PARAMS,
            stale_grads_fn=lambda stale_params: stale_grads,
            keep_params=rule.adaptive,
            **arguments,
        )

    return jax.jit(fn)


def _round(state, compressor, rule=RULE, grads=GRADS, stale_grads=STALE_GRADS, **kwargs):
    arguments = {"threshold": 0.0, "round": 10, "learning_rate": 0.5} | kwargs
    arguments = {name: jnp.asarray(value) for name, value in arguments.items()}
    return _compiled(compressor, rule)(state, grads, stale_grads, **arguments)


def _assert_silent(before, after, message):
    """Nothing but the staleness has changed, and nothing is sent."""
    assert not bool(after.uploaded)
    chex.assert_trees_all_equal(after.residual, before.residual)
    chex.assert_trees_all_equal(after.stale_params, before.stale_params)
    assert int(after.staleness) == int(before.staleness) + 1
    assert all(not np.any(np.asarray(x)) for x in jax.tree.leaves(message))


@pytest.mark.parametrize("name", COMPRESSORS)
def test_upload(name):
    """Conservation bit for bit: decoded message + new residual = gamma g + old residual."""
    compressor = COMPRESSORS[name]
    state = _state(compressor)
    new, message = _round(state, compressor)
    sent = compressor.decompress(message, PARAMS)
    total = jax.tree.map(lambda g: jnp.float32(0.5) * g, GRADS)
    if not compressor.lossless:
        sent = jax.tree.map(jnp.add, sent, new.residual)
        total = jax.tree.map(jnp.add, total, state.residual)
    chex.assert_trees_all_equal(sent, total)
    chex.assert_trees_all_equal(new.stale_params, PARAMS)
    assert bool(new.uploaded)
    assert int(new.staleness) == 1
    np.testing.assert_allclose(new.innovation, INNOVATION, rtol=1e-5)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_silent_round_changes_nothing(name):
    compressor = COMPRESSORS[name]
    state = _state(compressor)
    new, message = _round(state, compressor, threshold=1.01 * INNOVATION)
    _assert_silent(state, new, message)
    np.testing.assert_allclose(new.innovation, INNOVATION, rtol=1e-5)


@pytest.mark.parametrize(
    ("threshold", "uploads"),
    [(0.0, True), (0.99 * INNOVATION, True), (1.01 * INNOVATION, False), (np.inf, False)],
)
def test_uploads_when_the_innovation_exceeds_the_threshold(threshold, uploads):
    new, _ = _round(_state(COMPRESSORS["top_k"]), COMPRESSORS["top_k"], threshold=threshold)
    assert bool(new.uploaded) is uploads


def test_an_innovation_equal_to_the_threshold_is_silent():
    """(6) says at most: with no step behind it and no innovation, nothing is sent."""
    compressor = COMPRESSORS["top_k"]
    new, _ = _round(_state(compressor), compressor, stale_grads=GRADS, threshold=0.0)
    assert not bool(new.uploaded)


@pytest.mark.parametrize(
    ("staleness", "round", "uploads"),
    [(1, 2, True), (1, 3, False), (4, 3, False), (5, 3, True), (7, 100, True)],
)
def test_forced_in_the_first_rounds_and_at_the_cap(staleness, round, uploads):
    """D = 3 rounds, max_staleness = 5; an infinite threshold would silence everybody."""
    compressor = COMPRESSORS["top_k"]
    state = _state(compressor, staleness=staleness)
    new, _ = _round(state, compressor, threshold=np.inf, round=round)
    assert bool(new.uploaded) is uploads


@pytest.mark.parametrize(("staleness", "round"), [(1, 2), (5, 3)], ids=["first rounds", "cap"])
def test_no_stale_gradient_in_a_forced_round(staleness, round):
    """Its function is not run at all, and the innovation says so with a zero."""
    runs = []

    def stale_grads_fn(stale_params):
        jax.debug.callback(lambda: runs.append(1))
        return jax.tree.map(jnp.zeros_like, stale_params)

    @jax.jit
    def one_round(staleness, round):
        state = _state(COMPRESSORS["top_k"])._replace(staleness=staleness)
        return worker_round(
            COMPRESSORS["top_k"],
            RULE,
            state,
            GRADS,
            PARAMS,
            stale_grads_fn=stale_grads_fn,
            learning_rate=jnp.float32(0.5),
            threshold=jnp.float32(np.inf),
            round=round,
            keep_params=True,
        )

    new, _ = one_round(jnp.int32(staleness), jnp.int32(round))
    jax.effects_barrier()
    assert (bool(new.uploaded), float(new.innovation), runs) == (True, 0.0, [])
    one_round(jnp.int32(1), jnp.int32(3))
    jax.effects_barrier()
    assert runs == [1]


def test_uploads_are_exactly_max_staleness_rounds_apart_at_most():
    """A worker that never has news uploads every fifth round, never later."""
    compressor = COMPRESSORS["top_k"]
    state = init_worker(compressor, RULE, PARAMS, keep_params=True)
    uploads = []
    for t in range(20):
        state, _ = _round(state, compressor, threshold=np.inf, round=t)
        if bool(state.uploaded):
            uploads.append(t)
    assert uploads == [0, 1, 2, 7, 12, 17]


def test_always_uploads_without_a_stale_gradient():
    def never(stale_params):
        raise AssertionError("always() has no use for a stale gradient")

    rule = sasg_jax.always()
    compressor = COMPRESSORS["top_k"]
    state = init_worker(compressor, rule, PARAMS, keep_params=rule.adaptive)
    new, _ = worker_round(
        compressor,
        rule,
        state,
        GRADS,
        PARAMS,
        stale_grads_fn=never,
        learning_rate=jnp.float32(1),
        threshold=jnp.float32(np.inf),
        round=jnp.int32(10),
        keep_params=False,
    )
    assert bool(new.uploaded)
    assert new.stale_params == ()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("forced", [False, True], ids=["free", "forced"])
@pytest.mark.parametrize("rule", [RULE, sasg_jax.always()], ids=["innovation", "always"])
@pytest.mark.parametrize("name", COMPRESSORS)
def test_gradient_that_is_not_finite_is_refused(name, rule, forced, bad):
    """Also where the upload is forced: silent, and more stale by one."""
    compressor = COMPRESSORS[name]
    state = _state(compressor, rule, staleness=5 if forced else 2)
    grads = GRADS | {"b": GRADS["b"].at[3].set(bad)}
    new, message = _round(state, compressor, rule, grads=grads, round=0 if forced else 10)
    _assert_silent(state, new, message)
    assert not bool(new.finite)
    after, _ = _round(new, compressor, rule)
    assert bool(after.finite)
    assert bool(after.uploaded)
    chex.assert_tree_all_finite((after.residual, after.stale_params))


def test_stale_gradient_that_is_not_finite_uploads():
    """The fresh gradient is sound, so the worker must get away from where the stale one is not."""
    compressor = COMPRESSORS["top_k"]
    stale_grads = jax.tree.map(lambda g: g * jnp.nan, GRADS)
    new, message = _round(_state(compressor), compressor, stale_grads=stale_grads, threshold=np.inf)
    assert bool(new.uploaded)
    assert bool(new.finite)
    chex.assert_tree_all_finite((message, new.residual))


def test_innovation_that_overflows_uploads():
    compressor = COMPRESSORS["top_k"]
    grads = jax.tree.map(lambda g: 1e25 * g, GRADS)
    new, _ = _round(_state(compressor), compressor, grads=grads, threshold=1e30)
    assert bool(new.uploaded)
    assert bool(new.finite)


def test_learning_rate_is_not_rounded_to_half_precision():
    """gamma g is rounded once: 0.1 is 0.10009765625 in bfloat16."""
    compressor = COMPRESSORS["identity"]
    params = {"w": jnp.arange(1, 65, dtype=jnp.bfloat16)}
    state = init_worker(compressor, sasg_jax.always(), params, keep_params=False)
    _, message = worker_round(
        compressor,
        sasg_jax.always(),
        state,
        params,
        params,
        stale_grads_fn=lambda p: p,
        learning_rate=jnp.float32(0.1),
        threshold=jnp.float32(0),
        round=jnp.int32(0),
        keep_params=False,
    )
    want = (np.float32(0.1) * np.arange(1, 65, dtype=np.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(message["w"], want)


def test_squared_norms():
    a = {"x": jnp.array([1.0, 2.0]), "y": jnp.array(3.0)}
    b = {"x": jnp.array([0.0, 4.0]), "y": jnp.array(5.0)}
    assert float(squared_norm(a)) == 1 + 4 + 9
    assert float(squared_distance(a, b)) == 1 + 4 + 4
    # In float32: 256 + 1 is 256 in bfloat16.
    half = jnp.array([16.0, 1.0], jnp.bfloat16)
    assert float(squared_norm(half)) == 257
    assert float(squared_distance(half, jnp.zeros_like(half))) == 257
