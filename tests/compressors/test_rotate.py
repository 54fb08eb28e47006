"""Rotations, and few bits of what is rotated."""

import compressor_checks as checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sasg_jax
from sasg_jax.compressors import rotate

EDEN, BIASED, DITHERED = (
    sasg_jax.eden(2),
    sasg_jax.eden(1, unbiased=False),
    sasg_jax.dithered_sign(),
)
X = checks.tree()["matrix"].reshape(-1)


@pytest.mark.parametrize("compressor", [BIASED, DITHERED], ids=lambda x: x.name)
def test_any_numbers(compressor):
    checks.check_any_numbers(compressor)


def test_programs():
    checks.check_programs(EDEN)


def _matrix(length):
    """Of the transform, from its definition."""
    matrix = np.ones((1, 1))
    while len(matrix) < length:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.sqrt(length)


@pytest.mark.parametrize("length", [2, 64, 512])
def test_transform_is_that_of_the_matrix(length):
    x = np.random.default_rng(length).normal(size=(3, length)).astype(np.float32)
    got = rotate.hadamard(jnp.asarray(x))
    np.testing.assert_allclose(got, x @ _matrix(length), atol=1e-5)
    np.testing.assert_allclose(rotate.hadamard(got), x, atol=1e-5)


@pytest.mark.parametrize("times", [1, 2])
def test_a_rotation_is_undone(times):
    x, seed = jnp.asarray(X[:192].reshape(3, 64)), jnp.uint32(5)
    y = rotate.rotate(x, seed, times)
    np.testing.assert_allclose(jnp.sum(y**2, 1), jnp.sum(x**2, 1), rtol=1e-5)
    np.testing.assert_allclose(rotate.rotate_back(y, seed, times), x, atol=1e-4)
    assert np.abs(y - rotate.rotate(x, jnp.uint32(6), times)).max() > 0.1


def test_levels_are_the_best_of_a_normal_number():
    """As they are tabled; each is the mean of what is nearest to it."""
    np.testing.assert_allclose(rotate.normal_levels(1), [-0.79788, 0.79788], atol=1e-5)
    np.testing.assert_allclose(rotate.normal_levels(2)[2:], [0.45278, 1.51042], atol=1e-5)
    tabled = [0.24509, 0.75601, 1.34391, 2.15195]
    np.testing.assert_allclose(rotate.normal_levels(3)[4:], tabled, atol=1e-5)
    draws = np.random.default_rng(0).normal(size=200_000)
    for bits, error in ((1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)):
        levels = rotate.normal_levels(bits)
        nearest = np.abs(draws[:, None] - levels[None]).min(1)
        np.testing.assert_allclose(np.mean(nearest**2), error, rtol=0.02)


