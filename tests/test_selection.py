"""Every selection method finds the entries that lax.top_k finds, whatever the vector."""

import functools
import math

import chex
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from sasg_jax import selection

# The sample is every 17th entry, of large k every 31st or 67th. Short vectors and large k go to the
# reference; 8 sampled entries (136 in all) are the least that k = 1 prunes with; bit masks have
# words of 32.
SHAPES = [(1, 1), (33, 5), (135, 1), (136, 1), (1025, 16)]


@functools.cache
def _both(k: int):
    """Indices of the pruned selection and of lax.top_k, sorted."""

    def fn(x):
        indices = selection.pruned_top_k(x, k)
        chex.assert_shape(indices, (k,))
        chex.assert_type(indices, jnp.int32)
        return jnp.sort(indices), jnp.sort(lax.top_k(jnp.abs(x), k)[1])

    return jax.jit(fn)


def _assert_same_set(x, k):
    got, want = _both(k)(x)
    np.testing.assert_array_equal(got, want)


def _floats(**kwargs):
    return st.floats(width=32, allow_nan=False, **kwargs)


@pytest.mark.parametrize(("size", "k"), SHAPES)
@hypothesis.settings(max_examples=30, deadline=None, derandomize=True, database=None)
@hypothesis.given(data=st.data())
def test_any_vector(size, k, data):
    elements = data.draw(
        st.sampled_from(
            [
                _floats(),
                _floats(min_value=-2, max_value=2),
                _floats(min_value=0, max_value=2.0**-130),  # which the CPU may take for zero
                st.sampled_from([-1.0, 0.0, -0.0, 1.0]),
            ]
        )
    )
    fill = data.draw(st.sampled_from([st.just(0.0), st.just(-0.5), st.nothing()]))
    _assert_same_set(data.draw(hnp.arrays(np.float32, size, elements=elements, fill=fill)), k)


