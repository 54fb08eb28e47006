"""Draws by given probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sasg_jax.compressors.draws import SLACK, draw, factor_of


@pytest.mark.parametrize("tail", [1.5, 3, 30])
@pytest.mark.parametrize("places", [1, 7, 60])
def test_probabilities_add_up_to_the_places(tail, places):
    """Never to more, and nearly to as many; against the exact c, by bisection."""
    x = np.abs(np.random.default_rng(int(tail)).standard_t(tail, 200))
    x = (x / x.max()).astype(np.float32)
    factor = float(factor_of(jnp.asarray(x), places))
    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        over = np.minimum(1, middle * x.astype(np.float64)).sum() > places * (1 - SLACK)
        low, high = (low, middle) if over else (middle, high)
    assert factor <= low * (1 + 1e-5)
    assert np.minimum(1, factor * x).sum() > 0.98 * places


def test_nothing_to_draw():
    assert float(factor_of(jnp.zeros(9), 3)) == 0
    assert not draw(jnp.zeros(9), jax.random.key(0)).any()


def test_each_is_drawn_with_its_probability_and_no_more_than_there_is_room_for():
    p = np.random.default_rng(0).random(50).astype(np.float32) ** 3
    p[[3, 30]] = 1
    p[7] = 0
    p *= np.where(p < 1, 9 / p[p < 1].sum(), 1)
    p = np.minimum(p, 1)
    keys = jax.random.split(jax.random.key(0), 20_000)
    drawn = np.asarray(jax.jit(jax.vmap(lambda key: draw(jnp.asarray(p), key)))(keys))
    counts = drawn.sum(1)
    assert set(counts) <= {int(np.floor(p.sum())), int(np.ceil(p.sum()))}
    spread = np.sqrt(p * (1 - p) / len(keys)) + 1e-7
    assert (np.abs(drawn.mean(0) - p) / spread).max() < 4.5
    assert drawn[:, [3, 30]].all()
    assert not drawn[:, 7].any()


def test_small_probabilities_are_not_lost():
    """A million of 1e-6 add up to one: sums of float32 would not."""
    p = jnp.full(1_000_000, 1e-6)
    keys = jax.random.split(jax.random.key(1), 20)
    counts = [int(draw(p, key).sum()) for key in keys]
    assert set(counts) <= {0, 1}
    assert sum(counts) >= 19
