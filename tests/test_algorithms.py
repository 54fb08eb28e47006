"""The grid of methods and its neighbours: whole runs against the NumPy oracle, special cases, and
what the paper proves."""

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
from problems import ALPHA, DENSITY, LEARNING_RATE, METHODS, M

import sasg_jax
from sasg_jax.exchanges import shards
from sasg_jax.states import find_state

# Whole runs against the oracle --------------------------------------------------------------------

ROUNDS = 80
DRIVERS = ("vmap", "chunks", "shard_map", "pmap")
TOP_K = sasg_jax.top_k(DENSITY)
SEQUENCE = [30.0, 20.0, 10.0, 40.0]
STEPS, LOCAL_RATE = 2, 0.05


class Setting(NamedTuple):
    """One algorithm, twice: made by the library, and as arguments of the oracle."""

    tx: optax.GradientTransformation
    oracle: dict[str, Any]
    drivers: tuple[str, ...] = ()  # those of the default tier; `slow` has all others
    num_workers: int = M
    direction: str = "gradient"  # or accumulate, local_steps


def _rate(t):
    """Falls to a half, where no worker need upload, to less than that, where all must, to zero and
    comes back."""
    xp = np if isinstance(t, int) else jnp
    rates = xp.asarray([0.1, 0.05, 0.02, 0.0, 0.05], np.float32)
    return rates[(t >= 30) + 0 + (t >= 45) + (t >= 60) + (t >= 65)]


def _sgd(*parts, **kwargs):
    return sasg_jax.compressed_sgd(LEARNING_RATE, *parts, num_workers=M, **kwargs)


def _aggregate(*parts, after=LEARNING_RATE, **kwargs):
    return sasg_jax.pipeline(sasg_jax.aggregate(*parts, num_workers=M, **kwargs), optax.sgd(after))


def _times(rate):
    """What an optimiser behind the server makes of its step."""
    return lambda step: oracle.scaled(rate, step)


