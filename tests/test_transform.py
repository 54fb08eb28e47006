"""The transformation: bad arguments, gradients that are not finite, pipeline, diagnostics."""

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
from problems import ADAPTIVE, ALPHA, DENSITY, LEARNING_RATE, METHODS, M

import sasg_jax
from sasg_jax._checks import STATIC_ARGUMENTS
from sasg_jax.compressors import Compressed
from sasg_jax.transform import before_ours

PARAMS = problems.quadratic_params()
TOP_K = sasg_jax.top_k(DENSITY)
dense_aggregate = functools.partial(sasg_jax.aggregate, sasg_jax.identity())
adaptive_aggregate = functools.partial(sasg_jax.aggregate, TOP_K, sasg_jax.innovation(1.0))


def _trace(tx, grads=PARAMS, params=PARAMS, state=None, num_workers=M, **kwargs):
    """Traces one update on ``num_workers`` workers; raises what update raises."""
    state = tx.init(PARAMS) if state is None else state
    return jax.eval_shape(
        jax.vmap(
            lambda _: tx.update(grads, state, params, **kwargs),
            axis_name="workers",
            axis_size=num_workers,
        ),
        jnp.zeros(num_workers),
    )


# Bad arguments, when the transformation is built --------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        *(functools.partial(f, 0.1) for f in METHODS.values()),
        functools.partial(sasg_jax.compressed_sgd, 0.1),
        sasg_jax.aggregate,
    ],
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"exchange": "ring"}, r"^Expected exchange='ring' to be one of 'gather', 'lazy', 'serv"),
        ({"exchange": "psum"}, r"^Expected exchange='psum' to be another where a worker may be "),
        ({"axis_name": None}, r"^Expected axis_name=None to be a non-empty string\.$"),
        ({"silence": "hold"}, r"^Expected silence='hold' to be one of 'reuse', 'keep', 'drop'"),
        ({"downlink": 0.1}, r"^Expected downlink=0.1 to be made by sasg_jax.top_k"),
    ],
)
@pytest.mark.parametrize("make", [sasg_jax.lasg, sasg_jax.sasg, adaptive_aggregate])
def test_parts_that_all_take(make, arguments, message):
    rate = () if make is adaptive_aggregate else (0.1,)
    with pytest.raises(ValueError, match=message):
        make(*rate, num_workers=M, **arguments)


@pytest.mark.parametrize("name", METHODS)
def test_unknown_argument(name):
    with pytest.raises(TypeError, match="unexpected keyword argument 'densty'"):
        METHODS[name](0.1, num_workers=M, densty=0.1)


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


@pytest.mark.parametrize(
    ("leaf", "error", "message"),
    [
        (
            jnp.zeros(3, jnp.int32),
            TypeError,
            "to be of a floating-point type of 16 bits or more, g",
        ),
        (jnp.zeros(3, jnp.complex64), TypeError, "to be of a floating-point type of 16 bits or mo"),
        (jnp.zeros(3, jnp.float8_e4m3fn), TypeError, "to be of a floating-point type of 16 bits o"),
        (jnp.sin, TypeError, "to be of a floating-point type of 16 bits or more, got <"),
        (jnp.zeros((3, 0)), ValueError, r"to have between 1 and 2\*\*31 - 1 entries, got shape"),
        (
            jax.ShapeDtypeStruct((2**16, 2**15), jnp.float16),
            ValueError,
            r"to have between 1 and 2\*\*31 - 1 entries, got shape \(65536, 32768\)",
        ),
    ],
    ids=["integer", "complex", "float8", "function", "empty", "too large"],
)
def test_parameter_that_cannot_be_trained_is_named(leaf, error, message):
    tx = sasg_jax.sasg(0.1, num_workers=M)
    init = lambda leaf: tx.init({"layer": [jnp.zeros(3), leaf]})
    if isinstance(leaf, jax.ShapeDtypeStruct):
        init = functools.partial(jax.eval_shape, init)
    with pytest.raises(error, match=rf"^Expected params\['layer'\]\[1\] {message}"):
        init(leaf)


