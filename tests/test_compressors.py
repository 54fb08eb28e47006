"""What a message keeps, what it leaves out, and what it weighs."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sasg_jax
from sasg_jax.compressors import compress_with_feedback


def _tree(dtype=jnp.float32, seed=0):
    """A matrix, a vector, a scalar and a tensor of size 1."""
    rng = np.random.default_rng(seed)
    shapes = {"matrix": (8, 25), "one": (1,), "scalar": (), "vector": (31,)}
    return {k: jnp.asarray(rng.normal(size=shape), dtype) for k, shape in shapes.items()}


def _size(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


COMPRESSORS = {
    "identity": sasg_jax.identity(),
    "tensor": sasg_jax.top_k(0.1),
    "tree": sasg_jax.top_k(0.1, scope="tree"),
    "everything": sasg_jax.top_k(1),
    "approximate": sasg_jax.top_k(0.1, selection="approximate"),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", COMPRESSORS)
def test_conservation_bit_for_bit(name, dtype):
    """decompress(message) + remainder == tree; no entry is in both."""
    compressor, tree = COMPRESSORS[name], _tree(dtype)
    message, remainder, _ = jax.jit(compressor.compress)(tree)
    decoded = jax.jit(compressor.decompress)(message, tree)
    chex.assert_trees_all_equal_shapes_and_dtypes(decoded, remainder, tree)
    chex.assert_trees_all_equal(jax.tree.map(jnp.add, decoded, remainder), tree)
    for x, y in zip(jax.tree.leaves(decoded), jax.tree.leaves(remainder), strict=True):
        assert not bool(jnp.any((x != 0) & (y != 0)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", COMPRESSORS)
def test_feedback_conserves_bit_for_bit(name, dtype):
    """decoded message + new residual == tree + old residual, and nothing is kept twice."""
    compressor, tree = COMPRESSORS[name], _tree(dtype)
    residual = () if compressor.lossless else _tree(dtype, seed=1)
    made = jax.jit(lambda *args: compress_with_feedback(compressor, *args))(
        tree, residual, compressor.init_memory(tree)
    )
    sent = compressor.decompress(made.message, tree)
    if compressor.lossless:
        assert made.remainder == ()
        chex.assert_trees_all_equal(sent, tree)
        return
    chex.assert_trees_all_equal_shapes_and_dtypes(sent, made.remainder, tree)
    chex.assert_trees_all_equal(
        jax.tree.map(jnp.add, sent, made.remainder), jax.tree.map(jnp.add, tree, residual)
    )
    kept = sum(int(jnp.count_nonzero(x)) for x in jax.tree.leaves(sent))
    assert kept == {"tensor": 25, "approximate": 25, "tree": 23, "everything": 233}[name]
    assert not any(
        np.any((x != 0) & (y != 0))
        for x, y in zip(jax.tree.leaves(sent), jax.tree.leaves(made.remainder), strict=True)
    )


@pytest.mark.parametrize("scope", ["tensor", "tree"])
def test_memory_is_carried_for_every_vector(scope, monkeypatch):
    """One threshold for each vector, set by the first message; exact selections keep nothing."""
    monkeypatch.setattr("sasg_jax.selection._MIN_PRUNED_SIZE", 20)
    tree = {"long": 10 * _tree()["matrix"], "also": _tree()["vector"]}
    exact = sasg_jax.top_k(0.1, scope=scope)
    assert not jax.tree.leaves(jax.eval_shape(exact.compress, tree).memory)
    compressor = sasg_jax.top_k(0.1, scope=scope, selection="approximate")
    assert compressor.init_memory(tree) == ((0, 0) if scope == "tensor" else (0,))
    compress = jax.jit(compressor.compress)
    first = compress(tree, compressor.init_memory(tree))
    assert len(set(map(float, first.memory))) == len(first.memory)
    assert all(threshold > 0 for threshold in first.memory)
    again = compress(tree, first.memory)
    assert any(map(np.not_equal, again.memory, first.memory))


@pytest.mark.parametrize(
    ("size", "density", "k"),
    [
        (100, 0.29, 28),  # 0.29 * 100 is 28.999999999999996
        (100, 0.01, 1),
        (99, 0.01, 1),
        (1, 0.01, 1),
        (10, 0.5, 5),
        (11, 0.5, 5),
        (7, 1, 7),
        (7, 1.0, 7),
    ],
)
def test_exactly_k_entries(size, density, k):
    x = jnp.asarray(np.random.default_rng(size).permutation(size) + 1.0, jnp.float32)
    compressor = sasg_jax.top_k(density)
    message, remainder, _ = jax.jit(compressor.compress)(x)
    chex.assert_shape(jax.tree.leaves(message), (k,))
    kept = np.asarray(jax.jit(compressor.decompress)(message, x))
    # The largest k of 1..size, at their places.
    np.testing.assert_array_equal(kept, np.where(x > size - k, x, 0))
    np.testing.assert_array_equal(remainder, np.where(x > size - k, 0, x))


def test_k_of_the_papers_model():
    """MNIST-FC at 1 %: 4,071 of 407,050 values, 32 bits each."""
    shapes = [(784, 512), (512,), (512, 10), (10,)]
    tree = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    assert _size(tree) == 407_050
    assert sasg_jax.top_k(0.01).message_size(tree).paper_bits == 32 * (4014 + 5 + 51 + 1)
    assert sasg_jax.top_k(0.01, scope="tree").message_size(tree).paper_bits == 32 * 4070


def test_ties_and_signs():
    x = jnp.array([1.0, -2.0, 2.0, -2.0, 0.0, 2.0])
    (message,), _, _ = sasg_jax.top_k(0.5).compress(x)
    assert sorted(message.indices.tolist()) == [1, 2, 3]
    (zeros,), _, _ = sasg_jax.top_k(0.5).compress(jnp.zeros(6))
    assert sorted(zeros.indices.tolist()) == [0, 1, 2]
    np.testing.assert_array_equal(zeros.values, np.zeros(3))


def test_scopes_differ_as_they_should():
    """One scope keeps something of every tensor, the other only the largest of all."""
    tree = {"large": jnp.array([5.0, 4.0, 3.0, 2.0]), "small": jnp.array([0.1, 0.2, 0.3, 0.4])}
    _, remainder, _ = sasg_jax.top_k(0.5).compress(tree)
    chex.assert_trees_all_equal(
        remainder, {"large": jnp.array([0.0, 0, 3, 2]), "small": jnp.array([0.1, 0.2, 0, 0])}
    )
    _, remainder, _ = sasg_jax.top_k(0.5, scope="tree").compress(tree)
    chex.assert_trees_all_equal(remainder, {"large": jnp.zeros(4), "small": tree["small"]})


@pytest.mark.parametrize("density", [0.01, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("distribution", ["normal", "constant", "heavy"])
def test_lemma_1(distribution, density):
    """||x - C(x)||^2 <= (1 - k/d) ||x||^2; for a constant vector it is an equality."""
    size = 203
    x = {
        "normal": np.random.default_rng(1).normal(size=size),
        "constant": np.full(size, -2.0),
        "heavy": np.random.default_rng(2).standard_cauchy(size=size),
    }[distribution].astype(np.float32)
    _, remainder, _ = sasg_jax.top_k(density).compress(jnp.asarray(x))
    left_out = np.sum(np.square(np.asarray(remainder, np.float64)))
    bound = (1 - max(1, math.floor(density * size)) / size) * np.sum(np.square(x, dtype=np.float64))
    assert left_out <= bound * (1 + 1e-12)
    if distribution == "constant":
        np.testing.assert_allclose(left_out, bound, rtol=1e-12)


@pytest.mark.parametrize("scope", ["tensor", "tree"])
def test_density_one_is_the_identity(scope):
    tree = _tree()
    compressor = sasg_jax.top_k(1, scope=scope)
    message, remainder, _ = jax.jit(compressor.compress)(tree)
    chex.assert_trees_all_equal(jax.jit(compressor.decompress)(message, tree), tree)
    chex.assert_trees_all_equal(remainder, jax.tree.map(jnp.zeros_like, tree))


@pytest.mark.parametrize("selection", ["auto", "lax", "pruned"])
def test_selection_does_not_change_the_message(selection):
    tree = _tree(seed=3)
    want = jax.jit(sasg_jax.top_k(0.05, selection="lax").compress)(tree).remainder
    got = jax.jit(sasg_jax.top_k(0.05, selection=selection).compress)(tree).remainder
    chex.assert_trees_all_equal(got, want)


# Sums of messages ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMPRESSORS)
def test_sum_of_messages_goes_in_order_bit_for_bit(name):
    compressor = COMPRESSORS[name]
    trees = [_tree(seed=seed) for seed in range(5)]
    compress, decompress = jax.jit(compressor.compress), jax.jit(compressor.decompress)
    messages = [compress(tree).message for tree in trees]
    decoded = [decompress(message, trees[0]) for message in messages]
    total = decoded[0]
    for tree in decoded[1:]:
        total = jax.tree.map(jnp.add, total, tree)
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *messages)
    got = jax.jit(compressor.decompress_sum)(stacked, trees[0])
    chex.assert_trees_all_equal(got, total)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_half_precision_is_summed_in_float32(name):
    """256 + 1 + 1 + 2 is 260 in float32; in bfloat16 every 1 is rounded away."""
    compressor = COMPRESSORS[name]
    like = jnp.zeros((1,), jnp.bfloat16)
    messages = [compressor.compress(jnp.full(1, v, jnp.bfloat16))[0] for v in (256, 1, 1, 2)]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *messages)
    total = jax.jit(compressor.decompress_sum)(stacked, like)
    chex.assert_type(total, jnp.bfloat16)
    assert total.tolist() == [260.0]


def test_mixed_dtypes():
    tree = {"half": jnp.ones(4, jnp.bfloat16) * 3, "single": jnp.full(4, 1 / 3, jnp.float32)}
    for compressor in COMPRESSORS.values():
        message, remainder, _ = jax.jit(compressor.compress)(tree)
        decoded = jax.jit(compressor.decompress)(message, tree)
        chex.assert_trees_all_equal_shapes_and_dtypes(decoded, remainder, tree)
        chex.assert_trees_all_equal(jax.tree.map(jnp.add, decoded, remainder), tree)


# What a message weighs ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", COMPRESSORS)
def test_message_size_is_what_the_arrays_hold(name, dtype):
    compressor, tree = COMPRESSORS[name], _tree(dtype)
    message = jax.eval_shape(compressor.compress, tree).message
    assert compressor.message_size(tree).bytes == sum(
        x.size * x.dtype.itemsize for x in jax.tree.leaves(message)
    )
    shapes = jax.eval_shape(lambda: tree)
    assert compressor.message_size(shapes) == compressor.message_size(tree)


def test_paper_bits_count_values_only():
    tree = _tree()
    values = {"identity": 233, "everything": 233, "tensor": 20 + 1 + 1 + 3, "tree": 23}
    values["approximate"] = values["tensor"]
    for name, compressor in COMPRESSORS.items():
        assert compressor.message_size(tree).paper_bits == 32 * values[name]
    # Of half-precision values too: that is the convention.
    assert COMPRESSORS["tree"].message_size(_tree(jnp.bfloat16)).paper_bits == 32 * 23


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        (256, jnp.uint8),
        (257, jnp.uint16),
        (65_536, jnp.uint16),
        (65_537, jnp.uint32),
    ],
)
def test_index_type_fits_the_tensor(size, dtype):
    """The last entry of the largest tensor of each index type comes back to its place."""
    x = jnp.zeros(size).at[-1].set(-7.0)
    compressor = sasg_jax.top_k(1e-6, selection="lax")
    message = jax.jit(compressor.compress)(x).message
    chex.assert_type(message[0].indices, dtype)
    assert compressor.message_size(x).bytes == 4 + jnp.dtype(dtype).itemsize
    np.testing.assert_array_equal(jax.jit(compressor.decompress)(message, x), x)


def test_only_identity_is_lossless():
    assert [c.lossless for c in COMPRESSORS.values()] == [True, False, False, False, False]


# Bad arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "density", [0, -1, 1.5, math.nan, math.inf, True, "0.1", None, np.zeros(2)], ids=repr
)
def test_density_outside_its_range(density):
    with pytest.raises(ValueError, match=r"^Expected density=.* in \(0, 1\]\.$"):
        sasg_jax.top_k(density)


def test_bad_choices():
    with pytest.raises(ValueError, match=r"scope='layer' to be one of 'tensor', 'tree'\.$"):
        sasg_jax.top_k(0.1, scope="layer")
    with pytest.raises(ValueError, match=r"selection='sort' to be one of 'auto', 'lax', 'pruned'"):
        sasg_jax.top_k(0.1, selection="sort")