@pytest.mark.parametrize(
    ("size", "bits", "longest", "length"),
    [(1, 1, 4096, 64), (100, 1, 4096, 128), (4096, 1, 4096, 4096), (5120, 1, 4096, 1024),
     (4097, 4, 4096, 256), (200, 1, 64, 64), (407_050, 1, 4096, 4096)],
)  # fmt: skip
def test_blocks_are_what_makes_a_message_short(size, bits, longest, length):
    assert rotate.block_length(size, bits, longest) == length


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_size_is_the_formula(bits):
    like, length = checks.tree(), lambda n: rotate.block_length(n, bits, 4096)

    def size_of(n):
        blocks = -(-n // length(n))
        return 4 + 4 * blocks + blocks * length(n) * bits // 8

    size = sasg_jax.eden(bits).message_size(like)
    assert size == (checks.plain_bytes(like, size_of), 32 * (45 + 45 + 192 + 1 + 77))
    if bits == 1:
        assert sasg_jax.dithered_sign().message_size(like) == size


# In the mean --------------------------------------------------------------------------------------


def test_dithered_signs_are_right_in_the_mean():
    """Exactly; and with the variance of the formula, a single entry too."""
    bound = lambda x: (2 * np.log(2 * 256) - 1) * float(jnp.sum(x**2))
    checks.check_mean(DITHERED, X, bound(X), draws=4096)
    one = jnp.zeros(192).at[5].set(3)
    assert checks.check_mean(DITHERED, one, bound(one), draws=2048) < 1e-10


@pytest.mark.parametrize(("bits", "error"), [(1, 0.571 * 192 / 256), (4, 0.0096)])
def test_eden_is_nearly_right_in_the_mean(bits, error):
    """What of the error comes to lie in the padding, from 192 entries to 256, is cut off."""
    part = checks.check_mean(
        sasg_jax.eden(bits), X, 1.15 * error * float(jnp.sum(X**2)), draws=4096
    )
    np.testing.assert_allclose(part, error, rtol=0.15)


def test_one_transform_would_be_far_off():
    """Where two entries are all there is: half of ‖x‖ is always lost. Not with two transforms."""
    x = jnp.zeros((1, 64)).at[0, :2].set(jnp.asarray([2.0, 1.0]))

    def once(seed, times):
        y = rotate.rotate(x, seed, times)
        scale = jnp.sum(y**2) / jnp.sum(jnp.abs(y))
        return rotate.rotate_back(scale * jnp.sign(y), seed, times)

    off = []
    for times in (1, 2):
        draws = jax.jit(jax.vmap(lambda seed: once(seed, times)))(jnp.arange(20_000, dtype="uint32"))  # noqa: B023,E501  # fmt: skip
        off.append(float(jnp.linalg.norm(draws.mean(0) - x) / jnp.linalg.norm(x)))
    assert off[0] > 0.45
    assert off[1] < 0.015


def test_scales():
    """Of one, ⟨x, C(x)⟩ is ‖x‖²; of the other, C(x) is the nearest multiple: less is left out."""
    products, lost = [], []
    for compressor in (sasg_jax.eden(1), BIASED):
        message, remainder, _ = checks.compress(compressor, X, jax.random.key(3))
        decoded = np.asarray(checks.decompress(compressor, message, X), np.float64)
        products.append(decoded @ np.asarray(X) / np.sum(np.asarray(X, np.float64) ** 2))
        lost.append(np.sum(np.asarray(remainder, np.float64) ** 2))
    np.testing.assert_allclose(products[0], 1, rtol=1e-5)
    assert lost[1] < lost[0]
    assert lost[1] < np.sum(np.asarray(X) ** 2)


def _decoded(p, drawn, length=64):
    """One bit and the nearest multiple, by the matrix of the rotation."""
    matrix = np.eye(length)
    for signs in drawn:
        matrix = _matrix(length) @ np.diag(signs) @ matrix
    x = np.zeros(length)
    x[: p.size] = p.reshape(-1)
    y = matrix @ x
    c = np.sign(y) * np.sqrt(2 / np.pi)
    return (matrix.T @ c * (y @ c) / (c @ c))[: p.size].reshape(p.shape)


def _signs(key, shape):
    seed = jax.random.bits(jax.random.split(key)[0], (), jnp.uint32)
    one = lambda i: jax.random.bits(jax.random.fold_in(jax.random.key(seed), i), (2,), jnp.uint32)
    words = jnp.stack([one(0), one(1)])
    return 1.0 - 2.0 * (words[:, :, None] >> jnp.arange(32, dtype="uint32")[None, None] & 1).reshape(2, 64)  # noqa: E501  # fmt: skip


def test_equals_a_loop():
    checks.check_run(BIASED, _decoded, _signs, rule=sasg_jax.every(2), rtol=1e-3)


def test_both_ways_without_memory():
    """FO-SGD: a bit an entry up and down, and nothing kept anywhere."""
    tx = sasg_jax.compressed_sgd(
        0.1, DITHERED, num_workers=4, downlink=DITHERED, key=jax.random.key(0)
    )
    assert [tx.method.feedback.name, tx.method.downlink_feedback.name] == ["none()"] * 2


def test_says_what_it_is():
    assert [x.name for x in (EDEN, BIASED, DITHERED)] == [
        "eden(2)", "eden(1, unbiased=False)", "dithered_sign()"]  # fmt: skip
    assert sasg_jax.dithered_sign(block=64).name == "dithered_sign(block=64)"
    assert [x.unbiased for x in (EDEN, BIASED, DITHERED)] == [True, False, True]
    assert all(x.random and not x.shares_key for x in (EDEN, BIASED, DITHERED))


@pytest.mark.parametrize(
    ("argument", "value"),
    [("bits", 0), ("bits", 5), ("unbiased", 1), ("block", 32), ("block", 96), ("block", 64.0)],
)
def test_bad_arguments(argument, value):
    with pytest.raises(ValueError, match=rf"^Expected {argument}={value!r} to be "):
        sasg_jax.eden(**{argument: value})
