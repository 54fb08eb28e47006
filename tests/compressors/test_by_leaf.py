"""One compressor for some tensors, another for the rest."""

from typing import Any, cast

import chex
import compressor_checks as checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sasg_jax


def _choose(path, leaf):
    return "matrices" if leaf.ndim > 1 else "rest"


MIXED = sasg_jax.by_leaf(_choose, matrices=sasg_jax.top_k(0.3), rest=sasg_jax.identity())
DRAWN = sasg_jax.by_leaf(_choose, matrices=sasg_jax.qsgd(3, 16), rest=sasg_jax.sign())
SHARED = sasg_jax.by_leaf(lambda path, leaf: path, b=sasg_jax.identity(), w=sasg_jax.random_k(0.25))


def test_any_numbers():
    checks.check_any_numbers(DRAWN)


def test_each_gets_its_own():
    """As one tree: of both matrices together, and of the rest together."""
    tree = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(2), "c": jnp.full((2, 2), 9.0)}
    of_tree = sasg_jax.top_k(0.4, scope="tree")
    compressor = sasg_jax.by_leaf(_choose, matrices=of_tree, rest=sasg_jax.identity())
    message, remainder, _ = checks.compress(compressor, tree)
    decoded = checks.decompress(compressor, message, tree)
    chex.assert_trees_all_equal(decoded["c"], tree["c"])
    np.testing.assert_array_equal(decoded["b"], [1, 1])
    assert not decoded["a"].any()
    chex.assert_trees_all_equal(jax.tree.map(jnp.add, decoded, remainder), tree)
    alone = of_tree.message_size((tree["a"], tree["c"]))
    assert compressor.message_size(tree) == (alone.bytes + 8, alone.paper_bits + 64)
    assert set(message) == {"matrices", "rest"}


def test_paths_and_leaves():
    seen = []
    tree = {"layers": [{"bias": jnp.zeros(3, jnp.bfloat16)}], "head": jnp.zeros((2, 2))}
    note = lambda path, leaf: seen.append((path, leaf.shape, leaf.dtype)) or "all"
    sasg_jax.by_leaf(note, all=sasg_jax.identity(), unused=sasg_jax.sign()).message_shapes(tree)
    assert ("layers/0/bias", (3,), jnp.bfloat16) in seen
    assert ("head", (2, 2), jnp.float32) in seen


def test_memory_is_by_name():
    approximate = sasg_jax.top_k(0.1, selection="approximate")
    compressor = sasg_jax.by_leaf(_choose, matrices=approximate, rest=sasg_jax.sign())
    memory = compressor.init_memory(checks.tree())
    assert jax.tree.map(float, memory["matrices"]) == (0, 0)
    assert not jax.tree.leaves(memory["rest"])
    state = checks.compress(compressor, checks.tree())
    assert jax.tree.structure(state.memory) == jax.tree.structure(memory)


def test_they_draw_apart():
    """Keys are folded by the place of the name, as well as of the tensor."""
    parts = {"one": sasg_jax.qsgd(1, 64), "two": sasg_jax.qsgd(1, 64)}
    compressor = sasg_jax.by_leaf(lambda path, leaf: path, **parts)
    x = jnp.asarray(np.random.default_rng(0).normal(size=64), jnp.float32)
    message, _, _ = compressor.compress({"one": x, "two": x}, {"one": ((),), "two": ((),)},
                                        jax.random.key(0))  # fmt: skip
    assert np.any(message["one"][0].levels != message["two"][0].levels)


def test_equals_a_loop():
    """Vectors cross as they are."""
    compressor = sasg_jax.by_leaf(_choose, matrices=sasg_jax.sign(), rest=sasg_jax.identity())
    decoded = lambda p, _: p if p.ndim == 1 else np.abs(p).mean() * np.where(p < 0, -1, 1)
    checks.check_run(compressor, decoded, rule=sasg_jax.every(2))


def test_messages_add_up_where_all_do():
    """Also where only one of two draws, from the key that all share."""
    tx = sasg_jax.compressed_sgd(0.1, SHARED, num_workers=4, key=jax.random.key(0))
    assert tx.method.exchange.name == "psum"
    tree, key = {"b": jnp.ones(3), "w": jnp.arange(16.0)}, jax.random.key(1)
    message, remainder, _ = checks.compress(SHARED, tree, key)
    twice = jax.tree.map(lambda x: 2 * x, message)
    decoded = checks.decompress(SHARED, twice, tree, key)
    want = jax.tree.map(lambda x, rest: 2 * (x - rest), tree, remainder)
    chex.assert_trees_all_equal(decoded, want)
    assert np.count_nonzero(remainder["w"]) >= 11


def test_facts_are_those_that_all_have():
    facts = lambda x: (x.exact, x.unbiased, x.linear, x.random, x.shares_key)
    of = lambda *parts: facts(sasg_jax.by_leaf(_choose, **dict(zip("ab", parts, strict=True))))
    identity, sign, qsgd = sasg_jax.identity(), sasg_jax.sign(), sasg_jax.qsgd()
    shared = sasg_jax.random_k(0.1, unbiased=True)
    assert of(identity, identity) == (True, True, True, False, False)
    assert of(identity, qsgd) == (False, True, False, True, False)
    assert of(identity, shared) == (False, True, True, True, True)
    assert of(sign, identity) == (False, False, False, False, False)
    assert MIXED.name == "by_leaf(matrices=top_k(0.3), rest=identity())"


def test_what_is_refused():
    mean, three, word = sasg_jax.power_sgd(2), cast(Any, 3), cast(Any, "w")
    with pytest.raises(
        ValueError, match=r"^Expected b='power_sgd\(2\)' to be a compressor that needs no"
    ):
        sasg_jax.by_leaf(_choose, a=sasg_jax.sign(), b=mean)
    with pytest.raises(ValueError, match=r"^Expected b=3 to be a compressor"):
        sasg_jax.by_leaf(_choose, b=three)
    with pytest.raises(ValueError, match=r"^Expected compressors={} to have one at least"):
        sasg_jax.by_leaf(_choose)
    with pytest.raises(ValueError, match=r"^Expected choose='w' to be a function"):
        sasg_jax.by_leaf(word, a=sasg_jax.sign())
    with pytest.raises(ValueError, match=r"^Expected b='random_k\(0.1\)' to draw from a worker's"):
        sasg_jax.by_leaf(_choose, a=sasg_jax.qsgd(), b=sasg_jax.random_k(0.1))
    with pytest.raises(ValueError, match=r"^Expected choose\('w', ...\)='x' to be one of 'a'"):
        sasg_jax.by_leaf(lambda path, leaf: "x", a=sasg_jax.sign()).message_size({"w": jnp.ones(3)})
