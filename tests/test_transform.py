"""The transformation: bad arguments, gradients that are not finite, conservation, diagnostics."""

import functools
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import problems
import pytest
from jax.sharding import AxisType, PartitionSpec
from problems import ADAPTIVE, DENSITY, LEARNING_RATE, METHODS, M

import sasg_jax
from sasg_jax._checks import STATIC_ARGUMENTS

PARAMS = problems.quadratic_params()
dense_aggregate = functools.partial(sasg_jax.aggregate, sasg_jax.identity())
adaptive_aggregate = functools.partial(
    sasg_jax.aggregate, sasg_jax.top_k(DENSITY), sasg_jax.innovation(1.0)
)
AGGREGATES = {
    "dense": dense_aggregate,
    "sparse": functools.partial(sasg_jax.aggregate, sasg_jax.top_k(DENSITY)),
    "adaptive": adaptive_aggregate,
}


def _trace(tx, grads=PARAMS, params=PARAMS, axis_name="workers", num_workers=M, **kwargs):
    """Traces one update on ``num_workers`` workers; raises what update raises."""
    state = tx.init(PARAMS)
    return jax.eval_shape(
        jax.vmap(
            lambda _: tx.update(grads, state, params, **kwargs),
            axis_name=axis_name,
            axis_size=num_workers,
        ),
        jnp.zeros(num_workers),
    )


# Bad arguments, when the transformation is built --------------------------------------------------


@pytest.mark.parametrize(
    "make", [*(functools.partial(f, 0.1) for f in METHODS.values()), *AGGREGATES.values()]
)
@pytest.mark.parametrize("value", [0, -1, 2.5, True, "4", None])
def test_num_workers(make, value):
    with pytest.raises(
        ValueError,
        match=rf"^Expected num_workers={re.escape(repr(value))} to be an integer of at least 1\.$",
    ):
        make(num_workers=value)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("value", [0, -0.1, np.nan, np.inf, True, "0.1", None], ids=repr)
def test_learning_rate(name, value):
    with pytest.raises(ValueError, match=r"^Expected learning_rate=.* to be a (finite )?number ab"):
        METHODS[name](value, num_workers=M, **({"alpha": 1.0} if name in ADAPTIVE else {}))


@pytest.mark.parametrize("density", [0, -1, 1.5, np.nan, True, "0.1"], ids=repr)
@pytest.mark.parametrize("method", [sasg_jax.sasg, sasg_jax.sparse_sgd])
def test_density(method, density):
    with pytest.raises(ValueError, match=r"^Expected density=.* in \(0, 1\]\.$"):
        method(0.1, num_workers=M, density=density)


@pytest.mark.parametrize("argument", ["max_staleness", "history"])
@pytest.mark.parametrize("method", [sasg_jax.sasg, sasg_jax.lasg])
def test_caps(method, argument):
    with pytest.raises(ValueError, match=f"^Expected {argument}=0 to be an integer of at least 1"):
        method(0.1, num_workers=M, **{argument: 0})


@pytest.mark.parametrize("method", [sasg_jax.sasg, sasg_jax.lasg])
@pytest.mark.parametrize(
    ("alpha", "allowed"),
    [
        ([1.0, 2.0], "to be one number or history=10 numbers"),
        (-1.0, "to be finite and at least 0"),
        (np.nan, "to be finite and at least 0"),
        ("0.5", "to be "),
    ],
)
def test_alpha(method, alpha, allowed):
    with pytest.raises(ValueError, match=rf"^Expected alpha=.* {allowed}"):
        method(0.1, num_workers=M, alpha=alpha)


def test_alpha_function_that_returns_a_wrong_length():
    tx = sasg_jax.sasg(0.1, num_workers=M, alpha=lambda rate: [rate, rate])
    with pytest.raises(ValueError, match=r"Expected alpha=.* to be one number or history=10 numb"):
        _trace(tx, grad_fn=lambda p: p)


def test_alpha_function_without_a_learning_rate():
    rule = sasg_jax.innovation(sasg_jax.released_alpha(0.5, M))
    with pytest.raises(ValueError, match=r"^Expected alpha to be a number.*aggregate has none\.$"):
        sasg_jax.aggregate(sasg_jax.top_k(0.1), rule, num_workers=M)


