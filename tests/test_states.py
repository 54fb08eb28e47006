"""What is carried from round to round: found again in any wrapper, and saved by other libraries."""

from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from problems import DENSITY, LEARNING_RATE, METHODS, M

import sasg_jax
from sasg_jax.states import find_state

PARAMS = problems.quadratic_params()
TOP_K = sasg_jax.top_k(DENSITY)


def _compressed(compressor=TOP_K, rule=None, **kwargs):
    return sasg_jax.compressed_sgd(LEARNING_RATE, compressor, rule, num_workers=M, **kwargs)


AGGREGATE = sasg_jax.aggregate(TOP_K, num_workers=M)
APPROXIMATE = sasg_jax.top_k(DENSITY, selection="approximate")
# Every kind of memory, and every way to put ours among others.
OPTIMISERS = {
    **{name: make(LEARNING_RATE, num_workers=M) for name, make in METHODS.items()},
    "shared": sasg_jax.sasg(LEARNING_RATE, num_workers=M, share_stale_params=True),
    "sharded": METHODS["two_way"](LEARNING_RATE, num_workers=M, exchange="sharded"),
    "reuse": _compressed(rule=sasg_jax.every(3), silence="reuse"),
    "reconstruction": _compressed(feedback=sasg_jax.reconstruction()),
    "approximate": _compressed(APPROXIMATE, downlink=APPROXIMATE),
    "pipeline": sasg_jax.pipeline(optax.trace(0.9), AGGREGATE, optax.adam(0.1)),
    "chain": optax.chain(optax.trace(0.9), AGGREGATE, optax.adam(0.1)),
    "named_chain": optax.named_chain(("trace", optax.trace(0.9)), ("ours", AGGREGATE)),
    "masked": optax.masked(AGGREGATE, {"b": True, "w": False}),
    "inject_hyperparams": optax.inject_hyperparams(sasg_jax.sgd, "num_workers")(0.1, num_workers=M),
}


def _paths(tree):
    return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


# Saved by flax ------------------------------------------------------------------------------------


# The state of optax.named_chain is an OrderedDict, which flax's msgpack takes of nobody.
@pytest.mark.parametrize("name", [name for name in OPTIMISERS if name != "named_chain"])
def test_every_state_comes_back_from_flax_bytes(name):
    """Every array of it, of its type, in the structure that it had."""
    state = sasg_jax.stack_workers(OPTIMISERS[name].init(PARAMS), M)
    numbers = iter(range(1000))
    filled = jax.tree.map(lambda x: jnp.full_like(x, next(numbers) % 100 + 1), state)
    saved = flax.serialization.to_bytes(filled)
    restored = flax.serialization.from_bytes(state, saved)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for path, x in _paths(filled).items():
        got = _paths(restored)[path]
        assert (got.dtype, got.shape) == (x.dtype, x.shape)
        np.testing.assert_array_equal(got, x)
    assert sasg_jax.Ledger(restored).to_dict() == sasg_jax.Ledger(state).to_dict()


# Found by optax -----------------------------------------------------------------------------------

LIKE_PARAMS = (
    "residual",
    "reconstruction",
    "stale_params",
    "previous_params",
    "trace",
    "mu",
    "nu",
)


@pytest.mark.parametrize("name", sorted(OPTIMISERS.keys() - {"masked", "shared", "sharded"}))
def test_optax_finds_what_is_like_the_parameters(name):
    """As a sharding is given to them: exactly the arrays that they are like, and nothing else."""
    tx = OPTIMISERS[name]
    state = tx.init(PARAMS)
    shapes = jax.tree.map(jnp.shape, PARAMS, is_leaf=lambda x: isinstance(x, jax.Array))
    marked = optax.tree_utils.tree_map_params(
        tx,
        lambda x, shape: x.shape == shape,
        state,
        shapes,
        transform_non_params=lambda x: None,
    )
    found = _paths(marked)
    assert all(found.values())
    want = {path for path in _paths(state) if any(f".{part}[" in path for part in LIKE_PARAMS)}
    if name == "reconstruction":  # the server's sum of them, too
        want |= {path for path in _paths(state) if path.startswith(".server.memory")}
    assert found.keys() == want
    assert bool(want) == (name not in ("sgd", "inject_hyperparams"))


def test_optax_finds_the_shared_parameters():
    """The ring of them, the residual, and with shards the server's."""
    for name, parts in (("shared", {"recent_params", "residual"}), ("sharded", {"residual"})):
        tx = OPTIMISERS[name]
        marked = optax.tree_utils.tree_map_params(
            tx, lambda x: True, tx.init(PARAMS), transform_non_params=lambda x: None
        )
        assert parts <= {path.split("[")[0].split(".")[-1] for path in _paths(marked)}


# Found by ours ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMISERS)
def test_ours_is_found_in_any_wrapper(name):
    state = OPTIMISERS[name].init(PARAMS)
    ours = find_state(state)
    assert isinstance(ours, sasg_jax.AggregateState)
    assert sasg_jax.diagnostics(state).staleness is ours.worker.staleness
    assert find_state(ours) is ours


def test_wire_is_no_array_and_tells_methods_apart():
    """It travels in the structure of a state, so that states of one method have one structure."""
    states = [OPTIMISERS[name].init(PARAMS) for name in ("sasg", "sasg", "two_way")]
    one, same, other = map(jax.tree.structure, states)
    assert one == same
    assert hash(one) == hash(same)
    assert one != other
    assert not jax.tree.leaves(find_state(states[0]).wire)
    assert len({find_state(state).wire for state in states}) == 2


def test_finite_is_of_both_ways():
    """What a worker has refused, and a step that all of them refuse."""
    state: Any = METHODS["sasg"](0.1, num_workers=M).init(PARAMS)
    for worker, server in ((True, True), (True, False), (False, True)):
        changed = state._replace(
            worker=state.worker._replace(finite=jnp.asarray(worker)),
            server=state.server._replace(finite=jnp.asarray(server)),
        )
        assert bool(sasg_jax.diagnostics(changed).finite) is (worker and server)
