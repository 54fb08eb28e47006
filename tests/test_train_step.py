"""make_train_step: one function for vmap, pmap and shard_map; models with state and randomness."""

import functools
from typing import Any

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
from sasg_jax.transform import find_state

PARAMS = problems.quadratic_params()


def _make(tx=None, loss_fn=problems.quadratic_loss, **kwargs):
    tx = METHODS["sasg"](LEARNING_RATE, num_workers=M, history=2) if tx is None else tx
    arguments: dict[str, Any] = {"num_workers": M} | kwargs
    return sasg_jax.make_train_step(loss_fn, tx, **arguments)


# A run that stops and goes on ---------------------------------------------------------------------


@pytest.mark.parametrize("driver", DRIVERS)
def test_resumes_from_any_state(driver):
    """A state saved as NumPy arrays goes on with the same bits."""
    rounds = 9
    batches = problems.centres(rounds=rounds, seed=1)

    def loss_fn(params, batch, model_state, key):
        noise = jax.random.normal(key, params["b"].shape)
        loss = problems.quadratic_loss(params, batch) + jnp.vdot(noise, params["b"])
        return loss, model_state + loss

    tx = METHODS["two_way"](LEARNING_RATE, num_workers=M, history=2)
    train_step = _make(tx, loss_fn, driver=driver, has_model_state=True, has_key=True)
    step = problems.one_at_a_time(train_step.step)
    state = train_step.init(PARAMS, jnp.zeros(()), jax.random.PRNGKey(7))
    saved = []
    for t in range(rounds):
        saved.append(problems.to_numpy(state))
        state, _ = step(state, problems.at(batches, t))
    end = problems.to_numpy(state)
    for start in (0, 3, 8):
        state = saved[start]
        for t in range(start, rounds):
            state, _ = step(state, problems.at(batches, t))
        chex.assert_trees_all_equal(problems.to_numpy(state), end)


# Donation, devices, sharding ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("driver", "donate"), [*((driver, True) for driver in DRIVERS), ("shard_map", False)]
)
def test_donation(driver, donate):
    """The old state's memory is given up, or kept; the caller's parameters are always kept."""
    train_step = _make(driver=driver, donate=donate)
    params = problems.quadratic_params()
    state = train_step.init(params)
    batch = problems.centres()
    new_state, _ = jax.block_until_ready(train_step.step(state, batch))
    assert state.opt_state.worker.residual["w"].is_deleted() is donate
    assert state.params["w"].is_deleted() is donate
    assert not params["w"].is_deleted()
    chex.assert_tree_all_finite((params, new_state))
    if donate:
        train_step.init(params)


@pytest.mark.parametrize("driver", ["pmap", "shard_map"])
def test_runs_on_the_devices_it_is_given(driver):
    devices = jax.devices()[7:3:-1]
    train_step = _make(driver=driver, devices=devices)
    state, info = jax.block_until_ready(
        train_step.step(train_step.init(PARAMS), problems.centres())
    )
    assert {shard.device for shard in state.params["w"].addressable_shards} == set(devices)
    assert {shard.device for shard in info.loss.addressable_shards} == set(devices)
    for m, shard in enumerate(state.opt_state.worker.residual["w"].addressable_shards):
        assert shard.data.shape[0] == 1, m


def test_shard_map_splits_workers_and_replicates_the_rest():
    state = _make(driver="shard_map").init(PARAMS)
    specs = sasg_jax.worker_specs(state.opt_state)
    jax.tree.map(lambda x, spec: _assert_spec(x, spec), state.opt_state, specs)
    for x in jax.tree.leaves(state.params):
        _assert_spec(x, PartitionSpec())


def _assert_spec(x, spec):
    assert x.sharding.spec == spec


def test_another_axis_name():
    tx = METHODS["sasg"](LEARNING_RATE, num_workers=M, history=2, axis_name="m")
    batch = problems.centres()
    renamed = _make(tx, axis_name="m")
    same = _make()
    state, _ = renamed.step(renamed.init(PARAMS), batch)
    want, _ = same.step(same.init(PARAMS), batch)
    chex.assert_trees_all_equal(state.params, want.params)


# What a round reports -----------------------------------------------------------------------------


@pytest.mark.parametrize("driver", DRIVERS)
def test_loss_and_aux_are_each_workers_own(driver):
    """Before the step, on its own batch."""

    def loss_fn(params, batch):
        return problems.quadratic_loss(params, batch), {"first": batch["b"][0], "sum": params["b"]}

    train_step = _make(loss_fn=loss_fn, driver=driver, has_aux=True)
    batch = problems.centres()
    start = jax.tree.map(lambda x: x + 2, PARAMS)
    _, info = train_step.step(train_step.init(start), batch)
    want = [0.5 * sum(np.sum((2 - c[m]) ** 2) for c in batch.values()) for m in range(M)]
    np.testing.assert_allclose(info.loss, want, rtol=1e-5)
    np.testing.assert_array_equal(info.aux["first"], batch["b"][:, 0])
    np.testing.assert_array_equal(info.aux["sum"], np.full((M, 6), 2.0))