# Most workers in most rounds, and nobody in one.
PRESENT = np.random.default_rng(3).random((ROUNDS, M)) < 0.7
PRESENT[33] = False
AFTER = {"learning_rate": None, "after": _times(LEARNING_RATE)}
RATE = {"learning_rate": LEARNING_RATE}
SPARSE = RATE | {"density": DENSITY}
ADAPTIVE_DENSE = RATE | {"alpha": ALPHA}
ADAPTIVE_SPARSE = SPARSE | {"alpha": ALPHA}
TWO_WAY = ADAPTIVE_SPARSE | {"downlink_density": DENSITY}
SETTINGS = {
    # The grid, with the exchanges that suit it, and with the others.
    "sgd": Setting(METHODS["sgd"](0.1, num_workers=M), RATE, ("chunks",)),
    "sparse_sgd": Setting(METHODS["sparse_sgd"](0.1, num_workers=M), SPARSE, ("shard_map",)),
    "lasg": Setting(METHODS["lasg"](0.1, num_workers=M), ADAPTIVE_DENSE, ("vmap",)),
    "sasg": Setting(METHODS["sasg"](0.1, num_workers=M), ADAPTIVE_SPARSE, DRIVERS),
    "two_way": Setting(METHODS["two_way"](0.1, num_workers=M), TWO_WAY, ("shard_map",)),
    **{
        f"{name}_{exchange}": Setting(
            METHODS[name](0.1, num_workers=M, exchange=exchange), arguments, drivers
        )
        for name, exchange, arguments, drivers in [
            ("sgd", "gather", RATE, ()),
            ("sparse_sgd", "lazy", SPARSE, ()),
            ("sparse_sgd", "relay", SPARSE, ()),
            ("sparse_sgd", "server", SPARSE, ()),
            ("lasg", "server", ADAPTIVE_DENSE, ()),
            ("lasg", "sharded", ADAPTIVE_DENSE | {"scope": "shards"}, ()),
            ("sasg", "gather", ADAPTIVE_SPARSE, ()),
            ("sasg", "relay", ADAPTIVE_SPARSE, ()),
            ("sasg", "server", ADAPTIVE_SPARSE, ()),
            ("sasg", "sharded", ADAPTIVE_SPARSE | {"scope": "shards"}, ()),
            ("two_way", "sharded", TWO_WAY | {"scope": "shards"}, ("shard_map",)),
        ]
    },
    "sparse_sgd_of_eight_sharded": Setting(  # more workers than the smallest tensor has entries
        METHODS["sparse_sgd"](0.1, num_workers=8, exchange="sharded"),
        SPARSE | {"scope": "shards"},
        num_workers=8,
    ),
    "sasg_of_eight": Setting(
        METHODS["sasg"](0.1, num_workers=8),
        ADAPTIVE_SPARSE | {"alpha": 0.5 * 8 / LEARNING_RATE},
        ("shard_map",),
        num_workers=8,
    ),
    # What the threshold is made of.
    "tree_scope": Setting(
        _aggregate(sasg_jax.top_k(DENSITY, scope="tree"), sasg_jax.innovation(ALPHA)),
        AFTER | {"density": DENSITY, "alpha": ALPHA, "scope": "tree"},
        ("vmap",),
    ),
    "alpha_sequence": Setting(
        METHODS["sasg"](0.1, num_workers=M, alpha=SEQUENCE, history=4, max_staleness=3),
        ADAPTIVE_SPARSE | {"alpha": SEQUENCE, "history": 4, "max_staleness": 3},
        ("vmap",),
    ),
    "alpha_function_and_schedule": Setting(
        METHODS["sasg"](_rate, num_workers=M, alpha=lambda gamma: 2 / gamma),
        {"learning_rate": _rate, "density": DENSITY, "alpha": lambda gamma: 2 / gamma},
        ("vmap",),
    ),
    "scaled": Setting(  # the threshold follows the steps of the parameters
        optax.chain(METHODS["sasg"](1.0, num_workers=M, alpha=ALPHA), optax.scale(0.1)),
        {"learning_rate": 1.0, "density": DENSITY, "alpha": ALPHA, "after": _times(0.1)},
        ("shard_map",),
    ),
    # What a silent worker counts as.
    "turn": Setting(_sgd(TOP_K, sasg_jax.every(3)), SPARSE | {"turn": (3, True)}, ("shard_map",)),
    "turn_together": Setting(
        _sgd(sasg_jax.identity(), sasg_jax.every(2, staggered=False), exchange="server"),
        RATE | {"turn": (2, False)},
        ("chunks",),
    ),
    "turn_drop": Setting(
        _sgd(TOP_K, sasg_jax.every(3), silence="drop", exchange="relay"),
        SPARSE | {"turn": (3, True), "silence": "drop"},
        ("shard_map",),
    ),
    "turn_reuse": Setting(
        _sgd(TOP_K, sasg_jax.every(3), silence="reuse", feedback=sasg_jax.none()),
        SPARSE | {"turn": (3, True), "silence": "reuse", "feedback": "none"},
        ("vmap",),
    ),
    "sasg_keep": Setting(
        METHODS["sasg"](0.1, num_workers=M, silence="keep"),
        ADAPTIVE_SPARSE | {"silence": "keep"},
        ("chunks",),
    ),
    "lasg_drop": Setting(
        METHODS["lasg"](0.1, num_workers=M, silence="drop", exchange="gather"),
        ADAPTIVE_DENSE | {"silence": "drop"},
        ("shard_map",),
    ),
    # What becomes of what a message leaves out.
    "turn_decay": Setting(
        _sgd(TOP_K, sasg_jax.every(2), feedback=sasg_jax.residual(0.9)),
        SPARSE | {"turn": (2, True), "decay": 0.9},
        ("vmap",),
    ),
    "reconstruction": Setting(
        _sgd(TOP_K, feedback=sasg_jax.reconstruction()),
        SPARSE | {"feedback": "reconstruction"},
        ("chunks",),
    ),
    # Workers that are absent.
    "present_sgd": Setting(
        METHODS["sgd"](0.1, num_workers=M), RATE | {"present": PRESENT}, ("shard_map",)
    ),
    "present_sparse_sgd": Setting(
        METHODS["sparse_sgd"](0.1, num_workers=M), SPARSE | {"present": PRESENT}
    ),
    "present_sasg": Setting(
        METHODS["sasg"](0.1, num_workers=M),
        ADAPTIVE_SPARSE | {"present": PRESENT},
        ("shard_map",),
    ),
    "present_turn": Setting(
        _sgd(TOP_K, sasg_jax.every(2)), SPARSE | {"turn": (2, True), "present": PRESENT}, ("vmap",)
    ),
    "present_drop": Setting(
        _sgd(sasg_jax.identity(), silence="drop"),
        RATE | {"silence": "drop", "present": PRESENT},
        ("vmap",),
    ),
    "present_reconstruction": Setting(
        _aggregate(TOP_K, sasg_jax.innovation(ALPHA), feedback=sasg_jax.reconstruction()),
        AFTER
        | {
            "density": DENSITY,
            "alpha": ALPHA,
            "feedback": "reconstruction",
            "present": PRESENT,
        },
        ("vmap",),
    ),
    "present_sharded": Setting(
        METHODS["two_way"](0.1, num_workers=M, exchange="sharded"),
        TWO_WAY | {"scope": "shards", "present": PRESENT},
    ),
    # Other directions.
    "accumulate": Setting(
        METHODS["sasg"](0.1, num_workers=M), ADAPTIVE_SPARSE, ("vmap",), direction="accumulate"
    ),
    "local_steps": Setting(
        _aggregate(TOP_K, sasg_jax.every(2), after=0.8),
        {"learning_rate": None, "density": DENSITY, "turn": (2, True), "after": _times(0.8)},
        direction="local_steps",
    ),
    "lazy_local_steps": Setting(
        _aggregate(TOP_K, sasg_jax.innovation(0.2), after=1.0),
        {"learning_rate": None, "density": DENSITY, "alpha": 0.2},
        ("vmap",),
        direction="local_steps",
    ),
}


