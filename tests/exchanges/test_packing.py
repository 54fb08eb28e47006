"""Messages come out of a vector of words as they went in."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sasg_jax.exchanges.packing import pack, packed_bytes, unpack

DTYPES = ("uint8", "int8", "uint16", "float16", "bfloat16", "uint32", "int32", "float32", "bool")
TREES = {
    "wide": {"a": ("float32", (3, 2)), "b": ("uint32", (5,))},
    "narrow": {"a": ("uint8", (5,)), "b": ("bfloat16", (3,)), "c": ("uint16", ())},
    "mixed": {"a": ("bfloat16", (1,)), "b": ("float32", ()), "c": ("uint8", (6,))},
    "empty part": {"a": ("float32", (0,)), "b": ("uint8", (0, 3)), "c": ("float16", (2,))},
}


def _random(trees, rng):
    """Any bits of each type, NaN and denormal numbers among them."""
    tree = {}
    for name, (dtype, shape) in trees.items():
        count = int(np.prod(shape)) * jnp.dtype(dtype).itemsize
        octets = rng.integers(0, 256, count, np.uint8)
        tree[name] = jnp.asarray(octets.view(jnp.dtype(dtype)).reshape(shape))
    return tree


@pytest.mark.parametrize("name", TREES)
def test_every_bit_comes_back(name):
    tree = _random(TREES[name], np.random.default_rng(0))
    shapes = jax.eval_shape(lambda: tree)
    words = jax.jit(pack)(tree)
    back = jax.jit(lambda words: unpack(words, shapes))(words)
    for key, x in tree.items():
        assert (back[key].dtype, back[key].shape) == (x.dtype, x.shape)
        assert np.asarray(back[key]).tobytes() == np.asarray(x).tobytes()


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True, database=None)
@hypothesis.given(
    st.lists(st.tuples(st.sampled_from(DTYPES), st.integers(0, 9)), min_size=1, max_size=6)
)
def test_size_is_that_of_the_bytes_in_whole_words(parts):
    shapes = [jax.ShapeDtypeStruct((size,), dtype) for dtype, size in parts]
    octets = sum(jnp.dtype(dtype).itemsize * size for dtype, size in parts)
    assert packed_bytes(shapes) - octets in range(4)
    assert packed_bytes(shapes) % 4 == 0
