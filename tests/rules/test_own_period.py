"""innovation() without an alpha by hand: when a worker looks, and what its period becomes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sasg_jax
from sasg_jax.rules.base import Round, View
from sasg_jax.rules.own_period import OwnPeriod

M, THETA = 4, 0.25
PARAMS = jnp.asarray([3.0, 4.0])


def _rule(theta=THETA, max_staleness=8, look_every=2, **options):
    return sasg_jax.innovation(
        theta=theta, max_staleness=max_staleness, look_every=look_every, **options
    )


def _kept(period, uploads):
    return OwnPeriod(PARAMS, jnp.int32(period), jnp.int32(uploads))


def _decide(rule, memory, again, *, round=8, worker=0, staleness=1, shared=(), scale=1.0):
    """Where g is (2,), and g' is ``again(params)``. Both are multiplied by ``scale``."""
    now = Round(PARAMS, jnp.int32(round), M, None)
    threshold, shared = rule.begin(shared, now)
    unused = lambda: pytest.fail("nobody asked for it")
    rest = memory, shared, threshold, jnp.asarray(False)
    g = jnp.float32([2 * scale])
    reevaluate = lambda params: jnp.float32(scale) * jnp.reshape(again(params), 1)
    own = jnp.int32(worker), g, (), jnp.int32(staleness)
    return rule.decide(View(now, *own, *rest, reevaluate, unused, unused))


def _run(rule, ratios, *, worker=0):
    """Rounds of uploads and of looks, and the period after each round."""
    memory, staleness = rule.init_worker(PARAMS), 1
    uploads, looks, periods = [], [], []
    for t, ratio in enumerate(ratios):
        again = lambda params, t=t, r=ratio: looks.append(t) or jnp.float32(2 - 2 * math.sqrt(r))
        decision = _concrete(rule, memory, again, t, worker, staleness)
        memory = decision.memory
        uploads += [t] * bool(decision.upload)
        staleness = 1 if decision.upload else staleness + 1
        periods.append(int(memory.period))
        if decision.upload:
            memory = rule.sent(memory, PARAMS, PARAMS, None)
    return uploads, looks, periods


def _concrete(rule, memory, again, t, worker, staleness):
    """Without jit, so that what is not asked for is not traced either."""
    with jax.disable_jit():
        return _decide(rule, memory, again, round=t, worker=worker, staleness=staleness)


# When it looks, and what its period becomes -------------------------------------------------------


def test_periods_by_hand():
    """Nothing changes for 20 rounds, then everything does: it looks in every second upload."""
    uploads, looks, periods = _run(_rule(), [0.0] * 20 + [1.0] * 20)
    assert uploads == [0, 1, 2, 4, 6, 8, 12, 16, 24, 28, 32, 34, 36, 37, 38, 39]
    assert looks == [2, 6, 12, 24, 32, 36, 38]
    want = np.repeat([1, 2, 4, 8, 4, 2, 1], np.diff([0, 2, 6, 12, 24, 32, 36, 40]))
    assert periods == want.tolist()


@pytest.mark.parametrize(
    ("ratio", "period"),
    [
        (0, 8),
        (0.0625, 8),  # a quarter of theta
        (0.0626, 4),
        (0.25, 4),
        (0.2501, 2),
        (np.inf, 2),
        (np.nan, 2),
    ],
)
def test_period_is_halved_above_theta_and_doubled_up_to_a_quarter(ratio, period):
    again = lambda params: 2 - 2 * np.sqrt(ratio)
    decision = _decide(_rule(), _kept(4, 2), again)
    np.testing.assert_allclose(decision.measured, np.float32(ratio), rtol=1e-5)
    assert decision.upload
    assert decision.memory is not None
    assert (decision.memory.period, decision.memory.uploads) == (period, 1)


@pytest.mark.parametrize(
    ("max_staleness", "longest"), [(2, 2), (3, 2), (4, 4), (7, 4), (8, 8), (10, 8)]
)
def test_period_is_a_power_of_two_up_to_max_staleness(max_staleness, longest):
    rule = _rule(max_staleness=max_staleness)
    same, other = lambda params: 2.0, lambda params: 0.0
    for period, again, want in ((longest, same, longest), (1, other, 1)):
        decision = _decide(rule, _kept(period, 2), again)
        assert decision.memory is not None
        assert decision.memory.period == want


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_nothing_hangs_on_the_scale(scale):
    for ratio, period in ((0.24, 4), (0.26, 2)):
        again = lambda params, r=ratio: 2 - 2 * np.sqrt(r)
        decision = _decide(_rule(), _kept(4, 2), again, scale=scale)
        np.testing.assert_allclose(decision.measured, ratio, rtol=1e-5)
        assert decision.memory is not None
        assert decision.memory.period == period


def test_nothing_beside_nothing_is_no_change():
    decision = _decide(_rule(theta=0.0), _kept(4, 2), lambda params: 2.0, scale=0.0)
    assert decision.memory is not None
    assert (decision.measured, decision.memory.period) == (0, 8)


def test_workers_look_in_turn_at_first():
    """Worker m has m uploads less to go, and none looks in the first."""
    firsts = [_run(_rule(look_every=4), [1.0] * 8, worker=m)[1][0] for m in range(6)]
    assert firsts == [4, 3, 2, 1, 4, 3]


