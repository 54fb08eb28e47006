"""Numbers of few bits, against Python's integers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sasg_jax import bits


def _written(numbers, width):
    """One after another, lowest bit first: as one long integer, in little-endian bytes."""
    whole = sum(int(x) << (width * i) for i, x in enumerate(numbers))
    return whole.to_bytes(-(-len(numbers) * width // 8), "little")


@pytest.mark.parametrize("width", range(33))
@pytest.mark.parametrize("count", [1, 31, 32, 33, 77])
def test_integers_of_every_width(width, count):
    numbers = np.random.default_rng(count).integers(0, 2**width, count, dtype=np.uint64)
    numbers[-1] = 2**width - 1
    x = jnp.asarray(numbers.astype(np.uint32))
    octets = jax.jit(bits.pack_integers, static_argnums=1)(x, width)
    assert octets.dtype == jnp.uint8
    assert bytes(np.asarray(octets)) == _written(numbers, width)
    back = jax.jit(bits.unpack_integers, static_argnums=(1, 2))(octets, width, count)
    np.testing.assert_array_equal(back, x)


def test_higher_bits_are_left_out():
    x = jnp.asarray([0b1101, 0b0110], jnp.int32)
    assert bytes(np.asarray(bits.pack_integers(x, 2))) == bytes([0b1001])
    assert bits.pack_integers(jnp.asarray([-1]), 32).tolist() == [255] * 4


@pytest.mark.parametrize("size", [1, 31, 32, 33, 1000])
@pytest.mark.parametrize("part", [0, 0.02, 0.5, 1])
def test_masks_and_positions(size, part):
    """Both ways of making words set the same bits, and they are listed in order."""
    mask = np.random.default_rng(size).random(size) < part
    words = bits.pack_mask(jnp.asarray(mask))
    whole = sum(int(bit) << i for i, bit in enumerate(mask))
    assert bytes(np.asarray(words)) == whole.to_bytes(4 * words.size, "little")
    positions = np.flatnonzero(mask)
    np.testing.assert_array_equal(bits.set_bits(jnp.asarray(positions), size), words)
    listed, count = bits.first_set_bits(words, size)
    assert count == mask.sum()
    np.testing.assert_array_equal(listed[: positions.size], positions)
    few, _ = bits.first_set_bits(words, 1)
    assert mask.sum() == 0 or few.tolist() == positions[:1].tolist()


@pytest.mark.parametrize("num_bits", [1, 8, 9, 31, 32, 33, 64])
def test_words_and_bytes(num_bits):
    words = jnp.asarray([0x04030201, 0x08070605], jnp.uint32)[: -(-num_bits // 32)]
    octets = bits.words_to_bytes(words, num_bits)
    assert octets.tolist() == list(range(1, -(-num_bits // 8) + 1))
    back = bits.bytes_to_words(octets)
    assert bytes(np.asarray(back)) == bytes(np.asarray(octets)).ljust(4 * back.size, b"\0")


@pytest.mark.parametrize("count", [1, 5, 6, 1000])
def test_trits(count):
    """Five to a byte, the first one lowest; any byte is five of them."""
    x = np.random.default_rng(count).integers(0, 3, count)
    octets = jax.jit(bits.pack_trits)(jnp.asarray(x))
    assert (octets.shape, octets.dtype) == ((-(-count // 5),), jnp.uint8)
    np.testing.assert_array_equal(bits.unpack_trits(octets, count), x)
    assert bits.pack_trits(jnp.asarray([2, 1, 0, 0, 2])).tolist() == [2 + 3 + 2 * 81]
    every = bits.unpack_trits(jnp.arange(256, dtype=jnp.uint8), 5 * 256)
    assert every.max() == 2
