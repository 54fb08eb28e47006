"""Work done only where it is needed, values that are the same for all, and sums in order."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest

from sasg_jax.control_flow import (
    add_rows,
    for_all,
    refuse_collectives,
    same_on_all,
    sum_rows,
    update_if,
    zero_after,
)


def _double_and_add(carried, x):
    return {"a": carried["a"] + x, "n": carried["n"] + 1}, (2 * x, x.sum())


def _expected(active, carried, x):
    """What `_double_and_add` makes of entries that are active, by hand."""
    where = active[:, None]
    return (
        {
            "a": np.where(where, carried["a"] + x, carried["a"]),
            "n": carried["n"] + active.astype(np.int32),
        },
        (np.where(where, 2 * x, 0), np.where(active, x.sum(1), 0)),
    )


ROWS = 4
CARRIED = {
    "a": np.arange(12, dtype=np.float32).reshape(ROWS, 3),
    "n": np.arange(ROWS, dtype=np.int32),
}
X = np.arange(100, 112, dtype=np.float32).reshape(ROWS, 3)
PATTERNS = ["0000", "1111", "0100", "1011", "0001"]


def _flags(pattern):
    return np.array([c == "1" for c in pattern])


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("active", [False, True])
def test_one_entry(active, transform):
    fn = transform(lambda active, c, x: update_if(active, _double_and_add, c, x))
    carried, x = jax.tree.map(lambda a: a[1], (CARRIED, X))
    want = jax.tree.map(lambda a: a[0], _expected(np.array([active]), *_one_row(carried, x)))
    chex.assert_trees_all_equal(fn(jnp.asarray(active), carried, x), want)


def _one_row(*trees):
    return jax.tree.map(lambda a: np.asarray(a)[None], trees)


_mapped = jax.jit(jax.vmap(lambda active, c, x: update_if(active, _double_and_add, c, x)))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_under_vmap(pattern):
    active = _flags(pattern)
    chex.assert_trees_all_equal(_mapped(active, CARRIED, X), _expected(active, CARRIED, X))


def test_under_vmap_with_shared_operands():
    """Operands, carried values and the flag itself may be the same for all entries."""
    active = _flags("1011")
    shared = np.array([1.0, 2.0, 3.0], np.float32)
    everywhere = np.broadcast_to(shared, X.shape)
    fn = jax.jit(jax.vmap(lambda a, c: update_if(a, _double_and_add, c, shared)))
    chex.assert_trees_all_equal(fn(active, CARRIED), _expected(active, CARRIED, everywhere))

    one = {"a": shared, "n": np.int32(5)}
    all_the_same = jax.tree.map(lambda a: np.broadcast_to(a, (ROWS, *np.shape(a))), one)
    fn = jax.jit(jax.vmap(lambda a, x: update_if(a, _double_and_add, one, x)))
    chex.assert_trees_all_equal(fn(active, X), _expected(active, all_the_same, X))

    fn = jax.jit(jax.vmap(lambda c, x: update_if(jnp.asarray(True), _double_and_add, c, x)))
    chex.assert_trees_all_equal(fn(CARRIED, X), _expected(_flags("1111"), CARRIED, X))


def test_under_two_vmaps():
    active = np.stack([_flags("0110"), _flags("1000"), _flags("0000")])
    scale = np.array([1.0, 2.0, 3.0], np.float32)
    carried = jax.tree.map(lambda a: np.stack([a, a + 1, a + 2]), CARRIED)
    x = X[None] * scale[:, None, None]
    fn = jax.jit(jax.vmap(jax.vmap(lambda a, c, x: update_if(a, _double_and_add, c, x))))
    got = fn(active, carried, x)
    for i in range(3):
        row = problems.at((active, carried, x), i)
        chex.assert_trees_all_equal(problems.at(got, i), _expected(*row))


def test_runs_only_for_active_entries():
    """Under vmap too, where a lax.cond would run for all."""
    ran = []

    def fn(carried, x):
        jax.debug.callback(lambda first: ran.append(int(first)), x[0])
        return carried + x, ()

    mapped = jax.jit(jax.vmap(lambda a, c, x: update_if(a, fn, c, x)))
    for active in map(_flags, PATTERNS):
        ran.clear()
        jax.block_until_ready(mapped(active, CARRIED["a"], X))
        jax.effects_barrier()
        assert sorted(ran) == [int(first) for first in X[active, 0]]


def test_rows_are_written_in_place():
    """Whatever fn reads of a row, of the rows there is no copy."""

    def keep_largest(carried, x):
        total = carried + x
        indices = jax.lax.top_k(jnp.abs(total), 100)[1]
        return total.at[indices].set(0), (total[indices], indices)

    rows = jnp.zeros((16, 50_000))
    fn = jax.jit(jax.vmap(lambda a, c, x: update_if(a, keep_largest, c, x)), donate_argnums=1)
    memory = fn.lower(jnp.ones(16, bool), rows, rows).compile().memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes >= rows.nbytes
    assert memory.temp_size_in_bytes < rows.nbytes / 2


def test_sum_rows_goes_in_order():
    """16777216 + 1 + 1 is 16777216 in float32, and 1 + 1 + 16777216 is not."""
    big = np.float32(2**24)
    rows = jnp.array([[big, 1], [1, 1], [1, big]], jnp.float32)
    np.testing.assert_array_equal(sum_rows(rows), [2**24, 2**24 + 2])
    np.testing.assert_array_equal(sum_rows(rows[:1]), rows[0])


def test_sum_rows_is_a_left_fold_bit_for_bit():
    rows = np.random.default_rng(0).normal(size=(19, 5)).astype(np.float32)
    total = rows[0]
    for row in rows[1:]:
        total = total + row
    np.testing.assert_array_equal(jax.jit(sum_rows)(rows), total)


def test_add_rows_goes_on_from_a_total():
    rows = jnp.array([[1.0], [1.0]])
    np.testing.assert_array_equal(add_rows(jnp.float32([2**24]), rows), [2**24])
    np.testing.assert_array_equal(add_rows(jnp.float32([3]), rows[:0]), [3])


# A zero that waits --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_zero_after_is_zero_after_any_number(dtype):
    """What it is where the conversion of such a number to an integer is anybody's guess, too."""
    for first in (0.0, -0.0, 1.5, -3e38, np.inf, -np.inf, np.nan, -np.nan, 1e-45):
        floats = jnp.float32([first, 7]).astype(dtype)
        tree = {"a": floats, "n": jnp.arange(3), "none": jnp.zeros((0, 2))}
        assert jax.jit(zero_after)(tree) == 0
    assert zero_after({"n": jnp.arange(3)}) == 0


