"""Workers come and go: every part of the state, beside a NumPy loop and by itself."""

import functools
import json
import subprocess
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import problems
import pytest
import two_processes
from problems import ALPHA, DENSITY, LEARNING_RATE, M

import sasg_jax
from examples.power_sgd import power_sgd
from sasg_jax.exchanges import shards
from sasg_jax.state_axes import per_worker
from sasg_jax.states import NEVER, find_state

TOP_K = sasg_jax.top_k(DENSITY)

# Whole runs beside the NumPy loop -----------------------------------------------------------------

ROUNDS, HISTORY, STEPS, MOST = 24, 2, 2, 6
# Worker 0, which is the server where that is one of them, leaves; at last nobody keeps its number.
RESIZES = {6: ([1, 2, 3], 3), 12: ([0, 1, 2], 6), 18: ([5, 0, 2, 1], 4)}
RULE = sasg_jax.innovation(ALPHA, history=HISTORY)
PAPER: dict[str, Any] = {"alpha": ALPHA, "history": HISTORY}


def _compressed(compressor=TOP_K, rule=None, **parts):
    make = sasg_jax.compressed_sgd
    return lambda workers: make(LEARNING_RATE, compressor, rule, num_workers=workers, **parts)


def _local_steps(workers):
    ours = sasg_jax.aggregate(TOP_K, sasg_jax.every(2), num_workers=workers)
    return sasg_jax.pipeline(ours, optax.sgd(1.0))


def _momentum(workers):
    ours = sasg_jax.aggregate(TOP_K, sasg_jax.every(3), num_workers=workers)
    return sasg_jax.pipeline(optax.trace(0.5), ours, optax.sgd(LEARNING_RATE, momentum=0.5))


class Case(NamedTuple):
    """A method, twice: made by the library, and as arguments of the oracle."""

    make: Any  # tx = make(num_workers)
    oracle: dict[str, Any]
    driver: Mapping[str, Any] = MappingProxyType({})
    slow: bool = False


TWO_WAY: dict[str, Any] = {"downlink": sasg_jax.top_k(0.2)}
CASES = {
    "sasg": Case(_compressed(rule=RULE), PAPER),
    "sasg, keep": Case(_compressed(rule=RULE, silence="keep"), {**PAPER, "silence": "keep"}),
    "lasg": Case(_compressed(sasg_jax.identity(), RULE), {**PAPER, "density": None}, slow=True),
    "turn_sgd": Case(
        lambda workers: sasg_jax.turn_sgd(
            LEARNING_RATE, num_workers=workers, density=DENSITY, period=4
        ),
        {"turn": (4, True), "scope": "tree"},
    ),
    "drop": Case(
        _compressed(rule=sasg_jax.every(2), silence="drop"),
        {"turn": (2, True), "silence": "drop"},
        slow=True,
    ),
    "reconstruction": Case(
        _compressed(rule=sasg_jax.every(2), feedback=sasg_jax.reconstruction()),
        {"turn": (2, True), "feedback": "reconstruction"},
    ),
    "server": Case(_compressed(rule=RULE, **TWO_WAY), {**PAPER, "downlink_density": 0.2}),
    "sharded": Case(
        _compressed(rule=RULE, **TWO_WAY, exchange="sharded"),
        {**PAPER, "downlink_density": 0.2, "scope": "shards"},
    ),
    "sharded, reconstruction": Case(
        _compressed(
            rule=sasg_jax.every(2),
            feedback=sasg_jax.reconstruction(),
            **TWO_WAY,
            exchange="sharded",
        ),
        {
            "turn": (2, True),
            "feedback": "reconstruction",
            "downlink_density": 0.2,
            "scope": "shards",
        },
        slow=True,
    ),
    "server, on devices": Case(
        _compressed(rule=RULE, **TWO_WAY),
        {**PAPER, "downlink_density": 0.2},
        {"driver": "shard_map", "devices": jax.devices()[::-1]},
    ),
    "chunks": Case(_compressed(rule=RULE), PAPER, {"chunk_size": 2}, slow=True),
    "local steps": Case(_local_steps, {"learning_rate": None, "turn": (2, True)}),
    "pipeline": Case(_momentum, {"learning_rate": None, "turn": (3, True)}),
}


@functools.cache
def _batches(steps):
    images, labels = problems.softmax_batches(MOST, ROUNDS * steps)
    by_round = lambda x: np.swapaxes(x.reshape(ROUNDS, steps, *x.shape[1:]), 1, 2)
    return by_round(images), by_round(labels)


RATE = optax.linear_schedule(0.01, 0.002, 2 * ROUNDS)  # of the inner AdamW
B1, B2, EPS, DECAY = 0.9, 0.999, 1e-8, 1e-4