def _in_chunks(setting):
    """Whether the halves of a method can be run apart."""
    tx = SETTINGS[setting].tx
    return isinstance(tx, sasg_jax.Transformation) and not tx.method.exchange.sharded


def _slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


CASES = [
    (name, driver) if driver in setting.drivers else _slow(name, driver)
    for name, setting in SETTINGS.items()
    for driver in DRIVERS
    if driver != "chunks" or _in_chunks(name)
]


def _batches(setting):
    """Leading axes: rounds, workers, and the direction's steps where it has several."""
    batches = problems.softmax_batches(setting.num_workers, ROUNDS * STEPS)
    if setting.direction == "gradient":
        return jax.tree.map(lambda x: x[:ROUNDS], batches)

    def by_step(x):
        return np.swapaxes(x[: ROUNDS * STEPS].reshape(ROUNDS, STEPS, *x.shape[1:]), 1, 2)

    return jax.tree.map(by_step, batches)


def _library_run(setting, driver):
    """State after the last round, and what every round reported."""
    loss = problems.softmax_loss
    direction = {
        "gradient": lambda: sasg_jax.gradient(loss),
        "accumulate": lambda: sasg_jax.gradient(loss, accumulate=STEPS),
        "local_steps": lambda: sasg_jax.local_steps(loss, optax.sgd(LOCAL_RATE), steps=STEPS),
    }[setting.direction]()
    train_step = sasg_jax.make_train_step(
        direction,
        setting.tx,
        num_workers=setting.num_workers,
        driver="vmap" if driver == "chunks" else driver,
        chunk_size=2 if driver == "chunks" else None,
    )
    state = train_step.init(problems.softmax_params())
    rounds = _batches(setting), setting.oracle.get("present")
    if driver != "pmap":  # which is compiled by itself
        return jax.jit(problems.scan_rounds(train_step.step))(state, rounds)
    infos = []
    for t in range(ROUNDS):
        state, info = jax.block_until_ready(train_step.step(state, *problems.at(rounds, t)))
        infos.append(info)
    return state, jax.tree.map(lambda *xs: np.stack(xs), *jax.device_get(infos))