def test_zero_after_needs_the_floats():
    """The compiler cannot know it without them: what uses it waits for every one."""
    text = jax.jit(zero_after).lower((jnp.ones(3), jnp.ones(4))).compile().as_text()
    assert text
    entry = text[text.index("ENTRY") :]
    used = [line for line in entry.splitlines() if "fusion(" in line or "call(" in line]
    assert any("%tree_0" in line or "tree[0]" in line for line in used), entry
    assert "s32[] constant(0)" not in [line.split("ROOT ")[-1] for line in entry.splitlines()]


# for_all ------------------------------------------------------------------------------------------


def test_for_all_is_the_flag_of_one_entry():
    assert jax.jit(for_all)(jnp.array(True))
    assert not jax.jit(for_all)(jnp.array(False))


@pytest.mark.parametrize("flags", [[True, True, True], [True, False, True], [False] * 3])
def test_for_all_under_vmap_is_the_same_for_all_entries(flags):
    held = jax.vmap(for_all, out_axes=None)(jnp.array(flags))
    assert bool(held) == all(flags)


@pytest.mark.parametrize(("flags", "runs"), [([True, True], 0), ([True, False], 1)])
def test_a_branch_that_no_entry_needs_is_not_run(flags, runs):
    """And what it closes over is not copied for every entry: custom_vmap would refuse that."""
    seen = []
    constant = jnp.arange(3.0)

    @jax.custom_batching.sequential_vmap
    def work(x):
        return jnp.sum(x * constant)

    def entry(flag, x):
        def needed():
            jax.debug.callback(lambda: seen.append(1))
            return work(x)

        return jax.lax.cond(for_all(flag), lambda: 0.0, needed)

    x = jnp.ones((2, 3))
    got = jax.jit(jax.vmap(entry))(jnp.array(flags), x)
    jax.effects_barrier()
    assert bool(seen) == bool(runs)
    np.testing.assert_array_equal(got, [3.0 * runs] * 2)


