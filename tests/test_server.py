"""The server's half of a round: its memory, the mean, and the way down."""

import functools

import by_hand
import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import problems
import pytest
from problems import M

import sasg_jax
from sasg_jax.server import init_server, replace_messages, server_half
from sasg_jax.worker import init_worker, worker_half

PARAMS = problems.to_numpy(problems.quadratic_params())
RULE = sasg_jax.innovation(10.0, history=2, max_staleness=4)
TOP_K, WIDE_TOP_K = sasg_jax.top_k(0.25), sasg_jax.top_k(0.5)


def test_replaces_the_messages_that_arrived():
    old = {"values": np.arange(12.0, dtype=np.float32).reshape(4, 3), "n": np.arange(4)}
    fresh = jax.tree.map(lambda x: -x - 1, old)
    got = replace_messages(old, fresh, jnp.array([True, False, False, True]))
    want = {
        "values": np.array([[-1, -2, -3], [3, 4, 5], [6, 7, 8], [-10, -11, -12]], np.float32),
        "n": np.array([-1, 1, 2, -4]),
    }
    chex.assert_trees_all_equal(problems.to_numpy(got), want)


# What it remembers --------------------------------------------------------------------------------


def _init(*parts, **kwargs):
    method = sasg_jax.make_method(*parts, num_workers=M, **kwargs)
    return jax.eval_shape(lambda: init_server(method, PARAMS))


@pytest.mark.parametrize("compressor", [sasg_jax.identity(), TOP_K], ids=["identity", "top_k"])
def test_remembers_a_message_of_each_worker_where_a_silent_one_counts_as_its_last(compressor):
    message = compressor.message_shapes(PARAMS)
    rows = jax.tree.map(lambda s: jax.ShapeDtypeStruct((M, *s.shape), s.dtype), message)
    chex.assert_trees_all_equal_shapes_and_dtypes(_init(compressor, RULE).memory, rows)
    for rule, silence in ((RULE, "keep"), (RULE, "drop"), (sasg_jax.always(), None)):
        assert _init(compressor, rule, silence=silence).memory == ()


def test_remembers_the_sum_of_reconstructions():
    """In float32: sums of numbers in half precision need not fit."""
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    method = sasg_jax.make_method(TOP_K, num_workers=M, feedback=sasg_jax.reconstruction())
    memory = jax.eval_shape(lambda: init_server(method, half)).memory
    chex.assert_trees_all_equal_shapes_and_dtypes(memory, PARAMS)


def test_has_a_residual_where_the_way_down_is_compressed():
    residual = _init(downlink=TOP_K).downlink_feedback.residual
    chex.assert_trees_all_equal_shapes_and_dtypes(residual, PARAMS)
    assert _init(downlink=sasg_jax.identity()).downlink_feedback == ()
    assert _init().downlink_feedback == ()


# One round ----------------------------------------------------------------------------------------


def _messages(values):
    """Dense messages of all workers: every entry of worker m's is values[m]."""
    return jax.tree.map(lambda x: np.stack([np.full_like(x, value) for value in values]), PARAMS)


def _assert_three_rounds(method, steps):
    """All upload 1, 2, 3, 4, then workers 0 and 3 upload 10 and 40, and nobody does."""
    half = jax.jit(functools.partial(server_half, method))
    server = init_server(method, PARAMS)
    uploads = ([1, 1, 1, 1], [1, 0, 0, 1], [0, 0, 0, 0])
    messages = ([1, 2, 3, 4], [10, 99, 99, 40], [99, 99, 99, 99])
    last = steps[-1] if method.silence == "reuse" else 0.0
    for uploaded, values, want in zip(uploads, messages, [*steps, last], strict=True):
        step, server = half(server, _messages(values), np.asarray(uploaded, bool), PARAMS)
        chex.assert_trees_all_equal(
            problems.to_numpy(step), jax.tree.map(lambda x, w=want: np.full_like(x, w), PARAMS)
        )
    assert int(server.round) == 3


@pytest.mark.parametrize(
    ("silence", "steps"),
    [("reuse", [2.5, (10 + 2 + 3 + 40) / 4]), ("keep", [2.5, 12.5]), ("drop", [2.5, 25.0])],
)
def test_what_a_silent_worker_counts_as(silence, steps):
    """Its last message, or nothing, in a mean over all or over those that sent."""
    method = sasg_jax.make_method(
        sasg_jax.identity(), RULE, num_workers=M, silence=silence, learning_rate=1.0
    )
    _assert_three_rounds(method, steps)


@pytest.mark.parametrize(
    ("silence", "steps"),
    [("reuse", [2.5, (10 + 2 + 3 + 40) / 4]), ("keep", [2.5, 25.0]), ("drop", [2.5, 25.0])],
)
def test_mean_over_senders_of_who_is_silent(silence, steps):
    """As above: a last message that counts again has been sent, nothing has not."""
    method = sasg_jax.make_method(
        sasg_jax.identity(), RULE, num_workers=M, silence=silence, mean="senders"
    )
    _assert_three_rounds(method, steps)


