"""Every bad argument is named, with its value and what is allowed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sasg_jax import _checks


def test_wording():
    error = _checks.expected("density", 1.5, "in (0, 1]")
    assert type(error) is ValueError
    assert str(error) == "Expected density=1.5 in (0, 1]."
    assert (
        str(_checks.expected("exchange", "ring", "to be ..."))
        == "Expected exchange='ring' to be ...."
    )


def test_require():
    _checks.require(True, "x", 1, "to be 1")
    for false in (False, None, 0, ""):
        with pytest.raises(ValueError, match=r"^Expected x=2 to be 1\.$"):
            _checks.require(false, "x", 2, "to be 1")


@pytest.mark.parametrize("value", [3, np.int64(3), np.array(3), np.uint8(3)])
def test_integers_of_any_kind(value):
    got = _checks.check_int("n", value, minimum=3)
    assert type(got) is int
    assert got == 3


@pytest.mark.parametrize("value", [2, -5, 3.0, np.float32(3), "3", None, True, np.array([3, 3])])
def test_what_is_no_integer_of_that_size(value):
    with pytest.raises(ValueError, match=r"^Expected n=.* to be an integer of at least 3\.$"):
        _checks.check_int("n", value, minimum=3)


@pytest.mark.parametrize("value", [1, 1.0, 0.25, 1e-12, np.float32(0.5), np.int8(1)])
def test_fractions(value):
    got = _checks.check_fraction("density", value)
    assert type(got) is float
    assert got == value


@pytest.mark.parametrize("value", [0, -0.1, 1.0001, np.nan, np.inf, True, "0.1", None, 1j])
def test_what_is_no_fraction(value):
    with pytest.raises(ValueError, match=r"^Expected density=.* in \(0, 1\]\.$"):
        _checks.check_fraction("density", value)


def test_positive_numbers():
    assert [_checks.check_positive("clip", x) for x in (2, 1e30, np.float32(0.5))] == [2, 1e30, 0.5]
    for value in (0, -1, np.nan, np.inf, True, "1", None):
        with pytest.raises(ValueError, match=r"^Expected clip=.* to be a number above 0\.$"):
            _checks.check_positive("clip", value)


@pytest.mark.parametrize(
    "check", [_checks.check_fraction, _checks.check_int, _checks.check_positive]
)
def test_arrays_that_optax_makes_of_settings(check):
    """Traced or not, with the advice that helps."""
    kwargs = {"minimum": 1} if check is _checks.check_int else {}

    def fn(x):
        check("history", x, **kwargs)
        return x

    for run in (fn, jax.jit(fn)):
        with pytest.raises(
            TypeError, match=r"^Expected history to be a Python number that is know"
        ) as raised:
            run(jnp.float32(0.5))
        assert "optax.inject_hyperparams, pass static_args=('num_workers', 'density'," in str(
            raised.value
        )


@pytest.mark.parametrize("value", [0, 1, None, "yes", np.True_])
def test_flags(value):
    with pytest.raises(ValueError, match=r"^Expected donate=.* to be True or False\.$"):
        _checks.check_bool("donate", value)
    _checks.check_bool("donate", False)


@pytest.mark.parametrize("value", ["ring", None, 3, ["gather"]])
def test_choices(value):
    with pytest.raises(ValueError, match=r"^Expected exchange=.* to be one of 'gather', 'lazy'\.$"):
        _checks.check_choice("exchange", value, ("gather", "lazy"))
    assert _checks.check_choice("exchange", "lazy", ("gather", "lazy")) == "lazy"


@pytest.mark.parametrize("value", [0.1, 1, np.float64(0.1), optax.constant_schedule(0.1)])
def test_learning_rates(value):
    assert _checks.check_learning_rate(value) is value
    array = jnp.float32(0.1)  # as optax.inject_hyperparams makes of it
    assert _checks.check_learning_rate(array) is array


@pytest.mark.parametrize("value", [0, -0.1, np.nan, np.inf, True, None, "0.1", np.ones(2)])
def test_what_is_no_learning_rate(value):
    with pytest.raises(ValueError, match=r"^Expected learning_rate=.* or an optax schedule\.$"):
        _checks.check_learning_rate(value)
    with pytest.raises(ValueError, match=r"^Expected learning_rate=.* or an optax schedule\.$"):
        _checks.check_learning_rate(jnp.ones(2))


@pytest.mark.parametrize("value", ["", None, 3, ("a", "b")])
def test_names_of_an_axis(value):
    with pytest.raises(ValueError, match=r"^Expected axis_name=.* to be a non-empty string\.$"):
        _checks.check_axis_name(value)
    _checks.check_axis_name("workers")


def test_keys_of_both_kinds_become_one_kind():
    typed = _checks.check_key(jax.random.key(3))
    raw = _checks.check_key(jax.random.PRNGKey(3))
    assert typed.dtype == raw.dtype
    np.testing.assert_array_equal(jax.random.key_data(typed), jax.random.key_data(raw))
    assert _checks.check_key(None) is None


@pytest.mark.parametrize("value", [3, "key", np.ones(3), [0, 1]])
def test_what_is_no_key(value):
    with pytest.raises(ValueError, match=r"^Expected key=.* to be a PRNG key, e.g. jax.random.key"):
        _checks.check_key(value)


def test_several_keys():
    with pytest.raises(ValueError, match=r"(?s)^Expected key=.* to be one PRNG key\.$"):
        _checks.check_key(jax.random.split(jax.random.key(0), 2))


# Parameters ---------------------------------------------------------------------------------------


def test_params_become_arrays_of_strong_types():
    """Of what NumPy and Python have; the numbers stay, and so does what is an array already."""
    params = {"a": 1.5, "b": np.ones(2), "c": jnp.ones(3, jnp.bfloat16), "d": jnp.asarray(2.0)}
    got = _checks.as_params(params)
    assert all(isinstance(x, jax.Array) and not x.weak_type for x in got.values())
    assert {key: x.dtype.name for key, x in got.items()} == {
        "a": "float32",
        "b": "float32",  # as jax makes of float64 without 64-bit types
        "c": "bfloat16",
        "d": "float32",
    }
    for key, x in params.items():
        np.testing.assert_array_equal(got[key], x)
    assert _checks.as_params({}) == {}


@pytest.mark.parametrize(
    ("leaf", "error", "message"),
    [
        (np.ones(3, np.int32), TypeError, "of 16 bits or more, got int32"),
        (np.ones(3, np.complex64), TypeError, "of 16 bits or more, got complex64"),
        (True, TypeError, "of 16 bits or more, got bool"),
        ("weights", TypeError, "of 16 bits or more, got 'weights'"),
        (np.ones((0, 3)), ValueError, r"between 1 and 2\*\*31 - 1 entries, got shape \(0, 3\)"),
    ],
)
def test_parameters_that_cannot_be_trained_are_named(leaf, error, message):
    with pytest.raises(error, match=rf"^Expected params\['layer'\]\[1\] to .*{message}"):
        _checks.as_params({"layer": [1.0, leaf], "rest": 2.0})


LIKE = {"a": np.ones(3), "b": [np.ones((2, 2))]}


def test_what_is_like_params():
    _checks.check_like("grads", {"a": jnp.zeros(3), "b": [jnp.zeros((2, 2), jnp.bfloat16)]}, LIKE)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            {"a": np.ones(3)},
            r"^Expected grads to have the structure of params\.\n  grads: PyTreeDef",
        ),
        (
            {"a": np.ones(3), "b": [np.ones(4)]},
            r"^Expected grads\['b'\]\[0\] to have its shape in params",
        ),
        ({"a": 1.0, "b": [np.ones((2, 2))]}, r"^Expected grads\['a'\] .* \(3,\), got \(\)\.$"),
    ],
)
def test_what_is_not_like_params(tree, message):
    with pytest.raises(ValueError, match=message):
        _checks.check_like("grads", tree, LIKE)


def test_mapped_axis():
    """Its absence and another size, under any map."""
    check = lambda x: _checks.check_mapped_axis("workers", 3) or x
    np.testing.assert_array_equal(jax.vmap(check, axis_name="workers")(jnp.ones(3)), np.ones(3))
    with pytest.raises(
        ValueError, match=r"num_workers=3 to equal the size of axis 'workers', whi.* 2"
    ):
        jax.vmap(check, axis_name="workers")(jnp.ones(2))
    with pytest.raises(
        ValueError, match=r"^Expected axis_name='workers' to be a mapped axis, but "
    ):
        jax.vmap(check, axis_name="others")(jnp.ones(3))


@pytest.mark.parametrize("value", [0, 0.5, np.float32(0.25)])
def test_real_numbers_of_a_range(value):
    assert _checks.check_real("x", value, minimum=0, below=1) == value
    assert type(_checks.check_real("x", value, minimum=0)) is float


@pytest.mark.parametrize("value", [-0.1, 1, np.nan, np.inf, None, True, "0"])
def test_real_numbers_outside(value):
    with pytest.raises(ValueError, match=r"x=.* to be a number of at least 0 and below 1\.$"):
        _checks.check_real("x", value, minimum=0, below=1)


@pytest.mark.parametrize("value", [0, 2, 0.5, np.float32(3), jnp.float32(1e6)])
def test_bounds(value):
    assert _checks.check_bound("c", value) == value


@pytest.mark.parametrize("value", [-1e-9, np.nan, np.inf, True, "1", None, jnp.ones(2)])
def test_what_is_no_bound(value):
    with pytest.raises(ValueError, match=r"^Expected c=.* to be a finite number of at least 0\.$"):
        _checks.check_bound("c", value)
