"""make_train_step: one function for vmap, pmap and shard_map; models with state and randomness."""

import functools
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from problems import DENSITY, DRIVERS, LEARNING_RATE, METHODS, M

import sasg_jax

PARAMS = problems.quadratic_params()


def _make(tx=None, loss_fn=problems.quadratic_loss, **kwargs):
    tx = METHODS["sasg"](LEARNING_RATE, num_workers=M, history=2) if tx is None else tx
    arguments: dict[str, Any] = {"num_workers": M} | kwargs
    return sasg_jax.make_train_step(loss_fn, tx, **arguments)


# One run with everything, under every driver ------------------------------------------------------

ROUNDS = 8
BATCHES = problems.centres(rounds=ROUNDS, seed=1)


def _losses(params, batch, *, model_state, key):
    """A quadratic, with noise that its gradient has and the innovation has not; and statistics like
    those of BatchNorm, of what the parameters make of the batch."""
    noise = jax.random.normal(key, params["b"].shape)
    loss = problems.quadratic_loss(params, batch) + jnp.vdot(noise, params["b"])
    activations = batch["w"] * (1 + params["w"])
    mean = 0.9 * model_state["mean"] + 0.1 * activations.mean(0)
    new_state = {"mean": mean, "count": model_state["count"] + 1}
    return loss, (new_state, {"noise": noise, "at": params["b"]})


@functools.cache
def _train_step(driver) -> sasg_jax.TrainStep:
    tx = METHODS["two_way"](LEARNING_RATE, num_workers=M, history=1, alpha=30.0)
    return _make(tx, _losses, driver=driver, has_aux=True, has_model_state=True, has_key=True)


def _init(driver, seed=7):
    model_state = {"mean": jnp.ones(6), "count": jnp.zeros((), jnp.int32)}
    return _train_step(driver).init(PARAMS, model_state, jax.random.PRNGKey(seed))


class Run(NamedTuple):
    states: list  # before every round, and after the last
    infos: Any  # of all rounds
    compilations: list  # of the step, by round


@functools.cache
def _run(driver) -> Run:
    step = problems.one_at_a_time(_train_step(driver).step)
    state, states, infos, compilations = _init(driver), [], [], []
    for t in range(ROUNDS):
        states.append(problems.to_numpy(state))
        with problems.compilations() as compiled:
            state, info = step(state, problems.at(BATCHES, t))
        compilations.append(len(compiled))
        infos.append(problems.to_numpy(info))
    states.append(problems.to_numpy(state))
    return Run(states, jax.tree.map(lambda *xs: np.stack(xs), *infos), compilations)


@pytest.mark.parametrize("driver", DRIVERS)
def test_step_is_compiled_once(driver):
    first, *others = _run(driver).compilations
    assert first > 0
    assert not any(others)


def test_drivers_agree():
    want = _run("vmap")
    for driver in ("pmap", "shard_map"):
        got = _run(driver)
        chex.assert_trees_all_close(got.states, want.states, atol=1e-5)
        chex.assert_trees_all_close(got.infos, want.infos, atol=1e-4)


@pytest.mark.parametrize("driver", DRIVERS)
def test_resumes_from_any_state(driver):
    """A state saved as NumPy arrays goes on with the same bits."""
    step = problems.one_at_a_time(_train_step(driver).step)
    run = _run(driver)
    for start in (0, 3, ROUNDS - 1):
        state = run.states[start]
        for t in range(start, ROUNDS):
            state, _ = step(state, problems.at(BATCHES, t))
        chex.assert_trees_all_equal(problems.to_numpy(state), run.states[-1])


def test_loss_and_aux_are_each_workers_own():
    """Before the step, on its own batch."""
    run = _run("vmap")
    for t in range(ROUNDS):
        params, info = run.states[t].params, problems.at(run.infos, t)
        for m in range(M):
            batch = {key: x[t, m] for key, x in BATCHES.items()}
            want = 0.5 * sum(np.sum((params[key] - batch[key]) ** 2) for key in batch)
            want += info.aux["noise"][m] @ params["b"]
            np.testing.assert_allclose(info.loss[m], want, rtol=1e-4)
            np.testing.assert_array_equal(info.aux["at"][m], params["b"])


