"""What only reading the code would show: sizes out of reach, odd numbers, and odd divisions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from jax.custom_batching import custom_vmap
from problems import M

import sasg_jax
from sasg_jax.control_flow import zero_after

# Sizes --------------------------------------------------------------------------------------------

QUARTER = jax.ShapeDtypeStruct((2**29,), jnp.bfloat16)


def _tree_of_all(**options):
    return sasg_jax.aggregate(sasg_jax.top_k(1e-6, scope="tree"), num_workers=2, **options)


@pytest.mark.parametrize(
    ("tx", "leaves"),
    [
        (_tree_of_all(), 4),
        (_tree_of_all(exchange="sharded"), 8),  # a shard is half of all
        (
            sasg_jax.aggregate(
                sasg_jax.identity(), num_workers=2, downlink=sasg_jax.top_k(1e-6, scope="tree")
            ),
            4,
        ),
    ],
    ids=["up", "in shards", "down"],
)
def test_too_many_entries_of_a_tree_are_named(tx, leaves):
    """The first leaf with which all are 2**31 or more."""
    params = dict.fromkeys("abcdefgh"[:leaves], QUARTER)
    with pytest.raises(ValueError, match=rf"params\['{'abcdefgh'[leaves - 1]}'\] takes them to"):
        jax.eval_shape(tx.init, params)


def test_as_many_as_fit_are_taken():
    params = dict.fromkeys("abc", QUARTER)
    jax.eval_shape(_tree_of_all().init, params)
    jax.eval_shape(_tree_of_all(exchange="sharded").init, {**params, "d": QUARTER})
    tensors = sasg_jax.aggregate(sasg_jax.top_k(1e-6), num_workers=2)
    jax.eval_shape(tensors.init, dict.fromkeys("abcd", QUARTER))


def test_too_many_entries_of_a_tensor_are_named():
    params = {"a": QUARTER, "b": jax.ShapeDtypeStruct((2**16, 2**15), jnp.bfloat16)}
    with pytest.raises(ValueError, match=r"^Expected params\['b'\] to have between 1 and"):
        jax.eval_shape(sasg_jax.sgd(0.1, num_workers=2).init, params)


# Numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_zero_after_any_number(dtype):
    """NaN and infinity have no integer that other back ends must give."""
    numbers = np.array([0, -0.0, 1, -1, np.inf, -np.inf, np.nan, -np.nan])
    numbers = np.append(numbers, [jnp.finfo(dtype).max, jnp.finfo(dtype).smallest_subnormal])
    zeros = jax.jit(jax.vmap(lambda x: zero_after({"x": x[None], "none": x[None][:0]})))
    assert not zeros(jnp.asarray(numbers, dtype)).any()


# Divisions ----------------------------------------------------------------------------------------

PRIME = 5


@functools.cache
def _reached(chunk_size):
    """After three rounds of SASG with momentum in front."""
    tx = sasg_jax.pipeline(optax.trace(0.5), sasg_jax.sasg(0.1, num_workers=PRIME, density=0.3))
    train_step = sasg_jax.make_train_step(
        problems.quadratic_loss, tx, num_workers=PRIME, chunk_size=chunk_size
    )
    batches = problems.centres(PRIME, rounds=3)
    run = problems.scan_rounds(train_step.step)
    state, infos = run(train_step.init(problems.quadratic_params()), (batches,))
    return problems.to_numpy((state.params, infos.staleness, infos.loss))


@pytest.mark.parametrize(
    "chunk_size", [2, *(pytest.param(size, marks=pytest.mark.slow) for size in (1, 3, 4, 5, 9))]
)
def test_a_prime_number_of_workers_in_chunks_of_any_size(chunk_size):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
        _reached(chunk_size),
        _reached(None),
    )


def test_a_prime_number_of_workers_is_computed_in_chunks_and_a_rest():
    sizes = set()

    @custom_vmap
    def seen(x):
        return x

    @seen.def_vmap
    def _(size, batched, x):
        sizes.add(size)
        return x, batched[0]

    loss = lambda params, batch: jnp.sum(params * seen(batch))
    train_step = sasg_jax.make_train_step(
        loss, sasg_jax.sgd(0.1, num_workers=37), num_workers=37, chunk_size=8
    )
    state = train_step.init(jnp.ones(2))
    train_step.step.lower(state, np.ones((37, 2), np.float32))
    assert sizes == {8, 37 % 8}


# What depends on the worker -----------------------------------------------------------------------


def _worker_of_ones_own(in_state):
    """After ours, something that is not the same on all workers."""

    def update(updates, state, params=None):
        worker = jax.lax.axis_index("workers").astype(jnp.float32)
        if in_state:
            return updates, worker
        return jax.tree.map(lambda x: x * worker, updates), state

    return optax.GradientTransformation(lambda params: jnp.zeros(()), update)


@pytest.mark.parametrize("driver", ["vmap", "shard_map", "pmap"])
@pytest.mark.parametrize("in_state", [True, False], ids=["state", "updates"])
def test_what_depends_on_the_worker_after_ours_is_refused(driver, in_state):
    """In our words, whatever JAX says of it."""
    tx = optax.chain(sasg_jax.sgd(0.1, num_workers=M), _worker_of_ones_own(in_state))
    train_step = sasg_jax.make_train_step(
        lambda params, batch: jnp.sum(params * batch), tx, num_workers=M, driver=driver
    )
    with pytest.raises(ValueError, match=r"^Expected params and everything .* put what sees a"):
        train_step.step(train_step.init(jnp.ones(2)), np.ones((M, 2), np.float32))