def test_takes_multi_steps_as_it_is():
    """Also with an adaptive rule, which needs the gradient function passed through."""
    inner = METHODS["sasg"](LEARNING_RATE, num_workers=M, history=2)
    train_step = _make(optax.MultiSteps(inner, 2))
    state = train_step.init(PARAMS)
    for seed in range(4):
        state, info = train_step.step(state, problems.centres(seed=seed))
        np.testing.assert_array_equal(info.uploaded, seed > 0)
    assert int(find_state(state.opt_state).server.round) == 2


def test_report_is_the_states_diagnostics():
    train_step = _make(donate=False)
    state = train_step.init(PARAMS)
    for seed in range(4):
        state, info = train_step.step(state, problems.centres(seed=seed))
        assert info.aux == ()
        chex.assert_trees_all_equal(
            tuple(sasg_jax.diagnostics(state.opt_state)),
            (info.uploaded, info.finite, info.staleness, info.innovation, info.threshold),
        )


# Models with state --------------------------------------------------------------------------------


def _normalised_loss(params, batch, model_state):
    """Like BatchNorm: running statistics of what the parameters make of the batch."""
    activations = batch["w"] * (1 + params["w"])
    mean = 0.9 * model_state["mean"] + 0.1 * activations.mean(0)
    new_state = {"mean": mean, "count": model_state["count"] + 1}
    return problems.quadratic_loss(params, batch), new_state


