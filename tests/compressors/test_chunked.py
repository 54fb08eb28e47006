"""Which entries of every tile a message keeps, also of its cosine transform."""

import functools
import math

import by_hand
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sasg_jax

TILE = 8
SHAPES = {
    "convolution": (3, 2, 5, 9),
    "matrix": (19, 24),
    "one": (1,),
    "row": (1, 30),
    "scalar": (),
    "vector": (131,),
}
# What a tile is: of axes with a divisor between half of the longest side and that, and without.
SIDES = {
    "convolution": (6, 5),  # of 30 and 9: 5 + 4
    "matrix": (7, 8),  # of 19: 7 + 7 + 5
    "one": (1, 1),
    "row": (1, 6),
    "scalar": (1, 1),
    "vector": (6, 8),  # 17 rows, of which the last has three entries: 6 + 6 + 5
}
ENTRIES = {name: math.prod(sides) for name, sides in SIDES.items()}


def _tree(dtype=jnp.float32, seed=0, names=tuple(SHAPES)):
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.standard_t(3, SHAPES[k]), dtype) for k in names}


def _made(density, **how):
    return sasg_jax.chunked_top_k(density, tile=TILE, **how)


@functools.cache
def _jitted(compressor):
    return jax.jit(lambda tree: compressor.compress(tree, (), None)), jax.jit(compressor.decompress)


# The choice ---------------------------------------------------------------------------------------


def _num_tiles(name):
    shape = by_hand.as_matrix(np.zeros(SHAPES[name]), SIDES[name][1]).shape
    return len(list(by_hand.places(shape, SIDES[name])))


@pytest.mark.parametrize("dct", [False, True], ids=["entries", "dct"])
def test_the_largest_of_every_tile(dct):
    tree = _tree()
    compress, decompress = _jitted(_made(0.1, transform="dct" if dct else None))
    message, remainder, memory = compress(tree)
    assert memory == ()
    got = decompress(message, tree)
    for name, x in tree.items():
        x = np.asarray(x)
        kept = by_hand.tiles_of(x, SIDES[name], 0.1, dct)
        want = by_hand.from_tiles(kept, x, SIDES[name], dct)
        np.testing.assert_allclose(got[name], want, atol=1e-5 if dct else 0, err_msg=name)
        np.testing.assert_allclose(remainder[name], x - want, atol=1e-5 if dct else 0)


def test_as_many_in_every_tile():
    """And the size of a message says so."""
    tree = _tree()
    count = {name: _num_tiles(name) for name in SHAPES}
    kept = {name: max(1, math.floor(0.1 * ENTRIES[name])) for name in SHAPES}
    values = [count[name] * kept[name] for name in SHAPES]
    message = _jitted(_made(0.1))[0](tree).message
    assert [x.values.size for x in message] == [x.indices.size for x in message] == values
    for name, part in zip(SHAPES, message, strict=True):
        tiles, counts = np.unique(np.asarray(part.indices) // ENTRIES[name], return_counts=True)
        assert tiles.tolist() == list(range(count[name]))
        assert set(counts.tolist()) == {kept[name]}
    assert _made(0.1).message_size(tree).paper_bits == 32 * sum(values)


def test_the_authors_tiles():
    """64 of 64 by 64 entries, or of 4,096 in succession, in 12 bits each and some for counts."""
    compressor = sasg_jax.chunked_top_k(1 / 64, values="sign2", indices="tiled")
    matrix, vector = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((256, 128), (8 * 4096,)))
    for leaf in (matrix, vector):
        size = compressor.message_size(leaf)
        assert size.paper_bits == 32 * 64 * 8
        entries, magnitudes, counts = 64 * 8, 2 * 4, math.ceil(8 * 10 / 8)
        assert size.bytes == entries * 14 // 8 + magnitudes + counts
    x = np.zeros((256, 128), np.float32)
    x[:64, :64], x[200, 100] = 2, 1
    remainder = _jitted(sasg_jax.chunked_top_k(1 / 64))[0](jnp.asarray(x)).remainder
    assert remainder[0, :64].tolist() == [0] * 64  # of equal ones the first
    assert remainder[1:64, :64].min() == 2
    assert remainder[200, 100] == 0


def test_what_is_padded_is_chosen_last():
    """Also where a tile has nothing but zeros: those of the tensor go first, in any place."""
    x = jnp.zeros((6, 9)).at[-1, -1].set(3.0)  # tiles of 6 by 5, the last column of it padded
    message, remainder, _ = _jitted(_made(0.8))[0](x)
    first, second = np.asarray(message[0].indices).reshape(2, -1)  # 24 of 30
    assert first.tolist() == list(range(24))
    assert second.tolist() == [30 + i for i in range(30) if i % 5 < 4]
    assert not remainder.any()


