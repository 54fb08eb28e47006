"""Which parts of a state belong to a worker, and what others put around ours."""

import functools

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
APPROXIMATE = sasg_jax.top_k(DENSITY, selection="approximate")


@pytest.fixture(autouse=True)
def _thresholds_of_short_vectors(monkeypatch):
    """So that an approximate selection has a threshold to carry."""
    monkeypatch.setattr("sasg_jax.selection._MIN_PRUNED_SIZE", 1)


def _sasg(learning_rate=LEARNING_RATE, **kwargs):
    return sasg_jax.sasg(learning_rate, num_workers=M, density=DENSITY, history=2, **kwargs)


ADAPTIVE = sasg_jax.aggregate(
    sasg_jax.top_k(DENSITY), sasg_jax.innovation(10.0, history=2), num_workers=M
)


def _approximate(exchange):
    tx = sasg_jax.aggregate(APPROXIMATE, num_workers=M, downlink=APPROXIMATE, exchange=exchange)
    return optax.chain(tx, optax.sgd(LEARNING_RATE))


WRAPPED = {
    "plain": _sasg(),
    "pipeline": sasg_jax.pipeline(optax.trace(0.5), ADAPTIVE, optax.adam(LEARNING_RATE)),
    "chain": optax.chain(optax.trace(0.9), ADAPTIVE, optax.adam(LEARNING_RATE)),
    "named_chain": optax.named_chain(("trace", optax.trace(0.9)), ("ours", _sasg())),
    "nested_chain": optax.chain(optax.clip(1.0), optax.chain(optax.trace(0.5), _sasg())),
    # What masked leaves alone is each worker's own gradient: it must not reach the parameters.
    "masked": optax.chain(
        optax.masked(_sasg(), {"b": False, "w": True}),
        optax.masked(optax.set_to_zero(), {"b": True, "w": False}),
    ),
    "partition": optax.partition(
        {"ours": _sasg(), "frozen": optax.set_to_zero()}, {"b": "frozen", "w": "ours"}
    ),
    "flatten": optax.flatten(_sasg()),
    "inject_hyperparams": optax.inject_hyperparams(sasg_jax.sasg, static_args=STATIC_ARGUMENTS)(
        LEARNING_RATE, num_workers=M, density=DENSITY, history=2
    ),
    "server": _approximate("server"),
    "sharded": _approximate("sharded"),
}
OF_A_SHARD = (
    ".server.memory",
    ".server.downlink_feedback",
    ".server.downlink_memory",
    ".server.downlink_rule",
)


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
    of_a_shard = OF_A_SHARD if name == "sharded" else ()
    own_of_server = [path for path in own if ".server" in path]
    assert all(any(part in path for part in of_a_shard) for path in own_of_server)
    assert not [path for path in shared for part in of_a_shard if part in path]
    assert bool(own_of_server) == (name == "sharded")
    assert not [path for path in shared if ".worker" in path]
    assert any(".worker.feedback.residual" in path for path in own)
    assert any(".server.round" in path for path in shared)


@pytest.mark.parametrize(
    ("name", "part", "belongs_to_worker"),
    [
        ("pipeline", ".before[1].trace", True),
        ("pipeline", ".after[1][0].mu", False),
        ("chain", "[0].trace", True),
        ("chain", "[2][0].mu", False),
        ("chain", "[2][0].count", False),
        ("named_chain", "['trace'].trace", True),
        ("nested_chain", "[1][0].trace", True),
        ("inject_hyperparams", ".hyperparams['learning_rate']", False),
    ],
)
def test_marks_what_stands_around_ours(name, part, belongs_to_worker):
    own, shared = _marks(name)
    paths = own if belongs_to_worker else shared
    others = shared if belongs_to_worker else own
    assert any(path.startswith(part) for path in paths)
    assert not any(path.startswith(part) for path in others)


def test_axes_specs_and_stacking_agree():
    state = WRAPPED["chain"].init(PARAMS)
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


def test_keys_before_ours_are_a_worker_s_own():
    """One for each worker, and none that another has."""
    noise = optax.add_noise(0.1, 0.5, key=jax.random.key(3))
    tx = optax.chain(noise, sasg_jax.sgd(LEARNING_RATE, num_workers=M))
    keys = sasg_jax.stack_workers(tx.init(PARAMS), M)[0].rng_key
    assert keys.shape == (M,)
    assert len(np.unique(jax.random.key_data(keys), axis=0)) == M


# Wrappers under vmap with worker_axes and under shard_map with worker_specs -----------------------