class _Worker:
    """The state of momentum, or of AdamW, of one worker."""

    def __init__(self, params):
        self.mu = self.nu = {name: np.zeros_like(x) for name, x in params.items()}
        self.count = 0

    def momentum(self, g):
        self.mu = {name: g[name] + 0.5 * self.mu[name] for name in g}
        return self.mu

    def adamw(self, g, w):
        self.count += 1
        self.mu = {name: B1 * self.mu[name] + (1 - B1) * g[name] for name in g}
        self.nu = {name: B2 * self.nu[name] + (1 - B2) * g[name] ** 2 for name in g}
        rate = np.float32(np.asarray(RATE(self.count - 1)))
        made = {}
        for name, x in w.items():
            mu, nu = self.mu[name] / (1 - B1**self.count), self.nu[name] / (1 - B2**self.count)
            made[name] = (x - rate * (mu / (np.sqrt(nu) + EPS) + DECAY * x)).astype(np.float32)
        return made


class _Directions:
    """Each worker's direction, whose state starts at the mean where one joins."""

    def __init__(self, name):
        self.name, self.round = name, 0
        params = problems.softmax_params()
        self.workers = [_Worker(params) for _ in range(M)]
        self.outer = {name: np.zeros_like(x) for name, x in params.items()}

    def resize(self, stay, num_workers):
        started = _Worker(problems.softmax_params())
        average = lambda trees: {name: np.mean([x[name] for x in trees], 0) for name in started.mu}
        started.mu = average([worker.mu for worker in self.workers])
        started.nu = average([worker.nu for worker in self.workers])
        started.count = self.workers[0].count
        self.workers = [self.workers[m] for m in stay]
        for _ in range(num_workers - len(stay)):
            new = _Worker(started.mu)
            vars(new).update(vars(started))
            self.workers.append(new)

    def __call__(self, m, t, params):
        if t != self.round:
            self.round = t
            if t in RESIZES:
                self.resize(*RESIZES[t])
        images, labels = _batches(STEPS if self.name == "local steps" else 1)
        if self.name != "local steps":
            g = oracle.softmax_grad(params, images[t, m, 0], labels[t, m, 0])
            return self.workers[m].momentum(g) if self.name == "pipeline" else g
        w = params
        for step in range(STEPS):
            g = oracle.softmax_grad(w, images[t, m, step], labels[t, m, step])
            w = self.workers[m].adamw(g, w)
        return oracle.subtract(params, w)

    def after(self, step):
        if self.name != "pipeline":
            return step
        self.outer = {name: step[name] + 0.5 * self.outer[name] for name in step}
        return {name: LEARNING_RATE * x for name, x in self.outer.items()}


def _want(name):
    directions = _Directions(name)
    how = {"learning_rate": LEARNING_RATE, "density": DENSITY, **CASES[name].oracle}
    return oracle.train(
        directions,
        problems.softmax_params(),
        num_workers=M,
        rounds=ROUNDS,
        after=directions.after,
        resizes=RESIZES,
        **how,
    )


def _train_step(name, workers):
    loss, case = problems.softmax_loss, CASES[name]
    options = dict(case.driver)
    if "devices" in options:
        options["devices"] = options["devices"][:workers]
    if name == "local steps":
        loss = sasg_jax.local_steps(
            loss, optax.adamw(RATE, B1, B2, EPS, weight_decay=DECAY), steps=STEPS
        )
    return sasg_jax.make_train_step(loss, case.make(workers), num_workers=workers, **options)


def _run(name):
    """Its last state, and what was uploaded and the threshold of all rounds."""
    steps = {workers: _train_step(name, workers) for workers in (M, 3, MOST)}
    state, workers = steps[M].init(problems.softmax_params()), M
    uploaded, thresholds = np.zeros((ROUNDS, MOST), bool), np.zeros(ROUNDS)
    batches = _batches(STEPS if name == "local steps" else 1)
    if name != "local steps":
        batches = jax.tree.map(lambda x: x[:, :, 0], batches)
    for t in range(ROUNDS):
        if t in RESIZES:
            stay, workers = RESIZES[t]
            tx = CASES[name].make(workers)
            state = sasg_jax.resize(state, tx, num_workers=workers, stay=stay)
        batch = jax.tree.map(lambda x, n=workers, t=t: x[t, :n], batches)
        state, info = jax.block_until_ready(steps[workers].step(state, batch))
        uploaded[t, :workers], thresholds[t] = info.uploaded, info.threshold
    return state, uploaded, thresholds