@functools.cache
def _oracle_trace(name):
    setting = SETTINGS[name]
    images, labels = _batches(setting)

    def gradient(m, t, params):
        return oracle.softmax_grad(params, images[t, m], labels[t, m])

    def accumulated(m, t, params):
        grads = [
            oracle.softmax_grad(params, images[t, m, i], labels[t, m, i]) for i in range(STEPS)
        ]
        return {key: np.mean([g[key] for g in grads], axis=0) for key in params}

    def local_steps(m, t, params):
        local = params
        for i in range(STEPS):
            grad = oracle.softmax_grad(local, images[t, m, i], labels[t, m, i])
            local = oracle.subtract(local, oracle.scaled(LOCAL_RATE, grad))
        return oracle.subtract(params, local)

    direction = {"gradient": gradient, "accumulate": accumulated, "local_steps": local_steps}
    return oracle.train(
        direction[setting.direction],
        problems.softmax_params(),
        num_workers=setting.num_workers,
        rounds=ROUNDS,
        **setting.oracle,
    )


@pytest.mark.parametrize(("name", "driver"), CASES)
def test_whole_run_equals_the_oracle(name, driver):
    """The same uploads in every round, the same parameters and memories at the end; and replicas
    that agree bit for bit."""
    setting, expected = SETTINGS[name], _oracle_trace(name)
    state, infos = _library_run(setting, driver)
    final, infos = jax.device_get((state, infos))

    np.testing.assert_array_equal(infos.uploaded, expected.uploaded)
    assert infos.finite.all()
    close = functools.partial(chex.assert_trees_all_close, rtol=0, atol=1e-5)
    close(final.params, expected.params)
    ours = find_state(final.opt_state)
    stacked = lambda trees: jax.tree.map(lambda *xs: np.stack(xs), *trees)
    if isinstance(ours.worker.feedback, sasg_jax.Reconstruction):
        close(ours.worker.feedback.reconstruction, stacked(expected.reconstructions))
    elif isinstance(ours.worker.feedback, sasg_jax.Residual):
        close(ours.worker.feedback.residual, stacked(expected.residuals))
    else:  # nothing is left out, or it is forgotten
        assert not any(np.any(x) for x in jax.tree.leaves(expected.residuals))
    if "downlink_density" in setting.oracle:
        got = ours.server.downlink_feedback.residual
        if ours.wire.exchange == "sharded":
            got = shards.join(got, expected.downlink_residual)
        close(got, expected.downlink_residual)
    present = setting.oracle.get("present", True)
    np.testing.assert_allclose(
        infos.innovation * present, expected.innovation, rtol=1e-3, atol=1e-7
    )
    np.testing.assert_allclose(infos.threshold, expected.threshold, rtol=1e-3, atol=1e-7)
    np.testing.assert_array_equal(
        infos.staleness, np.where(expected.uploaded, 1, expected.staleness + 1)
    )
    if driver in ("shard_map", "pmap"):
        assert problems.same_on_all_devices(state.params)


@pytest.mark.parametrize("name", SETTINGS)
def test_oracles_runs_are_worth_comparing(name):
    """No choice hangs on rounding; where rule (6) lets workers choose, they do skip and do come
    back."""
    trace = _oracle_trace(name)
    assert trace.margin > 1e-5
    if "alpha" in SETTINGS[name].oracle:
        chosen = trace.uploaded[trace.innovation > 0]
        assert 0.1 < chosen.mean() < 0.9


# Methods that must coincide -----------------------------------------------------------------------


@functools.cache
def _quadratic_run(tx, driver="vmap", rounds=20):
    """Parameters after every round, on batches that change from round to round."""
    start = problems.start(tx, problems.quadratic_params())
    step = problems.map_workers(tx, start, driver=driver)

    def one_round(run, batch):
        run = step(run, batch)
        return run, run.params

    scan = jax.jit(lambda batches: jax.lax.scan(one_round, start, batches)[1])
    return jax.device_get(scan(problems.centres(rounds=rounds, seed=1)))