def test_params_must_be_passed():
    with pytest.raises(ValueError, match=r"^Expected params in update\("):
        _trace(sasg_jax.sasg(0.1, num_workers=M), params=None)


def test_number_of_workers_is_the_size_of_the_axis():
    tx = sasg_jax.sasg(0.1, num_workers=M + 1)
    with pytest.raises(
        ValueError, match=r"^Expected num_workers=5 to equal the size of axis 'workers', which is 4"
    ):
        _trace(tx, grad_fn=lambda p: p)


def test_unknown_axis():
    tx = METHODS["sasg"](0.1, num_workers=M, axis_name="batch")
    message = r"^Expected axis_name='batch' to be a mapped axis, but no axis of that name is in sc"
    with pytest.raises(ValueError, match=message):
        _trace(tx, grad_fn=lambda p: p)
    with pytest.raises(ValueError, match=message):  # no map at all
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, grad_fn=lambda p: p)


def test_gradients_must_be_like_the_parameters():
    tx = METHODS["sgd"](0.1, num_workers=M)
    with pytest.raises(ValueError, match=r"^Expected grads to have the structure of params"):
        _trace(tx, grads={"b": PARAMS["b"]})
    with pytest.raises(
        ValueError,
        match=r"^Expected grads\['b'\] to have its shape in params, \(6,\), got \(7,\)",
    ):
        _trace(tx, grads=PARAMS | {"b": jnp.zeros(7)})


def test_gradients_at_other_parameters_must_be_like_them_too():
    tx = METHODS["sasg"](0.1, num_workers=M)
    with pytest.raises(ValueError, match=r"^Expected grad_fn\(params\) to have the structure of p"):
        _trace(tx, grad_fn=lambda p: {"b": p["b"]})
    with pytest.raises(ValueError, match=r"^Expected grad_fn\(params\)\['b'\] to have its shape"):
        _trace(tx, grad_fn=lambda p: p | {"b": jnp.zeros(7)})


@pytest.mark.parametrize("name", METHODS)
def test_gradient_function_is_needed_by_adaptive_rules_only(name):
    tx = METHODS[name](0.1, num_workers=M)
    if name in ADAPTIVE:
        with pytest.raises(TypeError, match=r"needs grad_fn=\.\.\., a function of the parameters"):
            _trace(tx)
    else:
        _trace(tx)


@pytest.mark.parametrize(
    "present", [jnp.ones(M + 1, bool), jnp.ones(M), jnp.asarray(True)], ids=["5", "float", "scalar"]
)
def test_present_is_a_flag_for_each_worker(present):
    with pytest.raises(ValueError, match=r"^Expected present to be of dtype bool and shape \(4,\)"):
        _trace(METHODS["sgd"](0.1, num_workers=M), present=present)


@pytest.mark.parametrize(
    ("other", "part"),
    [
        (sasg_jax.sasg(0.1, num_workers=M, density=0.2), "compressor=top_k(0.2)"),
        (METHODS["sasg"](0.1, num_workers=M, history=5), "rule=innovation(max_staleness=10, hist"),
        (METHODS["sasg"](0.1, num_workers=M, exchange="server"), "exchange=server"),
        (METHODS["sasg"](0.1, num_workers=M, silence="keep"), "silence=keep"),
        (METHODS["two_way"](0.1, num_workers=M), "downlink=top_k(0.1)"),
        (METHODS["sasg"](0.1, num_workers=8), "num_workers=8"),
    ],
)
def test_state_of_another_method_is_refused(other, part):
    tx = METHODS["sasg"](0.1, num_workers=M)
    with pytest.raises(ValueError, match=rf"state is of one with {re.escape(part)}"):
        _trace(tx, state=other.init(PARAMS), grad_fn=lambda p: p)


def test_state_of_another_optimiser_is_refused():
    pipeline = sasg_jax.pipeline(METHODS["sgd"](0.1, num_workers=M))
    alone = METHODS["sgd"](0.1, num_workers=M)
    for tx, state, kind in (
        (pipeline, alone.init(PARAMS), "AggregateState"),
        (alone, pipeline.init(PARAMS), "PipelineState"),
        (alone, optax.adam(0.1).init(PARAMS), "tuple"),
    ):
        with pytest.raises(ValueError, match=f"made, .*State, got one of {kind}. Make a state"):
            _trace(tx, state=state)


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