def _whole(shards, like):
    """What the servers of all shards have of a tree."""
    return jax.tree.map(
        lambda x, leaf: np.asarray(x).reshape(-1)[: leaf.size].reshape(leaf.shape), shards, like
    )


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if case.slow else [])
        for name, case in CASES.items()
    ],
)
def test_run_is_that_of_a_loop(name):
    """From 4 workers to 3, 6 and 4: parameters, who uploads when, and what everybody keeps."""
    state, uploaded, thresholds = _run(name)
    want = _want(name)
    assert want.margin > 1e-5  # no choice hangs on rounding
    np.testing.assert_array_equal(uploaded, want.uploaded)
    close = functools.partial(chex.assert_trees_all_close, rtol=1e-3, atol=2e-5)
    close(problems.to_numpy(state.params), want.params)
    np.testing.assert_allclose(thresholds, want.threshold, rtol=1e-3, atol=1e-7)
    ours = find_state(state.opt_state)
    stacked = lambda trees: {key: np.stack([tree[key] for tree in trees]) for key in trees[0]}
    if name.endswith("reconstruction"):
        h = stacked(want.reconstructions)
        close(problems.to_numpy(ours.worker.feedback.reconstruction), h)
        total = _whole(ours.server.memory, want.params)
        close(total, {key: x.sum(0) for key, x in h.items()})
    elif name != "lasg":
        close(problems.to_numpy(ours.worker.feedback.residual), stacked(want.residuals))
    if "downlink" in str(CASES[name].oracle):
        got = _whole(ours.server.downlink_feedback.residual, want.params)
        close(got, want.downlink_residual)
        assert any(x.any() for x in got.values())
    # Who joins uploads at once; where it could be silent, others are.
    assert uploaded[12, 3:].all()
    assert not uploaded[:, :3].all()


# States of any content ----------------------------------------------------------------------------

PARAMS = problems.quadratic_params()
APPROXIMATE = sasg_jax.top_k(DENSITY, selection="approximate")


def _aggregate(compressor=TOP_K, rule=None, **parts):
    return lambda workers: sasg_jax.aggregate(compressor, rule, num_workers=workers, **parts)


def _around(wrap, ours=None):
    return lambda workers: wrap((ours or _aggregate())(workers))


NOISE = optax.add_noise(0.1, 0.5, key=jax.random.key(3))
OPTIMISERS = {
    "sasg": _compressed(rule=RULE),
    "shared": _compressed(rule=sasg_jax.innovation(1.0, share_stale_params=True)),
    "reconstruction": _compressed(feedback=sasg_jax.reconstruction()),
    "average": _compressed(feedback=sasg_jax.reconstruction(damping=0.5, momentum=0.3)),
    "momentum": _compressed(feedback=sasg_jax.momentum_residual(0.9)),
    "server": _compressed(rule=RULE, **TWO_WAY, downlink_rule=sasg_jax.direction_change()),
    "sharded": _compressed(
        APPROXIMATE,
        RULE,
        downlink=APPROXIMATE,
        downlink_rule=sasg_jax.direction_change(),
        exchange="sharded",
    ),
    "sharded, reconstruction": _compressed(
        feedback=sasg_jax.reconstruction(), **TWO_WAY, exchange="sharded"
    ),
    "approximate": _compressed(APPROXIMATE),
    "power_sgd": _aggregate(power_sgd(2)),
    "held_rate": _compressed(rule=sasg_jax.held_rate(0.3, sasg_jax.residual_norm())),
    "sasg_keep": lambda workers: sasg_jax.sasg_keep(0.1, num_workers=workers),
    "pipeline": _around(lambda ours: sasg_jax.pipeline(optax.adam(0.1), ours, optax.adam(0.1))),
    "chain": _around(lambda ours: optax.chain(NOISE, optax.trace(0.9), ours, optax.adam(0.1))),
    "named_chain": _around(lambda o: optax.named_chain(("a", optax.trace(0.9)), ("ours", o))),
    "masked": _around(lambda ours: optax.masked(ours, {"b": False, "w": True})),
    "flatten": _around(optax.flatten, _compressed(rule=RULE, **TWO_WAY, exchange="sharded")),
    "inject": lambda workers: optax.inject_hyperparams(
        sasg_jax.sasg, static_args=("num_workers", "density", "max_staleness", "history")
    )(0.1, num_workers=workers),
}
KEYS = jax.random.split(jax.random.key(1), M)


def _fill(tree, seed=0):
    """The same tree, of other numbers; some of them are -0.0."""
    rng = np.random.default_rng(seed)

    def fill(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) or x.dtype == bool:
            return x
        if jnp.issubdtype(x.dtype, jnp.integer):
            return np.asarray(rng.integers(1, 9, x.shape), x.dtype)
        numbers = np.asarray(rng.normal(size=x.shape))
        return np.asarray(np.where(numbers < -1, -0.0, numbers), x.dtype)

    return jax.tree.map(fill, tree)


@functools.cache
def _state(name, dtype=jnp.float32, workers=M) -> Any:
    params = problems.quadratic_params(dtype)
    opt_state = sasg_jax.stack_workers(OPTIMISERS[name](workers).init(params), workers)
    model_state = {"mean": np.zeros((workers, 3)), "count": np.zeros(workers, np.int32)}
    state = sasg_jax.TrainState(params, _fill(opt_state), _fill(model_state), KEYS[:workers])
    inner = optax.adamw(RATE).init(params)
    own = jax.tree.map(lambda x: jnp.broadcast_to(x, (workers, *x.shape)), inner)
    return state._replace(direction=_fill(own, 1))