def _dense_run(optimizer, rounds=20):
    """One machine that sees all workers' batches, with an optimiser of optax."""
    start = problems.quadratic_params()

    def one_round(carried, batch):
        params, state = carried
        grads = jax.vmap(jax.grad(problems.quadratic_loss), in_axes=(None, 0))(params, batch)
        mean = jax.tree.map(lambda g: g.mean(0), grads)
        updates, state = optimizer.update(mean, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    scan = jax.jit(lambda batches: jax.lax.scan(one_round, (start, optimizer.init(start)), batches))
    return jax.device_get(scan(problems.centres(rounds=rounds, seed=1))[1])


DENSE = METHODS["sgd"](0.1, num_workers=M, exchange="gather")
SPARSER = sasg_jax.sparse_sgd(0.1, num_workers=M, density=0.2)


@pytest.mark.parametrize(
    ("tx", "driver"),
    [
        (METHODS["sgd"](0.1, num_workers=M), "shard_map"),
        (DENSE, "vmap"),
        _slow(METHODS["sgd"](0.1, num_workers=M), "vmap"),
        _slow(_sgd(sasg_jax.identity(), feedback=sasg_jax.reconstruction()), "vmap"),
    ],
    ids=["psum on devices", "gather", "psum", "reconstruction"],
)
def test_sgd_is_optax_sgd_on_the_mean_gradient(tx, driver):
    chex.assert_trees_all_close(
        _quadratic_run(tx, driver), _dense_run(optax.sgd(LEARNING_RATE)), atol=1e-6
    )


@pytest.mark.parametrize(
    ("optimizer", "exchange"),
    [(optax.adamw(0.05), None), _slow(optax.sgd(0.1, momentum=0.9, nesterov=True), "gather")],
    ids=["adamw", "momentum"],
)
def test_dense_aggregate_before_an_optimizer_is_that_optimizer(optimizer, exchange):
    ours = sasg_jax.aggregate(sasg_jax.identity(), num_workers=M, exchange=exchange)
    chex.assert_trees_all_close(
        _quadratic_run(sasg_jax.pipeline(ours, optimizer)), _dense_run(optimizer), atol=1e-5
    )


@pytest.mark.parametrize(
    ("special", "general"),
    [
        (
            SPARSER,
            sasg_jax.sasg(0.1, num_workers=M, density=0.2, max_staleness=1, history=1),
        ),
        (DENSE, sasg_jax.lasg(0.1, num_workers=M, max_staleness=1, history=1)),
        (DENSE, sasg_jax.sparse_sgd(0.1, num_workers=M, density=1)),
        (
            sasg_jax.lasg(0.1, num_workers=M, history=2),
            sasg_jax.sasg(0.1, num_workers=M, density=1, history=2),
        ),
        (
            sasg_jax.lasg(0.1, num_workers=M, history=2),
            sasg_jax.lasg(0.1, num_workers=M, history=2, downlink=sasg_jax.identity()),
        ),
        _slow(SPARSER, sasg_jax.sasg(0.1, num_workers=M, density=0.2, alpha=0.0, history=1)),
        _slow(SPARSER, _sgd(sasg_jax.top_k(0.2), sasg_jax.every(1), silence="reuse")),
    ],
    ids=[
        "sasg(max_staleness=1) = sparse_sgd",
        "lasg(max_staleness=1) = sgd",
        "sparse_sgd(density=1) = sgd",
        "sasg(density=1) = lasg",
        "downlink=identity = none",
        "sasg(alpha=0) = sparse_sgd",
        "every(1) = sparse_sgd",
    ],
)
def test_special_case(special, general):
    chex.assert_trees_all_equal(_quadratic_run(special), _quadratic_run(general))


# What the paper proves ----------------------------------------------------------------------------


def _squared_norm(tree):
    return sum(float(np.sum(np.square(np.asarray(x, np.float64)))) for x in jax.tree.leaves(tree))


class History(NamedTuple):
    """Of every round; the first three before it."""

    params: Any
    residual: Any
    grads: Any
    uploaded: Any


@functools.cache
def _history(name) -> History:
    train_step = sasg_jax.make_train_step(
        problems.softmax_loss, METHODS[name](0.1, num_workers=M), num_workers=M
    )
    grads_fn = jax.vmap(jax.grad(problems.softmax_loss), in_axes=(None, 0))

    def one_round(state, batch):
        before = state.params, state.opt_state.worker.feedback.residual
        grads = grads_fn(state.params, batch)
        state, info = train_step.step(state, batch)
        return state, History(*before, grads, info.uploaded)

    start = train_step.init(problems.softmax_params())
    scan = jax.jit(lambda batches: jax.lax.scan(one_round, start, batches)[1])
    history = scan(problems.softmax_batches(M, ROUNDS))
    return jax.tree.map(lambda x: np.asarray(x, np.float64), history)


@pytest.mark.parametrize("name", ["sparse_sgd", "sasg"])
def test_lemma_2_bounds_the_residual(name):
    """||e||^2 <= 4 (1 - delta) / delta^2 * gamma^2 G^2, tensor by tensor, G the largest ||g||."""
    history = _history(name)
    for key, w in history.params.items():
        delta = max(1, int(DENSITY * w[0].size)) / w[0].size
        squared = lambda x: np.square(x).reshape(ROUNDS, M, -1).sum(-1).max()
        bound = 4 * (1 - delta) / delta**2 * LEARNING_RATE**2 * squared(history.grads[key])
        assert 0 < squared(history.residual[key]) <= bound


@pytest.mark.parametrize("name", ["sparse_sgd", "sasg"])
def test_auxiliary_sequence_moves_by_the_gradients(name):
    """Equation (16): v = w - mean(e) moves by -gamma/M times the gradients of those that uploaded,
    and by the old message of those that did not."""
    w, e, g, uploaded = _history(name)
    for key in w:
        scaled = LEARNING_RATE * g[key][:-1]
        messages = scaled + e[key][:-1] - e[key][1:]  # of those that uploaded: gamma g + e - e'
        v = w[key] - e[key].mean(1)
        last = np.zeros_like(messages[0])
        for t, sent in enumerate(uploaded[:-1]):
            sent = sent.astype(bool)
            last[sent] = messages[t][sent]
            moves = last.copy()
            moves[sent] = scaled[t][sent]
            np.testing.assert_allclose(v[t + 1] - v[t], -moves.mean(0), rtol=0, atol=2e-6)
    assert uploaded.all() == (name == "sparse_sgd")


# A battery over all methods -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("two_way", jnp.bfloat16),
        *(_slow(name, jnp.bfloat16) for name in METHODS if name != "two_way"),
        *(_slow(name, jnp.float32) for name in METHODS),
    ],
)
def test_converges_and_keeps_dtypes(name, dtype):
    """To the mean of the workers' centres, where no single worker is at rest."""
    tx = METHODS[name](0.02, num_workers=M)
    batch = problems.centres()
    before = problems.start(tx, problems.quadratic_params(dtype))
    step = problems.map_workers(tx, before)
    run = jax.jit(lambda run: jax.lax.fori_loop(0, 300, lambda t, run: step(run, batch), run))
    after = run(before)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, before)
    chex.assert_tree_all_finite(after)
    target = jax.tree.map(lambda x: x.mean(0), batch)
    distance = jax.tree.map(lambda p, c: jnp.asarray(p, jnp.float32) - c, after.params, target)
    # Error feedback at a constant rate ends in a ball around the minimum.
    ball = 0.15 if name in ("sasg", "two_way") else 0.03
    assert _squared_norm(distance) < ball * _squared_norm(target)


