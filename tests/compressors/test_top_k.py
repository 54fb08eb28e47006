"""Which entries a message keeps, and how they are written."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sasg_jax


def _tree(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"matrix": (8, 25), "one": (1,), "scalar": (), "vector": (31,)}
    return {k: jnp.asarray(rng.normal(size=shape), jnp.float32) for k, shape in shapes.items()}


_top_k = functools.cache(sasg_jax.top_k)


@functools.cache
def _jitted(compressor):
    return jax.jit(compressor.compress)


def _compress(compressor, tree, memory=None):
    memory = compressor.init_memory(tree) if memory is None else memory
    return _jitted(compressor)(tree, memory, None)


def test_memory_is_carried_for_every_vector(monkeypatch):
    """One threshold for each vector, set by the first message; exact selections keep nothing."""
    monkeypatch.setattr("sasg_jax.selection._MIN_PRUNED_SIZE", 20)
    tree = {"long": 10 * _tree()["matrix"], "also": _tree()["vector"]}
    exact = sasg_jax.top_k(0.1)
    shapes = jax.eval_shape(exact.compress, tree, exact.init_memory(tree), None)
    assert not jax.tree.leaves(shapes.memory)
    of_tree = sasg_jax.top_k(0.1, scope="tree", selection="approximate")
    assert of_tree.init_memory(tree) == (0,)
    compressor = sasg_jax.top_k(0.1, selection="approximate")
    assert compressor.init_memory(tree) == (0, 0)
    first = _compress(compressor, tree)
    assert len(set(map(float, first.memory))) == 2
    assert all(threshold > 0 for threshold in first.memory)
    again = _compress(compressor, tree, first.memory)
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
    message, remainder, _ = _compress(compressor, x)
    chex.assert_shape(jax.tree.leaves(message), (k,))
    kept = np.zeros(size)
    kept[np.asarray(message[0].indices)] = message[0].values
    # The largest k of 1..size, at their places.
    np.testing.assert_array_equal(kept, np.where(x > size - k, x, 0))
    np.testing.assert_array_equal(remainder, np.where(x > size - k, 0, x))


def test_k_of_the_papers_model():
    """MNIST-FC at 1 %: 4,071 of 407,050 values, 32 bits each."""
    shapes = [(784, 512), (512,), (512, 10), (10,)]
    tree = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    assert sum(math.prod(shape) for shape in shapes) == 407_050
    assert sasg_jax.top_k(0.01).message_size(tree).paper_bits == 32 * (4014 + 5 + 51 + 1)
    assert sasg_jax.top_k(0.01, scope="tree").message_size(tree).paper_bits == 32 * 4070


def test_ties_and_signs():
    x = jnp.array([1.0, -2.0, 2.0, -2.0, 0.0, 2.0])
    (message,), _, _ = _compress(sasg_jax.top_k(0.5), x)
    assert sorted(message.indices.tolist()) == [1, 2, 3]
    (zeros,), _, _ = _compress(sasg_jax.top_k(0.5), jnp.zeros(6))
    assert sorted(zeros.indices.tolist()) == [0, 1, 2]
    np.testing.assert_array_equal(zeros.values, np.zeros(3))


def test_scopes_differ_as_they_should():
    """One scope keeps something of every tensor, the other only the largest of all."""
    tree = {"large": jnp.array([5.0, 4.0, 3.0, 2.0]), "small": jnp.array([0.1, 0.2, 0.3, 0.4])}
    _, remainder, _ = _compress(sasg_jax.top_k(0.5), tree)
    chex.assert_trees_all_equal(
        remainder, {"large": jnp.array([0.0, 0, 3, 2]), "small": jnp.array([0.1, 0.2, 0, 0])}
    )
    _, remainder, _ = _compress(sasg_jax.top_k(0.5, scope="tree"), tree)
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
    _, remainder, _ = _compress(_top_k(density), jnp.asarray(x))
    left_out = np.sum(np.square(np.asarray(remainder, np.float64)))
    bound = (1 - max(1, math.floor(density * size)) / size) * np.sum(np.square(x, dtype=np.float64))
    assert left_out <= bound * (1 + 1e-12)
    if distribution == "constant":
        np.testing.assert_allclose(left_out, bound, rtol=1e-12)


@pytest.mark.parametrize("scope", ["tensor", "tree"])
def test_density_one_is_the_identity(scope):
    tree = _tree()
    compressor = sasg_jax.top_k(1, scope=scope)
    message, remainder, _ = _compress(compressor, tree)
    chex.assert_trees_all_equal(jax.jit(compressor.decompress)(message, tree), tree)
    chex.assert_trees_all_equal(remainder, jax.tree.map(jnp.zeros_like, tree))


def test_selection_does_not_change_the_message():
    tree = _tree(seed=3)
    want = _compress(sasg_jax.top_k(0.05, selection="lax"), tree).remainder
    got = _compress(sasg_jax.top_k(0.05, selection="pruned"), tree).remainder
    chex.assert_trees_all_equal(got, want)


# How entries are written --------------------------------------------------------------------------


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
    message = _compress(compressor, x).message
    chex.assert_type(message[0].indices, dtype)
    assert compressor.message_size(x).bytes == 4 + jnp.dtype(dtype).itemsize
    np.testing.assert_array_equal(jax.jit(compressor.decompress)(message, x), x)


def test_says_what_it_is():
    compressor = sasg_jax.top_k(0.1)
    is_said = [compressor.exact, compressor.unbiased, compressor.linear, compressor.random]
    assert is_said == [False] * 4
    assert sasg_jax.top_k(0.01).name == "top_k(0.01)"
    named = sasg_jax.top_k(1, scope="tree", selection="approximate")
    assert named.name == "top_k(1.0, scope='tree', selection='approximate')"
    # The exact selections send the same.
    assert sasg_jax.top_k(0.1, selection="lax").name == sasg_jax.top_k(0.1).name


@pytest.mark.parametrize("scope", ["tensor", "tree"])
def test_a_tree_without_arrays(scope):
    """As optax.masked leaves it where nothing is selected."""
    compressor = sasg_jax.top_k(0.1, scope=scope)
    message, remainder, memory = compressor.compress({"a": ()}, (), None)
    assert (message, remainder, memory) == ((), {"a": ()}, ())
    assert compressor.decompress((), {"a": ()}) == {"a": ()}
    assert compressor.message_size({"a": ()}) == (0, 0)


def test_indices_of_large_tensors_without_making_them():
    """Up to what a params tensor may have, 2**31 - 1 entries."""
    shape = jax.ShapeDtypeStruct((2**31 - 1,), jnp.bfloat16)
    k = math.floor(1e-6 * (2**31 - 1))
    assert sasg_jax.top_k(1e-6).message_size(shape) == (k * (2 + 4), 32 * k)


def test_tree_of_too_many_entries():
    """Their indices would not fit; tensor by tensor they do."""
    params = {"a": (jax.ShapeDtypeStruct((2**30, 1), jnp.bfloat16),) * 2}
    compressor = sasg_jax.top_k(1e-6, scope="tree")
    with pytest.raises(
        ValueError, match=r"scope='tree'\): params\['a'\]\[1\] takes them to 2147483648"
    ):
        compressor.message_size(params)
    params["a"] = (params["a"][0], jax.ShapeDtypeStruct((2**30 - 1,), jnp.bfloat16))
    assert compressor.message_size(params).paper_bits == 32 * 2147
    assert sasg_jax.top_k(1e-6).message_size((params["a"][0],) * 4).paper_bits == 32 * 4 * 1073


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
    names = r"'auto', 'lax', 'pruned', 'approximate'\.$"
    with pytest.raises(ValueError, match=rf"selection='sort' to be one of {names}"):
        sasg_jax.top_k(0.1, selection="sort")


# Coded --------------------------------------------------------------------------------------------

LONG = {"a": (16, 25), "b": (31,), "c": (700,)}
CODED = [
    sasg_jax.top_k(0.2, scope=scope, selection=selection, values=values, indices=indices)
    for scope, selection, values, indices in (
        ("tensor", "auto", "sign", "elias_fano"),
        ("tree", "auto", "sign4", "elias_fano"),
        ("tree", "approximate", "bfloat16", "tiled"),
        ("tensor", "lax", "plain", "bitmap"),
        ("tensor", "auto", sasg_jax.coders.signs(2, block=8), "fixed"),
    )
]


def _long(dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.standard_t(3, shape), dtype) for name, shape in LONG.items()}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("compressor", CODED, ids=lambda x: x.name)
def test_what_is_decoded_is_what_the_remainder_lacks(compressor, dtype):
    """Bit for bit, of as many entries as without a code, and in fewer bytes."""
    tree = _long(dtype)
    message, remainder, _ = _compress(compressor, tree)
    received = jax.jit(compressor.decompress)(message, tree)
    chex.assert_trees_all_equal(remainder, jax.tree.map(jnp.subtract, tree, received))
    plain = sasg_jax.top_k(0.2, scope="tree" if "scope" in compressor.name else "tensor")
    kept = sum(int(np.count_nonzero(x)) for x in received.values())
    assert kept == plain.message_size(tree).paper_bits // 32
    assert compressor.message_size(tree).paper_bits == plain.message_size(tree).paper_bits
    size = sum(x.nbytes for x in jax.tree.leaves(message))
    assert size == compressor.message_size(tree).bytes < plain.message_size(tree).bytes


def test_values_of_short_vectors_are_written_as_they_are():
    """A sign and its magnitude would take more."""
    compressor = sasg_jax.top_k(0.1, values="sign")
    (message,), remainder, _ = _compress(compressor, jnp.asarray([3.0, -1, 2, 7]))
    assert message.values.tolist() == [7]
    assert remainder.tolist() == [3, -1, 2, 0]
    two = sasg_jax.top_k(0.5, values="sign").message_shapes(jnp.zeros(4))[0].values
    assert two.signs.shape == (1,)


@pytest.mark.parametrize("compressor", CODED, ids=lambda x: x.name)
def test_any_bytes_decode_to_numbers(compressor):
    """Ten thousand messages that nobody has written: never NaN, and infinite only where an index
    comes twice. One of zeros decodes to zeros."""
    tree = _long()
    shapes = compressor.message_shapes(tree)
    rng = np.random.default_rng(1)

    def random(s):
        octets = rng.bytes(10_000 * s.size * s.dtype.itemsize)
        return jnp.asarray(np.frombuffer(octets, s.dtype).reshape(10_000, *s.shape))

    def look(message):
        received = jax.tree.leaves(compressor.decompress(message, tree))
        count = lambda fn: sum(jnp.sum(fn(x)) for x in received)
        return count(jnp.isnan), count(jnp.isinf)

    nans, infinite = jax.jit(lambda rows: jax.lax.map(look, rows))(jax.tree.map(random, shapes))
    assert nans.shape == (10_000,)
    assert not nans.any()
    assert np.mean(infinite) < 5
    nothing = compressor.decompress(compressor.zero_message(tree), tree)
    assert not any(np.any(x) for x in nothing.values())


def test_a_message_that_was_cut_short_is_refused():
    tree = _long()
    message = _compress(CODED[0], tree).message
    first = message[0]._replace(indices=jax.tree.map(lambda x: x[:-1], message[0].indices))
    with pytest.raises(ValueError, match=r"^Expected message\[0\]\.indices\[0\] to have its shape"):
        CODED[0].decompress((first, *message[1:]), tree)
    with pytest.raises(ValueError, match=r"^Expected message to have the structure of a message"):
        CODED[0].decompress(message[:-1], tree)
    half = jax.tree.map(lambda x: x.astype(jnp.float16), _compress(_top_k(0.2), tree).message)
    with pytest.raises(ValueError, match=r"^Expected message of dtypes=.* to be of .*float32"):
        _top_k(0.2).decompress(half, tree)