ROUNDS = 8


@functools.cache
def _run(name, driver, tx=None):
    """One's own loop, in a scan: a state whose shapes or types change would not fit into it."""
    tx = WRAPPED[name] if tx is None else tx
    batches = problems.centres(rounds=ROUNDS, seed=4)
    start = problems.start(tx, PARAMS)
    step = problems.map_workers(tx, start, driver=driver)
    train = lambda run, batches: jax.lax.scan(lambda run, b: (step(run, b), None), run, batches)[0]
    return start, jax.jit(train)(start, batches)


# The others are made of these: their marks are looked at above.
SHARDED = pytest.param("sharded", marks=pytest.mark.slow)  # two selections in each of the shards
IN_A_LOOP = ["pipeline", "named_chain", "masked", "partition", SHARDED]
# Under both maps the marks are the same: these have own parts in each of the places.
ON_DEVICES = ["pipeline", SHARDED]


@pytest.mark.parametrize("name", IN_A_LOOP)
def test_wrapper_runs_in_ones_own_loop(name):
    """In a stable state, which moves."""
    start, run = _run(name, "vmap")
    chex.assert_trees_all_equal_shapes_and_dtypes(run, start)
    moved = [bool(np.any(x)) for x in jax.tree.leaves(run.params)]
    assert moved == ([False, True] if name in ("masked", "partition") else [True, True])
    if name == "sharded":
        ours = run.opt_state[0]
        for memory in (ours.worker.compressor_memory, ours.server.downlink_memory):
            assert any(np.any(x) for x in jax.tree.leaves(memory))


@pytest.mark.parametrize("name", ON_DEVICES)
def test_wrapper_runs_alike_on_devices(name):
    """Where replicas are apart, they agree bit for bit."""
    _, run = _run(name, "shard_map")
    chex.assert_trees_all_close(_run(name, "vmap")[1], jax.device_get(run), atol=1e-5)
    assert problems.same_on_all_devices(run.params)


def _train(tx):
    train_step = sasg_jax.make_train_step(problems.quadratic_loss, tx, num_workers=M, donate=False)
    batches = problems.centres(rounds=ROUNDS, seed=4)
    run = jax.jit(lambda state, batches: jax.lax.scan(train_step.step, state, batches)[0])
    return run(train_step.init(PARAMS), batches).params


@pytest.mark.parametrize("name", ["pipeline", "masked"])
def test_wrapper_in_a_train_step_is_that_in_ones_own_loop(name):
    chex.assert_trees_all_close(_train(WRAPPED[name]), _run(name, "vmap")[1].params, atol=1e-6)


def test_flatten_is_the_method_on_all_entries_of_the_tree():
    """Though a rule that compares sees its parameters as one vector."""
    rule = sasg_jax.innovation(sasg_jax.released_alpha(0.5, M), history=2)
    compressor = sasg_jax.top_k(DENSITY, scope="tree")
    tree = sasg_jax.compressed_sgd(LEARNING_RATE, compressor, rule, num_workers=M)
    chex.assert_trees_all_close(_train(WRAPPED["flatten"]), _train(tree), atol=1e-6)


def test_flatten_of_mixed_types():
    """The stale parameters, which it keeps as one vector of the widest type, come back as each."""
    params = {"b": jnp.zeros(6, jnp.bfloat16), "w": jnp.zeros((4, 6))}
    types = []

    def loss(params, batch):
        types.append({key: x.dtype for key, x in params.items()})
        return problems.quadratic_loss(params, batch)

    tx = optax.flatten(_sasg())
    train_step = sasg_jax.make_train_step(loss, tx, num_workers=M, donate=False)
    jax.eval_shape(train_step.step, train_step.init(params), problems.centres())
    assert len(types) >= 2
    assert all(found == {"b": jnp.bfloat16, "w": jnp.float32} for found in types)


@pytest.mark.parametrize("name", ["flatten", "masked"])
def test_gradient_function_of_ones_own_learns_what_it_gets(name):
    """Parameters as they reach ours: one that is written for others is told so."""
    tx = WRAPPED[name]
    start = problems.start(tx, PARAMS)

    def worker(opt_state, batch):
        grad_fn = lambda p: jax.grad(lambda p: sum(jnp.sum(p[k] - batch[k]) for k in p))(p)
        return tx.update(grad_fn(PARAMS), opt_state, PARAMS, grad_fn=grad_fn)

    axes = sasg_jax.worker_axes(start.opt_state)
    with pytest.raises(Exception) as raised:  # noqa: PT011 its type is that of the function's own
        jax.vmap(worker, in_axes=(axes, 0), axis_name="workers")(
            start.opt_state, problems.centres()
        )
    assert any("grad_fn gets params as they reach sasg_jax" in n for n in raised.value.__notes__)