@pytest.mark.parametrize(
    ("exchange", "silence"),
    [
        ("gather", "keep"),
        ("lazy", "drop"),
        ("relay", "keep"),
        ("server", "drop"),
        ("sharded", "keep"),
        ("sharded", "drop"),
    ],
)
def test_mean_over_senders_over_any_exchange(exchange, silence):
    """Of directions with holes, from workers in turns: coordinate by coordinate, and replicas have
    the same bits."""
    rounds, rng = 4, np.random.default_rng(0)
    shapes = {"b": (6,), "w": (4, 6)}
    batches = {k: rng.normal(size=(rounds, M, *s)).astype(np.float32) for k, s in shapes.items()}
    batches = {k: np.where(rng.random(x.shape) < 0.5, x, 0) for k, x in batches.items()}
    how = {"exchange": exchange, "silence": silence, "mean": "senders"}
    tx = sasg_jax.compressed_sgd(1.0, sasg_jax.identity(), sasg_jax.every(2), num_workers=M, **how)
    loss = lambda params, batch: sum(jnp.vdot(params[k], batch[k]) for k in params)
    train_step = sasg_jax.make_train_step(loss, tx, num_workers=M, driver="shard_map")
    state = train_step.init(problems.quadratic_params())
    for t in range(rounds):
        state, _ = jax.block_until_ready(train_step.step(state, problems.at(batches, t)))
    for key in shapes:
        want, kept = np.zeros(shapes[key]), np.zeros((M, *shapes[key]))
        for t in range(rounds):
            turn = ((t + np.arange(M)) % 2 == 0).reshape(-1, *[1] * len(shapes[key]))
            pending = batches[key][t] + kept
            if silence == "keep":
                kept = np.where(turn, 0, pending)
            want -= by_hand.senders_mean(np.where(turn, pending, 0))
        np.testing.assert_allclose(state.params[key], want, rtol=1e-5, atol=1e-6)
    assert problems.same_on_all_devices(state.params)


def test_way_down_conserves():
    """Bit for bit: step + new residual = mean + old residual."""
    method = sasg_jax.make_method(
        sasg_jax.identity(), num_workers=M, downlink=TOP_K, learning_rate=1.0
    )
    half = jax.jit(functools.partial(server_half, method))
    server = init_server(method, PARAMS)
    rng = np.random.default_rng(0)
    for _ in range(3):
        messages = jax.tree.map(lambda x: rng.normal(size=(M, *x.shape)).astype(np.float32), PARAMS)
        old = server.downlink_feedback.residual
        step, server = half(server, messages, None, PARAMS)
        new = server.downlink_feedback.residual
        mean = jax.tree.map(lambda x: (((x[0] + x[1]) + x[2]) + x[3]) / np.float32(4), messages)
        chex.assert_trees_all_equal(
            jax.tree.map(np.add, step, new), jax.tree.map(np.add, mean, old)
        )
        for x in jax.tree.leaves(step):
            assert np.count_nonzero(x) == x.size // 4