def test_model_state_follows_the_rounds_that_count():
    """Each worker's statistics are of its own batches at the current parameters, never at stale
    ones, in the rounds in which it uploads."""
    run = _run("vmap")
    mean, count = np.ones((M, 6)), np.zeros(M)
    for t in range(ROUNDS):
        chex.assert_trees_all_close(run.states[t].model_state["mean"], mean, rtol=1e-5)
        np.testing.assert_array_equal(run.states[t].model_state["count"], count)
        activations = BATCHES["w"][t] * (1 + run.states[t].params["w"])[None]
        uploaded = run.infos.uploaded[t]
        mean = np.where(uploaded[:, None], 0.9 * mean + 0.1 * activations.mean(1), mean)
        count = count + uploaded
    assert 0.2 < run.infos.uploaded[1:].mean() < 0.8


def test_fresh_and_stale_gradient_use_the_same_key():
    """Then the innovation has no noise in it: it is how far the parameters have moved."""
    run = _run("vmap")
    stale: list[Any] = [None] * M
    measured = 0
    for t in range(ROUNDS):
        params = run.states[t].params
        for m in range(M):
            innovation = run.infos.innovation[t, m]
            if innovation > 0:
                moved = sum(np.sum((params[k] - stale[m][k]) ** 2) for k in params)
                np.testing.assert_allclose(innovation, moved, rtol=1e-4, atol=1e-6)
                measured += 1
            if run.infos.uploaded[t, m]:
                stale[m] = params
    assert measured > ROUNDS


def test_every_worker_and_round_draws_anew():
    noises = _run("vmap").infos.aux["noise"]
    assert len({row.tobytes() for row in noises.reshape(-1, 6)}) == ROUNDS * M


def test_randomness_follows_from_the_key():
    batch = problems.at(BATCHES, 0)
    _, info = _train_step("vmap").step(_init("vmap", seed=8), batch)
    noise = _run("vmap").infos.aux["noise"][0]
    assert not np.any(np.asarray(info.aux["noise"]) == noise)
    _, info = _train_step("vmap").step(_init("vmap", seed=7), batch)
    np.testing.assert_array_equal(info.aux["noise"], noise)


# Donation, devices, sharding ----------------------------------------------------------------------


@pytest.mark.parametrize("driver", DRIVERS)
def test_donation(driver):
    """The old state's memory is given up; the caller's parameters are kept."""
    params = problems.quadratic_params()
    model_state = {"mean": jnp.ones(6), "count": jnp.zeros((), jnp.int32)}
    state = _train_step(driver).init(params, model_state, jax.random.PRNGKey(7))
    new_state, _ = jax.block_until_ready(_train_step(driver).step(state, problems.at(BATCHES, 0)))
    for leaf in (state.opt_state.worker.feedback.residual["w"], state.params["w"]):
        assert leaf.is_deleted()
    assert not any(x.is_deleted() for x in jax.tree.leaves((params, model_state)))
    chex.assert_tree_all_finite((params, new_state))


@functools.cache
def _kept() -> sasg_jax.TrainStep:
    return _make(donate=False)


def test_no_donation():
    state = _kept().init(PARAMS)
    _kept().step(state, problems.centres())
    assert not any(x.is_deleted() for x in jax.tree.leaves(state))


@pytest.mark.parametrize("driver", ["pmap", "shard_map"])
def test_runs_on_the_devices_it_is_given(driver):
    """And on the axis."""
    devices = jax.devices()[7:3:-1]
    tx = METHODS["sparse_sgd"](LEARNING_RATE, num_workers=M, axis_name="m")
    train_step = _make(tx, driver=driver, devices=devices, axis_name="m")
    batch = problems.centres()
    state, info = jax.block_until_ready(train_step.step(train_step.init(PARAMS), batch))
    assert {shard.device for shard in state.params["w"].addressable_shards} == set(devices)
    for m, shard in enumerate(info.loss.addressable_shards):
        assert shard.device == devices[m]
    for m, shard in enumerate(state.opt_state.worker.feedback.residual["w"].addressable_shards):
        assert shard.data.shape[0] == 1, m
        assert shard.device == devices[m]
    want = [0.5 * sum(np.sum(c[m] ** 2) for c in batch.values()) for m in range(M)]
    np.testing.assert_allclose(info.loss, want, rtol=1e-5)


