"""Two thin factors of a matrix: of the mean of all, or of each worker's own."""

import compressor_checks as checks
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from problems import M

import sasg_jax

RNG = np.random.default_rng(0)
DECAYING = (RNG.normal(size=(20, 12)) * 0.7 ** np.arange(12)).astype(np.float32)


def test_any_numbers():
    checks.check_any_numbers(sasg_jax.low_rank(2))


def test_programs():
    checks.check_programs(sasg_jax.low_rank(1))


def _start(columns, rank, place=0):
    key = jax.random.fold_in(jax.random.key(0), place)
    return np.asarray(jax.random.normal(key, (columns, rank)), np.float64)


def test_messages_of_a_fixed_matrix_go_to_the_nearest():
    """The error of the 30th is that of the singular vectors; every one is a projection."""
    x, compressor = jnp.asarray(DECAYING), sasg_jax.low_rank(3)
    memory, errors = compressor.init_memory(x), []
    for _ in range(30):
        message, remainder, memory = checks.compress(compressor, x, memory=memory)
        errors.append(np.sum(np.asarray(remainder, np.float64) ** 2))
        right = np.sum(np.asarray(message[0].right, np.float64) ** 2)
        np.testing.assert_allclose(errors[-1], np.sum(DECAYING.astype(float) ** 2) - right, 1e-3)
    best = np.sum(np.linalg.svd(DECAYING.astype(np.float64))[1][3:] ** 2)
    np.testing.assert_allclose(errors[-1], best, rtol=1e-3)
    assert errors[0] > 1.02 * best


def test_a_matrix_of_zeros_leaves_the_start():
    compressor, zeros = sasg_jax.low_rank(2), jnp.zeros((6, 7))
    message, remainder, memory = checks.compress(compressor, zeros)
    np.testing.assert_array_equal(memory[0], compressor.init_memory(zeros)[0])
    assert not checks.decompress(compressor, message, zeros).any()
    assert not remainder.any()


def test_size_is_the_formula():
    """r (m + n) of the dtype, or the tensor where that is no less."""
    tree = {"kernel": jnp.zeros((3, 3, 4, 16)), "bias": jnp.zeros(16), "tall": jnp.zeros((50, 2)),
            "half": jnp.zeros((40, 30), jnp.bfloat16), "one": jnp.zeros(())}  # fmt: skip
    counts = {"kernel": 2 * (36 + 16), "bias": 16, "tall": 100, "half": 2 * 70, "one": 1}
    size = sasg_jax.low_rank(2).message_size(tree)
    assert size == (4 * (104 + 16 + 100 + 1) + 2 * 140, 32 * sum(counts.values()))
    # Means are of float32; for half precision that is more than bytes of the matrix only if thick.
    assert sasg_jax.power_sgd(2).message_size(tree).bytes == 4 * (104 + 16 + 100 + 1 + 140)


def _project(p, state, rank, place):
    if p.ndim == 1:
        return p
    q = state.setdefault("q", _start(p.shape[1], rank))
    left = np.linalg.qr(p.astype(np.float64) @ q)[0]
    state["q"] = p.T.astype(np.float64) @ left
    return left @ state["q"].T


@pytest.mark.parametrize(
    ("rule", "silence"),
    [(sasg_jax.every(2), None), (sasg_jax.innovation(40.0, history=3), "reuse")],
    ids=["turns", "last messages"],
)
def test_equals_a_loop(rule, silence):
    """Each worker goes on from its own last factors."""
    compressor = sasg_jax.low_rank(1)
    tx = sasg_jax.compressed_sgd(0.2, compressor, rule, num_workers=M, silence=silence)
    step = sasg_jax.make_train_step(problems.quadratic_loss, tx, num_workers=M)
    centres = problems.centres(rounds=20)
    state, infos = jax.jit(problems.scan_rounds(step.step))(
        step.init(problems.quadratic_params()), (centres,)
    )
    sent = np.asarray(infos.uploaded)
    w = np.zeros((4, 6))
    e, last, states = np.zeros((M, 4, 6)), np.zeros((M, 4, 6)), [{} for _ in range(M)]
    for t in range(20):
        total = np.zeros((4, 6))
        for m in range(M):
            p = 0.2 * (w - centres["w"][t, m]) + e[m]
            if sent[t, m]:
                last[m] = _project(p, states[m], 1, 0)
                e[m] = p - last[m]
                total += last[m]
            elif silence == "reuse":
                total += last[m]
            else:
                e[m] = p
        w = w - total / M
    assert 0 < sent.mean() < 1
    np.testing.assert_allclose(state.params["w"], w, rtol=1e-3, atol=1e-5)
    residual = state.opt_state.worker.feedback.residual
    np.testing.assert_allclose(residual["w"], e, rtol=1e-3, atol=1e-5)


