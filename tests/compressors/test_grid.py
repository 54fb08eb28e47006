"""LAQ's quantiser: its formula, its size, and what it does at the edges of a type."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sasg_jax


def _tree(dtype=jnp.float32, size=37):
    rng = np.random.default_rng(0)
    return {"a": jnp.asarray(rng.normal(size=size), dtype), "b": jnp.asarray([[3.0, -0.25]], dtype)}


def _compress(compressor, tree):
    message, rest, _ = jax.jit(lambda tree: compressor.compress(tree, (), None))(tree)
    return message, rest, compressor.decompress(message, tree)


@pytest.mark.parametrize("scope", ["tensor", "tree"])
@pytest.mark.parametrize("bits", [1, 2, 3, 5, 8, 13, 16])
def test_equals_its_formula(bits, scope):
    tree = _tree()
    _, rest, decoded = _compress(sasg_jax.grid(bits, scope=scope), tree)
    largest = {name: float(np.abs(x).max()) for name, x in tree.items()}
    for name, x in tree.items():
        x = np.asarray(x, np.float64)
        radius = largest[name] if scope == "tensor" else max(largest.values())
        delta = radius / (2**bits - 1)
        want = -radius + 2 * delta * np.floor((x + radius + delta) / (2 * delta))
        np.testing.assert_allclose(decoded[name], want, rtol=1e-5, atol=1e-5 * delta)
        assert (np.abs(np.asarray(rest[name])) <= delta * (1 + 1e-3)).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_what_is_decoded_is_what_the_remainder_lacks(dtype):
    """Bit for bit, and the sum of what arrives is that of what each decodes to."""
    compressor, tree = sasg_jax.grid(3), _tree(dtype)
    message, rest, decoded = _compress(compressor, tree)
    for name, x in tree.items():
        assert decoded[name].dtype == rest[name].dtype == dtype
        np.testing.assert_array_equal(rest[name], x - decoded[name])
    twice = compressor.decompress_sum(
        jax.tree.map(lambda x: jnp.stack([x, x]), message), tree, None
    )
    for name in tree:
        np.testing.assert_array_equal(twice[name], 2 * decoded[name].astype(jnp.float32))


@pytest.mark.parametrize("scope", ["tensor", "tree"])
def test_zeros_and_what_is_too_small_to_divide_by(scope):
    """Decode to zeros, as a message of zeros does."""
    compressor = sasg_jax.grid(4, scope=scope)
    tree = {"a": jnp.zeros(5), "b": jnp.full(3, 1e-40)}
    decoded = _compress(compressor, tree)[2]
    zeros = compressor.decompress(compressor.zero_message(tree), tree)
    for name in tree:
        assert not np.asarray(decoded[name]).any()
        assert not np.asarray(zeros[name]).any()


def test_the_largest_numbers():
    """Whose double is none."""
    x = jnp.asarray([3.4e38, -3.4e38, 1.0])
    _, rest, decoded = _compress(sasg_jax.grid(2), x)
    assert np.isfinite(np.asarray(rest)).all()
    np.testing.assert_allclose(decoded, [3.4e38, -3.4e38, 3.4e38 / 3], rtol=1e-5)


def test_whatever_arrives_is_finite():
    compressor, tree = sasg_jax.grid(4), _tree()
    message = compressor.compress(tree, (), None).message
    for radius in (np.nan, np.inf):
        bad = tuple(m._replace(radius=jnp.float32(radius)) for m in message)
        decoded = compressor.decompress(bad, tree)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(decoded)))


def test_bytes():
    """b bits an entry, each tensor in whole bytes, and one radius for each or for all."""
    tree = _tree()
    size = sasg_jax.grid(3).message_size(tree)
    assert size == (14 + 1 + 2 * 4, 32 * 39)
    assert sasg_jax.grid(3, scope="tree").message_size(tree).bytes == 14 + 1 + 4
    assert sasg_jax.grid(3, scope="tree").message_size({}).bytes == 0


def test_says_what_it_is():
    made = sasg_jax.grid(3)
    assert made.name == "grid(3)"
    assert sasg_jax.grid(3, scope="tree").name == "grid(3, scope='tree')"
    assert not any([made.exact, made.unbiased, made.linear, made.random])


def test_arguments_out_of_range():
    for bits in (0, 1.5, None):
        with pytest.raises(ValueError, match=rf"^Expected bits={bits!r} to be an integer"):
            sasg_jax.grid(bits)  # pyright: ignore
    with pytest.raises(ValueError, match=r"^Expected bits=17 to be at most 16\.$"):
        sasg_jax.grid(17)
    with pytest.raises(ValueError, match=r"^Expected scope='all' to be one of 'tensor', 'tree'"):
        sasg_jax.grid(3, scope="all")