def test_shard_map_splits_workers_and_replicates_the_rest():
    state = _init("shard_map")
    specs = sasg_jax.worker_specs(state.opt_state)
    got = jax.tree.map(lambda x: x.sharding.spec, state.opt_state)
    chex.assert_trees_all_equal(got, specs)
    for x in jax.tree.leaves(state.params):
        assert x.sharding.spec == PartitionSpec()
    for x in jax.tree.leaves((state.model_state, state.keys)):
        assert x.sharding.spec == PartitionSpec("workers")


# What a round reports, and passes on --------------------------------------------------------------


def test_report_is_the_states_diagnostics():
    state = _kept().init(PARAMS)
    for seed in range(4):
        state, info = _kept().step(state, problems.centres(seed=seed))
        assert info.aux == ()
        chex.assert_trees_all_equal(
            tuple(sasg_jax.diagnostics(state.opt_state)),
            info[1:-1],  # without the loss and aux
        )


def _keeps_value():
    """An optimiser that needs the loss, e.g. to cut the rate where it stands still."""

    def update(updates, state, params=None, *, value, **extra_args):
        del state, params, extra_args
        return updates, value

    return optax.GradientTransformationExtraArgs(
        lambda params: jnp.zeros(()),
        update,  # pyright: ignore[reportArgumentType]
    )


@pytest.mark.parametrize("arguments", [{}, {"chunk_size": 3}, {"driver": "shard_map"}], ids=str)
def test_passes_the_mean_loss_on(arguments):
    """Over workers that take part and whose loss is a number."""
    ours = sasg_jax.aggregate(sasg_jax.identity(), num_workers=M)
    tx = sasg_jax.pipeline(ours, _keeps_value(), optax.sgd(0.1))
    train_step = _make(tx, pass_value=True, **arguments)
    batch = problems.centres()
    batch["b"][1] = np.nan
    present = np.array([True, True, True, False])
    state, info = train_step.step(train_step.init(PARAMS), batch, present)
    want = np.mean([0.5 * sum(np.sum(c[m] ** 2) for c in batch.values()) for m in (0, 2)])
    np.testing.assert_allclose(state.opt_state.after[1], want, rtol=1e-5)
    assert np.isfinite(info.loss).tolist() == [True, False, True, True]
    chex.assert_tree_all_finite(state.params)


def test_says_how_the_loss_is_passed_on():
    ours = sasg_jax.aggregate(sasg_jax.identity(), num_workers=M)
    train_step = _make(sasg_jax.pipeline(ours, _keeps_value()))
    with pytest.raises(TypeError, match="value") as caught:
        train_step.step(train_step.init(PARAMS), problems.centres())
    (note,) = caught.value.__notes__
    assert note.startswith("If the optimiser needs value=..., say pass_value=True.")


# Models of flax -----------------------------------------------------------------------------------


