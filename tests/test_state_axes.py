"""Which parts of a state belong to a worker, and optax's wrappers under both maps."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from jax.sharding import PartitionSpec
from problems import DENSITY, LEARNING_RATE, M

import sasg_jax
from sasg_jax._checks import STATIC_ARGUMENTS

PARAMS = problems.quadratic_params()
MASK = {"b": False, "w": True}
APPROXIMATE = sasg_jax.top_k(DENSITY, selection="approximate")


@pytest.fixture(autouse=True)
def _thresholds_of_short_vectors(monkeypatch):
    """So that an approximate selection has a threshold to carry."""
    monkeypatch.setattr("sasg_jax.selection._MIN_PRUNED_SIZE", 1)


def _sasg(learning_rate=LEARNING_RATE, **kwargs):
    return sasg_jax.sasg(learning_rate, num_workers=M, density=DENSITY, history=2, **kwargs)


WRAPPED = {
    "plain": _sasg(),
    "chain_before": optax.chain(optax.trace(0.9), _sasg()),
    "chain_after": optax.chain(
        sasg_jax.aggregate(
            sasg_jax.top_k(DENSITY), sasg_jax.innovation(10.0, history=2), num_workers=M
        ),
        optax.adam(LEARNING_RATE),
    ),
    "nested_chain": optax.chain(optax.clip(1.0), optax.chain(optax.trace(0.5), _sasg())),
    # What masked leaves alone is each worker's own gradient: it must not reach the parameters.
    "masked": optax.chain(
        optax.masked(_sasg(), MASK), optax.masked(optax.set_to_zero(), {"b": True, "w": False})
    ),
    "inject_hyperparams": optax.inject_hyperparams(sasg_jax.sasg, static_args=STATIC_ARGUMENTS)(
        LEARNING_RATE, num_workers=M, density=DENSITY, history=2
    ),
    "multi_steps": optax.MultiSteps(
        sasg_jax.sparse_sgd(LEARNING_RATE, num_workers=M, density=DENSITY), 2
    ).gradient_transformation(),
    "multi_steps_adaptive": optax.MultiSteps(_sasg(), 2),
    "server": _sasg(exchange="server"),
    "sharded": _sasg(exchange="sharded", downlink=sasg_jax.top_k(DENSITY)),
    "approximate": optax.chain(
        sasg_jax.aggregate(APPROXIMATE, num_workers=M, downlink=APPROXIMATE, exchange="server"),
        optax.sgd(LEARNING_RATE),
    ),
    "sharded_approximate": optax.chain(
        sasg_jax.aggregate(APPROXIMATE, num_workers=M, downlink=APPROXIMATE, exchange="sharded"),
        optax.sgd(LEARNING_RATE),
    ),
    "sharded_in_a_chain": optax.chain(optax.clip(1.0), _sasg(exchange="sharded")),
}
SHARDED = [name for name in WRAPPED if "sharded" in name]
OF_A_SHARD = (".server.messages", ".server.downlink_residual", ".server.downlink_memory")


# Marks --------------------------------------------------------------------------------------------


def _marks(name):
    """Paths of the leaves that belong to a worker, and of those that do not."""
    own = sasg_jax.per_worker(WRAPPED[name].init(PARAMS))
    leaves = jax.tree_util.tree_leaves_with_path(own)
    paths = [(jax.tree_util.keystr(path), mark) for path, mark in leaves]
    return [p for p, mark in paths if mark], [p for p, mark in paths if not mark]


@pytest.mark.parametrize("name", WRAPPED)
def test_marks_ours(name):
    """Every leaf of the worker's state, and none of the server's but what belongs to its shard."""
    own, shared = _marks(name)
    leaves = jax.tree.leaves(WRAPPED[name].init(PARAMS))
    assert len(own) + len(shared) == len(leaves)
    of_a_shard = OF_A_SHARD if name in SHARDED else ()
    own_of_server = [path for path in own if ".server" in path]
    assert all(any(part in path for part in of_a_shard) for path in own_of_server)
    assert not [path for path in shared for part in of_a_shard if part in path]
    assert bool(own_of_server) == (name in SHARDED)
    assert not [path for path in shared if ".worker" in path]
    assert any(".worker.residual" in path for path in own)
    assert any(".server.round" in path for path in shared)


@pytest.mark.parametrize(
    ("name", "part", "belongs_to_worker"),
    [
        ("chain_before", "[0].trace", True),
        ("nested_chain", "[1][0].trace", True),
        ("chain_after", "[1][0].mu", False),
        ("chain_after", "[1][0].count", False),
        ("inject_hyperparams", ".hyperparams['learning_rate']", False),
        ("multi_steps", ".acc_grads", True),
        ("multi_steps", ".mini_step", False),
    ],
)
def test_marks_what_stands_around_ours(name, part, belongs_to_worker):
    own, shared = _marks(name)
    paths = own if belongs_to_worker else shared
    others = shared if belongs_to_worker else own
    assert any(path.startswith(part) for path in paths)
    assert not any(path.startswith(part) for path in others)


def test_axes_specs_and_stacking_agree():
    tx = WRAPPED["chain_before"]
    state = tx.init(PARAMS)
    own = jax.tree.leaves(sasg_jax.per_worker(state))
    axes = jax.tree.leaves(sasg_jax.worker_axes(state), is_leaf=lambda x: x is None)
    specs = jax.tree.leaves(
        sasg_jax.worker_specs(state, "m"), is_leaf=lambda x: isinstance(x, PartitionSpec)
    )
    stacked = jax.tree.leaves(sasg_jax.stack_workers(state, M))
    for is_own, axis, spec, x, before in zip(
        own, axes, specs, stacked, jax.tree.leaves(state), strict=True
    ):
        assert axis == (0 if is_own else None)
        assert tuple(spec) == (("m",) if is_own else ())
        assert x.shape == ((M, *before.shape) if is_own else before.shape)
        np.testing.assert_array_equal(x, np.broadcast_to(before, x.shape))


def test_specs_default_to_the_axis_of_the_methods():
    specs = sasg_jax.worker_specs(_sasg().init(PARAMS))
    assert tuple(specs.worker.staleness) == ("workers",)


# Wrappers under vmap with worker_axes and under shard_map with worker_specs -----------------------


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapper_runs_alike_under_both_maps(name):
    """Same results, stable state, one compilation; replicas agree bit for bit."""
    rounds = 8
    batches = problems.centres(rounds=rounds, seed=4)
    runs = {}
    for driver in ("vmap", "shard_map"):
        traces = 0

        def loss(params, batch):
            nonlocal traces
            traces += 1
            return problems.quadratic_loss(params, batch)

        before = problems.start(WRAPPED[name], PARAMS)
        step = problems.map_workers(WRAPPED[name], before, driver=driver, loss=loss)
        run = step(before, problems.at(batches, 0))
        if driver == "shard_map":  # its outputs are committed to their devices from now on
            run = step(run, problems.at(batches, 1))
        traces_at_first = traces
        for t in range(1 if driver == "vmap" else 2, rounds):
            run = step(run, problems.at(batches, t))
        chex.assert_trees_all_equal_shapes_and_dtypes(run, before)
        assert traces == traces_at_first
        runs[driver] = run
    chex.assert_trees_all_close(runs["vmap"], jax.device_get(runs["shard_map"]), atol=1e-5)
    assert problems.same_on_all_devices(runs["shard_map"].params)
    assert any(np.any(x) for x in jax.tree.leaves(runs["vmap"].params))
    if "approximate" in name:
        ours = runs["vmap"].opt_state[0]
        for memory in (ours.worker.compressor_memory, ours.server.downlink_memory):
            assert any(np.any(x) for x in jax.tree.leaves(memory))


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapper_is_stable_in_scan(name):
    run = problems.start(WRAPPED[name], PARAMS)
    step = problems.map_workers(WRAPPED[name], run)

    def train(run, batches):
        return jax.lax.scan(lambda run, batch: (step(run, batch), None), run, batches)[0]

    after = jax.eval_shape(train, run, problems.centres(rounds=2))
    chex.assert_trees_all_equal_shapes_and_dtypes(after, run)


def _run(tx, rounds=6, params=PARAMS):
    batches = problems.centres(rounds=rounds, seed=4)
    batches = {key: batches[key] for key in params}
    run = problems.start(tx, params)
    step = problems.map_workers(tx, run)
    for t in range(rounds):
        run = step(run, problems.at(batches, t))
    return run.params


def test_injected_learning_rate_is_the_learning_rate():
    chex.assert_trees_all_close(
        _run(WRAPPED["inject_hyperparams"]), _run(WRAPPED["plain"]), atol=1e-6
    )


def test_injected_hyperparameters_can_be_changed_between_rounds():
    """Ten times the learning rate makes the next dense step ten times as long."""
    factory = optax.inject_hyperparams(sasg_jax.sgd, static_args="num_workers")
    run = problems.start(factory(0.01, num_workers=M), PARAMS)
    step = problems.map_workers(factory(0.01, num_workers=M), run)
    batch = problems.centres()
    run.opt_state.hyperparams["learning_rate"] = jnp.float32(0.1)
    want = jax.tree.map(lambda c: 0.1 * c.mean(0), batch)
    chex.assert_trees_all_close(step(run, batch).params, want, atol=1e-6)


def test_masked_is_the_method_on_the_rest():
    got = _run(WRAPPED["masked"])
    chex.assert_trees_all_close(got["w"], _run(_sasg(), params={"w": PARAMS["w"]})["w"], atol=1e-6)
    np.testing.assert_array_equal(got["b"], PARAMS["b"])


def test_multi_steps_is_the_dense_optimizer_on_accumulated_gradients():
    """Two rounds of accumulation and one of SGD, from each worker's own gradients."""
    tx = optax.MultiSteps(sasg_jax.sgd(LEARNING_RATE, num_workers=M), 2).gradient_transformation()
    batches = problems.centres(rounds=4, seed=4)
    want = PARAMS
    for t in (0, 2):
        mean = jax.tree.map(lambda c, t=t: c[t : t + 2].mean(0), batches)
        want = jax.tree.map(lambda w, c: w - LEARNING_RATE * (w - c.mean(0)), want, mean)
    chex.assert_trees_all_close(_run(tx, rounds=4), want, atol=1e-6)


