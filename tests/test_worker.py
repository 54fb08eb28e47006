"""One worker's half of a round: when it uploads, what it sends, and what it keeps."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sasg_jax
from sasg_jax.rules import SILENCES
from sasg_jax.server import init_server
from sasg_jax.states import NEVER
from sasg_jax.worker import init_worker, worker_half

M = 4
RULE = sasg_jax.innovation(1.0, max_staleness=5, history=3)
COMPRESSORS = {"identity": sasg_jax.identity(), "top_k": sasg_jax.top_k(0.25)}
RATES = (0.5, 0.0, 1.0, 1e-3, 1e30)
FEEDBACKS = {
    "residual": sasg_jax.residual(),
    "decay": sasg_jax.residual(0.75),
    "reconstruction": sasg_jax.reconstruction(),
}


def _tree(seed):
    rng = np.random.default_rng(seed)
    return {
        "a": rng.normal(size=(3, 4)).astype(np.float32),
        "b": rng.normal(size=5).astype(np.float32),
    }


PARAMS, GRADS, STALE_GRADS, STALE_PARAMS, KEPT = map(_tree, range(5))
INNOVATION = sum(
    float(np.sum(np.square(GRADS[k] - STALE_GRADS[k], dtype=np.float64))) for k in GRADS
)


def _with(tree, value):
    """The tree with another number in one place."""
    return tree | {"b": np.where(np.arange(5) == 3, np.float32(value), tree["b"])}


def _rate(t):
    """Another rate every 1,000 rounds, so that few methods need be compiled."""
    return jnp.asarray(RATES, jnp.float32)[t // 1000]


@functools.cache
def _method(compressor="top_k", rule=RULE, feedback=None, silence=None, rate=_rate):
    return sasg_jax.make_method(
        COMPRESSORS[compressor],
        rule,
        num_workers=M,
        learning_rate=rate,
        feedback=FEEDBACKS[feedback] if feedback else None,
        silence=silence,
    )


@functools.cache
def _first(method):
    """Both states before the first round, as arrays of NumPy: these need not be compiled."""
    return jax.device_get((init_worker(method, PARAMS), init_server(method, PARAMS)))


def _worker(method, staleness=2, kept=KEPT):
    """A worker in the middle of a run."""
    worker, _ = _first(method)
    memory, rule = worker.feedback, worker.rule
    if isinstance(memory, sasg_jax.Residual | sasg_jax.Reconstruction):
        memory = type(memory)(kept)
    if rule != ():
        rule = rule._replace(stale_params=STALE_PARAMS)
    return worker._replace(feedback=memory, rule=rule, staleness=np.int32(staleness))


def _server(method, threshold=0.0, round=10):
    """A server whose threshold in this round is as given, whatever the last step was."""
    _, server = _first(method)
    rule = server.rule
    if rule != ():
        rule = rule._replace(history=np.asarray([threshold, 0, 0], np.float32))
    return server._replace(round=np.int32(round), rule=rule)


@functools.cache
def _compiled(method, reevaluates=True):
    def fn(worker, server, grads, stale_grads, index, present):
        return worker_half(
            method,
            worker,
            server,
            grads,
            PARAMS,
            index=index,
            present=present,
            reevaluate=(lambda stale_params: stale_grads) if reevaluates else None,
        )

    return jax.jit(fn)


def _round(
    worker,
    method,
    *,
    grads=GRADS,
    stale_grads=STALE_GRADS,
    index=0,
    present=True,
    threshold=0.0,
    round=10,
    rate=0.5,
):
    server = _server(method, threshold, round + 1000 * RATES.index(rate))
    arguments = grads, stale_grads, np.int32(index), np.bool_(present)
    return _compiled(method, method.rule.max_staleness is not None)(worker, server, *arguments)


def _gamma(tree, rate=0.5):
    return jax.tree.map(lambda g: np.float32(rate) * g, tree)


def _assert_silent(before, after, post):
    """Nothing but counters has changed, and nothing is sent."""
    assert not bool(after.uploaded)
    assert not bool(post.uploaded)
    assert not bool(after.used)
    chex.assert_trees_all_equal(after.feedback, before.feedback)
    chex.assert_trees_all_equal(after.rule, before.rule)
    assert int(after.staleness) == int(before.staleness) + 1
    assert all(not np.any(np.asarray(x)) for x in jax.tree.leaves(post.message))


# What is sent, and what is kept -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("compressor", "feedback"),
    [("identity", None), ("top_k", None), ("top_k", "decay"), ("top_k", "reconstruction")],
)
def test_upload_conserves(compressor, feedback):
    """Bit for bit: what is decoded and what is kept are what was to be sent and what was kept."""
    method = _method(compressor, feedback=feedback)
    worker = _worker(method)
    new, post = _round(worker, method)
    sent, wanted = method.compressor.decompress(post.message, PARAMS), _gamma(GRADS)
    if feedback == "reconstruction":
        kept = new.feedback.reconstruction
        chex.assert_trees_all_equal(kept, jax.tree.map(np.add, KEPT, sent))
        # The difference is what was compressed: nothing else is left of it.
        difference = jax.tree.map(np.subtract, wanted, KEPT)
        nonzero = jax.tree.map(lambda s, d: np.where(s == 0, 0, d), sent, difference)
        chex.assert_trees_all_equal(sent, nonzero)
        assert any(np.any(x) for x in jax.tree.leaves(sent))
    elif feedback is None and compressor == "identity":
        chex.assert_trees_all_equal(sent, wanted)
    else:
        decayed = _gamma(KEPT, 0.75) if feedback == "decay" else KEPT
        total = jax.tree.map(np.add, sent, new.feedback.residual)
        chex.assert_trees_all_equal(total, jax.tree.map(np.add, wanted, decayed))
        assert any(np.any(x) for x in jax.tree.leaves(new.feedback.residual))
    chex.assert_trees_all_equal(new.rule.stale_params, PARAMS)
    assert float(new.rule.learning_rate) == 0.5
    assert bool(new.uploaded)
    assert bool(new.used)
    assert bool(post.uploaded)
    assert int(new.staleness) == 1
    np.testing.assert_allclose(new.innovation, INNOVATION, rtol=1e-5)


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_silent_round_changes_nothing(compressor):
    method = _method(compressor)
    worker = _worker(method)
    new, post = _round(worker, method, threshold=1.01 * INNOVATION)
    _assert_silent(worker, new, post)
    assert bool(new.finite)
    np.testing.assert_allclose(new.innovation, INNOVATION, rtol=1e-5)


def test_silent_worker_that_keeps_its_direction():
    """All of it is in the residual, bit for bit; else it is as silent as any other."""
    method = _method(silence="keep")
    worker = _worker(method)
    new, post = _round(worker, method, threshold=1.01 * INNOVATION)
    total = jax.tree.map(np.add, _gamma(GRADS), KEPT)
    chex.assert_trees_all_equal(new.feedback.residual, total)
    assert bool(new.used)
    _assert_silent(worker, new._replace(feedback=worker.feedback, used=np.bool_(False)), post)


@pytest.mark.parametrize(
    "method",
    [_method(), _method(silence="keep"), _method(rule=sasg_jax.always())],
    ids=["sasg", "keep", "sparse_sgd"],
)
def test_absent_worker_changes_nothing(method):
    """However much it would have to say: its upload is due, and its gradient is no number."""
    worker = _worker(method, staleness=5)
    bad = _with(GRADS, np.nan)
    for grads in (GRADS, bad):
        new, post = _round(worker, method, present=False, grads=grads, round=0)
        _assert_silent(worker, new, post)
        assert bool(new.finite)  # nothing was refused


# When it uploads ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("threshold", "uploads"),
    [(0.0, True), (0.99 * INNOVATION, True), (1.01 * INNOVATION, False), (np.inf, False)],
)
def test_uploads_when_the_innovation_exceeds_the_threshold(threshold, uploads):
    new, _ = _round(_worker(_method()), _method(), threshold=threshold)
    assert bool(new.uploaded) is uploads


def test_an_innovation_equal_to_the_threshold_is_silent():
    """(6) says at most: with no step behind it and no innovation, nothing is sent."""
    new, _ = _round(_worker(_method()), _method(), stale_grads=GRADS, threshold=0.0)
    assert not bool(new.uploaded)


@pytest.mark.parametrize(
    ("staleness", "round", "uploads"),
    [(1, 2, True), (1, 3, False), (4, 3, False), (5, 3, True), (7, 100, True)],
)
def test_forced_in_the_first_rounds_and_at_the_cap(staleness, round, uploads):
    """D = 3 rounds, max_staleness = 5; an infinite threshold would silence everybody."""
    worker = _worker(_method(), staleness=staleness)
    new, _ = _round(worker, _method(), threshold=np.inf, round=round)
    assert bool(new.uploaded) is uploads


@pytest.mark.parametrize(
    ("last_rate", "uploads"), [(0.0, False), (0.2, False), (1.0, False), (1.001, True)]
)
def test_forced_where_the_rate_is_below_half_of_that_of_the_last_upload(last_rate, uploads):
    """The rate is 0.5; an infinite threshold would silence everybody."""
    worker = _worker(_method())
    worker = worker._replace(rule=worker.rule._replace(learning_rate=np.float32(last_rate)))
    new, _ = _round(worker, _method(), threshold=np.inf)
    assert bool(new.uploaded) is uploads


def test_forced_at_a_rate_of_zero():
    new, _ = _round(_worker(_method()), _method(), threshold=np.inf, rate=0.0)
    assert bool(new.uploaded)


def test_not_forced_where_there_is_no_rate():
    method = _method(rate=None)
    new, _ = _round(_worker(method), method, threshold=np.inf)
    assert not bool(new.uploaded)


@pytest.mark.parametrize("forced", ["first rounds", "cap"])
def test_no_stale_gradient_in_a_forced_round(forced):
    """Its function is not run at all, and the innovation says so with a zero."""
    runs = []

    def reevaluate(stale_params):
        jax.debug.callback(lambda: runs.append(1))
        return jax.tree.map(jnp.zeros_like, stale_params)

    @jax.jit
    def one_round(worker, server):
        return worker_half(_method(), worker, server, GRADS, PARAMS, index=0, reevaluate=reevaluate)

    worker = _worker(_method(), staleness=5 if forced == "cap" else 1)
    server = _server(_method(), threshold=np.inf, round=2 if forced == "first rounds" else 3)
    new, _ = one_round(worker, server)
    jax.effects_barrier()
    assert (bool(new.uploaded), float(new.innovation), runs) == (True, 0.0, [])
    one_round(_worker(_method(), staleness=1), _server(_method(), threshold=np.inf, round=3))
    jax.effects_barrier()
    assert runs == [1]


def test_uploads_are_exactly_max_staleness_rounds_apart_at_most():
    """A worker that never has news uploads every fifth round, never later."""
    worker, _ = _first(_method())
    uploads = []
    for t in range(20):
        worker, _ = _round(worker, _method(), threshold=np.inf, round=t)
        if bool(worker.uploaded):
            uploads.append(t)
    assert uploads == [0, 1, 2, 7, 12, 17]


def test_rule_that_compares_needs_another_gradient():
    with pytest.raises(TypeError, match=r"needs grad_fn=\.\.\., a function of the parameters"):
        jax.eval_shape(
            _compiled(_method(), False),
            *(_worker(_method()), _server(_method()), GRADS, GRADS, 0, True),
        )


def test_a_turn_is_the_workers_own():
    method = _method(rule=sasg_jax.every(3))
    turns = [
        [bool(_round(_worker(method), method, index=m, round=t)[0].uploaded) for m in range(4)]
        for t in range(4)
    ]
    assert turns == [
        [True, False, False, True],
        [False, False, True, False],
        [False, True, False, False],
        [True, False, False, True],
    ]


# What a rule sees, and what it remembers ----------------------------------------------------------


@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.parametrize("upload", [False, True])
def test_rule_sees_what_a_message_would_be_made_of(upload, feedback):
    """p, and what the message would leave out of it, whether or not it is sent."""
    seen = []

    def decide(view):
        jax.debug.callback(lambda *trees: seen.extend(trees), view.pending(), view.remainder())
        return sasg_jax.Decision(jnp.asarray(upload), jnp.zeros(()))

    rule = sasg_jax.Rule(name="sees()", decide=decide)
    method = sasg_jax.make_method(
        COMPRESSORS["top_k"], rule, num_workers=M, learning_rate=0.5, feedback=FEEDBACKS[feedback]
    )
    new, post = _round(_worker(method), method)
    jax.effects_barrier()
    pending, remainder = seen
    before = {"residual": KEPT, "decay": _gamma(KEPT, 0.75), "reconstruction": _gamma(KEPT, -1)}
    chex.assert_trees_all_equal(pending, jax.tree.map(np.add, _gamma(GRADS), before[feedback]))
    smallest = jax.tree.map(lambda p, rest: np.abs(p - rest)[p != rest].min(), pending, remainder)
    chex.assert_trees_all_equal_shapes(remainder, PARAMS)
    for name in PARAMS:
        assert 0 < np.count_nonzero(remainder[name]) < remainder[name].size
        assert np.abs(remainder[name]).max() <= smallest[name]
    if upload and feedback != "reconstruction":
        chex.assert_trees_all_equal(new.feedback.residual, remainder)
        sent = method.compressor.decompress(post.message, PARAMS)
        chex.assert_trees_all_equal(jax.tree.map(np.add, sent, remainder), pending)


@pytest.mark.parametrize("silence", SILENCES)
@pytest.mark.parametrize(
    ("upload", "remembers", "present", "bad", "memory"),
    [
        (False, True, True, False, 7),
        (True, True, True, False, 70),  # what sent makes of what was decided
        (False, False, True, False, 1),
        (True, False, True, False, 10),
        (False, True, False, False, 1),
        (True, True, False, False, 1),
        (True, True, True, True, 1),
    ],
)
def test_what_the_rule_remembers_of_a_round(upload, remembers, present, bad, memory, silence):
    """Nothing where it is absent or refused; else what it has decided, then what ``sent`` makes."""

    def decide(view):
        after = view.memory + 6 if remembers else None
        return sasg_jax.Decision(jnp.asarray(upload), jnp.zeros(()), memory=after)

    rule = sasg_jax.Rule(
        name="remembers()",
        decide=decide,
        init_worker=lambda params: jnp.ones(()),
        sent=lambda memory, *upload: 10 * memory,
    )
    method = sasg_jax.make_method(
        COMPRESSORS["top_k"], rule, num_workers=M, learning_rate=0.5, silence=silence
    )
    worker, _ = _first(method)
    grads = _with(GRADS, np.nan) if bad else GRADS
    new, _ = _compiled(method)(
        worker, _first(method)[1], grads, STALE_GRADS, np.int32(0), np.bool_(present)
    )
    assert float(new.rule) == memory
    assert bool(new.uploaded) is (upload and present and not bad)
    assert bool(new.finite) is not bad


# What is not finite -------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("forced", [False, True], ids=["free", "forced"])
@pytest.mark.parametrize(
    "method",
    [
        _method(),
        _method("identity"),
        _method(silence="keep"),
        _method(rule=sasg_jax.always()),
        _method("identity", rule=sasg_jax.always()),
        _method(rule=sasg_jax.always(), feedback="reconstruction"),
    ],
    ids=["sasg", "lasg", "keep", "sparse_sgd", "sgd", "reconstruction"],
)
def test_gradient_that_is_not_finite_is_refused(method, forced, bad):
    """Also where the upload is forced: silent, and more stale by one."""
    worker = _worker(method, staleness=5 if forced else 2)
    grads = _with(GRADS, bad)
    new, post = _round(worker, method, grads=grads, round=0 if forced else 10)
    _assert_silent(worker, new, post)
    assert not bool(new.finite)
    after, _ = _round(new, method)
    assert bool(after.finite)
    assert bool(after.uploaded)
    chex.assert_tree_all_finite((after.feedback, after.rule))


@pytest.mark.parametrize("silence", ["reuse", "keep"])
@pytest.mark.parametrize("threshold", [-1.0, np.inf], ids=["uploads", "silent"])
def test_product_with_the_rate_that_is_not_finite_is_refused(silence, threshold):
    """A gradient of 1e15 and a rate of 1e30: each is a number of float32, the product is none."""
    method = _method(silence=silence)
    worker = _worker(method)
    grads = _with(GRADS, 1e15)
    new, post = _round(
        worker, method, grads=grads, stale_grads=grads, threshold=threshold, rate=1e30
    )
    _assert_silent(worker, new, post)
    # One that is silent and keeps nothing has nothing to refuse.
    assert bool(new.finite) is (silence == "reuse" and threshold > 0)


@pytest.mark.parametrize("rate", [1.0, 1e-3])
@pytest.mark.parametrize("rule", [RULE, sasg_jax.always()], ids=["innovation", "always"])
@pytest.mark.parametrize("forced", [True, False])
def test_gradient_whose_square_is_not_finite_is_refused(rule, rate, forced):
    """Also where its product with the rate would be: nobody need look at the sums, then."""
    method = _method(rule=rule)
    worker = _worker(method, staleness=5 if forced else 2)
    new, post = _round(worker, method, grads=_with(GRADS, 1e25), rate=rate, threshold=1e30)
    _assert_silent(worker, new, post)
    assert not bool(new.finite)
    largest, _ = _round(worker, method, grads=_with(GRADS, 1e18), rate=rate, threshold=-1.0)
    assert bool(largest.uploaded)
    chex.assert_tree_all_finite(largest.feedback)


def test_half_precision_overflows_sooner():
    """40,000 and 40,000 are numbers of float16; their sum is none."""
    method = _method(rule=sasg_jax.always(), rate=1.0)
    params = {"w": jnp.zeros(4, jnp.float16)}
    worker = init_worker(method, params)
    server = init_server(method, params)
    half = jax.jit(functools.partial(worker_half, method, index=0))
    kept = []
    for grads in ([1, 40_000, 2, 3], [40_000, 0, 0, 0], [40_000, 0, 0, 0], [5, 0, 0, 0]):
        worker, post = half(worker, server, {"w": jnp.asarray(grads, jnp.float16)}, params)
        kept.append((bool(worker.uploaded), worker.feedback.residual["w"].tolist()))
    assert kept == [
        (True, [1, 0, 2, 3]),
        (True, [0, 0, 2, 3]),
        (True, [0, 0, 2, 3]),
        (True, [0, 0, 2, 3]),
    ]
    full = worker._replace(feedback=sasg_jax.Residual({"w": jnp.full(4, 40_000, jnp.float16)}))
    worker, post = half(full, server, {"w": jnp.full(4, 40_000, jnp.float16)}, params)
    _assert_silent(full, worker, post)
    assert not bool(worker.finite)


def test_stale_gradient_that_is_not_finite_uploads():
    """The fresh gradient is sound, so the worker must get away from where the stale one is not."""
    stale_grads = jax.tree.map(lambda g: g * np.float32(np.nan), GRADS)
    new, post = _round(_worker(_method()), _method(), stale_grads=stale_grads, threshold=np.inf)
    assert bool(new.uploaded)
    assert bool(new.finite)
    chex.assert_tree_all_finite((post.message, new.feedback))


def test_innovation_that_overflows_uploads():
    """The squares of g are numbers, that of g - g' is none."""
    stale_grads = _with(GRADS, -3e19)
    new, post = _round(
        _worker(_method()), _method(), stale_grads=stale_grads, threshold=3e38, grads=GRADS
    )
    assert bool(new.uploaded)
    assert bool(new.finite)
    chex.assert_tree_all_finite((post.message, new.feedback))