@pytest.mark.slow
def test_injected_learning_rate_is_the_learning_rate():
    got, want = (_run(name, "vmap")[1].params for name in ("inject_hyperparams", "plain"))
    chex.assert_trees_all_close(got, want, atol=1e-6)


def test_injected_hyperparameters_can_be_changed_between_rounds():
    """Ten times the learning rate makes the next dense step ten times as long."""
    tx = optax.inject_hyperparams(sasg_jax.sgd, static_args="num_workers")(0.01, num_workers=M)
    run = problems.start(tx, PARAMS)
    step = problems.map_workers(tx, run)
    batch = problems.centres()
    run.opt_state.hyperparams["learning_rate"] = jnp.float32(0.1)
    want = jax.tree.map(lambda c: 0.1 * c.mean(0), batch)
    chex.assert_trees_all_close(step(run, batch).params, want, atol=1e-6)


def test_injected_settings_that_must_not_be_arrays():
    """With the advice that helps, also where they are not traced."""
    inject = optax.inject_hyperparams(sasg_jax.sparse_sgd, static_args="num_workers")
    tx = inject(0.1, num_workers=M, density=0.1)
    with pytest.raises(TypeError, match=r"^Expected density to be a Python number .*static_args="):
        tx.init(PARAMS)


def test_masked_is_the_method_on_the_rest():
    rest = {"w": PARAMS["w"]}
    start = problems.start(_sasg(), rest)
    step = problems.map_workers(_sasg(), start)
    for t in range(ROUNDS):
        batch = problems.at(problems.centres(rounds=ROUNDS, seed=4), t)
        start = step(start, {"w": batch["w"]})
    for name in ("masked", "partition"):
        got = _run(name, "vmap")[1].params
        chex.assert_trees_all_close(got["w"], start.params["w"], atol=1e-6)
        np.testing.assert_array_equal(got["b"], PARAMS["b"])


def test_momentum_before_ours_is_momentum_on_the_mean():
    """For what is linear, so that the two may change places."""
    before = optax.chain(optax.trace(0.9), sasg_jax.sgd(LEARNING_RATE, num_workers=M))
    dense = sasg_jax.aggregate(sasg_jax.identity(), num_workers=M)
    after = optax.chain(dense, optax.sgd(LEARNING_RATE, 0.9))
    got, want = (_run(name, "vmap", tx)[1].params for name, tx in (("b", before), ("a", after)))
    chex.assert_trees_all_close(got, want, atol=1e-6)


# Optimisers that need the loss --------------------------------------------------------------------


def test_value_is_the_mean_loss():
    """Polyak's rate is loss / ‖mean gradient‖² here, and steps along the mean gradient."""
    tx = optax.chain(
        sasg_jax.aggregate(sasg_jax.identity(), num_workers=M),
        optax.polyak_sgd(max_learning_rate=9),
    )
    train_step = sasg_jax.make_train_step(
        problems.quadratic_loss, tx, num_workers=M, donate=False, pass_value=True
    )
    batch = problems.centres()
    state, info = train_step.step(train_step.init(PARAMS), batch)
    mean = {key: -c.mean(0) for key, c in batch.items()}
    loss = np.mean([sum(0.5 * np.sum(c[m] ** 2) for c in batch.values()) for m in range(M)])
    np.testing.assert_allclose(np.mean(info.loss), loss, rtol=1e-5)
    rate = loss / sum(np.sum(g**2) for g in mean.values())
    want = {key: -rate * g for key, g in mean.items()}
    chex.assert_trees_all_close(state.params, want, rtol=1e-4)


@pytest.mark.parametrize("name", ["polyak", "plateau", "line search"])
def test_a_missing_value_is_said_to_be_on_offer(name):
    after = {
        "polyak": optax.polyak_sgd(),
        "plateau": optax.contrib.reduce_on_plateau(),
        "line search": optax.scale_by_backtracking_linesearch(3),
    }[name]
    train_step = sasg_jax.make_train_step(
        problems.quadratic_loss, optax.chain(_sasg(), after), num_workers=M
    )
    with pytest.raises(TypeError, match="'value'") as raised:
        train_step.step(train_step.init(PARAMS), problems.centres())
    assert any("pass_value=True" in note for note in raised.value.__notes__)