# What is decoded ----------------------------------------------------------------------------------

CODED = [
    _made(0.2, values=values, indices=indices, magnitudes=magnitudes, transform=transform)
    for values, indices, magnitudes, transform in (
        ("plain", "plain", "tensor", None),
        ("sign2", "tiled", "tensor", None),
        ("sign4", "elias_fano", "tile", None),
        ("bfloat16", "fixed", "tile", "dct"),
        ("sign2", "tiled", "tile", "dct"),
        ("plain", "bitmap", "tensor", "dct"),
    )
]


FEW = "convolution", "scalar", "vector"  # soon compiled


def _each(*values):
    return pytest.mark.parametrize(*values, ids=lambda x: getattr(x, "name", x))


@_each("dtype", ["float32", "bfloat16", "float16"])
@_each("compressor", CODED)
def test_what_is_decoded_is_what_the_remainder_lacks(compressor, dtype):
    """Bit for bit."""
    tree = _tree(jnp.dtype(dtype), names=FEW)
    compress, decompress = _jitted(compressor)
    message, remainder, _ = compress(tree)
    received = decompress(message, tree)
    chex.assert_trees_all_equal(remainder, jax.tree.map(jnp.subtract, tree, received))
    chex.assert_trees_all_equal_shapes_and_dtypes(received, tree)
    assert sum(x.nbytes for x in jax.tree.leaves(message)) == compressor.message_size(tree).bytes


@_each("compressor", CODED)
def test_sum_of_messages_under_maps_and_loops(compressor):
    """As many as come, made and decoded one at a time, under vmap, or in a loop."""
    trees = [_tree(seed=seed, names=FEW) for seed in range(3)]
    compress, decompress = _jitted(compressor)
    made = [compress(tree) for tree in trees]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *trees)
    rows = jax.tree.map(lambda *xs: jnp.stack(xs), *[x.message for x in made])
    each = lambda tree: compressor.compress(tree, (), None)
    mapped = jax.jit(jax.vmap(each))(stacked)
    looped = jax.jit(lambda trees: jax.lax.map(each, trees))(stacked)
    remainders = jax.tree.map(lambda *xs: jnp.stack(xs), *[x.remainder for x in made])
    for got in (mapped, looped):
        chex.assert_trees_all_close(got.remainder, remainders, atol=1e-5)
    total = jax.jit(compressor.decompress_sum)(rows, trees[0], None)
    alone = [decompress(x.message, trees[0]) for x in made]
    chex.assert_trees_all_close(total, jax.tree.map(lambda *xs: sum(xs), *alone), atol=1e-5)


@_each("compressor", CODED)
def test_any_bytes_decode_to_numbers(compressor):
    """Two thousand messages that nobody has written: never NaN, and infinite only where an index
    comes twice; of frequencies never. One of zeros decodes to zeros."""
    tree = _tree(names=FEW)
    shapes = compressor.message_shapes(tree)
    rng, count = np.random.default_rng(1), 2000

    def random(s):
        octets = rng.bytes(count * s.size * s.dtype.itemsize)
        return jnp.asarray(np.frombuffer(octets, s.dtype).reshape(count, *s.shape))

    def look(message):
        received = jax.tree.leaves(compressor.decompress(message, tree))
        counted = lambda fn: sum(jnp.sum(fn(x)) for x in received)
        return counted(jnp.isnan), counted(jnp.isinf)

    nans, infinite = jax.jit(lambda rows: jax.lax.map(look, rows))(jax.tree.map(random, shapes))
    assert not nans.any()
    assert np.mean(infinite) < (1e-9 if "dct" in compressor.name else 5)
    nothing = compressor.decompress(compressor.zero_message(tree), tree)
    assert not any(np.any(x) for x in nothing.values())


def test_magnitudes_of_a_tile():
    """A tile of small entries beside one of large ones keeps its own size."""
    x = jnp.concatenate([jnp.full((8, 8), 100.0), jnp.full((8, 8), 0.5)], 1)
    received = {}
    for whose in ("tensor", "tile"):
        compressor = _made(0.5, values="sign", magnitudes=whose)
        compress, decompress = _jitted(compressor)
        received[whose] = np.asarray(decompress(compress(x).message, x))
    assert set(np.unique(received["tensor"])) == {0, 50.25}
    assert set(np.unique(received["tile"])) == {0, 0.5, 100}