@pytest.mark.parametrize("collective", [jax.lax.psum, jax.lax.all_gather])
def test_collective_in_the_loss_is_refused_where_workers_may_wait_for_ever(collective):
    def grad_fn(p):
        return jax.tree.map(lambda x: x + collective(x, "workers").sum(), p)

    with pytest.raises(ValueError, match=r"^Expected a loss without collectives over axis 'worker"):
        _trace(METHODS["sasg"](0.1, num_workers=M), grad_fn=grad_fn)
    _trace(METHODS["sgd"](0.1, num_workers=M), grad_fn=grad_fn)


# Gradients that are not finite --------------------------------------------------------------------

SICK = {  # name: exchange, arguments of the oracle
    "sgd": (None, {}),
    "sparse_sgd": (None, {"density": DENSITY}),
    "lasg": (None, {"alpha": ALPHA}),
    "sasg": (None, {"density": DENSITY, "alpha": ALPHA}),
    "two_way": (None, {"density": DENSITY, "alpha": ALPHA, "downlink_density": DENSITY}),
}


@pytest.mark.parametrize(
    "name",
    [
        *("sgd", "two_way"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("sparse_sgd", "lasg", "sasg")),
    ],
)
def test_run_with_gradients_that_are_not_finite_equals_the_oracle(name):
    """One worker sick now and then, one sick in round 0, all sick in one round."""
    rounds = 60
    images, labels = (x[:rounds].copy() for x in problems.softmax_batches(M, rounds))
    for t, m, bad in [
        *((0, 2, np.nan), (7, 1, np.inf), (15, 2, -np.inf), (16, 2, np.nan)),
        *((20, slice(None), np.nan), (40, 0, np.nan)),
    ]:
        images[t, m, 0, 0] = bad
    with np.errstate(invalid="ignore"):
        expected = oracle.train(
            lambda m, t, params: oracle.softmax_grad(params, images[t, m], labels[t, m]),
            problems.softmax_params(),
            num_workers=M,
            rounds=rounds,
            learning_rate=LEARNING_RATE,
            **SICK[name][1],
        )
    train_step = sasg_jax.make_train_step(
        problems.softmax_loss, METHODS[name](LEARNING_RATE, num_workers=M), num_workers=M
    )
    run = jax.jit(problems.scan_rounds(train_step.step))
    state, infos = run(train_step.init(problems.softmax_params()), ((images, labels),))
    np.testing.assert_array_equal(infos.uploaded, expected.uploaded)
    np.testing.assert_array_equal(infos.finite, np.isfinite(images).all((2, 3)))
    np.testing.assert_array_equal(
        infos.staleness, np.where(expected.uploaded, 1, expected.staleness + 1)
    )
    chex.assert_trees_all_close(state.params, expected.params, rtol=0, atol=1e-5)
    if "density" in SICK[name][1]:
        residuals = jax.tree.map(lambda *xs: np.stack(xs), *expected.residuals)
        got = state.opt_state.worker.feedback.residual
        chex.assert_trees_all_close(got, residuals, rtol=0, atol=1e-5)
    assert expected.margin > 1e-5


# What an update makes -----------------------------------------------------------------------------


def test_aggregate_compresses_the_mean_before_an_optimizer():
    """One worker, top 1 of 4: the update is the largest entry of gradient + residual."""
    tx = sasg_jax.aggregate(sasg_jax.top_k(0.25), num_workers=1)
    params = jnp.zeros(4)
    state: Any = tx.init(params)
    grads = jnp.array([1.0, -3.0, 2.0, 0.5])
    update: Any = jax.jit(
        jax.vmap(
            lambda state, _: tx.update(grads, state, params),
            in_axes=(None, 0),
            out_axes=(None, None),
            axis_name="workers",
        )
    )
    sent = []
    for _ in range(3):
        updates, state = update(state, jnp.zeros(1))
        sent.append(updates.tolist())
    assert sent == [[0, -3, 0, 0], [0, 0, 4, 0], [0, -6, 0, 0]]
    assert state.worker.feedback.residual.tolist() == [3, 0, 2, 1.5]