def test_other_type_errors_are_not_about_a_value():
    def loss(params, batch):
        raise TypeError("something else")

    train_step = sasg_jax.make_train_step(loss, _sasg(), num_workers=M)
    with pytest.raises(TypeError, match="something else") as raised:
        train_step.step(train_step.init(PARAMS), problems.centres())
    assert not any("pass_value" in note for note in getattr(raised.value, "__notes__", ()))


# Refusals -----------------------------------------------------------------------------------------


def _skip(gradients, step, params):
    del step, params
    return ~jnp.isfinite(gradients["w"]).all(), ()


MULTI_STEPS = r"^Expected a transformation without optax.MultiSteps .*gradient\(loss_fn, accumulat"
REFUSED = {
    "multi_steps": (optax.MultiSteps(_sasg(), 2).gradient_transformation(), MULTI_STEPS),
    "multi_steps_in_a_chain": (
        optax.chain(optax.clip(1.0), optax.MultiSteps(_sasg(), 2).gradient_transformation()),
        MULTI_STEPS,
    ),
    "multi_steps_that_skips": (
        optax.MultiSteps(
            _sasg(),
            2,
            should_skip_update_fn=_skip,  # pyright: ignore[reportArgumentType]
        ).gradient_transformation(),
        MULTI_STEPS,
    ),
    "multi_steps_that_skips_with_a_state": (
        optax.MultiSteps(
            _sasg(), 2, should_skip_update_fn=optax.skip_not_finite
        ).gradient_transformation(),
        MULTI_STEPS,
    ),
    "apply_if_finite": (
        optax.apply_if_finite(_sasg(), 5),
        r"^Expected a transformation without optax.apply_if_finite .* wait for each other for ever",
    ),
    "partition_with_another": (
        optax.partition({"ours": _sasg(), "b": optax.adam(0.1)}, {"b": "b", "w": "ours"}),
        r"^Expected optax.partition to have no optimiser beside sasg_jax, got one for label 'b'",
    ),
    "partition_of_two": (
        optax.partition({"a": _sasg(), "b": _sasg()}, {"b": "b", "w": "a"}),
        r"exactly one state of sasg_jax .*, found 2\. One transformation serves the whole tree",
    ),
    "two": (optax.chain(_sasg(), _sasg()), r"exactly one state of sasg_jax .*, found 2"),
    "none": (optax.adam(0.1), r"exactly one state of sasg_jax .*, found 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_stand_around_ours_is_refused_before_the_first_round(name):
    """In one's own loop and by a train step."""
    tx, message = REFUSED[name]
    state = tx.init(PARAMS)
    functions = (sasg_jax.per_worker, sasg_jax.worker_axes, sasg_jax.worker_specs)
    for function in (*functions, lambda state: sasg_jax.stack_workers(state, M)):
        with pytest.raises(ValueError, match=message):
            function(state)
    with pytest.raises(ValueError, match=message):
        sasg_jax.make_train_step(problems.quadratic_loss, tx, num_workers=M).init(PARAMS)


@pytest.mark.parametrize("skip", [None, _skip])
def test_multi_steps_itself(skip):
    """Which is no transformation, but has the two functions of one."""
    tx = optax.MultiSteps(_sasg(), 2, should_skip_update_fn=skip)
    with pytest.raises(ValueError, match=MULTI_STEPS):
        sasg_jax.per_worker(tx.init(PARAMS))
    with pytest.raises(ValueError, match=MULTI_STEPS):
        sasg_jax.make_train_step(
            problems.quadratic_loss,
            tx,  # pyright: ignore[reportArgumentType]
            num_workers=M,
        )


def test_masked_gradients_that_would_reach_the_parameters():
    """Each worker's own: said in the first round, with what to do."""
    tx = optax.masked(_sasg(), {"b": False, "w": True})
    train_step = sasg_jax.make_train_step(problems.quadratic_loss, tx, num_workers=M)
    with pytest.raises(ValueError, match=r"to be the same on all workers.*optax.set_to_zero\(\)"):
        train_step.step(train_step.init(PARAMS), problems.centres())


@pytest.mark.parametrize("num_workers", [0, -1, 1.5])
def test_stack_for_no_workers(num_workers):
    with pytest.raises(ValueError, match=rf"^Expected num_workers={num_workers} to be an integer"):
        sasg_jax.stack_workers(_sasg().init(PARAMS), num_workers)