@pytest.mark.parametrize(
    ("name", "exchange"),
    [("two_way", "sharded"), *(_slow(name, None) for name in ("sgd", "lasg", "two_way"))],
)
def test_one_worker(name, exchange):
    """M = 1 runs, and dense methods are then plain SGD."""
    tx = METHODS[name](0.2, num_workers=1, exchange=exchange)
    batch = problems.centres(1)
    run = problems.start(tx, problems.quadratic_params(), 1)
    step = problems.map_workers(tx, run)
    for _ in range(3):
        run = step(run, batch)
    chex.assert_tree_all_finite(run)
    assert sasg_jax.diagnostics(run.opt_state).uploaded.tolist() == [True]
    if name in ("sgd", "lasg"):
        want = jax.tree.map(lambda c: (1 - 0.8**3) * c[0], batch)
    else:  # the largest entry of the largest parts, more and more
        want = _quadratic_oracle(batch)
    chex.assert_trees_all_close(run.params, want, atol=1e-6)


def _quadratic_oracle(batch, rounds=3):
    return oracle.train(
        lambda m, t, params: oracle.subtract(params, problems.at(batch, m)),
        problems.to_numpy(problems.quadratic_params()),
        num_workers=1,
        rounds=rounds,
        learning_rate=0.2,
        density=DENSITY,
        downlink_density=DENSITY,
    ).params