def _resize(state, name, workers, stay=None) -> Any:
    return sasg_jax.resize(state, OPTIMISERS[name](workers), num_workers=workers, stay=stay)


def _bits(x):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x).dtype, np.shape(x), np.asarray(x).tobytes()


@pytest.mark.parametrize("stay", [None, range(M)], ids=["default", "range"])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_same_workers_are_the_same_bits(name, stay):
    state = _state(name)
    got = _resize(state, name, M, stay)
    assert jax.tree.structure(got) == jax.tree.structure(state)
    assert list(map(_bits, jax.tree.leaves(got))) == list(map(_bits, jax.tree.leaves(state)))


@pytest.mark.parametrize("name", OPTIMISERS)
def test_state_is_one_that_the_optimiser_makes(name):
    """Of all structure, shapes and dtypes, static parts included; and the old one is as it was."""
    before = list(map(_bits, jax.tree.leaves(_state(name))))
    for workers, stay in ((3, None), (6, None), (4, [3, 1]), (1, [2])):
        got = _resize(_state(name), name, workers, stay)
        fresh = sasg_jax.stack_workers(OPTIMISERS[name](workers).init(PARAMS), workers)
        chex.assert_trees_all_equal_shapes_and_dtypes(got.opt_state, fresh)
        assert sasg_jax.Ledger(got.opt_state).to_dict() == sasg_jax.Ledger(fresh).to_dict()
        for x in jax.tree.leaves((got.model_state, got.keys, got.direction)):
            assert len(x) == workers
        chex.assert_trees_all_equal(got.params, _state(name).params)
    assert list(map(_bits, jax.tree.leaves(_state(name)))) == before


@pytest.mark.parametrize("name", OPTIMISERS)
def test_who_stays_keeps_what_is_its_own(name):
    """In the order in which it is named; but its residual, and in shards what is of shards."""
    state = _state(name)
    got = _resize(state, name, 5, stay := [2, 0])
    keep = lambda opt_state: [
        (jax.tree_util.keystr(path), x)
        for (path, x), own in zip(
            jax.tree_util.tree_leaves_with_path(opt_state),
            jax.tree.leaves(per_worker(opt_state)),
            strict=True,
        )
        if own and not any(part in jax.tree_util.keystr(path) for part in but)
    ]
    but = [".residual", ".server"]
    if find_state(state.opt_state).wire.exchange == "sharded":
        but += [".compressor_memory", ".staleness"]
    kept = keep(state.opt_state)
    assert len(kept) > 3
    for (path, old), (again, new) in zip(kept, keep(got.opt_state), strict=True):
        assert path == again
        assert _bits(new[:2]) == _bits(old[np.asarray(stay)])
    own = state.model_state, state.keys, state.direction
    new_own = got.model_state, got.keys, got.direction
    for old, new in zip(jax.tree.leaves(own), jax.tree.leaves(new_own), strict=True):
        assert _bits(new[:2]) == _bits(old[np.asarray(stay)])


SHARED = "params", "rule", "finite", "sent_down", "threshold", "round"


@pytest.mark.parametrize("name", OPTIMISERS)
def test_what_all_share_goes_on(name):
    """The rule's history and the round, and what stands after ours."""
    state = _state(name)
    got = _resize(state, name, 3, [3, 1])
    old, new = (find_state(x.opt_state).server._asdict() for x in (state, got))
    for part in SHARED[1:]:
        chex.assert_trees_all_equal(new[part], old[part])
    if name not in ("sharded", "sharded, reconstruction", "flatten"):
        for part in ("downlink_feedback", "downlink_memory", "downlink_rule"):
            chex.assert_trees_all_equal(new[part], old[part])
    if name == "pipeline":
        chex.assert_trees_all_equal(got.opt_state.after, state.opt_state.after)


# Residuals ----------------------------------------------------------------------------------------


def _residual(state):
    return find_state(state.opt_state).worker.feedback.residual


def _sums(state):
    return {key: np.asarray(x, np.float64).sum(0) for key, x in _residual(state).items()}


DTYPES = jnp.float32, jnp.float16, jnp.bfloat16


