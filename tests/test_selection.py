"""Every selection method finds the entries that lax.top_k finds, whatever the vector."""

import functools

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

# The sample is every 17th entry. Short vectors and large k go to the reference; 8 sampled entries
# (136 in all) are the least that k = 1 prunes with; bit masks have words of 32 entries.
SHAPES = [(1, 1), (32, 32), (33, 5), (135, 1), (136, 1), (200, 2), (512, 30), (1025, 16)]


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
    return st.floats(width=32, allow_nan=False, allow_subnormal=False, **kwargs)


@pytest.mark.parametrize(("size", "k"), SHAPES)
@hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)
@hypothesis.given(data=st.data())
def test_any_vector(size, k, data):
    elements = data.draw(
        st.sampled_from(
            [_floats(), _floats(min_value=-2, max_value=2), st.sampled_from([-1.0, 0.0, -0.0, 1.0])]
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
    return {
        "normal": normal,
        "heavy_tailed": normal**5,
        "tied": np.round(2 * normal) / 2,
        "constant": np.full(size, -3.0, np.float32),
        "zeros": np.zeros(size, np.float32),
        "fewer_than_k_nonzero": few,
        "ascending": np.sort(np.abs(normal)),
        "descending": -np.sort(-np.abs(normal)),
        "sample_too_large": np.where(sampled & few_sampled, 100.0, normal).astype(np.float32),
        "sample_all_zero": np.where(sampled, 0.0, normal).astype(np.float32),
        "infinite": np.where(np.arange(size) == size - 1, -np.inf, normal).astype(np.float32),
    }


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("kind", _vectors(1, 1))
@pytest.mark.parametrize(("size", "k"), [(200, 2), (1000, 10), (5000, 50), (40_000, 400)])
def test_hard_vector(size, k, kind, dtype):
    _assert_same_set(jnp.asarray(_vectors(size, k)[kind], dtype), k)


def test_both_branches_are_tested(monkeypatch):
    """What these tests compare is the pruned selection, except where the sample misleads it."""
    monkeypatch.setattr(selection, "lax_top_k", lambda x, k: jnp.full(k, -1, jnp.int32))
    select = jax.jit(lambda x: selection.pruned_top_k(x, 50))
    vectors = _vectors(5000, 50)
    uses_reference = {kind: bool((select(x) < 0).any()) for kind, x in vectors.items()}
    misleading = (
        "constant",
        "zeros",
        "fewer_than_k_nonzero",
        "sample_too_large",
        "sample_all_zero",
    )
    assert uses_reference == {kind: kind in misleading for kind in vectors}


@pytest.mark.parametrize("size", [(1 << 15) - 1, 1 << 15])
@pytest.mark.parametrize("method", selection.METHODS)
def test_every_method_at_the_size_where_auto_switches(method, size):
    x = _vectors(size, 300)["tied"]
    got = jax.jit(lambda x: selection.magnitude_top_k(x, 300, method=method))(x)
    want = np.argsort(-np.abs(x), kind="stable")[:300]
    np.testing.assert_array_equal(np.sort(got), np.sort(want))


def test_under_vmap_and_scan():
    size, k = 1000, 10
    rows = np.stack([_vectors(size, k)[kind] for kind in ("normal", "tied", "sample_too_large")])
    want = np.sort(np.argsort(-np.abs(rows), axis=1, kind="stable")[:, :k], axis=1)

    def select(x):
        return jnp.sort(selection.pruned_top_k(x, k))

    np.testing.assert_array_equal(jax.jit(jax.vmap(select))(rows), want)
    np.testing.assert_array_equal(lax.scan(lambda c, x: (c, select(x)), None, rows)[1], want)


@pytest.mark.parametrize("size", [1000, 40_000])
@pytest.mark.parametrize("method", selection.METHODS)
@pytest.mark.parametrize("nan_at", ["sampled", "largest", "most"])
def test_nan_is_not_chosen_where_there_are_numbers(method, size, nan_at):
    x, k = _vectors(size, 1)["normal"].copy(), 20
    if nan_at == "sampled":
        x[::17] = np.nan
    elif nan_at == "largest":
        x[np.argsort(-np.abs(x))[:k]] = np.nan
    else:
        x[: size - 2 * k] = np.nan
    got = jax.jit(lambda x: selection.magnitude_top_k(x, k, method=method))(x)
    want = np.argsort(-np.where(np.isnan(x), -1, np.abs(x)), kind="stable")[:k]
    np.testing.assert_array_equal(np.sort(got), np.sort(want))


@pytest.mark.parametrize("method", selection.METHODS)
def test_equal_magnitudes_go_by_index(method):
    x = np.tile([1.0, -1.0], 300).astype(np.float32)
    indices = jax.jit(lambda x: selection.magnitude_top_k(x, 7, method=method))(x)
    np.testing.assert_array_equal(np.sort(indices), np.arange(7))


def test_unknown_method():
    with pytest.raises(ValueError, match=r"Expected method='fast' to be one of 'auto', 'lax'"):
        selection.magnitude_top_k(jnp.ones(3), 1, method="fast")
