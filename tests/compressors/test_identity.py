"""The compressor that leaves nothing out."""

import chex
import jax.numpy as jnp

import sasg_jax

TREE = {"a": jnp.array([1.5, -0.0, 3e38]), "b": jnp.ones((2, 3), jnp.bfloat16)}


def test_the_message_is_the_tree_and_nothing_remains():
    message, remainder, memory = sasg_jax.identity().compress(TREE, ("kept",), None)
    assert message is TREE
    assert memory == ("kept",)
    chex.assert_trees_all_equal(
        remainder, {"a": jnp.zeros(3), "b": jnp.zeros((2, 3), jnp.bfloat16)}
    )


def test_says_so():
    """Nothing is left out, so no residual need be kept; messages may be added before decoding."""
    compressor = sasg_jax.identity()
    is_said = [compressor.exact, compressor.unbiased, compressor.linear, compressor.random]
    assert is_said == [True, True, True, False]
    assert compressor.name == "identity()"