def _half_a_unit(x, dtype):
    """In the last place of numbers as large as the largest of each column."""
    exponents = np.floor(np.log2(np.abs(x).max(0)))
    return float(jnp.finfo(dtype).eps) / 2 * 2.0**exponents


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize(("workers", "stay"), [(3, [1, 2, 3]), (1, None), (5, [0, 3]), (2, [3, 1])])
def test_residuals_of_who_leaves_are_shared_out(dtype, workers, stay):
    """Equally, and their sum is kept, there and back."""
    state = _state("sasg", dtype)
    got = _resize(state, "sasg", workers, stay)
    staying = list(range(workers)) if stay is None else stay
    for key, old in _residual(state).items():
        old, new = (np.asarray(x, np.float64) for x in (old, _residual(got)[key]))
        share = old[[m for m in range(M) if m not in staying]].sum(0) / len(staying)
        rounded = _half_a_unit(new, dtype)
        off = np.abs(new[: len(staying)] - old[staying] - share)
        assert (off <= 3 * rounded[None]).all()
        np.testing.assert_array_equal(new[len(staying) :], 0)
        assert (np.abs(new.sum(0) - old.sum(0)) <= rounded).all()
    if dtype == jnp.float32:
        back = _resize(got, "sasg", M)
        for key, want in _sums(state).items():
            np.testing.assert_allclose(_sums(back)[key], want, rtol=0, atol=1e-6)


def test_residuals_too_large_for_one_are_taken_over_by_the_next():
    """In half precision nothing becomes infinite."""
    state = _state("sasg", jnp.float16)
    of_old = jnp.asarray([60000, -60000, 60000, 60000], jnp.float16)
    e = {
        key: of_old.reshape(M, *(1,) * (x.ndim - 1)) + 0 * x for key, x in _residual(state).items()
    }
    worker = state.opt_state.worker._replace(feedback=sasg_jax.Residual(e))
    state = state._replace(opt_state=state.opt_state._replace(worker=worker))
    got = _residual(_resize(state, "sasg", 2, [0, 1]))["b"]
    np.testing.assert_array_equal(got[:, 0], [65504, 120000 - 65504])


def test_feedback_of_ones_own_is_refused():
    own = sasg_jax.Feedback(
        name="own",
        init=lambda tree: {"kept": tree},
        before=lambda x, memory: x,
        after=lambda memory, compressed, decoded: memory,
    )
    make = _compressed(feedback=own)
    state = sasg_jax.TrainState(PARAMS, sasg_jax.stack_workers(make(M).init(PARAMS), M))
    with pytest.raises(ValueError, match=r"^Expected feedback of type='dict' to be that of"):
        sasg_jax.resize(state, make(3), num_workers=3)


# Who joins ----------------------------------------------------------------------------------------

RULES = {
    "paper": sasg_jax.innovation(1e9, history=HISTORY),
    "every": sasg_jax.every(10**6),
    "reuse": sasg_jax.every(10**6, staggered=False),
    "direction_change": sasg_jax.direction_change(1e9, max_staleness=10**6),
    "held_rate": sasg_jax.held_rate(1e-6, sasg_jax.innovation(), gain=9.0),
}


@pytest.mark.parametrize("name", RULES)
def test_who_joins_uploads_in_its_first_round_whatever_the_rule(name):
    """Also where that is later than the others': nobody else has anything to say."""
    silence = "reuse" if name == "reuse" else None
    make = _compressed(rule=RULES[name], silence=silence)
    steps = {n: _make_step(make(n), n) for n in (2, 5)}
    state = steps[2].init(PARAMS)
    batches = problems.centres(5, rounds=8)
    for t in range(4):
        state, _ = steps[2].step(state, jax.tree.map(lambda x, t=t: x[t, :2], batches))
    state = sasg_jax.resize(state, make(5), num_workers=5)
    np.testing.assert_array_equal(_residual(state)["w"][2:], 0)
    uploads = []
    for t in range(4, 8):
        present = np.array([True, True, True, True, t > 5])
        state, info = steps[5].step(state, problems.at(batches, t), present)
        uploads.append(np.asarray(info.uploaded).astype(int).tolist())
    assert uploads[0] == [0, 0, 1, 1, 0]
    assert uploads[2][4] == 1
    if name != "held_rate":  # which begins to measure when it has been forced
        assert [uploads[1], uploads[3]] == [[0] * 5] * 2
        assert uploads[2] == [0, 0, 0, 0, 1]


def _make_step(tx, workers):
    return sasg_jax.make_train_step(problems.quadratic_loss, tx, num_workers=workers)


def test_rules_of_a_turn_wait_at_the_start_as_ever():
    """Only one who joins a run must upload without a bound."""
    worker = sasg_jax.init_worker(_compressed(rule=sasg_jax.every(9))(M).method, PARAMS)
    assert worker.staleness == 1 < NEVER


@pytest.mark.parametrize("name", OPTIMISERS)
def test_who_joins_has_nothing_yet(name):
    """As ``init_worker`` has it, at the current parameters."""
    state = _state(name)._replace(params=_fill(PARAMS, 3))
    got = find_state(_resize(state, name, 6).opt_state).worker
    fresh: Any = find_state(OPTIMISERS[name](6).init(state.params)).worker
    cap = find_state(state.opt_state).wire.max_staleness
    np.testing.assert_array_equal(got.staleness[M:], cap or NEVER)
    if name == "power_sgd":
        fresh = fresh._replace(compressor_memory=got.compressor_memory[:][:])
        got = got._replace(compressor_memory=got.compressor_memory)
    for m in range(M, 6):
        mine = jax.tree.map(lambda x, m=m: x[m], got)._replace(staleness=fresh.staleness)
        if name == "power_sgd":
            mine = mine._replace(compressor_memory=fresh.compressor_memory)
        chex.assert_trees_all_equal(mine, fresh)