@pytest.mark.parametrize("name", METHODS)
def test_unknown_exchange(name):
    with pytest.raises(
        ValueError,
        match=r"^Expected exchange='ring' to be one of 'gather', 'lazy', 'relay', .* 'psum'\.$",
    ):
        METHODS[name](0.1, num_workers=M, exchange="ring")


@pytest.mark.parametrize("name", [name for name in METHODS if name != "sgd"])
def test_psum_is_for_dense_and_always(name):
    with pytest.raises(
        ValueError,
        match=r"^Expected exchange='psum' only for identity compression with always uploading\.$",
    ):
        METHODS[name](0.1, num_workers=M, exchange="psum")


@pytest.mark.parametrize("axis_name", ["", None, 3])
def test_axis_name(axis_name):
    with pytest.raises(ValueError, match=r"^Expected axis_name=.* to be a non-empty string\.$"):
        sasg_jax.sasg(0.1, num_workers=M, axis_name=axis_name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"compressor": 0.1}, "Expected compressor=0.1 to be made by sasg_jax.top_k or sasg_jax."),
        ({"upload_rule": 1.0}, "Expected upload_rule=1.0 to be made by sasg_jax.innovation or "),
        ({"downlink": 0.1}, "Expected downlink=0.1 to be made by sasg_jax.top_k or sasg_jax.ident"),
    ],
)
def test_parts_of_another_type(arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        sasg_jax.aggregate(num_workers=M, **arguments)


@pytest.mark.parametrize(
    ("factory", "arguments"),
    [
        (sasg_jax.sasg, {"density": 0.1}),
        (sasg_jax.sparse_sgd, {"density": 0.1}),
        (sasg_jax.lasg, {}),
        (sasg_jax.sgd, {}),
    ],
)
def test_injected_hyperparameters_need_static_arguments(factory, arguments):
    tx = optax.inject_hyperparams(factory)(0.1, num_workers=M, **arguments)
    with pytest.raises(TypeError, match=r"Expected .* known when .* pass static_args=.*'density'"):
        jax.eval_shape(tx.init, PARAMS)


# Bad arguments of init and update -----------------------------------------------------------------


@pytest.mark.parametrize("params", [{}, (), {"a": None}], ids=repr)
def test_empty_tree(params):
    with pytest.raises(ValueError, match=r"^Expected params to hold at least one array, got"):
        sasg_jax.sasg(0.1, num_workers=M).init(params)


def test_integer_parameter_is_named():
    params = {"layer": [jnp.zeros(3), jnp.zeros(3, jnp.int32)]}
    with pytest.raises(
        TypeError,
        match=r"^Expected params\['layer'\]\[1\] to be of a floating-point type, got int3",
    ):
        sasg_jax.sasg(0.1, num_workers=M).init(params)


def test_complex_parameter_is_named():
    with pytest.raises(TypeError, match=r"^Expected params\['c'\] to be of a floating-point type"):
        sasg_jax.sgd(0.1, num_workers=M).init({"c": jnp.zeros(3, jnp.complex64)})


def test_parameter_without_entries_is_named():
    with pytest.raises(ValueError, match=r"^Expected params\['e'\] to have between 1 and 2\*\*31"):
        sasg_jax.sasg(0.1, num_workers=M).init({"e": jnp.zeros((3, 0))})


def test_params_must_be_passed():
    with pytest.raises(ValueError, match=r"^Expected params to be passed to update\("):
        _trace(sasg_jax.sasg(0.1, num_workers=M), params=None)


def test_number_of_workers_is_the_size_of_the_axis():
    tx = sasg_jax.sasg(0.1, num_workers=M + 1)
    with pytest.raises(
        ValueError, match=r"^Expected num_workers=5 to equal the size of axis 'workers', which is 4"
    ):
        _trace(tx, grad_fn=lambda p: p)


@pytest.mark.parametrize("name", METHODS)
def test_unknown_axis(name):
    tx = METHODS[name](0.1, num_workers=M, axis_name="batch")
    message = r"^Expected axis_name='batch' to be a mapped axis, but no axis of that name is in sc"
    with pytest.raises(ValueError, match=message):
        _trace(tx, grad_fn=lambda p: p)
    with pytest.raises(ValueError, match=message):  # no map at all
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, grad_fn=lambda p: p)