def test_momentum_before_ours_is_momentum_on_the_mean():
    tx = optax.chain(optax.trace(0.9), sasg_jax.sgd(LEARNING_RATE, num_workers=M))
    after = optax.chain(
        sasg_jax.aggregate(sasg_jax.identity(), num_workers=M), optax.sgd(LEARNING_RATE, 0.9)
    )
    chex.assert_trees_all_close(_run(tx), _run(after), atol=1e-6)


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [sasg_jax.per_worker, sasg_jax.worker_axes, sasg_jax.worker_specs],
)
@pytest.mark.parametrize(
    ("tx", "found"), [(optax.adam(0.1), 0), (optax.chain(_sasg(), _sasg()), 2)]
)
def test_state_without_exactly_one_of_ours(function, tx, found):
    with pytest.raises(ValueError, match=rf"exactly one state of sasg_jax .*, found {found}"):
        function(tx.init(PARAMS))


def test_multi_steps_that_skips():
    tx = optax.MultiSteps(_sasg(), 2, should_skip_update_fn=optax.skip_not_finite)
    with pytest.raises(
        ValueError, match=r"^Expected optax.MultiSteps without should_skip_update_f"
    ):
        sasg_jax.worker_axes(tx.init(PARAMS))


@pytest.mark.parametrize("num_workers", [0, -1, 1.5])
def test_stack_for_no_workers(num_workers):
    with pytest.raises(ValueError, match=rf"^Expected num_workers={num_workers} to be an integer"):
        sasg_jax.stack_workers(_sasg().init(PARAMS), num_workers)