def _classification(seed=0, rounds=40):
    """Two classes that a linear model tells apart."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(2, size=(rounds, M, 8)).astype(np.int32)
    images = rng.normal(size=(rounds, M, 8, 5)) + np.where(labels, 2, -2)[..., None]
    return images.astype(np.float32), labels


def _assert_learns(train_step, state):
    run = jax.jit(problems.scan_rounds(train_step.step))
    state, infos = run(state, (_classification(),))
    losses = infos.loss.mean(1)
    assert losses[-5:].mean() < 0.3 * losses[0]
    assert not infos.uploaded.all()
    return state


def _cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def test_trains_a_flax_linen_model_with_batch_norm_and_dropout():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Dense(8)(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
            x = nn.Dropout(0.2, deterministic=not train)(nn.relu(x))
            return nn.Dense(2)(x)

    model = Model()

    def loss_fn(params, batch, model_state, key):
        images, labels = batch
        logits, new_state = model.apply(
            {"params": params} | model_state,
            images,
            train=True,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        return _cross_entropy(logits, labels), new_state

    with jax.numpy_rank_promotion("allow"):  # layers of flax add biases to batches
        variables = model.init(jax.random.key(0), jnp.zeros((1, 5)), train=False)
        params = variables.pop("params")
        train_step = _make(loss_fn=loss_fn, has_model_state=True, has_key=True)
        state = _assert_learns(
            train_step, train_step.init(params, variables, key=jax.random.key(1))
        )
        means = state.model_state["batch_stats"]["BatchNorm_0"]["mean"]
        assert len({np.asarray(row).tobytes() for row in means}) == M  # every worker its own
        images, labels = _classification(seed=1, rounds=1)
        logits = model.apply(
            {"params": state.params} | sasg_jax.mean_model_state(state.model_state),
            images.reshape(-1, 5),
            train=False,
        )
    assert np.mean(np.argmax(np.asarray(logits), 1) == labels.reshape(-1)) > 0.9


@pytest.mark.slow
def test_trains_a_flax_nnx_model():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(5, 8, rngs=rngs)
            self.out = nnx.Linear(8, 2, rngs=rngs)

        def __call__(self, x):
            return self.out(nnx.relu(self.hidden(x)))

    with jax.numpy_rank_promotion("allow"):
        graph, params = nnx.split(Model(nnx.Rngs(0)), nnx.Param)

        def loss_fn(params, batch):
            images, labels = batch
            return _cross_entropy(nnx.merge(graph, params)(images), labels)

        train_step = _make(loss_fn=loss_fn)
        state = _assert_learns(train_step, train_step.init(params))
        images, labels = _classification(seed=1, rounds=1)
        logits = nnx.merge(graph, state.params)(images.reshape(-1, 5))
    assert np.mean(np.argmax(logits, 1) == labels.reshape(-1)) > 0.9


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"driver": "jit"}, r"^Expected driver='jit' to be one of 'vmap', 'pmap', 'shard_map'\.$"),
        ({"num_workers": 0}, "^Expected num_workers=0 to be an integer of at least 1"),
        ({"num_workers": 2.5}, "^Expected num_workers=2.5 to be an integer"),
        ({"num_workers": True}, "^Expected num_workers=True to be an integer"),
        ({"axis_name": 3}, "^Expected axis_name=3 to be a non-empty string"),
        ({"donate": 1}, "^Expected donate=1 to be True or False"),
        ({"pass_value": None}, "^Expected pass_value=None to be True or False"),
        ({"has_aux": "yes"}, "^Expected has_aux='yes' to be True or False"),
        ({"devices": [0] * M}, r"Expected devices=.* to be None for driver='vmap'\.$"),
        (
            {"driver": "shard_map", "num_workers": 9},
            r"^Expected one device for each of num_workers=9, got 8\..*device_count=9 in",
        ),
        ({"driver": "pmap", "devices": [0, 1]}, r"num_workers=4, got 2\."),
        ({"driver": "shard_map", "chunk_size": 2}, "^Expected chunk_size=2 to be None for driver="),
        ({"chunk_size": 0}, "^Expected chunk_size=0 to be an integer of at least 1"),
        ({"tx": optax.MultiSteps(METHODS["sgd"](0.1, num_workers=M), 2)}, "accumulate=k"),
        (
            {"loss_fn": sasg_jax.gradient(problems.quadratic_loss), "has_aux": True},
            "^Expected has_aux=True to be said to sasg_jax.gradient or local_steps instead",
        ),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        _make(**arguments)


@functools.cache
def _state():
    return problems.to_numpy(_make().init(PARAMS))


@pytest.mark.parametrize("driver", DRIVERS)
def test_wrong_leading_axis(driver):
    batch = problems.centres()
    for bad in (batch["w"][:3], np.float32(1)):
        with pytest.raises(
            ValueError,
            match=r"^Expected batch\['w'\] to have a leading axis of num_workers=4, got shape \(",
        ):
            _make(driver=driver).step(_state(), batch | {"w": bad})


def test_wrong_axis_of_steps():
    direction = sasg_jax.gradient(problems.quadratic_loss, accumulate=3)
    with pytest.raises(
        ValueError, match=r"axis of num_workers=4, and then one of steps=3, got shape \(4, 6\)\.$"
    ):
        _make(loss_fn=direction).step(_state(), problems.centres())


@pytest.mark.parametrize("driver", DRIVERS)
def test_number_of_workers_is_that_of_transformation_and_state(driver):
    """Whichever differs."""
    five = METHODS["sasg"](0.1, num_workers=5, history=2)
    train_step = _make(five, driver=driver)
    state = train_step.init(PARAMS)
    with pytest.raises(ValueError, match=r"^Expected num_workers=4 to be that of the state, 5"):
        train_step.step(state, problems.centres())
    with pytest.raises(
        ValueError, match=r"^Expected num_workers=5 to equal the size of axis 'workers', which is 4"
    ):
        train_step.step(_state(), problems.centres())


@pytest.mark.parametrize("driver", ["vmap", "shard_map"])
@pytest.mark.parametrize(
    ("tx", "message"),
    [
        (optax.adam(0.1), "exactly one state of sasg_jax .*, found 0"),
        (
            optax.chain(*[sasg_jax.aggregate(num_workers=M)] * 2),
            "exactly one state of sasg_jax .*, found 2",
        ),
        (
            optax.MultiSteps(
                METHODS["sgd"](0.1, num_workers=M), 2, should_skip_update_fn=optax.skip_not_finite
            ).gradient_transformation(),
            "without optax.MultiSteps around it",
        ),
    ],
    ids=["none", "two", "MultiSteps"],
)
def test_needs_exactly_one_transformation_of_ours(driver, tx, message):
    with pytest.raises(ValueError, match=message):
        _make(tx, driver=driver).init(PARAMS)


def _add_worker_number(keep_in_state):
    """A transformation that must not stand after ours: what it does depends on the worker."""

    def update(updates, state, params=None):
        number = jax.lax.axis_index("workers").astype(jnp.float32)
        if keep_in_state:
            return updates, state + number
        return jax.tree.map(lambda u: u + number, updates), state

    return optax.GradientTransformation(lambda params: jnp.zeros(()), update)


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("keep_in_state", [True, False])
def test_what_depends_on_the_worker_must_stand_before_ours(driver, keep_in_state):
    """Else replicas would drift apart; after ours it is refused, by every driver."""
    ours = sasg_jax.aggregate(sasg_jax.top_k(DENSITY), num_workers=M)
    tx = optax.chain(ours, _add_worker_number(keep_in_state))
    state = jax.device_get(sasg_jax.stack_workers(tx.init(PARAMS), M))
    with pytest.raises(ValueError, match="to be the same on all workers, but a part depends on"):
        _make(tx, driver=driver).step(
            sasg_jax.TrainState(problems.to_numpy(PARAMS), state, (), ()), problems.centres()
        )


@pytest.mark.parametrize("driver", ["vmap", pytest.param("shard_map", marks=pytest.mark.slow)])
def test_what_stands_before_ours_may_depend_on_the_worker(driver):
    ours = sasg_jax.aggregate(sasg_jax.identity(), num_workers=M)
    train_step = _make(optax.chain(_add_worker_number(True), ours), driver=driver)
    state, _ = jax.block_until_ready(train_step.step(train_step.init(PARAMS), problems.centres()))
    np.testing.assert_array_equal(state.opt_state[0], np.arange(M))


@pytest.mark.parametrize("has_key", [True, False])
def test_key_is_given_if_and_only_if_it_is_used(has_key):
    train_step = _make(has_key=has_key)
    with pytest.raises(
        ValueError, match=rf"(?s)^Expected key=.* to be {'a PRNG key' if has_key else 'None'} here"
    ):
        train_step.init(PARAMS, key=None if has_key else jax.random.key(0))


@pytest.mark.parametrize("has_model_state", [True, False])
def test_model_state_is_given_if_and_only_if_it_is_used(has_model_state):
    train_step = _make(has_model_state=has_model_state)
    with pytest.raises(ValueError, match=f"has_model_state={has_model_state}"):
        train_step.init(PARAMS, () if has_model_state else {"mean": jnp.zeros(3)})


@pytest.mark.parametrize("params", [{}, (), {"a": None}], ids=repr)
def test_empty_tree(params):
    with pytest.raises(ValueError, match=r"^Expected params to hold at least one array, got"):
        _make().init(params)


def test_parameter_that_cannot_be_trained_is_named():
    with pytest.raises(TypeError, match=r"^Expected params\['n'\] to be of a floating-point type"):
        _make().init(PARAMS | {"n": jnp.zeros(3, jnp.int32)})
