"""Norms, products and sums of trees that numbers of any type survive."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sasg_jax import numerics

HALF = {"a": jnp.array([3.0, 60_000], jnp.float16), "b": jnp.array([[1e30]], jnp.bfloat16)}


@pytest.mark.parametrize(
    ("dtype", "wider"),
    [("bfloat16", "float32"), ("float16", "float32"), ("float32", "float32"), ("float64",) * 2],
)
def test_wide_is_at_least_float32(dtype, wider):
    assert numerics.wide(jnp.dtype(dtype)) == jnp.dtype(wider)


def test_squares_of_half_precision_are_taken_in_float32():
    x = {"a": HALF["a"]}
    assert numerics.squared_norm(x) == 9 + 60_000.0**2
    assert numerics.squared_distance(x, {"a": -x["a"]}) == 36 + 120_000.0**2
    ulp = {"a": jnp.array([256.0], jnp.bfloat16)}, {"a": jnp.array([1.0], jnp.bfloat16)}
    assert numerics.squared_distance(*ulp) == 255**2  # in bfloat16 255 is a number, its square not


def test_norms_of_nothing():
    assert numerics.squared_norm({}) == numerics.squared_distance({}, {}) == 0


def test_distance_is_that_of_a_loop():
    rng = np.random.default_rng(0)
    a, b = ({"x": rng.normal(size=(3, 2)), "y": rng.normal(size=5)} for _ in range(2))
    want = sum(((a[key] - b[key]) ** 2).sum() for key in a)
    to_jax = lambda tree: jax.tree.map(jnp.float32, tree)
    np.testing.assert_allclose(numerics.squared_distance(to_jax(a), to_jax(b)), want, rtol=1e-6)
    sound = numerics.squared_distance_of_sound(to_jax(a), to_jax(b))
    np.testing.assert_allclose(sound, want, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e20, -1e20])
def test_distance_tells_of_an_entry_whose_square_is_no_number(bad):
    """Of the first tree, also where the second has the same entry; and compiled, too."""
    distance = jax.jit(numerics.squared_distance_of_sound)
    a = jnp.array([1.0, bad, 2.0])
    assert np.isnan(distance(a, a))
    assert np.isnan(distance(a, jnp.zeros(3)))
    assert distance(jnp.zeros(3), a) == np.inf
    large = jnp.array([1.0, 1e18, 2.0])
    assert distance(large, large) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_all_finite(bad):
    all_finite = jax.jit(numerics.all_finite)
    tree = {"a": jnp.full(3, 3e38), "b": jnp.full((2, 2), -3e38, jnp.bfloat16)}
    assert all_finite(tree)
    assert not all_finite({**tree, "b": tree["b"].at[1, 0].set(bad)})
    assert not all_finite({**tree, "a": tree["a"].at[:2].set([bad, -bad])})


def test_products_are_taken_in_float32():
    """0.7 * 13 in bfloat16 is 9.125, and 9.0625 where the rate is rounded first; in float16
    1e5 * 0.5 fits, and 1e5 does not."""
    got = numerics.scale(jnp.float32(0.7), jnp.array([13.0], jnp.bfloat16))
    assert (got.dtype, float(got[0])) == (jnp.bfloat16, 9.125)
    got = numerics.scale(jnp.float32(1e5), jnp.array([0.5], jnp.float16))
    assert (got.dtype, float(got[0])) == (jnp.float16, float(jnp.float16(5e4)))
    assert numerics.scale(None, HALF) is HALF
