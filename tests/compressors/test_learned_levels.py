"""Levels that are fitted to what is rounded to them."""

import math

import compressor_checks as checks
import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest

import sasg_jax
from sasg_jax.compressors.learned_levels import fit_levels

COMPRESSOR = sasg_jax.learned_levels(3, 16, every=2)
X = checks.tree()["vector"]


def test_any_numbers():
    checks.check_any_numbers(COMPRESSOR)


def test_programs():
    checks.check_programs(COMPRESSOR)


@pytest.mark.parametrize(("levels", "bucket"), [(1, 8), (3, 16), (7, 512), (127, 64)])
def test_size_is_the_formula(levels, bucket):
    """That of QSGD, and s - 1 levels."""
    like, width = checks.tree(), math.ceil(math.log2(2 * levels + 1))
    size_of = lambda n: 4 * (levels - 1) + 4 * -(-n // min(bucket, n)) + -(-n * width // 8)
    size = sasg_jax.learned_levels(levels, bucket).message_size(like)
    assert size == (checks.plain_bytes(like, size_of), 32 * (45 + 45 + 192 + 1 + 77))


def _variance(levels, parts, weights):
    """Σ w (ℓ' - r)(r - ℓ), entry by entry."""
    ends = np.r_[0, np.asarray(levels, np.float64), 1]
    below = np.clip(np.searchsorted(ends, parts, side="right") - 1, 0, len(ends) - 2)
    return np.sum(weights * (ends[below + 1] - parts) * (parts - ends[below]))


@pytest.mark.parametrize("levels", [2, 4, 7])
def test_fit_is_nearly_the_best(levels):
    """Against a search that moves one level at a time, from what was found and from anywhere."""
    rng = np.random.default_rng(0)
    parts = np.abs(rng.normal(size=3000)) / 6
    weights = rng.random(3000)
    fit = jax.jit(lambda p, w: fit_levels(p, w, levels))
    found = np.asarray(fit(jnp.asarray(parts, jnp.float32), jnp.asarray(weights, jnp.float32)))
    assert (np.diff(np.r_[0, found, 1]) > 0).all()
    best = np.sort(rng.random(levels - 1)) * 0.5
    for _ in range(60):
        for j in range(levels - 1):
            ends = np.r_[0, best, 1]
            tried = np.linspace(ends[j], ends[j + 2], 60)
            each = [_variance(np.r_[best[:j], t, best[j + 1 :]], parts, weights) for t in tried]
            best[j] = tried[np.argmin(each)]
    got, want = _variance(found, parts, weights), _variance(best, parts, weights)
    assert got < 1.05 * want
    uniform = _variance(np.arange(1, levels) / levels, parts, weights)
    assert got < 0.6 * uniform


def test_one_level_and_nothing_to_fit():
    assert fit_levels(jnp.zeros((1, 9)), jnp.zeros((1, 9)), 1).shape == (0,)
    levels = fit_levels(jnp.zeros((1, 9)), jnp.zeros((1, 9)), 4)
    assert np.isfinite(levels).all()


@pytest.mark.parametrize("norm", ["l2", "max"])
def test_is_right_in_the_mean(norm):
    """With the variance of the levels that are sent, which is less than that of QSGD."""
    compressor = sasg_jax.learned_levels(3, 32, norm=norm)
    message, _, _ = checks.compress(compressor, X, jax.random.key(0))
    bound = 0.0
    for i, start in enumerate(range(0, 77, 32)):
        x = np.abs(np.asarray(X[start : start + 32], np.float64))
        size = float(message[0].norms[i])
        bound += _variance(message[0].levels, np.minimum(x / size, 1), size**2)
    found = checks.check_mean(compressor, X, bound, draws=4096)
    np.testing.assert_allclose(found * float(jnp.sum(X**2)), bound, rtol=0.1)
    assert found < 0.8 * checks.check_mean(sasg_jax.qsgd(3, 32, norm=norm), X, 1e9, draws=4096)


def test_levels_are_fitted_in_every_second_message():
    trees = [
        jnp.asarray(np.random.default_rng(i).standard_t(2, 200), jnp.float32) for i in range(4)
    ]
    memory, seen = COMPRESSOR.init_memory(trees[0]), []
    for i, x in enumerate(trees):
        message, _, memory = checks.compress(COMPRESSOR, x, jax.random.key(i), memory)
        seen.append(np.asarray(message[0].levels))
        np.testing.assert_array_equal(memory[0].levels, message[0].levels)
    np.testing.assert_array_equal(seen[0], seen[1])
    np.testing.assert_array_equal(seen[2], seen[3])
    assert np.any(seen[1] != seen[2])


def test_a_run_needs_no_residual_and_nobody_to_agree():
    """Workers of levels of their own, in turns; and the loss goes down."""
    tx = sasg_jax.compressed_sgd(
        0.2, COMPRESSOR, num_workers=4, key=jax.random.key(0), feedback=sasg_jax.none()
    )
    step = sasg_jax.make_train_step(problems.quadratic_loss, tx, num_workers=4)
    centres = problems.centres()
    state, infos = jax.jit(problems.scan_rounds(step.step))(
        step.init(problems.quadratic_params()),
        (jax.tree.map(lambda x: np.repeat(x[None], 40, 0), centres),),
    )
    mean = centres["w"].mean(0)
    assert np.linalg.norm(state.params["w"] - mean) < 0.5 * np.linalg.norm(mean)
    levels = state.opt_state.worker.compressor_memory[1].levels
    assert np.any(levels[0] != levels[1])
    assert np.isfinite(infos.loss).all()


def test_says_what_it_is():
    names = "learned_levels(3, 16, every=2)", "learned_levels(7, 512)"
    assert (COMPRESSOR.name, sasg_jax.learned_levels().name) == names
    assert (COMPRESSOR.unbiased, COMPRESSOR.random) == (True, True)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("levels", 0), ("levels", 128), ("bucket", 0), ("every", 0), ("norm", "l1")],
)
def test_bad_arguments(argument, value):
    with pytest.raises(ValueError, match=rf"^Expected {argument}={value!r} to be "):
        sasg_jax.learned_levels(**{argument: value})