def test_memory_with_means_inside_stays_the_same_on_all():
    """PowerSGD's, also where worker 0 leaves."""
    state = _state("power_sgd")
    memory = [np.broadcast_to(x[:1], x.shape) for x in state.opt_state.worker.compressor_memory]
    worker = state.opt_state.worker._replace(compressor_memory=memory)
    state = state._replace(opt_state=state.opt_state._replace(worker=worker))
    (got,) = _resize(state, "power_sgd", 6, [3, 2]).opt_state.worker.compressor_memory
    np.testing.assert_array_equal(got, np.broadcast_to(memory[0][:1], got.shape))


def test_models_and_directions_start_at_the_mean():
    """AdamW's moments with the count that fits them; and what is before ours."""
    state = _state("pipeline")
    got = _resize(state, "pipeline", 6, [3, 1])
    own = lambda state: (state.model_state, state.direction, state.opt_state.before)
    want = sasg_jax.mean_model_state(jax.tree.map(jnp.asarray, own(state)))
    for m in range(2, 6):
        mine = jax.tree.map(lambda x, m=m: x[m], own(got))
        chex.assert_trees_all_close(mine, want, rtol=1e-6, atol=1e-7)
    assert len({int(count) for count in got.direction[0].count[2:]}) == 1


def test_equal_numbers_have_themselves_for_a_mean():
    """E.g. a learning rate in the state, of which there are three."""
    numbers = np.random.default_rng(0).random(99)
    for dtype in (np.float32, jnp.bfloat16):
        rate = np.stack([numbers.astype(dtype)] * 3)
        opt_state = sasg_jax.stack_workers(_compressed()(3).init(PARAMS), 3)
        state = sasg_jax.TrainState(PARAMS, opt_state, direction=rate)
        got = sasg_jax.resize(state, _compressed()(7), num_workers=7).direction
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, np.stack([rate[0]] * 7))


@pytest.mark.parametrize("kind", ["typed", "integers"])
def test_keys_of_who_joins_are_nobody_elses(kind):
    """They follow from the old ones, whoever has left in between; and no round has them."""
    state = _state("sasg")
    if kind == "integers":
        state = state._replace(keys=jax.random.key_data(state.keys))
    data = lambda keys: np.asarray(keys if kind == "integers" else jax.random.key_data(keys))
    rows = lambda keys: [row.tobytes() for row in data(keys)]
    six = _resize(state, "sasg", 6)
    again = _resize(state, "sasg", 6)
    assert rows(six.keys) == rows(again.keys)
    assert len(set(rows(six.keys))) == 6
    four = _resize(six, "sasg", 4, [0, 1, 2, 5])
    other = _resize(four, "sasg", 6)
    assert len(set(rows(other.keys))) == 6
    assert rows(other.keys)[:4] == rows(four.keys)
    fold = jax.vmap(lambda key, number: jax.random.fold_in(key, number), (None, 0))
    in_use = fold(KEYS[0], jnp.arange(100))
    assert not set(rows(six.keys)[4:]) & {x.tobytes() for x in np.asarray(_data(in_use))}


_data = jax.random.key_data


def test_keys_before_ours_are_nobody_elses():
    keys = _resize(_state("chain"), "chain", 6).opt_state[0].rng_key
    assert len(np.unique(_data(keys), axis=0)) == 6


# The server ---------------------------------------------------------------------------------------


def test_last_messages_stay_with_their_workers():
    state = _state("sasg")
    before = state.opt_state.server.memory
    got = _resize(state, "sasg", 5, [2, 0]).opt_state.server.memory
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(got), strict=True):
        np.testing.assert_array_equal(new[:2], old[[2, 0]])
        np.testing.assert_array_equal(new[2:], 0)


@pytest.mark.parametrize("name", ["reconstruction", "average", "sharded, reconstruction"])
@pytest.mark.parametrize(("workers", "stay"), [(3, [1, 2, 3]), (6, None), (4, [3, 0]), (1, [2])])
def test_sum_of_reconstructions_is_over_those_who_are_there(name, workers, stay):
    state = _state(name)
    ours = state.opt_state
    h = ours.worker.feedback.reconstruction
    memory = {key: x.sum(0) for key, x in h.items()}
    if "sharded" in name:
        memory = shards.cut(memory, M)
    state = state._replace(opt_state=ours._replace(server=ours.server._replace(memory=memory)))
    got = _resize(state, name, workers, stay).opt_state
    want = {key: x.sum(0) for key, x in got.worker.feedback.reconstruction.items()}
    want = shards.cut(want, workers) if "sharded" in name else want  # what pads them is zero
    chex.assert_trees_all_close(got.server.memory, want, atol=1e-6)