@pytest.mark.parametrize(
    ("driver", "has_aux"), [*((driver, False) for driver in DRIVERS), ("vmap", True)]
)
def test_stale_pass_never_writes_the_model_state(driver, has_aux):
    """Each worker's statistics follow its own batches at the current parameters, uploads or not."""

    def loss_fn(params, batch, model_state):
        loss, new_state = _normalised_loss(params, batch, model_state)
        return (loss, (new_state, 2 * loss)) if has_aux else (loss, new_state)

    # An enormous alpha: after the first round everybody is silent until the cap.
    tx = METHODS["sasg"](LEARNING_RATE, num_workers=M, history=1, alpha=1e6)
    train_step = _make(tx, loss_fn, driver=driver, has_model_state=True, has_aux=has_aux)
    state = train_step.init(PARAMS, {"mean": jnp.ones(6), "count": jnp.zeros((), jnp.int32)})
    mean = np.ones((M, 6))
    uploads = 0
    for t in range(5):
        batch = problems.centres(seed=t)
        activations = batch["w"] * (1 + np.asarray(state.params["w"]))[None]
        mean = 0.9 * mean + 0.1 * activations.mean(1)
        state, info = jax.block_until_ready(train_step.step(state, batch))
        uploads += int(np.sum(info.uploaded))
        np.testing.assert_allclose(state.model_state["mean"], mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(state.model_state["count"], [t + 1] * M)
        if has_aux:
            np.testing.assert_allclose(info.aux, 2 * info.loss, rtol=1e-6)
    assert uploads == M


def test_mean_model_state():
    state = {"mean": jnp.array([[1.0, 2.0], [3.0, 6.0]]), "count": jnp.array([7, 8])}
    got = sasg_jax.mean_model_state(state)
    chex.assert_trees_all_equal(got, {"mean": jnp.array([2.0, 4.0]), "count": jnp.array(7)})
    assert sasg_jax.mean_model_state(()) == ()


# Randomness ---------------------------------------------------------------------------------------


def _random_loss(params, batch, key):
    """Linear in the parameters: its gradient is the noise, whatever the parameters."""
    noise = jax.random.normal(key, params["b"].shape)
    return jnp.vdot(noise, params["b"]) + 0 * problems.quadratic_loss(params, batch), noise


@functools.cache
def _random_train_step(driver):
    return _make(loss_fn=_random_loss, driver=driver, has_key=True, has_aux=True)


def _noise_of_run(driver="vmap", seed=0, rounds=4):
    train_step = _random_train_step(driver)
    state = train_step.init(PARAMS, key=jax.random.key(seed))
    noises, innovations = [], []
    for _ in range(rounds):
        state, info = jax.block_until_ready(train_step.step(state, problems.centres()))
        noises.append(np.asarray(info.aux))
        innovations.append(np.asarray(info.innovation))
    return np.stack(noises), np.stack(innovations)


@pytest.mark.parametrize("driver", DRIVERS)
def test_fresh_and_stale_gradient_use_the_same_key(driver):
    """The gradient is the noise, so the innovation is zero if and only if the noise is the same."""
    noises, innovations = _noise_of_run(driver)
    np.testing.assert_array_equal(innovations, 0)
    # And another one for every worker and round.
    assert len({row.tobytes() for row in noises.reshape(-1, 6)}) == noises.shape[0] * M


def test_randomness_follows_from_the_key():
    noises, _ = _noise_of_run(seed=1)
    np.testing.assert_array_equal(noises, _noise_of_run(seed=1)[0])
    np.testing.assert_allclose(noises, _noise_of_run("shard_map", seed=1)[0], atol=1e-6)
    assert not np.any(noises == _noise_of_run(seed=2)[0])


# Models of flax -----------------------------------------------------------------------------------


def _classification(seed=0, rounds=40):
    """Two classes that a linear model tells apart."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(2, size=(rounds, M, 8)).astype(np.int32)
    images = rng.normal(size=(rounds, M, 8, 5)) + np.where(labels, 2, -2)[..., None]
    return images.astype(np.float32), labels


def _assert_learns(train_step, state):
    images, labels = _classification()
    losses, uploads = [], 0
    for batch in zip(images, labels, strict=True):
        state, info = train_step.step(state, batch)
        losses.append(float(info.loss.mean()))
        uploads += int(info.uploaded.sum())
    assert np.mean(losses[-5:]) < 0.3 * losses[0]
    assert uploads < M * len(images)
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


def test_unknown_driver():
    with pytest.raises(
        ValueError, match=r"^Expected driver='jit' to be one of 'vmap', 'pmap', 'shard_map'\.$"
    ):
        _make(driver="jit")


@pytest.mark.parametrize("num_workers", [0, 2.5, True])
def test_number_of_workers(num_workers):
    with pytest.raises(ValueError, match=f"^Expected num_workers={num_workers} to be an integer"):
        _make(num_workers=num_workers)


@pytest.mark.parametrize("driver", ["pmap", "shard_map"])
def test_too_few_devices(driver):
    with pytest.raises(
        ValueError,
        match=r"^Expected one device for each of num_workers=9, got 8\..*device_count=9 before",
    ):
        _make(METHODS["sasg"](0.1, num_workers=9), num_workers=9, driver=driver)
    with pytest.raises(ValueError, match=r"num_workers=4, got 2\."):
        _make(driver=driver, devices=jax.devices()[:2])


def test_simulation_takes_no_devices():
    with pytest.raises(ValueError, match=r"Expected devices=.* to be None for driver='vmap'\.$"):
        _make(devices=jax.devices()[:M])


@pytest.mark.parametrize("driver", DRIVERS)
def test_wrong_leading_axis(driver):
    train_step = _make(driver=driver)
    batch = problems.centres()
    for bad in (batch["w"][:3], np.float32(1)):
        with pytest.raises(
            ValueError,
            match=r"^Expected batch\['w'\] to have a leading axis of num_workers=4, got shape \(",
        ):
            train_step.step(train_step.init(PARAMS), batch | {"w": bad})


@pytest.mark.parametrize("driver", DRIVERS)
def test_number_of_workers_of_the_transformation(driver):
    train_step = _make(METHODS["sasg"](0.1, num_workers=5), driver=driver)
    with pytest.raises(
        ValueError, match=r"^Expected num_workers=5 to equal the size of axis 'workers', which is 4"
    ):
        train_step.step(train_step.init(PARAMS), problems.centres())


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize(
    ("tx", "found"),
    [
        (optax.adam(0.1), 0),
        (optax.chain(*[sasg_jax.aggregate(num_workers=M)] * 2), 2),
    ],
)
def test_needs_exactly_one_transformation_of_ours(driver, tx, found):
    with pytest.raises(ValueError, match=rf"exactly one state of sasg_jax .*, found {found}"):
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
    train_step = _make(optax.chain(ours, _add_worker_number(keep_in_state)), driver=driver)
    with pytest.raises(ValueError, match="to be the same on all workers, but a part depends on"):
        train_step.step(train_step.init(PARAMS), problems.centres())


@pytest.mark.parametrize("driver", DRIVERS)
def test_what_stands_before_ours_may_depend_on_the_worker(driver):
    ours = sasg_jax.aggregate(sasg_jax.identity(), num_workers=M)
    train_step = _make(optax.chain(_add_worker_number(True), ours), driver=driver)
    state, _ = jax.block_until_ready(train_step.step(train_step.init(PARAMS), problems.centres()))
    np.testing.assert_array_equal(state.opt_state[0], np.arange(M))


def test_multi_steps_that_skips():
    tx = optax.MultiSteps(
        METHODS["sasg"](0.1, num_workers=M), 2, should_skip_update_fn=optax.skip_not_finite
    )
    with pytest.raises(
        ValueError, match=r"^Expected optax.MultiSteps without should_skip_update_f"
    ):
        _make(tx.gradient_transformation()).init(PARAMS)


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


def test_integer_parameter_is_named():
    with pytest.raises(TypeError, match=r"^Expected params\['n'\] to be of a floating-point type"):
        _make().init(PARAMS | {"n": jnp.zeros(3, jnp.int32)})