# Means inside -------------------------------------------------------------------------------------


def test_power_sgd_equals_a_loop():
    """Two means a round; a vector crosses whole; each keeps what the mean's factors leave out."""
    centres = problems.centres(rounds=15)
    tx = sasg_jax.pipeline(
        sasg_jax.aggregate(sasg_jax.power_sgd(2), num_workers=M), optax.sgd(0.2, momentum=0.9)
    )
    step = sasg_jax.make_train_step(problems.quadratic_loss, tx, num_workers=M)
    run = jax.jit(problems.scan_rounds(step.step))
    state, _ = run(step.init(problems.quadratic_params()), (centres,))
    w, e, q = {"b": np.zeros(6), "w": np.zeros((4, 6))}, np.zeros((M, 4, 6)), _start(6, 2, 1)
    momentum = {name: np.zeros_like(x) for name, x in w.items()}
    for t in range(15):
        x = w["w"] - centres["w"][t] + e
        p = np.linalg.qr(np.mean(x @ q, 0))[0]
        q = np.mean(x.transpose(0, 2, 1) @ p, 0)
        e = x - p @ q.T
        mean = {"b": (w["b"] - centres["b"][t]).mean(0), "w": p @ q.T}
        for name in w:
            momentum[name] = 0.9 * momentum[name] + mean[name]
            w[name] = w[name] - 0.2 * momentum[name]
    residual = state.opt_state.aggregate.worker.feedback.residual
    np.testing.assert_allclose(residual["w"], e, rtol=1e-3, atol=2e-3)
    assert not residual["b"].any()
    for name in w:
        np.testing.assert_allclose(state.params[name], w[name], rtol=1e-3, atol=1e-3)


def _alone(compressor):
    assert compressor.compress_mean is not None
    return compressor.compress_mean


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_power_sgd_conserves(dtype):
    """Decoded and remainder are the tree; and the memory goes to the subspace of a fixed matrix."""
    compressor, tree = sasg_jax.power_sgd(3), {"x": jnp.asarray(DECAYING, dtype), "b": jnp.ones(3)}
    memory = compressor.init_memory(tree)
    alone = jax.jit(lambda tree, memory: _alone(compressor)(tree, memory, None, lambda x: x))
    for _ in range(30):
        decoded, remainder, memory = alone(tree, memory)
        np.testing.assert_array_equal(remainder["x"], tree["x"] - decoded["x"])
        np.testing.assert_array_equal(decoded["b"], 1)
        assert decoded["x"].dtype == remainder["x"].dtype == dtype
    vectors = np.linalg.svd(np.asarray(tree["x"], np.float64))[2][:3]
    basis = np.linalg.qr(np.asarray(memory[1], np.float64))[0]
    np.testing.assert_allclose(np.linalg.svd(vectors @ basis)[1], 1, atol=1e-4)


def test_power_sgd_of_zeros():
    compressor, zeros = sasg_jax.power_sgd(1), {"w": jnp.zeros((9, 9))}
    memory = compressor.init_memory(zeros)
    decoded, remainder, after = _alone(compressor)(zeros, memory, None, lambda x: x)
    assert not decoded["w"].any()
    assert not remainder["w"].any()
    np.testing.assert_array_equal(memory[0], after[0])


@pytest.mark.parametrize(
    ("argument", "value"),
    [("rule", sasg_jax.every(2)), ("silence", "reuse"), ("downlink", sasg_jax.sign())],
)
def test_what_means_do_not_go_with(argument, value):
    with pytest.raises(ValueError, match=f"^Expected {argument}="):
        sasg_jax.aggregate(sasg_jax.power_sgd(), num_workers=M, **{argument: value})


@pytest.mark.parametrize("make", [sasg_jax.power_sgd, sasg_jax.low_rank])
def test_bad_rank(make):
    assert make(3).name == f"{make.__name__}(3)"
    for rank in (0, 1.5, "2", True):
        with pytest.raises(ValueError, match=r"^Expected rank=.* to be an integer of at least 1"):
            make(rank)
