"""What becomes of the part of a direction that a message leaves out."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sasg_jax

SIZE, ROUNDS = 20, 300


@functools.cache
def _run(kind, dtype, density, decay=1.0):
    """Rounds of one worker. Directions and what the server decodes, each shape=(ROUNDS, SIZE), and
    the memory in the end."""
    made = {
        "residual": functools.partial(sasg_jax.residual, decay),
        "reconstruction": sasg_jax.reconstruction,
        "none": sasg_jax.none,
    }
    feedback, compressor = made[kind](), sasg_jax.top_k(density)
    rng = np.random.default_rng(0)
    directions = jnp.asarray(1 + rng.normal(size=(ROUNDS, SIZE)), dtype)

    def round(memory, direction):
        p = feedback.before(direction, memory)
        compressed = compressor.compress(p, ((),), None)
        decoded = compressor.decompress(compressed.message, p)
        return feedback.after(memory, compressed, lambda: decoded), decoded

    start = feedback.init(jax.ShapeDtypeStruct((SIZE,), dtype))
    memory, decoded = jax.lax.scan(round, start, directions)
    return directions, decoded, memory


def _top(x, density):
    kept = np.argsort(-np.abs(x), kind="stable")[: max(1, int(density * x.size))]
    return np.where(np.isin(np.arange(x.size), kept), x, 0)


@pytest.mark.parametrize("decay", [1.0, 0.75])
def test_residual_equals_a_loop(decay):
    """p = x + βe, e = p - C(p)."""
    directions, decoded, memory = _run("residual", jnp.float32, 0.2, decay)
    e = np.zeros(SIZE, np.float32)
    for x, sent in zip(np.asarray(directions), np.asarray(decoded), strict=True):
        p = x + np.float32(decay) * e
        np.testing.assert_allclose(sent, _top(p, 0.2), atol=1e-5)
        e = p - _top(p, 0.2)
    np.testing.assert_allclose(memory.residual, e, atol=1e-5)


def test_residual_loses_nothing():
    """What was sent and what is left add up to all that came, to the rounding of the sums."""
    directions, decoded, memory = _run("residual", jnp.float32, 0.1)
    arrived = np.asarray(decoded, np.float64).sum(0) + np.asarray(memory.residual)
    np.testing.assert_allclose(arrived, np.asarray(directions, np.float64).sum(0), atol=1e-3)


def test_residual_decays():
    """Of what is left out for n rounds, β^n is left: of ones, 1 + β + β² + ..."""
    feedback = sasg_jax.residual(0.5)
    memory = feedback.init(jnp.zeros(1))
    assert feedback.keep is not None
    for _ in range(4):
        memory = feedback.keep(memory, feedback.before(jnp.ones(1), memory))
    np.testing.assert_array_equal(memory.residual, [1.875])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_residual_keeps_the_type_of_the_direction(dtype):
    for decay in (1.0, 0.9):
        feedback = sasg_jax.residual(decay)
        x = jnp.ones(3, dtype)
        memory = feedback.init(x)
        p = feedback.before(x, memory)
        assert feedback.keep is not None
        chex.assert_trees_all_equal_shapes_and_dtypes(p, feedback.keep(memory, p).residual, x)


def test_none_sends_what_comes():
    directions, decoded, memory = _run("none", jnp.float32, 0.2)
    want = [_top(x, 0.2) for x in np.asarray(directions)]
    np.testing.assert_array_equal(decoded, want)
    assert memory == ()
    assert sasg_jax.none().keep is None


def test_reconstruction_equals_a_loop():
    """p = x - h, h = h + C(p), from h = 0."""
    directions, decoded, memory = _run("reconstruction", jnp.float32, 0.3)
    h = np.zeros(SIZE, np.float32)
    for x, sent in zip(np.asarray(directions), np.asarray(decoded), strict=True):
        np.testing.assert_allclose(sent, _top(x - h, 0.3), atol=1e-5)
        h = h + _top(x - h, 0.3)
    np.testing.assert_allclose(memory.reconstruction, h, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_both_sides_have_the_same_reconstruction(dtype):
    """The sum of all that arrived, also in half precision: else what one of them rounds away would
    be missing in every step from then on."""
    _, decoded, memory = _run("reconstruction", dtype, 0.3)
    chex.assert_type(decoded, dtype)
    server = np.asarray(decoded, np.float64).sum(0)
    np.testing.assert_allclose(memory.reconstruction, server, atol=1e-4)


def test_reconstruction_does_not_decode_where_nothing_is_sent():
    feedback = sasg_jax.reconstruction()
    assert feedback.reconstructs
    assert feedback.keep is None  # a silent worker counts as its h


@pytest.mark.parametrize("decay", [0, -0.5, 1.5, float("nan"), True, "1", None], ids=repr)
def test_decay_outside_its_range(decay):
    with pytest.raises(ValueError, match=rf"^Expected decay={decay!r} in \(0, 1\]\.$"):
        sasg_jax.residual(decay)


def test_momentum_and_damping_outside_their_range():
    for value in (1, 1.5, -0.1, float("nan"), True, None):
        with pytest.raises(ValueError, match=rf"^Expected momentum={value!r} in \[0, 1\)\.$"):
            sasg_jax.momentum_residual(value)  # pyright: ignore
    with pytest.raises(ValueError, match=r"^Expected masking=1 to be True or False\.$"):
        sasg_jax.momentum_residual(masking=1)  # pyright: ignore
    for name in ("damping", "momentum"):
        for value in (0, 1.5, True):
            with pytest.raises(ValueError, match=rf"^Expected {name}={value!r} in \(0, 1\]\.$"):
                sasg_jax.reconstruction(**{name: value})


def test_what_a_reconstruction_is_damped_by_stays():
    """h is half of what arrived, on both sides."""
    feedback, x = sasg_jax.reconstruction(damping=0.5), jnp.ones(3)
    memory = feedback.after(feedback.init(x), None, lambda: x)  # pyright: ignore
    np.testing.assert_array_equal(memory.reconstruction, [0.5, 0.5, 0.5])
    assert (feedback.damping, feedback.reconstructs, feedback.keep) == (0.5, True, None)


def test_average_starts_at_the_first_direction():
    feedback = sasg_jax.reconstruction(momentum=0.25)
    memory = feedback.init(jnp.zeros(1, jnp.bfloat16))
    averages = []
    assert feedback.take_in is not None
    for x in (4.0, 8.0, 0.0):
        memory = feedback.take_in(jnp.full(1, x, jnp.bfloat16), memory)
        averages.append(float(memory.average[0]))
    assert averages == [4, 5, 3.75]
    assert feedback.before(jnp.zeros(1, jnp.bfloat16), memory).dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_momentum_residual_keeps_the_type_of_the_direction(dtype):
    feedback, x = sasg_jax.momentum_residual(0.9), jnp.ones(3, dtype)
    assert feedback.take_in is not None
    memory = feedback.take_in(x, feedback.take_in(x, feedback.init(x)))
    chex.assert_trees_all_equal_shapes_and_dtypes(memory, sasg_jax.MomentumResidual(x, x))
    np.testing.assert_allclose(feedback.before(x, memory), [2.9] * 3, rtol=1e-2)


def test_names():
    more = sasg_jax.momentum_residual(), sasg_jax.momentum_residual(0.5, masking=False)
    more += sasg_jax.reconstruction(damping=0.5), sasg_jax.reconstruction(momentum=0.1)
    assert [feedback.name for feedback in more] == [
        "momentum_residual(0.9)",
        "momentum_residual(0.5, masking=False)",
        "reconstruction(damping=0.5)",
        "reconstruction(momentum=0.1)",
    ]
    made = [sasg_jax.residual(), sasg_jax.residual(0.95), sasg_jax.none()]
    names = [feedback.name for feedback in [*made, sasg_jax.reconstruction()]]
    assert names == ["residual()", "residual(0.95)", "none()", "reconstruction()"]
