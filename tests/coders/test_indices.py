"""Coders of indices: what is written, its size, and that it comes back."""

import functools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import sasg_jax
from sasg_jax.coders import INDEX_CODERS, elias_fano, tiled
from sasg_jax.coders.indices import _elias_fano

LARGEST = 2**31 - 1
CODERS = {**INDEX_CODERS, "always elias_fano": _elias_fano(), "tiled(16)": tiled(16)}
# k and n: one, all, no multiples of anything, few of very many.
SHAPES = [(1, 1), (1, 2), (2, 2), (1, 1000), (999, 1000), (1000, 1000), (7, 11), (33, 257)]
SHAPES += [(5, 512), (51, 5120), (300, 1000), (501, 1000), (260, 65_537), (1300, 131_071)]
HUGE = [(1, LARGEST), (100, LARGEST), (1000, 2**30 + 1)]


@functools.cache
def _jitted(name):
    coder = CODERS[name]
    encode = jax.jit(coder.encode, static_argnums=1)
    return encode, jax.jit(coder.decode, static_argnums=(1, 2))


def _size(code):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(code))


def _subset(kept, size, kind, seed=0):
    """Ascending: all over the vector, in one cluster, or at either end."""
    rng = np.random.default_rng(seed)
    if kind == "spread" and size < 2**20:
        return np.sort(rng.choice(size, kept, replace=False))
    if kind == "spread":
        step = size // kept
        return np.arange(kept) * step + rng.integers(0, step, kept)
    start = {"first": 0, "last": size - kept, "cluster": rng.integers(0, size - kept + 1)}[kind]
    return np.arange(kept) + start


def _check(name, indices, size):
    encode, decode = _jitted(name)
    code = encode(jnp.asarray(indices, jnp.int32), size)
    np.testing.assert_array_equal(decode(code, len(indices), size), indices)
    return code


@pytest.mark.parametrize("name", CODERS)
@pytest.mark.parametrize(("kept", "size"), SHAPES)
@pytest.mark.parametrize("kind", ["spread", "cluster", "first", "last"])
def test_comes_back(name, kept, size, kind):
    _check(name, _subset(kept, size, kind), size)


@pytest.mark.parametrize("name", ["plain", "fixed", "elias_fano"])
@pytest.mark.parametrize(("kept", "size"), HUGE)
@pytest.mark.parametrize("kind", ["spread", "first", "last"])
def test_vectors_of_up_to_two_to_the_31(name, kept, size, kind):
    _check(name, _subset(kept, size, kind), size)


