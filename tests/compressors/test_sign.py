"""Signs, and one or two magnitudes."""

import compressor_checks as checks
import jax.numpy as jnp
import numpy as np
import pytest

import sasg_jax

COMPRESSORS = [sasg_jax.sign(), sasg_jax.one_bit(block=20)]
X = np.random.default_rng(0).standard_t(3, 100).astype(np.float32)


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=lambda x: x.name)
def test_any_numbers(compressor):
    checks.check_any_numbers(compressor)


def test_programs():
    checks.check_programs(COMPRESSORS[1])


def _one_magnitude(p, _):
    return np.abs(p).mean() * np.where(p < 0, -1, 1)


def _two_levels(p, _):
    level = lambda mask: p[mask].mean() if mask.any() else 0.0
    return np.where(p < 0, level(p < 0), level(p >= 0))


def _by_blocks(decoded, p, block):
    return np.concatenate([decoded(p[i : i + block], ()) for i in range(0, p.size, block)])


@pytest.mark.parametrize("block", [100, 40, 1])
@pytest.mark.parametrize("name", ["sign", "one_bit"])
def test_what_is_decoded(name, block):
    decoded = {"sign": _one_magnitude, "one_bit": _two_levels}[name]
    compressor = getattr(sasg_jax, name)(block)
    message, _, _ = compressor.compress(jnp.asarray(X), ((),), None)
    got = compressor.decompress(message, jnp.asarray(X))
    np.testing.assert_allclose(got, _by_blocks(decoded, X, block), rtol=1e-5)


def test_zero_counts_as_positive():
    x = jnp.asarray([0.0, -0.0, -2.0, 4.0] * 4)
    decoded = lambda c: c.decompress(c.compress(x, ((),), None).message, x).tolist()[:4]
    assert decoded(sasg_jax.sign()) == [1.5, 1.5, -1.5, 1.5]
    np.testing.assert_allclose(decoded(sasg_jax.one_bit()), [4 / 3, 4 / 3, -2, 4 / 3], rtol=1e-6)


def test_what_is_left_out():
    """1 - ‖x‖₁²/(n‖x‖²) of the squares; by two levels, less."""
    left = [np.sum(np.square(c.compress(jnp.asarray(X), ((),), None).remainder, dtype=np.float64))
            for c in (sasg_jax.sign(), sasg_jax.one_bit())]  # fmt: skip
    squares = np.sum(np.square(X, dtype=np.float64))
    want = squares - np.abs(X).sum(dtype=np.float64) ** 2 / X.size
    np.testing.assert_allclose(left[0], want, rtol=1e-5)
    assert left[1] < left[0] < squares


@pytest.mark.parametrize("block", [None, 1, 32, 1000])
def test_size_is_the_formula(block):
    like = checks.tree()
    for compressor, numbers in ((sasg_jax.sign(block), 1), (sasg_jax.one_bit(block), 2)):
        size_of = lambda n: -(-n // 8) + 4 * numbers * -(-n // min(block or n, n))  # noqa: B023
        size = compressor.message_size(like)
        assert size == (checks.plain_bytes(like, size_of), 32 * (45 + 45 + 192 + 1 + 77))


def test_equals_a_loop():
    """In turns, a silent worker's part into the residual; and by rule (6), with last messages."""
    checks.check_run(sasg_jax.sign(), _one_magnitude, rule=sasg_jax.every(2))
    checks.check_run(sasg_jax.one_bit(), _two_levels, rule=sasg_jax.innovation(40.0, history=3))


def test_says_what_it_is():
    assert [x.name for x in COMPRESSORS] == ["sign()", "one_bit(block=20)"]
    for x in COMPRESSORS:
        assert not any((x.unbiased, x.random, x.exact, x.linear, x.shares_key))


@pytest.mark.parametrize("block", [0, 1.5, "all"])
@pytest.mark.parametrize("make", [sasg_jax.sign, sasg_jax.one_bit])
def test_bad_block(make, block):
    with pytest.raises(ValueError, match=rf"^Expected block={block!r} to be an integer"):
        make(block)