def test_who_has_joined_needs_its_direction_whatever_a_rule_foresees():
    """It uploads in its first round: worker_half and needs_direction agree on that."""
    never = lambda view: sasg_jax.Decision(jnp.asarray(False), jnp.zeros(()))
    rule = sasg_jax.Rule(name="never", decide=never, foresees=True)
    method = sasg_jax.make_method(sasg_jax.identity(), rule, num_workers=M)
    server, params = init_server(method, PARAMS), PARAMS
    for staleness, needed in ((1, False), (NEVER, True)):
        worker = init_worker(method, params)._replace(staleness=jnp.int32(staleness))
        found = sasg_jax.needs_direction(method, worker, server, params, index=0)
        new, _ = worker_half(method, worker, server, GRADS, params, index=0)
        assert bool(found) == bool(new.uploaded) == needed


# Half precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_product_is_rounded_once(dtype):
    """0.1 is 0.10009765625 in bfloat16, and 1e-6 hardly a number of float16."""
    rates = np.asarray([0.1, 1e-6], np.float32)
    method = _method("identity", rule=sasg_jax.always(), rate=lambda t: jnp.asarray(rates)[t])
    params = {"w": jnp.arange(1, 65, dtype=dtype) * 512}
    worker, server = init_worker(method, params), init_server(method, params)
    half = jax.jit(functools.partial(worker_half, method, index=0))
    for t, rate in enumerate(rates):
        _, post = half(worker, server._replace(round=jnp.int32(t)), params, params)
        exact = rate * np.asarray(params["w"], np.float32)
        np.testing.assert_array_equal(post.message["w"], exact.astype(dtype))