@pytest.mark.slow
def test_rounds_conserve_both_ways():
    """What workers computed is in the parameters, in their residuals, or in the server's."""
    tx = METHODS["two_way"](LEARNING_RATE, num_workers=M, max_staleness=1, history=1)
    batches = problems.centres(rounds=12, seed=5)
    start = problems.start(tx, PARAMS)
    step = problems.map_workers(tx, start)
    scan = jax.jit(lambda start: jax.lax.scan(lambda r, b: (step(r, b), r.params), start, batches))
    run, path = scan(start)
    computed = jax.tree.map(
        lambda w, c: LEARNING_RATE * (np.asarray(w)[:, None] - c).mean(1).sum(0), path, batches
    )
    residual = run.opt_state.server.downlink_feedback.residual
    left = jax.tree.map(
        lambda e, r: e.mean(0) + r, run.opt_state.worker.feedback.residual, residual
    )
    assert all(np.any(x) for x in jax.tree.leaves(residual))
    moved = jax.tree.map(jnp.subtract, PARAMS, run.params)
    chex.assert_trees_all_close(moved, jax.tree.map(jnp.subtract, computed, left), atol=1e-6)


def test_compressor_that_takes_means_inside():
    """A worker that is refused or absent adds zeros to the mean, and keeps its residual."""

    def compress_mean(tree, memory, key, mean):
        doubled = jax.tree.map(lambda x: 2 * x, mean(tree))
        return Compressed(doubled, jax.tree.map(lambda x: 0.5 * x, tree), memory + 1)

    compressor = sasg_jax.Compressor(
        name="twice()", compress_mean=compress_mean, init_memory=lambda tree: jnp.zeros(())
    )
    tx = sasg_jax.compressed_sgd(0.5, compressor, num_workers=M)
    run = problems.start(tx, PARAMS)
    present = jnp.array([True, True, True, False])
    step = problems.map_workers(tx, run, present=present)
    first, second = problems.centres(seed=1), problems.centres(seed=2)
    second["b"][1] = np.nan
    run = step(run, first)
    p = {k: -0.5 * first[k] for k in first}
    want = {k: -2 * p[k][:3].sum(0) / M for k in p}
    chex.assert_trees_all_close(run.params, want, atol=1e-6)
    residual = {k: np.where([[1], [1], [1], [0]], 0.5 * p[k].reshape(M, -1), 0) for k in p}
    residual = {k: residual[k].reshape(p[k].shape) for k in p}
    chex.assert_trees_all_close(run.opt_state.worker.feedback.residual, residual, atol=1e-6)

    params = problems.to_numpy(run.params)
    run = step(run, second)
    for k in p:
        p[k] = 0.5 * (params[k] - second[k]) + residual[k]
        p[k][[1, 3]] = 0  # refused and absent
        want = params[k] - 2 * p[k].sum(0) / M
        np.testing.assert_allclose(run.params[k], want, atol=1e-6)
        np.testing.assert_allclose(
            run.opt_state.worker.feedback.residual[k],
            np.stack([0.5 * p[k][0], residual[k][1], 0.5 * p[k][2], residual[k][3]]),
            atol=1e-6,
        )
    got = sasg_jax.diagnostics(run.opt_state)
    assert got.uploaded.tolist() == [True, False, True, False]
    assert got.finite.tolist() == [True, False, True, True]
    assert got.staleness.tolist() == [1, 2, 1, 3]
    assert run.opt_state.worker.compressor_memory.tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize("name", METHODS)
def test_state_does_not_alias_the_parameters(name):
    """A step that donates its state must not take the caller's parameters with it."""
    state = METHODS[name](0.1, num_workers=M).init(PARAMS)
    mine = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(PARAMS)}
    assert not mine & {x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)}


# What stands around ours --------------------------------------------------------------------------


def _parts():
    return (
        optax.clip_by_global_norm(1.0),
        optax.trace(0.5),
        sasg_jax.aggregate(TOP_K, sasg_jax.innovation(10.0, history=2), num_workers=M),
        optax.adam(0.1),
    )


