"""On a GPU: ``JAX_PLATFORMS=cuda,cpu python -m pytest -m gpu``."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sasg_jax
from sasg_jax.control_flow import zero_after
from sasg_jax.selection import METHODS as SELECTIONS

pytestmark = pytest.mark.gpu
M, ROUNDS, SIZE = 6, 30, 4096


@functools.cache
def _gpu():
    try:
        return jax.devices("gpu")[0]
    except RuntimeError:
        pytest.skip("there is no GPU")


def _loss(params, batch):
    return jnp.sum(jnp.square(params["w"] - batch)) + jnp.sum(jnp.square(params["b"]))


TOP = functools.partial(sasg_jax.compressed_sgd, 0.1, sasg_jax.top_k(0.1), num_workers=M)
METHODS = {
    "sgd": sasg_jax.sgd(0.1, num_workers=M),
    "sparse": sasg_jax.sparse_sgd(0.1, num_workers=M, density=0.1),
    "lasg": sasg_jax.lasg(0.1, num_workers=M),
    "sasg": sasg_jax.sasg(0.1, num_workers=M, density=0.1),
    "shared": sasg_jax.sasg(0.1, num_workers=M, density=0.1, share_stale_params=True),
    "two_way": sasg_jax.sasg(0.1, num_workers=M, density=0.1, downlink=sasg_jax.top_k(0.1)),
    "sharded": sasg_jax.sasg(0.1, num_workers=M, density=0.1, exchange="sharded"),
    "turn": TOP(sasg_jax.every(3)),
    "reconstruction": TOP(feedback=sasg_jax.reconstruction()),
}


def _run(tx, device, **how):
    batches = np.random.default_rng(0).normal(size=(ROUNDS, M, SIZE)).astype(np.float32)
    with jax.default_device(device):
        train_step = sasg_jax.make_train_step(_loss, tx, num_workers=M, **how)
        state = train_step.init({"w": jnp.zeros(SIZE), "b": jnp.ones(3)})
        state, infos = jax.jit(lambda s, b: jax.lax.scan(train_step.step, s, b))(state, batches)
        assert jax.tree.leaves(state.params)[0].devices() == {device}
    return jax.device_get((state.params, infos))


@pytest.mark.parametrize("name", METHODS)
def test_a_run_is_that_of_the_cpu(name):
    """The same uploads in every round, and parameters that differ by rounding."""
    params, infos = _run(METHODS[name], _gpu())
    want_params, want = _run(METHODS[name], jax.devices("cpu")[0])
    np.testing.assert_array_equal(infos.uploaded, want.uploaded)
    chex.assert_trees_all_close(params, want_params, atol=1e-4)


def test_a_run_gives_the_same_bits_again():
    chex.assert_trees_all_equal(*(_run(METHODS["sasg"], _gpu()) for _ in range(2)))


def test_chunks_are_all_at_once():
    params, infos = _run(METHODS["shared"], _gpu(), chunk_size=4)
    want_params, want = _run(METHODS["shared"], _gpu())
    np.testing.assert_array_equal(infos.uploaded, want.uploaded)
    chex.assert_trees_all_close(params, want_params, atol=1e-5)


@pytest.mark.parametrize("method", sorted(SELECTIONS))
def test_selections_choose_the_same(method):
    x = np.random.default_rng(1).normal(size=1 << 17).astype(np.float32)
    with jax.default_device(_gpu()):
        indices = SELECTIONS[method](jnp.asarray(x), 1000)
    assert set(np.asarray(indices).tolist()) == set(np.argsort(-np.abs(x))[:1000].tolist())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("value", [0.0, -3.0, 6e4, -np.inf, np.nan])
def test_the_zero_that_waits_is_zero(dtype, value):
    with jax.default_device(_gpu()):
        assert int(jax.jit(zero_after)(jnp.full(3, value, dtype))) == 0