@pytest.mark.parametrize("name", METHODS)
def test_gradients_must_be_like_the_parameters(name):
    tx = METHODS[name](0.1, num_workers=M)
    with pytest.raises(ValueError, match=r"^Expected grads to have the structure of params"):
        _trace(tx, grads={"b": PARAMS["b"]}, grad_fn=lambda p: p)
    with pytest.raises(
        ValueError,
        match=r"^Expected grads\['b'\] to have the shape of its parameter, \(6,\), got \(7,\)",
    ):
        _trace(tx, grads=PARAMS | {"b": jnp.zeros(7)}, grad_fn=lambda p: p)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_stale_gradients_must_be_like_the_parameters(name):
    tx = METHODS[name](0.1, num_workers=M)
    with pytest.raises(ValueError, match=r"^Expected stale_grads to have the structure of params"):
        _trace(tx, stale_grads={"b": PARAMS["b"]})
    with pytest.raises(ValueError, match=r"^Expected stale_grads\['b'\] to have the shape"):
        _trace(tx, grad_fn=lambda p: PARAMS | {"b": jnp.zeros(7)})


@pytest.mark.parametrize("name", METHODS)
def test_gradient_function_is_needed_by_adaptive_rules_only(name):
    tx = METHODS[name](0.1, num_workers=M)
    if name in ADAPTIVE:
        with pytest.raises(TypeError, match=r"needs grad_fn=.* or .* as stale_grads="):
            _trace(tx)
    else:
        _trace(tx)


@pytest.mark.parametrize("make", [METHODS["sasg"], METHODS["sgd"]])
def test_gradients_that_shard_map_has_summed_are_refused(make):
    """With the default check_vma=True, jax.grad of replicated parameters sums over workers."""
    tx = make(LEARNING_RATE, num_workers=M)
    run = problems.start(tx, PARAMS)
    own = sasg_jax.per_worker(run.opt_state)

    def on_one_device(params, opt_state, batch):
        opt_state = jax.tree.map(lambda o, x: x[0] if o else x, own, opt_state)

        def grad_fn(p):
            return jax.grad(problems.quadratic_loss)(p, problems.at(batch, 0))

        updates, _ = tx.update(grad_fn(params), opt_state, params, grad_fn=grad_fn)
        return updates

    mesh = jax.make_mesh((M,), ("workers",), axis_types=(AxisType.Auto,), devices=jax.devices()[:M])
    specs = sasg_jax.worker_specs(run.opt_state)
    in_specs = (PartitionSpec(), specs, PartitionSpec("workers"))
    mapped = jax.shard_map(on_one_device, mesh=mesh, in_specs=in_specs, out_specs=PartitionSpec())
    with pytest.raises(
        ValueError, match=r"shard_map has summed over axis 'workers'\. Pass check_vma=False"
    ):
        jax.eval_shape(mapped, *run, problems.centres())


# Gradients that are not finite --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        *((name, np.nan) for name in METHODS),
        *((f"aggregate_{name}", np.nan) for name in AGGREGATES),
        ("sasg", np.inf),
        ("sgd", -np.inf),
    ],
)
def test_worker_with_a_gradient_that_is_not_finite_sits_the_round_out(name, bad):
    """In round 0 and in the middle of a run, inside jit."""
    if name in METHODS:
        tx = METHODS[name](LEARNING_RATE, num_workers=M)
    else:
        make = AGGREGATES[name.removeprefix("aggregate_")]
        tx = optax.chain(make(num_workers=M), optax.sgd(LEARNING_RATE))
    sick, rounds = 2, 6
    batches = problems.centres(rounds=rounds, seed=5)
    for t in (0, 4):
        batches["w"][t, sick, 1, 1] = bad
    run = problems.start(tx, PARAMS)
    step = problems.map_workers(tx, run)
    for t in range(rounds):
        before, run = run, step(run, problems.at(batches, t))
        old, new = _ours(before), _ours(run)
        healthy = [m for m in range(M) if m != sick or t not in (0, 4)]
        assert np.flatnonzero(new.worker.finite).tolist() == healthy
        assert np.flatnonzero(new.worker.uploaded).tolist() == healthy  # D = 10: all upload
        chex.assert_tree_all_finite((run.params, new.worker._replace(innovation=()), new.server))
        if t in (0, 4):
            carried = [(s.worker.residual, s.worker.stale_params) for s in (old, new)]
            carried += [s.server.messages for s in (old, new)]
            kept = [problems.at(tree, sick) for tree in carried]
            chex.assert_trees_all_equal(kept[0], kept[1])
            chex.assert_trees_all_equal(kept[2], kept[3])
            assert int(new.worker.staleness[sick]) == int(old.worker.staleness[sick]) + 1
        else:
            assert int(new.worker.staleness[sick]) == 1


