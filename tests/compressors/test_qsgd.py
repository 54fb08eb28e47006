"""QSGD: levels of a norm, rounded at random."""

import math

import compressor_checks as checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sasg_jax

COMPRESSORS = [sasg_jax.qsgd(), sasg_jax.qsgd(3, 16), sasg_jax.qsgd(1, 50, norm="max")]


@pytest.mark.parametrize("compressor", COMPRESSORS[1:], ids=lambda x: x.name)
def test_any_numbers(compressor):
    checks.check_any_numbers(compressor)


def test_programs():
    checks.check_programs(COMPRESSORS[1])


@pytest.mark.parametrize(("levels", "bucket"), [(1, 8), (3, 16), (7, 128), (127, 512), (200, 9)])
def test_size_is_the_formula(levels, bucket):
    """⌈log₂(2s + 1)⌉ bits an entry, 4 bytes a bucket, or the tensor where that is no shorter."""
    like, width = checks.tree(), math.ceil(math.log2(2 * levels + 1))
    size_of = lambda n: 4 * -(-n // min(bucket, n)) + -(-n * width // 8)
    size = sasg_jax.qsgd(levels, bucket).message_size(like)
    assert size == (checks.plain_bytes(like, size_of), 32 * (45 + 45 + 192 + 1 + 77))


@pytest.mark.parametrize(("levels", "norm"), [(1, "l2"), (50, "l2"), (3, "max")])
def test_is_right_in_the_mean(levels, norm):
    """Within the bound of each bucket, also of the last, shorter one."""
    x = checks.tree()["vector"]
    rows = [np.asarray(x[:32]), np.asarray(x[32:64]), np.asarray(x[64:])]
    part = {"l2": lambda r: min(r.size / levels**2, math.sqrt(r.size) / levels) * np.sum(r**2),
            "max": lambda r: r.size * np.max(r**2) / (4 * levels**2)}  # fmt: skip
    compressor = sasg_jax.qsgd(levels, 32, norm=norm)
    checks.check_mean(compressor, x, sum(map(part[norm], rows)), draws=4096)


def test_the_largest_numbers_are_right_in_the_mean():
    """Their norm is no float: the largest float stands for it."""
    x = jnp.full(40, 3e38)
    message, _, _ = checks.compress(COMPRESSORS[0], x, jax.random.key(0))
    assert message[0].norms.tolist() == [float(jnp.finfo(jnp.float32).max)]
    ones = jnp.full(40, 0.25)
    assert checks.check_mean(sasg_jax.qsgd(2, 8), ones, 40 * 0.5**2) > 0.01


def _in_numpy(levels, bucket):
    def decoded(p, draws):
        parts = []
        for i, start in enumerate(range(0, p.size, bucket)):
            x = p.reshape(-1)[start : start + bucket]
            norm = np.sqrt(np.sum(np.square(x, dtype=np.float64)))
            level, low = levels * np.abs(x) / norm, np.floor(levels * np.abs(x) / norm)
            level = np.minimum(low + (draws[i][: x.size] < level - low), levels)
            parts.append(norm * np.sign(x) * level / levels)
        return np.concatenate(parts).reshape(p.shape)

    return decoded


@pytest.mark.parametrize("rule", [None, sasg_jax.every(2)], ids=["always", "turns"])
def test_equals_a_loop(rule):
    """The key is folded by the round, the worker and the tensor; a silent one keeps a residual."""
    rows = lambda shape, row: (-(-math.prod(shape) // row), row)
    draw = lambda key, shape: jax.random.uniform(key, rows(shape, min(5, math.prod(shape))))
    checks.check_run(sasg_jax.qsgd(3, 5), _in_numpy(3, 5), draw, rule=rule)


def test_says_what_it_is():
    assert [x.name for x in COMPRESSORS] == [
        "qsgd(7, 128)", "qsgd(3, 16)", "qsgd(1, 50, norm='max')"]  # fmt: skip
    x = COMPRESSORS[0]
    assert (x.unbiased, x.random, x.exact, x.linear, x.shares_key) == (True, True) + 3 * (False,)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("levels", 0), ("levels", 1.5), ("levels", 2**23), ("bucket", 0), ("norm", "l1")],
)
def test_bad_arguments(argument, value):
    with pytest.raises(ValueError, match=rf"^Expected {argument}={value!r} to be "):
        sasg_jax.qsgd(**{argument: value})
