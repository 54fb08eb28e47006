"""Rules without units by hand: what each compares, when it uploads, and what it asks for."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sasg_jax
from sasg_jax.numerics import squared_norm
from sasg_jax.rules.base import Round, View

M, CAP = 4, 3


def _tree(*values):
    return {"a": jnp.float32(values[:1]), "b": jnp.float32(values[1:])}


PARAMS, ZERO = _tree(1, 2, 3), _tree(0, 0, 0)
SEEN = {
    "g": _tree(4, 4, 0),  # of squared norm 32
    "p": _tree(8, 0, 8),  # 128
    "rest": _tree(4, 0, 4),
    "g_s": _tree(0, -4, 0),
    "older": _tree(1, 1, 0),
    "newer": _tree(1, 1, 2),
}
MAKE = {
    "message_share": lambda theta=2.0, cap=CAP: sasg_jax.message_share(theta, max_staleness=cap),
    "residual_norm": lambda theta=2.0, cap=CAP: sasg_jax.residual_norm(
        theta, history=2, max_staleness=cap
    ),
    "direction_change": lambda theta=2.0, cap=CAP: sasg_jax.direction_change(
        theta, max_staleness=cap
    ),
}
RATIO = {
    "message_share": (128 - 32) / 128,
    "residual_norm": 128 / (M**2 * (2 + 6) / 2),
    "direction_change": (16 + 64) / 32,
}
ASKS_FOR = {
    "message_share": {"p", "rest"},
    "residual_norm": {"p"},
    "direction_change": set(),
}
every_rule = pytest.mark.parametrize("name", MAKE)


def _decide(rule, *, scale=1.0, round=2, worker: Any = 2, staleness: Any = 1, instead=None):
    """Who uploads, what is measured, and what is asked for. ``scale`` multiplies all that has a
    unit; what is ``instead`` of it is as it is."""
    asked, unused = set(), lambda params: pytest.fail("nobody asked for it")
    seen = {name: jax.tree.map(lambda x: x * scale, SEEN[name]) for name in SEEN}
    seen |= instead or {}

    def ask(name):
        jax.debug.callback(lambda: asked.add(name))
        return seen[name]

    def decide(worker, staleness, number):
        shared = rule.init_shared(PARAMS)
        for back, step in ((2, "older"), (1, "newer")):
            then = Round(PARAMS, number - back, M, None)
            _, shared = rule.begin(shared, then)
            shared = rule.end(shared, then, seen[step])
        now = Round(PARAMS, number, M, None)
        threshold, shared = rule.begin(shared, now)
        return rule.decide(
            View(
                round=now,
                worker=worker,
                direction=seen["g"],
                feedback=(),
                staleness=staleness,
                memory=rule.sent(rule.init_worker(PARAMS), PARAMS, seen["g_s"], None),
                shared=shared,
                threshold=threshold,
                forced=staleness >= rule.max_staleness,
                reevaluate=unused,
                pending=lambda: ask("p"),
                remainder=lambda: ask("rest"),
            )
        )

    decide = decide if np.ndim(staleness) == 0 else jax.vmap(decide, in_axes=(0, 0, None))
    decision = jax.jit(decide)(jnp.int32(worker), jnp.int32(staleness), jnp.int32(round))
    jax.block_until_ready(decision)
    jax.effects_barrier()
    assert decision.sound is decision.memory is None
    return np.asarray(decision.upload), np.asarray(decision.measured), asked


# What is measured, and when -----------------------------------------------------------------------


@every_rule
def test_uploads_strictly_above_theta(name):
    ratio = np.float32(RATIO[name])
    uploads, measured, asked = _decide(MAKE[name](float(ratio)))
    assert (uploads, measured, asked) == (False, ratio, ASKS_FOR[name])
    uploads, measured, _ = _decide(MAKE[name](float(np.nextafter(ratio, np.float32(0)))))
    assert (uploads, measured) == (True, ratio)


@every_rule
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_nothing_hangs_on_the_scale(name, scale):
    for factor, uploads in ((0.999, True), (1.001, False)):
        got, measured, _ = _decide(MAKE[name](factor * RATIO[name]), scale=scale)
        assert got == uploads
        np.testing.assert_allclose(measured, RATIO[name], rtol=1e-5)


@every_rule
@pytest.mark.parametrize("scale", [np.nan, np.inf, 1e25])
def test_what_is_no_number_uploads(name, scale):
    """Also where numbers are, but their squares are not."""
    uploads, _, _ = _decide(MAKE[name](1e30), scale=scale)
    assert uploads


@every_rule
@pytest.mark.parametrize("theta", [0.0, 1.0])
def test_nothing_beside_nothing_is_silent(name, theta):
    uploads, measured, _ = _decide(MAKE[name](theta), scale=0.0)
    assert (uploads, measured) == (False, 0)


@pytest.mark.parametrize(
    ("name", "zero"),
    [
        ("residual_norm", {"older": ZERO, "newer": ZERO}),
        ("direction_change", {"g": ZERO}),
    ],
)
def test_anything_beside_nothing_uploads(name, zero):
    uploads, measured, _ = _decide(MAKE[name](1e30), instead=zero)
    assert (uploads, measured) == (True, np.inf)


@every_rule
def test_no_change_is_silent_at_a_theta_of_zero(name):
    """Nor a message that would carry nothing, nor nothing to send."""
    same = {"g_s": SEEN["g"], "rest": SEEN["p"]}
    if name == "residual_norm":
        same = {"p": ZERO}
    uploads, measured, _ = _decide(MAKE[name](0.0), instead=same)
    assert (uploads, measured) == (False, 0)


@every_rule
def test_uploads_in_turn(name):
    """Worker m in rounds t with (t + m) % 3 == 0, whatever theta."""
    rule, workers = MAKE[name](1e30), np.arange(M)
    rows = [_decide(rule, round=t, worker=workers, staleness=np.ones(M))[:2] for t in range(3, 7)]
    want = [[(t + m) % CAP == 0 for m in workers] for t in range(3, 7)]
    np.testing.assert_array_equal([uploads for uploads, _ in rows], want)
    ratios = np.where(want, 0, np.float32(RATIO[name]))
    np.testing.assert_array_equal([measured for _, measured in rows], ratios)


@every_rule
@pytest.mark.parametrize(
    ("round", "staleness", "forced"), [(1, 1, True), (4, 2, True), (2, 2, False), (2, 3, True)]
)
def test_forced_uploads_measure_nothing(name, round, staleness, forced):
    """In the turn of worker 2, or at the cap."""
    uploads, measured, asked = _decide(MAKE[name](1e30), round=round, staleness=staleness)
    assert (uploads, asked) == (forced, set() if forced else ASKS_FOR[name])
    assert measured == (0 if forced else RATIO[name])


@every_rule
def test_nobody_is_asked_where_all_are_forced(name):
    """Worker 2 is free in the second of these rounds; the others still measure nothing."""
    rule, workers = MAKE[name](1e30), np.arange(M)
    stale = np.full(M, CAP)
    uploads, measured, asked = _decide(rule, worker=workers, staleness=stale)
    assert uploads.all()
    assert (measured.any(), asked) == (False, set())
    free = workers == 2
    uploads, measured, asked = _decide(rule, worker=workers, staleness=np.where(free, 1, stale))
    np.testing.assert_array_equal(uploads, ~free)
    np.testing.assert_array_equal(measured, np.where(free, np.float32(RATIO[name]), 0))
    assert asked == ASKS_FOR[name]


@every_rule
def test_who_is_forced_in_every_round_never_asks(name):
    rule = MAKE[name](1e30, 1)
    for round in (2, 3):
        assert _decide(rule, round=round) == (True, 0, set())
    assert rule.measure is None


# What is kept -------------------------------------------------------------------------------------


def test_what_the_last_upload_leaves():
    """Its direction, where that is compared, and else nothing."""
    g = SEEN["g"]
    kept = {name: make().sent((), PARAMS, g, None) for name, make in MAKE.items()}
    assert kept.pop("direction_change") is g
    assert set(kept.values()) == {()}


def test_residual_norm_compares_with_the_mean_of_the_last_steps():
    """Of three, in which a round that was not counts as a step of zero; and M² is 16."""
    rule = sasg_jax.residual_norm(history=3)
    assert rule.measure is not None
    shared, ratios = rule.init_shared(PARAMS), []
    unused = lambda *params: pytest.fail("nobody asked for it")
    pending = lambda: _tree(0, 8, 0)
    for t, norm in enumerate([0, 2, 1, 1, 4, 0, 0, 0]):
        round = Round(PARAMS, jnp.int32(t), M, None)
        rest = jnp.int32(1), (), shared, jnp.zeros(()), jnp.asarray(False)
        view = View(round, jnp.int32(0), PARAMS, (), *rest, unused, pending, unused)
        ratios.append(float(rule.measure(view)))
        shared = rule.end(shared, round, _tree(0, norm, 0))
    sums = [4, 4 + 1, 4 + 1 + 1, 1 + 1 + 16, 1 + 16, 16]
    np.testing.assert_allclose(ratios, [np.inf, np.inf, *(64 * 3 / 16 / x for x in sums)])
    np.testing.assert_array_equal(shared, np.zeros(3))


def test_direction_change_starts_from_nothing():
    """Before its first upload a worker has sent with no direction."""
    kept = sasg_jax.direction_change().init_worker(PARAMS)
    assert float(squared_norm(kept)) == 0
    assert jax.tree.structure(kept) == jax.tree.structure(PARAMS)


def test_what_they_say_of_themselves():
    """Theta is no part of a name: it may change from one part of a run to the next."""
    defaults = {
        sasg_jax.message_share(): ("message_share(max_staleness=10)", 0.3),
        sasg_jax.residual_norm(): ("residual_norm(max_staleness=10, history=10)", 30),
        sasg_jax.direction_change(): ("direction_change(max_staleness=10)", 1),
    }
    for rule, (name, theta) in defaults.items():
        assert (rule.name, rule.silence, rule.always) == (name, "keep", False)
        threshold, _ = rule.begin((), Round(PARAMS, jnp.int32(0), M, None))
        assert threshold == np.float32(theta)
        assert not rule.needs_learning_rate
    assert {make(cap=7).max_staleness for make in MAKE.values()} == {7}


# Bad arguments ------------------------------------------------------------------------------------


@every_rule
@pytest.mark.parametrize("theta", [-1, -1e-9, math.nan, math.inf, True, "1", [1.0]], ids=str)
def test_theta_that_is_no_bound(name, theta):
    with pytest.raises(
        ValueError, match=r"^Expected theta=.* to be a finite number of at least 0\.$"
    ):
        MAKE[name](theta)


@every_rule
def test_theta_may_be_traced(name):
    """One that optax.inject_hyperparams sets, e.g.; only its shape is known."""
    start = Round(PARAMS, jnp.int32(0), M, None)
    bound = jax.jit(lambda theta: MAKE[name](theta).begin((), start)[0])
    assert bound(0.5) == bound(jnp.float32(0.5)) == MAKE[name](jnp.float32(0.5)).begin((), start)[0]
    with pytest.raises(ValueError, match=r"^Expected theta=.* to be one number\."):
        bound(jnp.ones(2))


@every_rule
@pytest.mark.parametrize("cap", [0, -1, 1.5, True, "3"])
def test_max_staleness_below_one(name, cap):
    with pytest.raises(
        ValueError, match=rf"^Expected max_staleness={cap!r} to be an integer of at least 1\.$"
    ):
        MAKE[name](2.0, cap)


@pytest.mark.parametrize("history", [0, 1.5, None])
def test_history_below_one(history):
    with pytest.raises(ValueError, match=rf"^Expected history={history!r} to be an integer of at"):
        sasg_jax.residual_norm(history=history)