def test_frequencies_that_do_not_fit_into_half_precision():
    """Of a tile of large entries the lowest frequency alone is eight times as large."""
    x = jnp.full((8, 8), 30_000.0, jnp.float16)
    compressor = _made(0.1, transform="dct")
    compress, decompress = _jitted(compressor)
    message, remainder, _ = compress(x)
    received = decompress(message, x)
    assert np.isfinite(received).all()
    np.testing.assert_allclose(received, 65504 / 8, rtol=1e-2)
    assert np.isfinite(remainder).all()
    chex.assert_trees_all_equal(remainder, x - received)
    spread = jnp.asarray(np.where(np.arange(64) % 2, -1, 1).reshape(8, 8) * 65504.0, jnp.float16)
    assert np.isfinite(compress(spread).remainder).all()


# Means over senders -------------------------------------------------------------------------------


@pytest.mark.parametrize("dct", [False, True], ids=["entries", "dct"])
def test_mean_over_senders(dct):
    """Of each entry, or of each frequency, those messages that have it."""
    compressor = _made(0.1, transform="dct" if dct else None)
    trees = [{"w": _tree(seed=seed)["matrix"][:8, :8]} for seed in range(4)]
    rows = [_jitted(compressor)[0](tree).message for tree in trees]
    rows = jax.tree.map(lambda *xs: jnp.stack(xs), *rows)
    got = jax.jit(compressor.mean_over_senders)(rows, trees[0])["w"]
    kept = [next(by_hand.tiles_of(np.asarray(x["w"]), (8, 8), 0.1, dct))[1] for x in trees]
    assert (np.count_nonzero(kept, axis=0) > 1).any()
    mean = by_hand.senders_mean(kept)
    want = by_hand.frequencies(mean, is_vector=False, inverse=True) if dct else mean
    np.testing.assert_allclose(got, want, atol=1e-5)


# Edges --------------------------------------------------------------------------------------------


def test_a_tree_without_arrays():
    compressor = _made(0.1)
    assert compressor.compress({"a": ()}, (), None) == ((), {"a": ()}, ())
    assert compressor.decompress((), {"a": ()}) == {"a": ()}
    assert compressor.message_size({"a": ()}) == (0, 0)


@pytest.mark.parametrize("density", [1e-6, 1.0])
def test_extremes(density):
    """One entry of every tile, and all."""
    tree = {"matrix": _tree()["matrix"], "scalar": _tree()["scalar"]}
    message, remainder, _ = _jitted(_made(density))[0](tree)
    assert (message[0].values.size, message[1].values.size) == ((9, 1) if density < 1 else (504, 1))
    assert remainder["scalar"] == 0
    if density == 1:
        assert not remainder["matrix"].any()


def test_a_message_that_was_cut_short_is_refused():
    tree = _tree()
    message = _jitted(CODED[0])[0](tree).message
    with pytest.raises(ValueError, match=r"^Expected message to have the structure of a message"):
        CODED[0].decompress(message[:-1], tree)


def test_says_what_it_is():
    assert sasg_jax.chunked_top_k(0.5).name == "chunked_top_k(0.5)"
    made = _made(0.5, transform="dct", values="sign2", indices="tiled", magnitudes="tile")
    how = "tile=8, transform='dct', values='sign2', indices='tiled', magnitudes='tile'"
    assert made.name == f"chunked_top_k(0.5, {how})"
    assert [made.exact, made.unbiased, made.linear, made.random] == [False] * 4


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"density": 0}, r"density=0 in \(0, 1\]"),
        ({"density": 2}, r"density=2 in \(0, 1\]"),
        ({"tile": 1}, "tile=1 to be an integer of at least 2"),
        ({"tile": 2048}, "tile=2048 to be an integer of at most 1024"),
        ({"tile": 8.0}, "tile=8.0 to be an integer"),
        ({"transform": "fft"}, "transform='fft' to be None or 'dct'"),
        ({"values": "int4"}, "values='int4' to be one of"),
        ({"indices": "runs"}, "indices='runs' to be one of"),
        ({"magnitudes": "row"}, "magnitudes='row' to be one of 'tensor', 'tile'"),
    ],
)
def test_bad_arguments(how, message):
    with pytest.raises(ValueError, match=f"^Expected {message}"):
        sasg_jax.chunked_top_k(**{"density": 0.1, **how})