# What must be the same on all workers, and what must not communicate ------------------------------


def test_same_on_all_is_what_it_is():
    tree = {"a": jnp.ones(2), "b": jnp.int32(3)}
    chex.assert_trees_all_equal(jax.jit(same_on_all)(0, tree), tree)
    shared = jax.vmap(lambda m: same_on_all(m, tree), out_axes=None)(jnp.arange(3))
    chex.assert_trees_all_equal(shared, tree)


def test_what_depends_on_the_worker_is_not_the_same_on_all():
    tree = {"a": jnp.ones((3, 2)), "b": jnp.int32(3)}
    mapped = jax.vmap(same_on_all, in_axes=(0, {"a": 0, "b": None}))
    with pytest.raises(ValueError, match="to be the same on all workers, but a part depends on"):
        mapped(jnp.arange(3), tree)


def _in_a_loop(x):
    return jax.lax.fori_loop(0, 2, lambda i, x: x + jax.lax.pmean(x, "workers"), x)


def _in_a_branch(x):
    return jax.lax.cond(x > 0, lambda x: jax.lax.psum(x, "workers"), lambda x: x, x)


def _in_a_derivative(x):
    @jax.custom_jvp
    def fn(x):
        return jax.lax.all_gather(x, "workers").sum()

    fn.defjvp(lambda x, t: (fn(*x), fn(*t)))
    return jax.jit(jax.checkpoint(fn))(x)


COLLECTIVES = {
    "psum": lambda x: jax.lax.psum(x, "workers"),
    "over two axes": lambda x: jax.lax.psum(x, ("data", "workers")),
    "ppermute": lambda x: jax.lax.ppermute(x, "workers", [(0, 1), (1, 0)]),
    "loop": _in_a_loop,
    "branch": _in_a_branch,
    "derivative": _in_a_derivative,
}


def _on_two_axes(fn):
    return jax.vmap(jax.vmap(fn, axis_name="data"), axis_name="workers")(jnp.ones((2, 3)))


@pytest.mark.parametrize("name", COLLECTIVES)
def test_collectives_are_found_wherever_they_are(name):
    with pytest.raises(ValueError, match=r"^Expected a loss without collectives over axis 'work"):
        _on_two_axes(refuse_collectives(COLLECTIVES[name], "workers"))


def test_what_moves_nothing_between_workers_may_stay():
    """The index of a worker, a mean over another axis; trees come back as they were made."""

    def fn(x, tree):
        mean = jax.lax.pmean(x, "data")
        return {"a": (mean, tree["n"]), "index": jax.lax.axis_index("workers"), "none": None}

    got = _on_two_axes(lambda x: refuse_collectives(fn, "workers")(x, {"n": 5 * x}))
    np.testing.assert_array_equal(got["a"][0], np.ones((2, 3)))
    np.testing.assert_array_equal(got["a"][1], np.full((2, 3), 5))
    np.testing.assert_array_equal(got["index"], [[0] * 3, [1] * 3])
    assert got["none"] is None