@pytest.mark.slow
def test_workers_may_be_renumbered():
    """Permuting the batches permutes the workers' states and leaves the parameters."""
    permutation = np.array([2, 0, 3, 1])
    tx = METHODS["two_way"](LEARNING_RATE, num_workers=M, history=2)
    start = problems.start(tx, problems.quadratic_params())
    step = problems.map_workers(tx, start)

    def one_round(run, batch):
        run = step(run, batch)
        return run, (run.params, run.opt_state.worker)

    scan = jax.jit(lambda batches: jax.lax.scan(one_round, start, batches)[1])
    batches = problems.centres(rounds=8, seed=3)
    params, workers = scan(batches)
    permuted, permuted_workers = scan(jax.tree.map(lambda x: x[:, permutation], batches))
    assert not np.all(workers.uploaded)
    chex.assert_trees_all_close(params, permuted, atol=1e-6)
    workers = jax.tree.map(lambda x: x[:, permutation], workers)
    chex.assert_trees_all_close(workers, permuted_workers, atol=1e-5)


@pytest.mark.parametrize("name", ["sasg", _slow("sgd")])
def test_runs_for_several_seeds_under_vmap(name):
    """A vmap outside the map over workers: each seed's run is the run of that seed alone."""
    tx = METHODS[name](LEARNING_RATE, num_workers=M, **({"history": 2} if name == "sasg" else {}))
    runs = [problems.centres(rounds=6, seed=seed) for seed in (1, 2)]
    start = problems.start(tx, problems.quadratic_params())
    step = problems.map_workers(tx, start)

    def train(batches):
        return jax.lax.scan(lambda run, batch: (step(run, batch), None), start, batches)[0]

    together = jax.jit(jax.vmap(train))(jax.tree.map(lambda *xs: np.stack(xs), *runs))
    for i, batches in enumerate(runs):
        alone = jax.jit(train)(batches)
        chex.assert_trees_all_close(problems.at(together, i), alone, atol=1e-5)


# Few bits of everything ---------------------------------------------------------------------------


def test_methods_of_few_bits_are_rows_of_the_table():
    """What each is made of; and any part may be another."""
    key = jax.random.key(0)

    def parts(tx):
        method = tx.method
        named = method.compressor, method.feedback, method.downlink, method.downlink_feedback
        return [part.name for part in named]

    sign = sasg_jax.sign_sgd(0.1, num_workers=2)
    assert parts(sign) == ["sign()", "residual()", "identity()", "none()"]
    both = sasg_jax.sign_sgd(0.1, num_workers=2, downlink=sasg_jax.sign())
    assert parts(both) == ["sign()", "residual()", "sign()", "residual()"]
    drawn = sasg_jax.terngrad(0.1, num_workers=2, key=key)
    assert parts(drawn) == ["ternary(2.5)", "none()", "identity()", "none()"]
    kept = sasg_jax.terngrad(0.1, num_workers=2, key=key, feedback=sasg_jax.residual(), clip=None)
    assert parts(kept) == ["ternary(None)", "residual()", "identity()", "none()"]
    flattened = sasg_jax.fo_sgd(0.1, num_workers=2, key=key)
    assert parts(flattened) == ["dithered_sign()", "none()", "dithered_sign()", "none()"]
    with pytest.raises(ValueError, match=r"^Expected key=None to be a PRNG key for dithered_sign"):
        sasg_jax.fo_sgd(0.1, num_workers=2)