def _ours(run):
    (state,) = (
        node
        for node in jax.tree.leaves(
            run.opt_state, is_leaf=lambda x: isinstance(x, sasg_jax.AggregateState)
        )
        if isinstance(node, sasg_jax.AggregateState)
    )
    return state


@pytest.mark.parametrize("name", ["sgd", "sparse_sgd"])
def test_worker_that_sits_out_counts_as_a_message_of_zeros(name):
    tx = METHODS[name](LEARNING_RATE, num_workers=M, **({} if name == "sgd" else {"density": 1}))
    batch = problems.centres()
    batch["b"][1] = np.nan
    run = problems.start(tx, PARAMS)
    run = problems.map_workers(tx, run)(run, batch)
    healthy = [0, 2, 3]
    want = jax.tree.map(lambda c: LEARNING_RATE * c[healthy].sum(0) / M, batch)
    chex.assert_trees_all_close(run.params, want, atol=1e-6)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_run_with_gradients_that_are_not_finite_equals_the_oracle(name):
    """One worker sick now and then, one sick in round 0, all sick in one round."""
    rounds = 60
    images, labels = (x[:rounds].copy() for x in problems.mlp_batches(M))
    for t, m in [(0, 2), (7, 1), (15, 2), (16, 2), (20, slice(None)), (40, 0)]:
        images[t, m, 0, 0] = np.nan
    with np.errstate(invalid="ignore"):
        expected = oracle.train(
            lambda m, t, params: oracle.mlp_grad(params, images[t, m], labels[t, m]),
            problems.mlp_params(),
            num_workers=M,
            rounds=rounds,
            learning_rate=LEARNING_RATE,
            density=None if name == "lasg" else DENSITY,
            alpha=problems.ALPHA,
            downlink_density=DENSITY if name == "two_way" else None,
        )
    train_step = problems.mlp_step(M, name)
    state = train_step.init(problems.mlp_params())
    uploaded, finite = [], []
    for t in range(rounds):
        state, info = train_step.step(state, (images[t], labels[t]))
        uploaded.append(info.uploaded)
        finite.append(info.finite)
    np.testing.assert_array_equal(np.stack(uploaded), expected.uploaded)
    np.testing.assert_array_equal(np.stack(finite), np.isfinite(images).all((2, 3)))
    chex.assert_trees_all_close(state.params, expected.params, rtol=0, atol=1e-5)


# What a round keeps -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sparse_sgd", "sasg", "two_way"])
def test_rounds_conserve(name):
    """What workers computed is in the parameters, in their residuals, or in the server's.

    Under always: w0 - w_T = sum of mean(gamma g) - mean(e) - r, to float tolerance; bit for bit in
    test_worker and test_server.
    """
    adaptive = {"max_staleness": 1, "history": 1} if name in ADAPTIVE else {}
    tx = METHODS[name](LEARNING_RATE, num_workers=M, **adaptive)
    rounds = 12
    batches = problems.centres(rounds=rounds, seed=5)
    run = problems.start(tx, PARAMS)
    step = problems.map_workers(tx, run)
    total = jax.tree.map(np.zeros_like, problems.to_numpy(PARAMS))
    for t in range(rounds):
        batch = problems.at(batches, t)
        total = jax.tree.map(
            lambda s, w, c: s + LEARNING_RATE * (np.asarray(w)[None] - c).mean(0),
            total,
            run.params,
            batch,
        )
        run = step(run, batch)
    left = jax.tree.map(lambda e: e.mean(0), run.opt_state.worker.residual)
    if name == "two_way":
        left = jax.tree.map(jnp.add, left, run.opt_state.server.downlink_residual)
        assert all(np.any(x) for x in jax.tree.leaves(run.opt_state.server.downlink_residual))
    moved = jax.tree.map(jnp.subtract, PARAMS, run.params)
    chex.assert_trees_all_close(moved, jax.tree.map(jnp.subtract, total, left), atol=1e-6)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_stale_grads_may_be_passed_instead_of_a_function(name):
    tx = METHODS[name](LEARNING_RATE, num_workers=M, history=1)
    batches = problems.centres(rounds=4, seed=6)
    by_function = by_value = problems.start(tx, PARAMS)
    step = problems.map_workers(tx, by_function)
    axes = sasg_jax.worker_axes(by_value.opt_state)

    def worker_step(params, opt_state, batch):
        grad = jax.grad(problems.quadratic_loss)
        updates, opt_state = tx.update(
            grad(params, batch),
            opt_state,
            params,
            stale_grads=grad(opt_state.worker.stale_params, batch),
        )
        return optax.apply_updates(params, updates), opt_state

    mapped = jax.jit(
        jax.vmap(
            worker_step,
            in_axes=(None, axes, 0),
            out_axes=(None, axes),
            axis_name="workers",
        )
    )
    for t in range(4):
        by_function = step(by_function, problems.at(batches, t))
        by_value = problems.Run(*mapped(*by_value, problems.at(batches, t)))
    chex.assert_trees_all_equal(by_function, by_value)