def _vectors(size: int, k: int):
    """Vectors that are hard in one way each."""
    rng = np.random.default_rng(size)
    normal = rng.normal(size=size).astype(np.float32)
    sampled = np.arange(size) % 17 == 0
    few_sampled = np.arange(size) < 17 * (10 + k // 4)
    few = np.zeros(size, np.float32)
    few[rng.choice(size, max(1, k // 2), replace=False)] = -1
    large = rng.permutation(size)
    return {
        "normal": normal,
        "heavy_tailed": normal**5,
        "tied": np.round(2 * normal) / 2,
        "constant": np.full(size, -3.0, np.float32),
        "zeros": np.zeros(size, np.float32),
        "fewer_than_k_nonzero": few,
        "signs": np.sign(normal),
        # Of two magnitudes, the larger one a little less and a little more often than k times.
        "less_than_k_large": np.where(large < k - 1 - k // 20, -2, np.sign(normal)),
        "more_than_k_large": np.where(large < k + 1 + k // 20, -2, np.sign(normal)),
        "tiny": (rng.integers(-99, 100, size) * np.float32(1e-45)).astype(np.float32),
        "tiny_and_zero": np.where(normal > 0, 0, np.float32(1e-45) * large).astype(np.float32),
        "ascending": np.sort(np.abs(normal)),
        "descending": -np.sort(-np.abs(normal)),
        "sample_too_large": np.where(sampled & few_sampled, 100.0, normal).astype(np.float32),
        "sample_all_zero": np.where(sampled, 0.0, normal).astype(np.float32),
        "infinite": np.where(np.arange(size) == size - 1, -np.inf, normal).astype(np.float32),
    }


@pytest.mark.parametrize("kind", _vectors(1, 1))
@pytest.mark.parametrize(
    ("size", "k", "dtype"),
    [
        (200, 2, jnp.float16),
        (5000, 50, jnp.float32),
        (5000, 50, jnp.bfloat16),
        (40_000, 400, jnp.float32),
    ],
)
def test_hard_vector(size, k, kind, dtype):
    _assert_same_set(jnp.asarray(_vectors(size, k)[kind], dtype), k)


@pytest.mark.parametrize("kind", ["normal", "tied", "constant", "sampled_large"])
@pytest.mark.parametrize(
    ("k", "stride"), [(40_000, 67), pytest.param(5000, 31, marks=pytest.mark.slow)]
)
def test_long_stride(k, stride, kind):
    size = 200_000
    vectors = _vectors(size, k)
    sampled = np.arange(size) % stride == 0
    vectors["sampled_large"] = np.where(sampled, 100.0, vectors["normal"]).astype(np.float32)
    _assert_same_set(jnp.asarray(vectors[kind]), k)


def test_all_branches_are_tested(monkeypatch):
    """What these tests compare is the pruned selection, also where one magnitude occurs very often,
    except where the sample misleads it."""
    monkeypatch.setattr(selection, "lax_top_k", lambda x, k: jnp.full(k, -1, jnp.int32))
    select = jax.jit(lambda x: selection.pruned_top_k(x, 50))
    vectors = _vectors(5000, 50)
    uses_reference = {kind: bool((select(x) < 0).any()) for kind, x in vectors.items()}
    # The numbers that the CPU takes for zero are all above the bound, and too many.
    misleading = ("sample_too_large", "sample_all_zero", "tiny", "tiny_and_zero")
    assert uses_reference == {kind: kind in misleading for kind in vectors}


@functools.cache
def _compiled(k, method):
    return jax.jit(lambda x: selection.magnitude_top_k(x, k, method=method))


@pytest.mark.parametrize("size", [(1 << 15) - 1, 1 << 15])
def test_at_the_size_where_auto_switches(size):
    x = _vectors(size, 300)["tied"]
    got = _compiled(300, "auto")(x)
    want = np.argsort(-np.abs(x), kind="stable")[:300]
    np.testing.assert_array_equal(np.sort(got), np.sort(want))


def test_under_vmap():
    size, k = 1000, 10
    rows = np.stack([_vectors(size, k)[kind] for kind in ("normal", "tied", "sample_too_large")])
    want = np.sort(np.argsort(-np.abs(rows), axis=1, kind="stable")[:, :k], axis=1)

    got = jax.jit(jax.vmap(lambda x: selection.pruned_top_k(x, k)))(rows)
    np.testing.assert_array_equal(np.sort(got), want)


@pytest.mark.parametrize(("size", "method"), [(1000, "lax"), (1000, "pruned"), (40_000, "auto")])
@pytest.mark.parametrize("nan_at", ["sampled", "largest", "most", "all_but_few", "among_zeros"])
def test_nan_is_not_chosen_where_there_are_numbers(method, size, nan_at):
    x, k = _vectors(size, 1)["normal"].copy(), 20
    if nan_at == "sampled":
        x[::17] = np.nan
    elif nan_at == "largest":
        x[np.argsort(-np.abs(x))[:k]] = np.nan
    elif nan_at == "among_zeros":
        x[:] = np.where(x > 1, np.nan, 0)
    else:
        x[: size - {"most": 2 * k, "all_but_few": k // 2}[nan_at]] = np.nan
    got = _compiled(k, method)(x)
    want = np.argsort(-np.where(np.isnan(x), -1, np.abs(x)), kind="stable")[:k]
    np.testing.assert_array_equal(np.sort(got), np.sort(want))


@pytest.mark.parametrize("method", ["lax", "pruned"])
def test_equal_magnitudes_go_by_index(method):
    x = np.tile([1.0, -1.0], 300).astype(np.float32)
    indices = _compiled(7, method)(x)
    np.testing.assert_array_equal(np.sort(indices), np.arange(7))


# A threshold that serves again -------------------------------------------------------------------


@pytest.fixture
def prunes_short_vectors(monkeypatch):
    monkeypatch.setattr(selection, "_MIN_PRUNED_SIZE", 20)


@functools.cache
def _compiled_approximate(k):
    return jax.jit(lambda x, threshold: selection.approximate_top_k(x, k, threshold))


def _approximate(x, k, threshold):
    indices, new = _compiled_approximate(k)(x, jnp.float32(threshold))
    chex.assert_shape(indices, (k,))
    chex.assert_type([indices, new], [jnp.int32, jnp.float32])
    return np.asarray(indices), float(new)


def _left(x, indices):
    """What part of the sum of squares is not chosen."""
    squares = np.square(np.asarray(x, np.float64))
    total = squares.sum()
    return 0.0 if total == 0 else 1 - squares[indices].sum() / total


@pytest.mark.usefixtures("prunes_short_vectors")
@pytest.mark.parametrize("kind", [kind for kind in _vectors(1, 1) if kind != "infinite"])
@pytest.mark.parametrize(
    ("size", "k", "dtype"),
    [(100, 1, jnp.float32), (1000, 10, jnp.bfloat16)],
)
def test_approximate_keeps_lemma_1_whatever_the_threshold(size, k, kind, dtype):
    """Also where it is far too small or too large, and every index is chosen once."""
    x = jnp.asarray(_vectors(size, k)[kind], dtype)
    ordered = np.sort(np.abs(np.asarray(x, np.float32)))[::-1]
    ranks = (0, k // 2, math.ceil(0.8 * k) - 1, k - 1, k, 2 * k, size - 1)
    for threshold in (0.0, *ordered[list(ranks)], 2 * ordered[0]):
        indices, _ = _approximate(x, k, threshold)
        assert len(set(indices.tolist())) == k
        assert 0 <= indices.min() <= indices.max() < size
        assert _left(x, indices) <= 1 - 0.8 * k / size + 1e-6


@pytest.mark.usefixtures("prunes_short_vectors")
@pytest.mark.parametrize(
    ("large", "is_reused"), [(0, False), (7, False), (8, True), (9, True), (10, True), (11, False)]
)
def test_threshold_is_reused_for_eight_to_ten_tenths_of_k(large, is_reused):
    """All that reach it are chosen then; otherwise it is the k-th largest. Both are corrected."""
    k, threshold = 10, 100.0
    x = np.random.default_rng(0).permutation(np.arange(1.0, 201.0)).astype(np.float32) / 4
    x[np.argsort(-x)[:large]] += threshold
    order = np.argsort(-x)
    assert (x >= threshold).sum() == large
    indices, new = _approximate(jnp.asarray(x), k, threshold)
    if is_reused:
        assert set(order[:large]) <= set(indices.tolist())
        assert new == pytest.approx(threshold * (large / (0.9 * k)) ** (1 / 12))
    else:
        assert set(indices.tolist()) == set(order[:k].tolist())
        assert new == pytest.approx(x[order[k - 1]] * (1 / 0.9) ** (1 / 12))


@pytest.mark.usefixtures("prunes_short_vectors")
def test_approximate_with_error_feedback():
    """Over rounds the threshold follows: it is seldom found anew, and little is lost by it."""
    size, k, rounds, settled = 40_000, 400, 160, 100
    step = jax.jit(lambda x, threshold: selection.approximate_top_k(x, k, threshold))
    rng = np.random.default_rng(0)
    scales = rng.lognormal(sigma=1.0, size=size)
    residual, threshold = np.zeros(size, np.float32), jnp.float32(0)
    left, least, renewed = [], [], []
    for _ in range(rounds):
        x = (residual + scales * rng.normal(size=size)).astype(np.float32)
        renewed.append(not 0.8 * k <= (np.abs(x) >= threshold).sum() <= k)
        indices, threshold = step(x, threshold)
        left.append(_left(x, indices))
        least.append(_left(x, np.argsort(-np.abs(x))[:k]))
        residual = x.copy()
        residual[indices] = 0
    assert renewed[0]
    assert np.mean(renewed[settled:]) < 0.1
    np.testing.assert_array_less(np.array(least) - 1e-6, left)
    kept, most = 1 - np.mean(left), 1 - np.mean(least)
    assert kept > 0.9 * most


@pytest.mark.usefixtures("prunes_short_vectors")
def test_approximate_never_chooses_nan_where_there_are_numbers():
    x = np.random.default_rng(0).normal(size=500).astype(np.float32)
    threshold = np.sort(np.abs(x))[-9]
    x[np.argsort(np.abs(x))[:485]] = np.nan
    indices, _ = _approximate(jnp.asarray(x), 10, threshold)
    assert not np.isnan(x[indices]).any()


def test_vmap_takes_one_vector_after_another(monkeypatch):
    """A cond under vmap would run the reference for every vector beside what is faster."""
    monkeypatch.setattr(selection, "_MIN_PRUNED_SIZE", 20)
    rows = jnp.ones((3, 200))
    for fn in (
        lambda x: selection.pruned_top_k(x, 2),
        lambda x: selection.approximate_top_k(x, 2, jnp.float32(0))[0],
    ):
        text = str(jax.make_jaxpr(jax.vmap(fn))(rows))
        assert "cond[" in text
        assert "f32[3,200] = abs" not in text


def test_unknown_method():
    with pytest.raises(ValueError, match=r"Expected method='fast' to be one of 'auto', 'lax'"):
        selection.magnitude_top_k(jnp.ones(3), 1, method="fast")


def test_types_are_the_same_in_64_bit_mode():
    x = jnp.asarray(_vectors(1 << 16, 300)["normal"])
    with jax.enable_x64(True):
        indices, threshold = selection.approximate_top_k(x, 300, jnp.float32(1.0))
        chosen = selection.magnitude_top_k(x, 300, method="pruned")
    assert (indices.dtype, threshold.dtype, chosen.dtype) == ("int32", "float32", "int32")
