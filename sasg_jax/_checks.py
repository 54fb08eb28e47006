"""One wording for every bad argument: its name, its value, and what is allowed."""

import math
import numbers
import operator
from collections.abc import Collection
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from sasg_jax.numerics import LARGEST_RATE

# Arguments that fix shapes or control flow. optax.inject_hyperparams turns every number that is
# not listed in its `static_args` into a traced array, which these cannot be.
STATIC_ARGUMENTS = ("num_workers", "density", "max_staleness", "history")


def expected(name: str, value: Any, allowed: str) -> ValueError:
    """``ValueError("Expected name=value <allowed>.")``"""
    return ValueError(f"Expected {name}={value!r} {allowed}.")


def require(ok: Any, name: str, value: Any, allowed: str) -> None:
    """Raises :func:`expected` unless ``ok``."""
    if not ok:
        raise expected(name, value, allowed)


def _reject_traced(name: str, value: Any, kinds: Any = jax.Array) -> None:
    if isinstance(value, kinds):
        why = f"Expected {name} to be a Python number that is known when the transformation is "
        why += f"built, got the array {value}. Under optax.inject_hyperparams, pass "
        raise TypeError(why + f"static_args={STATIC_ARGUMENTS!r} (those that the optimiser has).")


def check_int(name: str, value: Any, *, minimum: int) -> int:
    """``value`` as an int of at least ``minimum``."""
    _reject_traced(name, value)
    try:
        result = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        result = None
    if result is None or result < minimum:
        raise expected(name, value, f"to be an integer of at least {minimum}")
    return result


def check_cap(max_staleness: Any) -> int | None:
    """The ``max_staleness`` of a rule that need have none."""
    if max_staleness is None:
        return None
    return check_int("max_staleness", max_staleness, minimum=1)


def check_bool(name: str, value: Any) -> None:
    require(isinstance(value, bool), name, value, "to be True or False")


def check_fraction(name: str, value: Any) -> float:
    """``value`` as a float in (0, 1]."""
    _reject_traced(name, value)
    require(is_real(value) and 0 < value <= 1, name, value, "in (0, 1]")
    return float(value)


def check_bound(name: str, value: Any) -> Any:
    """``value``, a finite number of at least 0; of a traced one only that it is a scalar."""
    if isinstance(value, jax.core.Tracer):
        require(value.shape == (), name, value, "to be one number")
        return value
    value = value.item() if isinstance(value, jax.Array) and value.ndim == 0 else value
    allowed = "to be a finite number of at least 0"
    require(is_real(value) and 0 <= value < math.inf, name, value, allowed)
    return value


def check_positive(name: str, value: Any) -> float:
    """``value`` as a float above 0 and below infinity."""
    _reject_traced(name, value)
    require(is_real(value) and 0 < value < float("inf"), name, value, "to be a number above 0")
    return float(value)


def check_choice(name: str, value: Any, choices: Collection[str]) -> str:
    """``value``, which must be one of ``choices``."""
    allowed = f"to be one of {', '.join(map(repr, choices))}"
    require(isinstance(value, str) and value in choices, name, value, allowed)
    return value


def check_real(name: str, value: Any, *, minimum: float, below: float = float("inf")) -> float:
    """``value`` as a float of at least ``minimum`` and below another number."""
    _reject_traced(name, value)
    ok = is_real(value) and minimum <= value < below
    rest = "" if below == float("inf") else f" and below {below:g}"
    require(ok, name, value, f"to be a number of at least {minimum:g}{rest}")
    return float(value)


def check_learning_rate(value: Any, name: str = "learning_rate") -> Any:
    """``value``, which must be a schedule, a scalar array, or a number in (0, 1e6]."""
    if callable(value) or (isinstance(value, jax.Array) and value.ndim == 0):
        return value
    ok = is_real(value) and 0 < value <= LARGEST_RATE
    allowed = f"to be a number above 0 and at most {LARGEST_RATE:g}, or an optax schedule"
    require(ok, name, value, allowed)
    return value


def is_real(value: Any) -> bool:
    """Whether ``value`` is a real number of Python or NumPy, and not a bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_key(key: Any) -> Any:
    """A PRNG key as a typed one, or None."""
    if key is None:
        return None
    _reject_traced("key", key, jax.core.Tracer)
    try:
        typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        key = jax.random.clone(key) if typed else jax.random.wrap_key_data(key)
    except (AttributeError, TypeError, ValueError):
        raise expected("key", key, "to be a PRNG key, e.g. jax.random.key(0)") from None
    require(not key.shape, "key", key, "to be one PRNG key")
    return key


def check_axis_name(axis_name: Any) -> None:
    is_name = isinstance(axis_name, str) and axis_name != ""
    require(is_name, "axis_name", axis_name, "to be a non-empty string")


def check_mapped_axis(axis_name: str, num_workers: int) -> None:
    """Raises ValueError unless the code runs under a mapped axis of ``num_workers`` entries."""
    try:
        size = jax.lax.axis_size(axis_name)
    except NameError:
        why = f"Expected axis_name={axis_name!r} to be a mapped axis, but no axis of that name is "
        why += "in scope. Call update inside jax.vmap, jax.pmap (axis_name=...) or jax.shard_map, "
        raise ValueError(why + "or let sasg_jax.make_train_step do it.") from None
    allowed = f"to equal the size of axis {axis_name!r}, which is {size}"
    require(size == num_workers, "num_workers", num_workers, allowed)


def as_params(params: Any) -> Any:
    """``params`` with arrays of JAX at its leaves, of strong types: a weak one would be strong
    after the first round, and the step be compiled again. ValueError for an array of no entries or
    2**31 or more, TypeError for one that is not of a floating-point type of 16 bits or more."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        where = f"params{jax.tree_util.keystr(path)}"
        try:
            dtype = jnp.result_type(leaf)
            got, is_right = dtype.name, jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize > 1
        except TypeError:
            got, is_right = repr(leaf), False
        if not is_right:
            why = f"Expected {where} to be of a floating-point type of 16 bits or more, got {got}. "
            why += "Keep such leaves out of params (in the model state), or mask them with "
            raise TypeError(why + "optax.masked.")
        if not 0 < jnp.size(leaf) < 2**31:
            why = f"Expected {where} to have between 1 and 2**31 - 1 entries, got shape "
            raise ValueError(why + f"{jnp.shape(leaf)}.")
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), params)


def check_like(name: str, tree: Any, like: Any, of: str = "params") -> None:
    """Raises ValueError unless ``tree`` has the structure and the shapes of ``like``."""
    got, want = jax.tree.structure(tree), jax.tree.structure(like)
    if got != want:
        why = f"Expected {name} to have the structure of {of}.\n  {name}: {got}\n  {of}: {want}"
        raise ValueError(why)
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    for (path, leaf), reference in zip(leaves, jax.tree.leaves(like), strict=True):
        if jnp.shape(leaf) != jnp.shape(reference):
            why = f"Expected {name}{jax.tree_util.keystr(path)} to have its shape in {of}, "
            raise ValueError(why + f"{jnp.shape(reference)}, got {jnp.shape(leaf)}.")