def test_aggregate_compresses_the_mean_before_an_optimizer():
    """One worker, top 1 of 4: the update is the largest entry of gradient + residual."""
    tx = sasg_jax.aggregate(sasg_jax.top_k(0.25), num_workers=1)
    params = jnp.zeros(4)
    state: Any = tx.init(params)
    grads = jnp.array([1.0, -3.0, 2.0, 0.5])
    update: Any = jax.vmap(
        lambda state, _: tx.update(grads, state, params),
        in_axes=(None, 0),
        out_axes=(None, None),
        axis_name="workers",
    )
    sent = []
    for _ in range(3):
        updates, state = update(state, jnp.zeros(1))
        sent.append(updates.tolist())
    assert sent == [[0, -3, 0, 0], [0, 0, 4, 0], [0, -6, 0, 0]]
    assert state.worker.residual.tolist() == [3, 0, 2, 1.5]


@pytest.mark.parametrize("name", METHODS)
def test_state_does_not_alias_the_parameters(name):
    """A step that donates its state must not take the caller's parameters with it."""
    state = METHODS[name](0.1, num_workers=M).init(PARAMS)
    mine = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(PARAMS)}
    assert not mine & {x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)}


# Reading the state --------------------------------------------------------------------------------


def test_diagnostics_through_wrappers():
    tx = optax.chain(
        optax.clip(1.0),
        optax.inject_hyperparams(METHODS["sasg"], static_args=STATIC_ARGUMENTS)(
            0.1, num_workers=M, density=0.1
        ),
    )
    run = problems.start(tx, PARAMS)
    run = problems.map_workers(tx, run)(run, problems.centres())
    got = sasg_jax.diagnostics(run.opt_state)
    chex.assert_shape((got.uploaded, got.finite, got.staleness, got.innovation), (M,))
    chex.assert_shape(got.threshold, ())
    assert np.all(got.uploaded)
    assert got.staleness.tolist() == [1] * M


@pytest.mark.parametrize(
    ("tx", "found"),
    [
        (optax.adam(0.1), 0),
        (optax.chain(dense_aggregate(num_workers=M), sasg_jax.sgd(0.1, num_workers=M)), 2),
    ],
)
def test_diagnostics_of_another_state(tx, found):
    with pytest.raises(
        ValueError, match=rf"contain exactly one state of sasg_jax .*, found {found}"
    ):
        sasg_jax.diagnostics(tx.init(PARAMS))


def test_unique_field_names():
    """optax.tree.get finds a field through any chain by its name alone."""
    state = optax.chain(adaptive_aggregate(num_workers=M), optax.adam(0.1)).init(PARAMS)
    for name in ("residual", "stale_params", "staleness", "uploaded", "round", "messages"):
        optax.tree.get(state, name)  # raises if the name is not unique
        assert optax.tree.get(state, name) is not None


@pytest.mark.parametrize("name", METHODS)
def test_state_holds_no_empty_arrays(name):
    """Checkpointing libraries refuse them."""
    state = METHODS[name](0.1, num_workers=M).init({"a": jnp.ones(5)})
    assert all(leaf.size > 0 for leaf in jax.tree.leaves(state))