@pytest.mark.parametrize("worker", [0, 1, 3])
def test_turns_are_staggered(worker):
    memory = _kept(4, 0)
    again = lambda params: pytest.fail("nobody asked for it")
    for t in range(4, 12):
        decision = _concrete(_rule(look_every=100), memory, again, t, worker, 1)
        assert decision.upload == ((t + worker) % 4 == 0)


def test_an_absence_says_nothing_about_the_period():
    """It looks in the next upload."""
    again = lambda params: pytest.fail("nobody asked for it")
    decision = _concrete(_rule(), _kept(4, 2), again, 8, 0, 9)
    assert (bool(decision.upload), float(decision.measured)) == (True, 0)
    assert decision.memory is not None
    assert (decision.memory.period, decision.memory.uploads) == (4, 3)
    decision = _concrete(_rule(), decision.memory, lambda params: 0.0, 12, 0, 3)
    assert decision.memory is not None
    assert (decision.measured, decision.memory.period) == (1, 2)


def test_one_that_looks_asks_and_the_others_measure_nothing():
    """Where nobody does, nobody is asked, also under vmap."""
    asked = []

    def again(params):
        jax.debug.callback(lambda: asked.append(1))
        return 0.0

    def one(uploads, period):
        return _decide(_rule(), OwnPeriod(PARAMS, period, uploads), again)

    every = jax.jit(jax.vmap(one))
    idle = every(jnp.asarray([1, 1, 2]), jnp.asarray([4, 4, 3]))  # the last is not its turn
    jax.block_until_ready(idle)
    jax.effects_barrier()
    assert (asked, idle.upload.tolist()) == ([], [True, True, False])
    busy = every(jnp.asarray([2, 1, 2]), jnp.asarray([4, 4, 3]))
    jax.block_until_ready(busy)
    jax.effects_barrier()
    assert asked
    assert busy.measured.tolist() == [1, 0, 0]
    assert busy.memory.period.tolist() == [2, 4, 3]


# What is kept -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cap", [2, 3, 5, 8])
def test_shared_stale_params_are_those_of_the_last_upload(cap):
    """As are a worker's own; g' is the parameters of one entry themselves, here."""
    path = np.random.default_rng(cap).normal(2, 0.6, size=(60, 1)).astype(np.float32)
    for share in (False, True):
        rule = _rule(0.1, cap, 1, share_stale_params=share)
        memory, shared, staleness, last = (
            rule.init_worker(path[0]),
            rule.init_shared(path[0]),
            1,
            0,
        )
        decide = jax.jit(
            lambda memory, shared, t, staleness, rule=rule: _decide(
                rule, memory, lambda x: x, round=t, worker=1, staleness=staleness, shared=shared
            )
        )
        periods = set()
        for t, params in enumerate(path):
            decision = decide(memory, shared, t, staleness)
            looks = decision.upload and t > 0
            want = (1 - path[last, 0] / 2) ** 2 if looks else 0
            np.testing.assert_allclose(decision.measured, want, rtol=1e-5, atol=1e-7)
            memory = decision.memory
            if decision.upload:
                memory, last = rule.sent(memory, params, params, None), t
            staleness = 1 if decision.upload else staleness + 1
            shared = rule.end(shared, Round(jnp.asarray(params), jnp.int32(t), M, None), params)
            periods.add(int(memory.period))
        assert len(periods) == int(math.log2(cap)) + 1


def test_what_it_says_of_itself():
    """Theta is no part of it: it may change from one part of a run to the next."""
    rule = sasg_jax.innovation()
    assert rule.name == "innovation(max_staleness=2, look_every=16)"
    assert (rule.silence, rule.max_staleness, rule.always) == ("keep", None, False)
    assert not rule.needs_learning_rate
    threshold, _ = rule.begin((), Round(PARAMS, jnp.int32(0), M, None))
    assert threshold == 1
    shared = _rule(share_stale_params=True)
    assert shared.name == "innovation(max_staleness=8, look_every=2, share_stale_params=True)"
    assert shared.init_worker(PARAMS).stale_params == ()
    assert rule.sent(_kept(4, 1), jnp.zeros(2), PARAMS, None).stale_params.tolist() == [0, 0]


def test_max_staleness_of_one_is_every_round():
    """And never asks for another gradient."""
    rule = _rule(max_staleness=1)
    assert rule.always
    assert rule.measure is None
    again = lambda params: pytest.fail("nobody asked for it")
    for t in range(3):
        decision = _decide(rule, rule.init_worker(PARAMS), again, round=t)
        assert (decision.upload, decision.measured) == (True, 0)


# Bad arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize("theta", [-1, -1e-9, math.nan, math.inf, True, "1", [1.0]], ids=str)
def test_theta_that_is_no_bound(theta):
    with pytest.raises(
        ValueError, match=r"^Expected theta=.* to be a finite number of at least 0\.$"
    ):
        sasg_jax.innovation(theta=theta)


@pytest.mark.parametrize("name", ["max_staleness", "look_every"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "3"])
def test_counts_below_one(name, value):
    with pytest.raises(
        ValueError, match=rf"^Expected {name}={value!r} to be an integer of at least 1\.$"
    ):
        sasg_jax.innovation(**{name: value})