@pytest.mark.parametrize("downlink", [None, WIDE_TOP_K], ids=["dense", "top_k"])
def test_mean_in_half_precision_is_that_of_the_numbers(downlink):
    """Four times 30,000 is no number of float16; their mean is."""
    params = jax.tree.map(lambda x: x.astype(np.float16), PARAMS)
    method = sasg_jax.make_method(
        sasg_jax.identity(), num_workers=M, downlink=downlink, learning_rate=1.0
    )
    messages = jax.tree.map(lambda x: np.full((M, *x.shape), 30_000, np.float16), params)
    step, server = server_half(method, init_server(method, params), messages, None, params)
    sent = jax.tree.map(lambda x: x.size if downlink is None else x.size // 2, params)
    for name, x in step.items():
        assert x.dtype == np.float16
        assert np.sort(x.ravel()).tolist() == [0.0] * (x.size - sent[name]) + [3e4] * sent[name]
    assert bool(server.finite)


@pytest.mark.parametrize("downlink", [None, TOP_K], ids=["dense", "top_k"])
def test_step_that_is_not_finite_is_not_made(downlink):
    """Two numbers of float32 whose sum is none: the round leaves no trace but its number."""
    method = sasg_jax.make_method(
        sasg_jax.identity(), num_workers=M, downlink=downlink, learning_rate=1.0
    )
    half = jax.jit(functools.partial(server_half, method))
    messages = _messages([1.0, 2.0, 3.0, 4.0])
    _, before = half(init_server(method, PARAMS), messages, None, PARAMS)
    step, after = half(before, _messages([3e38, 3e38, 0, 0]), None, PARAMS)
    assert not any(np.any(x) for x in jax.tree.leaves(step))
    assert not bool(after.finite)
    assert int(after.round) == 2
    chex.assert_trees_all_equal(after.downlink_feedback, before.downlink_feedback)
    step, after = half(after, messages, None, PARAMS)
    assert bool(after.finite)
    assert any(np.any(x) for x in jax.tree.leaves(step))


@pytest.mark.parametrize("rate", [None, 0.5])
@pytest.mark.parametrize("downlink", [None, TOP_K], ids=["dense", "top_k"])
def test_rule_sees_the_step(downlink, rate):
    """As everybody makes it: what the way down brings, and nothing where it is not finite."""
    rule = sasg_jax.Rule(
        name="sees_steps()",
        decide=sasg_jax.always().decide,
        init_shared=lambda params: {"step": jax.tree.map(jnp.zeros_like, params), "began": 0},
        begin=lambda shared, round: (jnp.float32(7), shared | {"began": round.number + 1}),
        end=lambda shared, round, step: shared | {"step": step},
    )
    method = sasg_jax.make_method(
        sasg_jax.identity(), rule, num_workers=M, downlink=downlink, learning_rate=rate
    )
    half = jax.jit(functools.partial(server_half, method))
    server, everybody = init_server(method, PARAMS), np.ones(M, bool)
    rng = np.random.default_rng(0)
    messages = jax.tree.map(lambda x: rng.normal(size=(M, *x.shape)).astype(np.float32), PARAMS)
    for t, scale in enumerate([1, 2, np.inf]):
        made = jax.tree.map(lambda x, s=scale: np.float32(s) * x, messages)
        step, server = half(server, made, everybody, PARAMS)
        chex.assert_trees_all_equal(server.rule["step"], step)
        assert (int(server.rule["began"]), float(server.threshold)) == (t + 1, 7)
        assert all(np.any(x) == np.isfinite(scale) for x in jax.tree.leaves(step))


def test_counts_rounds_no_further_than_the_type_goes():
    method = sasg_jax.make_method(sasg_jax.identity(), num_workers=M, learning_rate=1.0)
    last = np.iinfo(np.int32).max
    server = init_server(method, PARAMS)._replace(round=jnp.int32(last))
    _, server = server_half(method, server, _messages([1, 1, 1, 1]), None, PARAMS)
    assert int(server.round) == last


# Both halves, joined by a loop --------------------------------------------------------------------

METHODS = {
    "sasg": ((TOP_K, RULE), {}, {"density": 0.25, "alpha": 10.0}),
    "two_way": (
        (TOP_K, RULE),
        {"downlink": WIDE_TOP_K},
        {"density": 0.25, "alpha": 10.0, "downlink_density": 0.5},
    ),
    "turn": ((TOP_K, sasg_jax.every(2)), {}, {"density": 0.25, "turn": (2, True)}),
    "reconstruction": (
        (TOP_K, sasg_jax.every(2)),
        {"feedback": sasg_jax.reconstruction()},
        {"density": 0.25, "turn": (2, True), "feedback": "reconstruction"},
    ),
}


@pytest.mark.parametrize(
    "name",
    ["two_way", *(pytest.param(n, marks=pytest.mark.slow) for n in METHODS if n != "two_way")],
)
def test_halves_joined_by_a_loop_are_the_oracles(name):
    """No map over workers, no collective: whatever brings the messages."""
    parts, others, arguments = METHODS[name]
    rounds, rate = 12, 0.25
    method = sasg_jax.make_method(*parts, num_workers=M, learning_rate=rate, **others)
    centres = problems.centres(rounds=rounds, seed=7)
    expected = oracle.train(
        lambda m, t, params: oracle.subtract(params, problems.at(problems.at(centres, t), m)),
        PARAMS,
        num_workers=M,
        rounds=rounds,
        learning_rate=rate,
        history=2,
        max_staleness=4,
        **arguments,
    )

    @jax.jit
    def work(worker, server, centre, params, index):
        def direction(at):
            return jax.tree.map(jnp.subtract, at, centre)

        return worker_half(
            method, worker, server, direction(params), params, index=index, reevaluate=direction
        )

    half = jax.jit(functools.partial(server_half, method))
    workers = [init_worker(method, PARAMS)] * M
    server, params = init_server(method, PARAMS), PARAMS
    for t in range(rounds):
        posts = []
        for m in range(M):
            centre = problems.at(problems.at(centres, t), m)
            workers[m], post = work(workers[m], server, centre, params, m)
            posts.append(post)
        messages = jax.tree.map(lambda *xs: np.stack(xs), *(post.message for post in posts))
        uploaded = np.stack([post.uploaded for post in posts])
        np.testing.assert_array_equal(uploaded, expected.uploaded[t])
        step, server = half(server, messages, uploaded, params)
        params = oracle.subtract(params, problems.to_numpy(step))
    assert expected.margin > 1e-5
    assert not expected.uploaded.all()
    chex.assert_trees_all_close(params, expected.params, atol=1e-6)