def test_pipeline_is_the_chain():
    """As long as every worker's gradient counts. A pipeline may stand in another."""
    first, second, ours, after = _parts()
    runs = []
    for tx in (
        optax.chain(first, second, ours, after),
        sasg_jax.pipeline(first, sasg_jax.pipeline(second, ours), after),
    ):
        start = problems.start(tx, PARAMS)
        step = problems.map_workers(tx, start)
        batches = problems.centres(rounds=2, seed=5)
        scan = jax.jit(
            lambda run, step=step, batches=batches: jax.lax.scan(
                lambda run, batch: (step(run, batch), run.params), run, batches
            )
        )
        runs.append(jax.device_get(scan(start)[0].params))
    chex.assert_trees_all_equal(*runs)


@pytest.mark.parametrize("count", [0, 2])
def test_pipeline_has_exactly_one_of_ours(count):
    ours = [sasg_jax.sgd(0.1, num_workers=M)] * count
    with pytest.raises(ValueError, match=rf"exactly one of sasg_jax .*, got {count}\.$"):
        sasg_jax.pipeline(optax.clip(1.0), *ours, optax.adam(0.1))


def test_what_follows_gets_the_extra_arguments():
    """Those that ours has no use for."""

    def update(updates, state, params=None, *, value: Any = None, **extra_args):
        del params
        assert "grad_fn" not in extra_args
        return jax.tree.map(lambda u: u + value, updates), state

    after = optax.GradientTransformationExtraArgs(lambda params: (), update)
    tx = sasg_jax.pipeline(dense_aggregate(num_workers=M), after)
    run = problems.start(tx, PARAMS)
    run = problems.map_workers(tx, run, value=jnp.float32(7), value_fn=sum)(run, problems.centres())
    want = jax.tree.map(lambda c: 7 - c.mean(0), problems.centres())
    chex.assert_trees_all_close(run.params, want, atol=1e-6)


def test_gradient_before_ours():
    """Through what stands before ours, and nothing else; no state is changed."""
    first, second, ours, _ = _parts()

    def fail(updates, state, params=None):
        raise AssertionError("stands after ours")

    fails = optax.GradientTransformation(lambda params: (), fail)
    tx = optax.chain(first, second, ours, fails)
    state = tx.init(PARAMS)
    grads = jax.tree.map(lambda x: jnp.full_like(x, 10.0), PARAMS)
    norm = 10 * np.sqrt(30)
    get = jax.jit(lambda: before_ours(optax.with_extra_args_support(tx), grads, state, PARAMS))
    chex.assert_trees_all_close(get(), jax.tree.map(lambda g: g / norm, grads), rtol=1e-5)
    other = optax.with_extra_args_support(optax.adam(0.1))
    with pytest.raises(ValueError, match=r"^Expected tx to contain a transformation of sasg_jax"):
        before_ours(other, grads, other.init(PARAMS), PARAMS)


# Reading the state --------------------------------------------------------------------------------


def test_diagnostics_through_wrappers():
    tx = optax.chain(
        optax.clip(1.0),
        optax.inject_hyperparams(METHODS["sasg"], static_args=STATIC_ARGUMENTS)(
            0.1, num_workers=M, density=0.1
        ),
    )
    got = sasg_jax.diagnostics(problems.start(tx, PARAMS).opt_state)
    chex.assert_shape((got.uploaded, got.finite, got.staleness, got.innovation), (M,))
    chex.assert_shape(got.threshold, ())
    assert got.staleness.tolist() == [10] * M  # all are due


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
    tx = optax.chain(adaptive_aggregate(num_workers=M, downlink=TOP_K), optax.adam(0.1))
    state = tx.init(PARAMS)
    for name in ("stale_params", "staleness", "uploaded", "used", "round", "threshold", "history"):
        assert optax.tree.get(state, name) is not None  # raises if the name is not unique


@pytest.mark.parametrize("name", METHODS)
def test_state_holds_no_empty_arrays(name):
    """Checkpointing libraries refuse them."""
    state = METHODS[name](0.1, num_workers=M).init({"a": jnp.ones(5)})
    assert all(leaf.size > 0 for leaf in jax.tree.leaves(state))