@pytest.mark.parametrize("workers", [1, 3, 5, 40])
def test_residual_of_the_way_down_is_cut_anew(workers):
    """No entry changes, also with more shards than entries; and back."""
    state = _state("sharded")
    ours = state.opt_state
    whole = {key: np.asarray(x) for key, x in _fill(PARAMS, 5).items()}
    down = sasg_jax.Residual(shards.cut(whole, M))
    server = ours.server._replace(downlink_feedback=down)
    state = state._replace(opt_state=ours._replace(server=server))
    got = _resize(state, "sharded", workers)
    cut = got.opt_state.server.downlink_feedback.residual
    chex.assert_trees_all_equal(_whole(cut, PARAMS), whole)
    assert cut["w"].shape == (workers, -(-24 // workers))
    back = _resize(got, "sharded", M).opt_state.server.downlink_feedback.residual
    chex.assert_trees_all_equal(_whole(back, PARAMS), whole)


def test_shards_of_another_number_ask_all_for_their_messages():
    """A last message has the entries of each old shard. With as many shards it goes on."""
    state = _state("sharded")
    cap = state.opt_state.wire.max_staleness
    got = _resize(state, "sharded", 3).opt_state
    np.testing.assert_array_equal(got.worker.staleness, cap)
    assert not any(x.any() for x in jax.tree.leaves(got.server.memory))
    assert not any(x.any() for x in jax.tree.leaves(got.worker.compressor_memory))
    assert (got.server.downlink_rule.staleness == 10).all()
    before, stay = state.opt_state, [2, 0, 1]
    got = _resize(state, "sharded", M, stay).opt_state
    np.testing.assert_array_equal(got.worker.staleness[:3], before.worker.staleness[stay])
    memories = before.server.memory, got.server.memory
    for old, new in zip(*map(jax.tree.leaves, memories), strict=True):
        np.testing.assert_array_equal(new[:, :3], old[:, stay])
        np.testing.assert_array_equal(new[:, 3], 0)


# Steps, loops and processes -----------------------------------------------------------------------


def test_in_a_loop_of_ones_own():
    """As in a train step, with the optimiser's state alone."""
    make = _compressed(rule=RULE)
    batches = problems.centres(M, rounds=6)
    run, state = problems.start(make(M), PARAMS), _make_step(make(M), M).init(PARAMS)
    for workers, rounds in ((M, range(3)), (3, range(3, 6))):
        if workers != M:
            arguments = {"num_workers": workers, "stay": [0, 1, 3]}
            own = sasg_jax.TrainState(run.params, run.opt_state)
            own = sasg_jax.resize(own, make(workers), **arguments)
            run = problems.Run(own.params, own.opt_state)
            state = sasg_jax.resize(state, make(workers), **arguments)
        loop = problems.map_workers(make(workers), run, num_workers=workers)
        train = _make_step(make(workers), workers).step
        for t in rounds:
            batch = jax.tree.map(lambda x, t=t, n=workers: x[t, :n], batches)
            run, (state, _) = loop(run, batch), train(state, batch)
    chex.assert_trees_all_close(run.params, state.params, atol=1e-6)
    chex.assert_trees_all_close(run.opt_state, state.opt_state, atol=1e-6)


@pytest.mark.parametrize("driver", ["pmap", "shard_map", "vmap"])
def test_step_takes_it_from_any_devices(driver):
    """Of other workers, whose step may have any memory again; compiled once."""
    make = _compressed(rule=sasg_jax.every(2), **TWO_WAY)
    options: dict[str, Any] = {}
    if driver != "vmap":
        options = {"driver": driver, "devices": jax.devices()[4:7]}
    loss = lambda params, batch, key: problems.quadratic_loss(params, batch)
    train = functools.partial(sasg_jax.make_train_step, loss, has_key=True)
    before = train(make(5), num_workers=5, driver="shard_map")
    after = train(make(3), num_workers=3, **options)
    state = before.init(PARAMS, key=jax.random.key(0))
    state, _ = jax.block_until_ready(before.step(state, problems.centres(5)))
    kept = sasg_jax.resize(state, make(3), num_workers=3, stay=[1, 2, 4])
    copy = problems.to_numpy(kept._replace(keys=()))
    jax.block_until_ready(before.step(state, problems.centres(5)))
    state, compiled = kept, []
    for seed in range(3):
        with problems.compilations() as names:
            state, _ = jax.block_until_ready(after.step(state, problems.centres(3, seed=seed)))
        compiled.append(len(names))
    chex.assert_trees_all_equal(kept._replace(keys=()), copy)  # it is the user's still
    assert compiled[0] > 0
    assert compiled[1:] == [0, 0]
    if driver != "vmap":
        assert state.params["w"].sharding.device_set == set(jax.devices()[4:7])


REFUSED = {
    "no workers": ({"num_workers": 0}, "^Expected num_workers=0 to be an integer of at least 1"),
    "not the optimiser's": ({"num_workers": 5}, r"^Expected num_workers=5 to be that of tx, 3\.$"),
    "twice": ({"stay": [1, 1]}, r"^Expected stay=\[1, 1\] to be at least 1 and at most num_worker"),
    "nobody": ({"stay": []}, r"^Expected stay=\[\] to be at least 1"),
    "too many": ({"stay": range(4)}, r"^Expected stay=\[0, 1, 2, 3\] to be .*num_workers=3 differ"),
    "too high": ({"stay": [0, 4]}, r"^Expected stay=\[0, 4\] .* numbers below 4\.$"),
    "negative": ({"stay": [0, -1]}, r"^Expected stay\[1\]=-1 to be an integer of at least 0"),
    "half": ({"stay": [0.5]}, r"^Expected stay\[0\]=0.5 to be an integer"),
    "a number": ({"stay": 2}, "^Expected stay=2 to be a sequence of workers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_arguments(name):
    arguments, message = REFUSED[name]
    make = _compressed(rule=RULE)
    with pytest.raises(ValueError, match=message):
        sasg_jax.resize(_state("sasg"), make(3), **({"num_workers": 3} | arguments))


OTHERS = {
    "density": (_compressed(sasg_jax.top_k(0.5), RULE), r"it has compressor=top_k\(0.5\)"),
    "rule": (_compressed(rule=sasg_jax.every(2)), r"it has rule=every\(2\)"),
    "silence": (_compressed(rule=RULE, silence="keep"), "it has silence=keep"),
    "exchange": (_compressed(rule=RULE, exchange="sharded"), "it has exchange=sharded"),
    "downlink": (
        _compressed(rule=RULE, exchange="lazy", feedback=sasg_jax.residual(0.5)),
        r"it has feedback=residual\(0.5\)",
    ),
    "pipeline": (
        lambda workers: sasg_jax.pipeline(optax.identity(), _compressed(rule=RULE)(workers)),
        "got one of another structure",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_state_of_another_optimiser_is_named(name):
    make, named = OTHERS[name]
    with pytest.raises(
        ValueError, match=rf"^Expected a state that this optimiser has made.*{named}"
    ):
        sasg_jax.resize(_state("sasg"), make(3), num_workers=3)


def test_state_of_other_parameters():
    make, state = _compressed(rule=RULE), _state("sasg")
    wider = state._replace(params=PARAMS | {"w": jnp.zeros((4, 7))})
    with pytest.raises(
        ValueError, match=r"^Expected state.opt_state.*\['w'\] to have its shape in"
    ):
        sasg_jax.resize(wider, make(3), num_workers=3)


def test_state_of_one_worker():
    state = sasg_jax.TrainState(PARAMS, _compressed(rule=RULE)(M).init(PARAMS))
    with pytest.raises(
        ValueError, match=r"^Expected state.opt_state.worker.* to have a leading axis of 4 workers"
    ):
        sasg_jax.resize(state, _compressed(rule=RULE)(3), num_workers=3)


def test_state_without_ours():
    state = sasg_jax.TrainState(PARAMS, optax.adam(0.1).init(PARAMS))
    with pytest.raises(ValueError, match="exactly one state of sasg_jax"):
        sasg_jax.resize(state, optax.adam(0.1), num_workers=3)


PROCESS = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[1]))
import sasg_jax
loss = lambda params, batch: jnp.sum((params - batch) ** 2)
make = lambda workers: sasg_jax.sasg(
    0.1, num_workers=workers, density=0.4, history=1, downlink=sasg_jax.top_k(0.4)
)
train = lambda workers: sasg_jax.make_train_step(
    loss, make(workers), num_workers=workers, driver="shard_map", donate=False
)
batches = np.random.default_rng(0).normal(size=(6, 4, 5)).astype(np.float32)
state, step = train(4).init(jnp.ones(5)), train(4).step
for t in range(6):
    if t == 3:
        state = sasg_jax.resize(state, make(3), num_workers=3, stay=[1, 2, 3])
        step = train(3).step
    state, info = jax.block_until_ready(step(state, batches[t, : 4 if t < 3 else 3]))
print(json.dumps(np.asarray(state.params.addressable_shards[0].data).tolist()))
"""


@pytest.mark.processes
def test_over_several_processes():
    """The server's state is that of worker 0, which one of them has; the run is the simulated."""
    outputs = two_processes.outputs(PROCESS, timeout=300)
    got = [json.loads(output.splitlines()[-1]) for output in outputs]
    simulated = PROCESS.replace('driver="shard_map", ', "").split("\n")
    code = "\n".join(line for line in simulated if "distributed" not in line)
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=two_processes.ENVIRONMENT,
    )
    want = json.loads(result.stdout.splitlines()[-1])
    np.testing.assert_allclose(got, [want, want], rtol=1e-5)
