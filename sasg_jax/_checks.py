"""One wording for every bad argument: its name, its value, and what is allowed."""

import math
import numbers
import operator
from collections.abc import Collection, Hashable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

# Arguments that fix shapes or control flow. optax.inject_hyperparams turns every number that is
# not listed in its `static_args` into a traced array, which these cannot be.
STATIC_ARGUMENTS = ("num_workers", "density", "max_staleness", "history")


def expected(name: str, value: Any, allowed: str) -> ValueError:
    """Returns ``ValueError("Expected name=value <allowed>.")``."""
    return ValueError(f"Expected {name}={value!r} {allowed}.")


def _reject_traced(name: str, value: Any) -> None:
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            f"Expected {name} to be a Python number that is known when the transformation is "
            f"built, got the traced value {value}. Under optax.inject_hyperparams, pass "
            f"static_args={STATIC_ARGUMENTS!r} (those that the optimiser has)."
        )


def check_int(name: str, value: Any, *, minimum: int) -> int:
    """Returns ``value`` as an int of at least ``minimum``; raises ValueError otherwise."""
    _reject_traced(name, value)
    allowed = f"to be an integer of at least {minimum}"
    if isinstance(value, bool):
        raise expected(name, value, allowed)
    try:
        result = operator.index(value)
    except TypeError:
        raise expected(name, value, allowed) from None
    if result < minimum:
        raise expected(name, value, allowed)
    return result


def check_bool(name: str, value: Any) -> bool:
    """Returns ``value`` if it is a bool; raises ValueError otherwise."""
    if not isinstance(value, bool):
        raise expected(name, value, "to be True or False")
    return value


def check_density(name: str, value: Any) -> float:
    """Returns ``value`` as a float in (0, 1]; raises ValueError otherwise."""
    _reject_traced(name, value)
    if not is_real(value) or not 0 < value <= 1:
        raise expected(name, value, "in (0, 1]")
    return float(value)


def check_choice(name: str, value: Any, choices: Collection[str]) -> str:
    """Returns ``value`` if it is one of ``choices``; raises ValueError otherwise."""
    if not isinstance(value, str) or value not in choices:
        raise expected(name, value, f"to be one of {', '.join(map(repr, choices))}")
    return value


def check_learning_rate(value: Any) -> Any:
    """Returns ``value`` if it is a schedule, a scalar array, or a finite number above 0."""
    if callable(value) or (isinstance(value, jax.Array) and value.ndim == 0):
        return value
    if not is_real(value) or not (math.isfinite(value) and value > 0):
        raise expected("learning_rate", value, "to be a finite number above 0 or an optax schedule")
    return value


def is_real(value: Any) -> bool:
    """Whether ``value`` is a real number of Python or NumPy, and not a bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_key(key: Any) -> Any:
    """Returns a PRNG key as a typed one, or None; raises ValueError for anything else."""
    if key is None:
        return None
    _reject_traced("key", key)
    try:
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            key = jax.random.clone(key)
        else:
            key = jax.random.wrap_key_data(key)
    except (AttributeError, TypeError, ValueError):
        raise expected("key", key, "to be a PRNG key, e.g. jax.random.key(0)") from None
    if key.shape:
        raise expected("key", key, "to be one PRNG key")
    return key


def check_axis_name(axis_name: Any) -> Hashable:
    """Returns ``axis_name`` if it can name one mapped axis; raises ValueError otherwise."""
    if not isinstance(axis_name, str) or not axis_name:
        raise expected("axis_name", axis_name, "to be a non-empty string")
    return axis_name


def check_mapped_axis(axis_name: str, num_workers: int) -> None:
    """Raises ValueError unless the code runs under a mapped axis of ``num_workers`` entries."""
    try:
        size = jax.lax.axis_size(axis_name)
    except NameError:
        raise ValueError(
            f"Expected axis_name={axis_name!r} to be a mapped axis, but no axis of that name is in "
            "scope. Call update inside jax.vmap, jax.pmap (axis_name=...) or jax.shard_map, or "
            "let sasg_jax.make_train_step do it."
        ) from None
    if size != num_workers:
        raise expected(
            "num_workers", num_workers, f"to equal the size of axis {axis_name!r}, which is {size}"
        )


def as_params(params: Any) -> Any:
    """``params`` with arrays of JAX at its leaves: what JAX makes of those of NumPy and of floats.

    Raises:
      ValueError: an array has no entries, or 2**31 or more.
      TypeError: a leaf is not of a real floating-point type of 16, 32 or 64 bits; the message
        gives its path.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        where = f"params{jax.tree_util.keystr(path)}"
        try:
            dtype = jnp.result_type(leaf)
        except TypeError:
            dtype = None
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize < 2:
            got = repr(leaf) if dtype is None else dtype.name
            raise TypeError(
                f"Expected {where} to be of a floating-point type of 16 bits or more, got {got}. "
                "Keep such leaves out of params (in the model state), or mask them with "
                "optax.masked."
            )
        if not 0 < jnp.size(leaf) < 2**31:
            raise ValueError(
                f"Expected {where} to have between 1 and 2**31 - 1 entries, "
                f"got shape {jnp.shape(leaf)}."
            )
    # A weak type would be a strong one after the first round, and the step be compiled again.
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), params)


def check_not_empty(params: Any) -> None:
    """Raises ValueError unless ``params`` holds an array."""
    if not jax.tree.leaves(params):
        raise ValueError(f"Expected params to hold at least one array, got {params!r}.")


def check_like(name: str, tree: Any, like: Any) -> None:
    """Raises ValueError unless ``tree`` has the structure and the shapes of ``like``."""
    got, want = jax.tree.structure(tree), jax.tree.structure(like)
    if got != want:
        raise ValueError(
            f"Expected {name} to have the structure of params.\n  {name}: {got}\n  params: {want}"
        )
    for (path, leaf), reference in zip(
        jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(like), strict=True
    ):
        if jnp.shape(leaf) != jnp.shape(reference):
            raise ValueError(
                f"Expected {name}{jax.tree_util.keystr(path)} to have the shape of its parameter, "
                f"{jnp.shape(reference)}, got {jnp.shape(leaf)}."
            )