@st.composite
def _cases(draw):
    """A vector, and some of its entries: of few shapes, since each is compiled."""
    kept, size = draw(st.sampled_from([shape for shape in SHAPES if shape[0] < shape[1]]))
    kind = draw(st.sampled_from(["spread", "cluster", "first", "last", "runs"]))
    seed = draw(st.integers(0, 2**32 - 1))
    if kind != "runs":
        return _subset(kept, size, kind, seed), size
    weights = np.repeat(np.random.default_rng(seed).pareto(1, -(-size // 16)) + 1e-9, 16)[:size]
    keys = np.random.default_rng(seed + 1).exponential(size=size) / weights
    return np.sort(np.argpartition(keys, kept - 1)[:kept]), size


@hypothesis.given(_cases())
@hypothesis.settings(max_examples=300, deadline=None)
def test_random_cases(case):
    for name in ("elias_fano", "always elias_fano", "tiled", "bitmap"):
        _check(name, *case)


@pytest.mark.slow
@hypothesis.given(_cases())
@hypothesis.settings(max_examples=10_000, deadline=None)
def test_ten_thousand_random_cases(case):
    for name in ("elias_fano", "always elias_fano"):
        _check(name, *case)


# Sizes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CODERS)
@pytest.mark.parametrize(("kept", "size"), SHAPES)
def test_size_is_what_it_says(name, kept, size):
    """In bits; each array of a code is rounded up to whole bytes."""
    code = _jitted(name)[0](jnp.asarray(_subset(kept, size, "spread"), jnp.int32), size)
    arrays = len(jax.tree.leaves(code))
    num_bits = CODERS[name].num_bits(kept, size)
    assert 0 <= 8 * _size(code) - num_bits < 8 * max(arrays, 1)


@pytest.mark.parametrize(("kept", "size"), [*SHAPES, *HUGE])
def test_elias_fano_is_as_long_as_the_formula(kept, size):
    low = math.floor(math.log2(size / kept))
    num_bits = _elias_fano().num_bits(kept, size)
    assert num_bits == kept * low + kept + (size - 1) // 2**low
    assert num_bits <= kept * low + kept + size / 2**low


def test_elias_fano_at_one_percent():
    """8.56 bits an entry, where its entropy is 8.08; at a thousandth 11.95 and 11.40."""
    size = 10**7
    for density, ours, entropy in ((0.01, 8.56, 8.08), (0.001, 11.95, 11.40)):
        kept = round(density * size)
        assert elias_fano().num_bits(kept, size) / kept == pytest.approx(ours, abs=0.01)
        p = density
        bits = -(p * math.log2(p) + (1 - p) * math.log2(1 - p)) / p
        assert bits == pytest.approx(entropy, abs=0.01)


def test_the_shortest_is_chosen():
    """Of few entries of a short vector fixed width, of most a bitmap, of all nothing."""
    num_bits = elias_fano().num_bits
    assert num_bits(1, 2) == 1
    assert num_bits(1, 512) == 9
    assert num_bits(500, 1000) == 1000
    assert num_bits(1000, 1000) == 0
    for kept, size in [*SHAPES, *HUGE]:
        others = [INDEX_CODERS[x].num_bits(kept, size) for x in ("plain", "fixed", "bitmap")]
        assert num_bits(kept, size) <= min(others)
    assert num_bits(4070, 407_050) < INDEX_CODERS["tiled"].num_bits(4070, 407_050)


def _elias_fano_by_hand(indices, size):
    """As text: lowest bits of each, one after another; then each high part in unary, as zeros for
    how much larger it is than the last and a one."""
    low = int(math.log2(size / len(indices)))
    lows = "".join(f"{i % 2**low:0{low}b}"[::-1] if low else "" for i in indices)
    highs, last = "", 0
    for i in indices:
        highs += "0" * (i // 2**low - last) + "1"
        last = i // 2**low
    highs += "0" * ((size - 1) // 2**low - last)
    as_bytes = lambda text: bytes(int(text[i : i + 8][::-1], 2) for i in range(0, len(text), 8))
    return as_bytes(lows), as_bytes(highs)


@pytest.mark.parametrize(("kept", "size"), [(3, 10), (4, 64), (7, 11), (33, 257), (51, 5120)])
def test_elias_fano_against_a_loop(kept, size):
    indices = _subset(kept, size, "spread", seed=kept)
    code = _jitted("always elias_fano")[0](jnp.asarray(indices, jnp.int32), size)
    assert tuple(bytes(np.asarray(x)) for x in code) == _elias_fano_by_hand(indices, size)


# Under transformations ----------------------------------------------------------------------------


def test_under_vmap_scan_and_shard_map():
    kept, size, rows = 51, 5120, 4
    many = jnp.asarray([_subset(kept, size, "spread", seed) for seed in range(rows)], jnp.int32)
    coder = elias_fano()
    around = lambda indices: coder.decode(coder.encode(indices, size), kept, size)
    np.testing.assert_array_equal(jax.jit(jax.vmap(around))(many), many)
    np.testing.assert_array_equal(jax.lax.map(around, many), many)
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("workers",))
    spec = PartitionSpec("workers")
    each = lambda block: jax.vmap(around)(block)
    shard_map = jax.shard_map(each, mesh=mesh, in_specs=spec, out_specs=spec)
    np.testing.assert_array_equal(jax.jit(shard_map)(many), many)


# What encode has not written ----------------------------------------------------------------------


@pytest.mark.parametrize("name", CODERS)
@pytest.mark.parametrize(("kept", "size"), [(1, 2), (7, 11), (33, 257), (300, 1000)])
def test_random_bytes_decode_to_indices_in_range(name, kept, size):
    encode, decode = _jitted(name)
    shapes = jax.eval_shape(lambda x: encode(x, size), jnp.zeros(kept, jnp.int32))
    rng = np.random.default_rng(kept)
    for _ in range(100):
        octets = lambda s: rng.integers(0, np.iinfo(s.dtype).max, s.shape, s.dtype, endpoint=True)
        indices = np.asarray(decode(jax.tree.map(octets, shapes), kept, size))
        assert indices.shape == (kept,)
        assert ((indices >= 0) & (indices < size)).all()
    for fill in (0, 255):
        full = jax.tree.map(lambda s, x=fill: jnp.full(s.shape, x).astype(s.dtype), shapes)
        indices = np.asarray(decode(full, kept, size))
        assert ((indices >= 0) & (indices < size)).all()


@pytest.mark.parametrize("tile", [0, 1, 3, 1000, True, "16"])
def test_tiles_are_powers_of_two(tile):
    with pytest.raises(ValueError, match=r"^Expected tile="):
        tiled(tile)


def test_unknown_coder():
    why = r"^Expected indices='rice' to be one of 'plain', 'fixed', 'tiled', 'bitmap', 'elias_fano'"
    with pytest.raises(ValueError, match=why + ", or of type IndexCoder"):
        sasg_jax.top_k(0.1, indices="rice")
