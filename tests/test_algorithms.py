"""The grid of methods: whole runs against the NumPy oracle, and what the paper proves."""

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
from problems import ALPHA, DENSITY, DRIVERS, LEARNING_RATE, METHODS, ROUNDS, M

import sasg_jax
from sasg_jax import shards
from sasg_jax.transform import find_state

# Whole runs against the oracle --------------------------------------------------------------------


class Setting(NamedTuple):
    """One algorithm, twice: made by the library, and as arguments of the oracle."""

    tx: optax.GradientTransformation
    oracle: dict[str, Any]
    num_workers: int = M


def _tenth_after_half(t):
    return jnp.where(t < ROUNDS // 2, 0.1, 0.02)


ADAPTIVE_SPARSE = {"learning_rate": LEARNING_RATE, "density": DENSITY, "alpha": ALPHA}
SEQUENCE = [30.0, 20.0, 10.0, 40.0]
SETTINGS = {
    "sgd": Setting(sasg_jax.sgd(LEARNING_RATE, num_workers=M), {"learning_rate": LEARNING_RATE}),
    "sparse_sgd": Setting(
        sasg_jax.sparse_sgd(LEARNING_RATE, num_workers=M, density=DENSITY),
        {"learning_rate": LEARNING_RATE, "density": DENSITY},
    ),
    "lasg": Setting(
        sasg_jax.lasg(LEARNING_RATE, num_workers=M, alpha=ALPHA),
        {"learning_rate": LEARNING_RATE, "alpha": ALPHA},
    ),
    "sasg": Setting(
        sasg_jax.sasg(LEARNING_RATE, num_workers=M, density=DENSITY, alpha=ALPHA), ADAPTIVE_SPARSE
    ),
    "two_way": Setting(
        sasg_jax.sasg(
            LEARNING_RATE,
            num_workers=M,
            density=DENSITY,
            alpha=ALPHA,
            downlink=sasg_jax.top_k(DENSITY),
        ),
        ADAPTIVE_SPARSE | {"downlink_density": DENSITY},
    ),
    "tree_scope": Setting(
        optax.chain(
            sasg_jax.aggregate(
                sasg_jax.top_k(DENSITY, scope="tree"),
                sasg_jax.innovation(ALPHA),
                num_workers=M,
            ),
            optax.sgd(LEARNING_RATE),
        ),
        ADAPTIVE_SPARSE | {"scope": "tree"},
    ),
    "alpha_sequence": Setting(
        sasg_jax.sasg(LEARNING_RATE, num_workers=M, density=DENSITY, alpha=SEQUENCE, history=4),
        ADAPTIVE_SPARSE | {"alpha": SEQUENCE, "history": 4},
    ),
    "alpha_function_and_schedule": Setting(
        sasg_jax.sasg(
            _tenth_after_half, num_workers=M, density=DENSITY, alpha=lambda gamma: 2 / gamma
        ),
        {
            "learning_rate": lambda t: 0.1 if t < ROUNDS // 2 else 0.02,
            "density": DENSITY,
            "alpha": lambda gamma: 2 / gamma,
        },
    ),
    **{
        exchange: Setting(
            sasg_jax.sasg(LEARNING_RATE, num_workers=M, density=DENSITY, exchange=exchange),
            ADAPTIVE_SPARSE,
        )
        for exchange in ("lazy", "relay", "server")
    },
    "server_two_way": Setting(
        METHODS["two_way"](LEARNING_RATE, num_workers=M, exchange="server"),
        ADAPTIVE_SPARSE | {"downlink_density": DENSITY},
    ),
    "server_lasg": Setting(
        sasg_jax.lasg(LEARNING_RATE, num_workers=M, exchange="server"),
        {"learning_rate": LEARNING_RATE, "alpha": ALPHA},
    ),
    "lazy_sparse_sgd": Setting(
        METHODS["sparse_sgd"](LEARNING_RATE, num_workers=M, exchange="lazy"),
        {"learning_rate": LEARNING_RATE, "density": DENSITY},
    ),
    "sharded": Setting(
        METHODS["sasg"](LEARNING_RATE, num_workers=M, exchange="sharded"),
        ADAPTIVE_SPARSE | {"scope": "shards"},
    ),
    "sharded_two_way": Setting(
        METHODS["two_way"](LEARNING_RATE, num_workers=M, exchange="sharded"),
        ADAPTIVE_SPARSE | {"scope": "shards", "downlink_density": DENSITY},
    ),
    "sharded_lasg": Setting(
        sasg_jax.lasg(LEARNING_RATE, num_workers=M, exchange="sharded"),
        {"learning_rate": LEARNING_RATE, "alpha": ALPHA},
    ),
    "sharded_sparse_sgd_of_eight": Setting(  # more workers than the smallest tensor has entries
        METHODS["sparse_sgd"](LEARNING_RATE, num_workers=8, exchange="sharded"),
        {"learning_rate": LEARNING_RATE, "density": DENSITY, "scope": "shards"},
        num_workers=8,
    ),
    "eight_workers": Setting(
        sasg_jax.sasg(LEARNING_RATE, num_workers=8, density=DENSITY),
        ADAPTIVE_SPARSE | {"alpha": 0.5 * 8 / LEARNING_RATE},
        num_workers=8,
    ),
}


@functools.cache
def oracle_trace(setting: str) -> oracle.Trace:
    _, arguments, num_workers = SETTINGS[setting]
    images, labels = problems.mlp_batches(num_workers)
    return oracle.train(
        lambda m, t, params: oracle.mlp_grad(params, images[t, m], labels[t, m]),
        problems.mlp_params(),
        num_workers=num_workers,
        rounds=ROUNDS,
        **arguments,
    )


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_whole_run_equals_the_oracle(setting, driver):
    """The same uploads in every round, the same parameters and residuals at the end.

    And one compilation, and replicas that agree bit for bit.
    """
    tx, _, num_workers = SETTINGS[setting]
    images, labels = problems.mlp_batches(num_workers)
    traces = 0

    def loss_fn(params, batch):
        nonlocal traces
        traces += 1
        return problems.mlp_loss(params, batch)

    train_step = sasg_jax.make_train_step(loss_fn, tx, num_workers=num_workers, driver=driver)
    step = problems.one_at_a_time(train_step.step)
    state = train_step.init(problems.mlp_params())
    infos, traces_by_round = [], set()
    for t in range(ROUNDS):
        state, info = step(state, (images[t], labels[t]))
        infos.append(info)
        traces_by_round.add(traces)
    infos = jax.tree.map(lambda *xs: np.stack(xs), *jax.device_get(infos))
    expected = oracle_trace(setting)

    np.testing.assert_array_equal(infos.uploaded, expected.uploaded)
    final = jax.device_get(state)
    close = functools.partial(chex.assert_trees_all_close, rtol=0, atol=1e-5)
    close(final.params, expected.params)
    ours = find_state(final.opt_state)
    if jax.tree.leaves(ours.worker.residual):
        scale = LEARNING_RATE if setting == "tree_scope" else 1  # there the rate comes after
        residuals = jax.tree.map(lambda *xs: np.stack(xs) / scale, *expected.residuals)
        close(ours.worker.residual, residuals, atol=1e-5 / scale)
    if jax.tree.leaves(ours.server.downlink_residual):
        got = ours.server.downlink_residual
        if ours.wire.exchange == "sharded":
            got = shards.join(got, expected.downlink_residual)
        close(got, expected.downlink_residual)
    assert bool(jax.tree.leaves(ours.worker.residual)) == ("density" in SETTINGS[setting].oracle)
    np.testing.assert_allclose(infos.innovation, expected.innovation, rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(infos.threshold, expected.threshold, rtol=1e-3, atol=1e-7)
    np.testing.assert_array_equal(
        infos.staleness, np.where(expected.uploaded, 1, expected.staleness + 1)
    )
    assert len(traces_by_round) == 1
    if driver != "vmap":
        assert problems.same_on_all_devices(state.params)
    if "alpha" in SETTINGS[setting].oracle:  # workers did skip, and did come back
        assert 0.1 < expected.uploaded[10:].mean() < 0.9


# Methods that must coincide -----------------------------------------------------------------------


@functools.cache
def _quadratic_run(tx, rounds=20, **kwargs):
    """Parameters after every round, on batches that change from round to round."""
    batches = problems.centres(rounds=rounds, seed=1)
    run = problems.start(tx, problems.quadratic_params())
    step = problems.map_workers(tx, run, **kwargs)
    history = []
    for t in range(rounds):
        run = step(run, problems.at(batches, t))
        history.append(run.params)
    return jax.tree.map(lambda *xs: np.stack(xs), *jax.device_get(history))


def _dense_run(optimizer, rounds=20):
    """One machine that sees all workers' batches, with an optimiser of optax."""
    batches = problems.centres(rounds=rounds, seed=1)
    params = problems.quadratic_params()
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, batch):
        grads = jax.vmap(jax.grad(problems.quadratic_loss), in_axes=(None, 0))(params, batch)
        mean = jax.tree.map(lambda g: g.mean(0), grads)
        updates, state = optimizer.update(mean, state, params)
        return optax.apply_updates(params, updates), state

    history = []
    for t in range(rounds):
        params, state = step(params, state, problems.at(batches, t))
        history.append(params)
    return jax.tree.map(lambda *xs: np.stack(xs), *jax.device_get(history))


@pytest.mark.parametrize("driver", ["vmap", "shard_map"])
@pytest.mark.parametrize("exchange", ["psum", "gather"])
def test_sgd_is_optax_sgd_on_the_mean_gradient(exchange, driver):
    tx = sasg_jax.sgd(LEARNING_RATE, num_workers=M, exchange=exchange)
    chex.assert_trees_all_close(
        _quadratic_run(tx, driver=driver), _dense_run(optax.sgd(LEARNING_RATE)), atol=1e-6
    )


@pytest.mark.parametrize(
    "optimizer",
    [optax.sgd(0.1), optax.sgd(0.1, momentum=0.9, nesterov=True), optax.adamw(0.05)],
    ids=["sgd", "momentum", "adamw"],
)
@pytest.mark.parametrize("exchange", ["psum", "gather"])
def test_dense_aggregate_before_an_optimizer_is_that_optimizer(optimizer, exchange):
    ours = sasg_jax.aggregate(sasg_jax.identity(), num_workers=M, exchange=exchange)
    chex.assert_trees_all_close(
        _quadratic_run(optax.chain(ours, optimizer)), _dense_run(optimizer), atol=1e-5
    )


SPARSE = sasg_jax.sparse_sgd(LEARNING_RATE, num_workers=M, density=0.2)
DENSE = sasg_jax.sgd(LEARNING_RATE, num_workers=M, exchange="gather")


@pytest.mark.parametrize(
    ("special", "general"),
    [
        (
            SPARSE,
            sasg_jax.sasg(LEARNING_RATE, num_workers=M, density=0.2, max_staleness=1, history=1),
        ),
        (
            DENSE,
            sasg_jax.lasg(LEARNING_RATE, num_workers=M, max_staleness=1, history=1),
        ),
        (
            DENSE,
            sasg_jax.sparse_sgd(LEARNING_RATE, num_workers=M, density=1),
        ),
        (
            sasg_jax.lasg(LEARNING_RATE, num_workers=M, history=2),
            sasg_jax.sasg(LEARNING_RATE, num_workers=M, density=1, history=2),
        ),
        (
            sasg_jax.sasg(LEARNING_RATE, num_workers=M, history=2),
            sasg_jax.sasg(LEARNING_RATE, num_workers=M, history=2, downlink=sasg_jax.identity()),
        ),
        (
            SPARSE,
            sasg_jax.sasg(LEARNING_RATE, num_workers=M, density=0.2, alpha=0.0, history=1),
        ),
    ],
    ids=[
        "sasg(max_staleness=1) = sparse_sgd",
        "lasg(max_staleness=1) = sgd",
        "sparse_sgd(density=1) = sgd",
        "sasg(density=1) = lasg",
        "downlink=identity = none",
        "sasg(alpha=0) = sparse_sgd",
    ],
)
def test_special_case(special, general):
    chex.assert_trees_all_equal(_quadratic_run(special), _quadratic_run(general))


@pytest.mark.parametrize("name", ["lasg", "sasg"])
def test_default_alpha_is_half_of_m_over_the_learning_rate(name):
    """The threshold after D rounds, from the steps that the parameters made."""
    rounds, history, rate = 6, 3, 0.25
    tx = METHODS[name](rate, num_workers=M, history=history)
    batches = problems.centres(rounds=rounds, seed=1)
    run = problems.start(tx, problems.quadratic_params())
    step = problems.map_workers(tx, run)
    steps = []
    for t in range(rounds):
        threshold = 0.5 / (rate * M) * sum(steps[-history:])
        before, run = run.params, step(run, problems.at(batches, t))
        np.testing.assert_allclose(
            sasg_jax.diagnostics(run.opt_state).threshold, threshold, rtol=1e-4
        )
        steps.append(_squared_norm(jax.tree.map(jnp.subtract, run.params, before)))


# What the paper proves ----------------------------------------------------------------------------


def _squared_norm(tree):
    return sum(float(np.sum(np.square(np.asarray(x, np.float64)))) for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", ["sparse_sgd", "sasg"])
def test_lemma_2_bounds_the_residual(name):
    """||e||^2 <= 4 (1 - delta) / delta^2 * gamma^2 G^2, tensor by tensor, G the largest ||g||."""
    train_step = problems.mlp_step(M, name)
    images, labels = problems.mlp_batches(M)
    grads_fn = jax.jit(jax.vmap(jax.grad(problems.mlp_loss), in_axes=(None, 0)))
    state = train_step.init(problems.mlp_params())
    largest_grad = dict.fromkeys(state.params, 0.0)
    largest_residual = dict.fromkeys(state.params, 0.0)
    for t in range(100):
        batch = (images[t], labels[t])
        grads = jax.device_get(grads_fn(state.params, batch))
        state, _ = train_step.step(state, batch)
        residuals = jax.device_get(state.opt_state.worker.residual)
        for largest, tree in ((largest_grad, grads), (largest_residual, residuals)):
            for key, x in tree.items():
                norms = np.sum(np.square(x, dtype=np.float64).reshape(M, -1), axis=1)
                largest[key] = max(largest[key], norms.max())
    for key, x in state.params.items():
        delta = max(1, int(DENSITY * x.size)) / x.size
        bound = 4 * (1 - delta) / delta**2 * LEARNING_RATE**2 * largest_grad[key]
        assert 0 < largest_residual[key] <= bound


@pytest.mark.parametrize("name", ["sparse_sgd", "sasg"])
def test_auxiliary_sequence_moves_by_the_gradients(name):
    """Equation (16): v = w - mean(e) moves by -gamma/M times the gradients of those that uploaded,
    and by the old message of those that did not."""
    train_step = problems.mlp_step(M, name)
    images, labels = problems.mlp_batches(M)
    grads_fn = jax.jit(jax.vmap(jax.grad(problems.mlp_loss), in_axes=(None, 0)))

    def auxiliary(state):
        residual = state.opt_state.worker.residual
        return jax.tree.map(
            lambda w, e: np.asarray(w, np.float64) - np.asarray(e, np.float64).mean(0),
            state.params,
            residual,
        )

    def decoded(old, new, grads, m):
        """Worker m's message of this round: gamma g + e - e'."""
        e, e_new = old.opt_state.worker.residual, new.opt_state.worker.residual
        return jax.tree.map(
            lambda g, e, e_new: LEARNING_RATE * np.asarray(g[m]) + np.asarray(e[m] - e_new[m]),
            grads,
            e,
            e_new,
        )

    state = jax.device_get(train_step.init(problems.mlp_params()))
    last_message = [None] * M
    silent = 0
    for t in range(40):
        batch = (images[t], labels[t])
        grads = jax.device_get(grads_fn(state.params, batch))
        new_state, info = jax.device_get(train_step.step(state, batch))
        moves = []
        for m in range(M):
            if info.uploaded[m]:
                last_message[m] = decoded(state, new_state, grads, m)
                grad = problems.at(grads, m)
                moves.append(jax.tree.map(lambda g: LEARNING_RATE * np.asarray(g), grad))
            else:
                moves.append(last_message[m])
                silent += 1
        moved = jax.tree.map(np.subtract, auxiliary(new_state), auxiliary(state))
        mean_move = jax.tree.map(lambda *xs: -np.sum(xs, axis=0) / M, *moves)
        chex.assert_trees_all_close(moved, mean_move, rtol=0, atol=2e-6)
        state = new_state
    assert (silent > 0) == (name == "sasg")


# A battery over all methods -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", METHODS)
def test_converges_and_keeps_dtypes(name, dtype):
    """To the mean of the workers' centres, where no single worker is at rest."""
    tx = METHODS[name](0.02, num_workers=M)
    batch = problems.centres()
    before = problems.start(tx, problems.quadratic_params(dtype))
    step = problems.map_workers(tx, before)
    run = before
    for _ in range(300):
        run = step(run, batch)
    chex.assert_trees_all_equal_shapes_and_dtypes(run, before)
    chex.assert_tree_all_finite(run)
    target = jax.tree.map(lambda x: x.mean(0), batch)
    distance = jax.tree.map(lambda p, c: jnp.asarray(p, jnp.float32) - c, run.params, target)
    # Error feedback at a constant rate ends in a ball around the minimum.
    ball = 0.15 if name in ("sasg", "two_way") else 0.03
    assert _squared_norm(distance) < ball * _squared_norm(target)


@pytest.mark.parametrize("name", METHODS)
def test_unknown_extra_arguments_are_ignored(name):
    tx = METHODS[name](LEARNING_RATE, num_workers=M)
    run = problems.start(tx, problems.quadratic_params())
    step = problems.map_workers(tx, run, value=jnp.ones(()), value_fn=sum)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        jax.eval_shape(step, run, problems.centres()), run
    )


@pytest.mark.parametrize("name", METHODS)
def test_one_worker(name):
    """M = 1 runs, and dense methods are then plain SGD."""
    tx = METHODS[name](0.2, num_workers=1)
    batch = problems.centres(1)
    run = problems.start(tx, problems.quadratic_params(), 1)
    step = problems.map_workers(tx, run)
    for _ in range(3):
        run = step(run, batch)
    chex.assert_tree_all_finite(run)
    chex.assert_shape(sasg_jax.diagnostics(run.opt_state).uploaded, (1,))
    if name in ("sgd", "lasg"):
        want = jax.tree.map(lambda c: (1 - 0.8**3) * c[0], batch)
        chex.assert_trees_all_close(run.params, want, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_workers_may_be_renumbered(name):
    """Permuting the batches permutes the workers' states and leaves the parameters."""
    permutation = np.array([2, 0, 3, 1])
    adaptive = {"history": 2} if name in problems.ADAPTIVE else {}
    tx = METHODS[name](LEARNING_RATE, num_workers=M, **adaptive)
    rounds = 8
    batches = problems.centres(rounds=rounds, seed=3)
    run = permuted = problems.start(tx, problems.quadratic_params())
    step = problems.map_workers(tx, run)
    for t in range(rounds):
        batch = problems.at(batches, t)
        run = step(run, batch)
        permuted = step(permuted, jax.tree.map(lambda x: x[permutation], batch))
        chex.assert_trees_all_close(run.params, permuted.params, atol=1e-6)
        chex.assert_trees_all_close(
            jax.tree.map(lambda x: x[permutation], run.opt_state.worker),
            permuted.opt_state.worker,
            atol=1e-5,
        )


@pytest.mark.parametrize("name", METHODS)
def test_state_is_stable_in_scan(name):
    """lax.scan refuses a carry whose structure, shapes, dtypes or weak types change."""
    tx = METHODS[name](LEARNING_RATE, num_workers=M)
    run = problems.start(tx, problems.quadratic_params())
    step = problems.map_workers(tx, run)

    def train(run, batches):
        return jax.lax.scan(lambda run, batch: (step(run, batch), None), run, batches)[0]

    after = jax.eval_shape(train, run, problems.centres(rounds=2))
    chex.assert_trees_all_equal_shapes_and_dtypes(after, run)


@pytest.mark.parametrize("name", ["sgd", "sasg"])
def test_runs_for_several_seeds_under_vmap(name):
    """A vmap outside the map over workers: each seed's run is the run of that seed alone."""
    rounds = 6
    tx = METHODS[name](LEARNING_RATE, num_workers=M, **({"history": 2} if name == "sasg" else {}))
    runs = [problems.centres(rounds=rounds, seed=seed) for seed in (1, 2)]
    start = problems.start(tx, problems.quadratic_params())
    step = problems.map_workers(tx, start)

    def train(batches):
        return jax.lax.scan(lambda run, batch: (step(run, batch), None), start, batches)[0]

    together = jax.jit(jax.vmap(train))(jax.tree.map(lambda *xs: np.stack(xs), *runs))
    for i, batches in enumerate(runs):
        run = start
        for t in range(rounds):
            run = step(run, problems.at(batches, t))
        chex.assert_trees_all_close(problems.at(together, i), run, atol=1e-5)
