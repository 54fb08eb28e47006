"""The named local methods: whole runs beside a loop of each recipe, and what they refuse."""

import functools
import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import by_hand
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from problems import M

import sasg_jax
from sasg_jax.states import find_state

ROUNDS, STEPS, TILE = 20, 3, 4
SIDES = {"b": (2, 3), "w": (4, 3)}  # the tiles of problems.quadratic_params
DOWN = sasg_jax.top_k(0.5, values="sign", indices="elias_fano")
TURN = sasg_jax.every(2)


def _falling(t):
    return 0.05 * 0.95**t


ADAMW = optax.chain(optax.clip_by_global_norm(2.0), optax.adamw(_falling, weight_decay=0.1))
MUON = optax.contrib.muon(0.05)  # of w; of b it is AdamW


class Recipe(NamedTuple):
    """One method, twice: made by the library, and for the loop below."""

    make: Callable[..., sasg_jax.LocalMethod]
    inner: Any = None  # of optax; without one, the direction is a gradient
    decay: float = 1.0
    density: float | None = None  # of each tile; None is everything
    levels: int | None = None  # magnitudes; None is all bits
    by_senders: bool = False
    turn: bool = False
    outer: tuple[float, float] = (1.0, 0.0)  # rate, and Nesterov's momentum
    decays: float = 0.0  # weights of demo


LOCAL: dict[str, Any] = {"num_workers": M, "steps": STEPS}
LOSS = problems.quadratic_loss
TILES: dict[str, Any] = {"density": 0.25, "tile": TILE}
SPARSE_LOCO = Recipe(
    functools.partial(sasg_jax.sparse_loco, LOSS, ADAMW, **LOCAL, **TILES, outer_rate=0.5),
    inner=ADAMW,
    decay=0.95,
    density=0.25,
    levels=2,
    outer=(0.5, 0.0),
)
DEMO = Recipe(
    functools.partial(
        sasg_jax.demo, LOSS, _falling, num_workers=M, **TILES, decay=0.9, weight_decay=0.3
    ),
    decay=0.9,
    density=0.25,
    decays=0.3,
)
RECIPES = {
    "local_sgd": Recipe(
        functools.partial(sasg_jax.local_sgd, LOSS, _falling, **LOCAL), optax.sgd(_falling)
    ),
    "diloco": Recipe(
        functools.partial(sasg_jax.diloco, LOSS, ADAMW, **LOCAL), ADAMW, outer=(0.7, 0.9)
    ),
    "sparse_loco": SPARSE_LOCO,
    "muloco": Recipe(
        functools.partial(sasg_jax.muloco, LOSS, 0.05, **LOCAL),
        inner=MUON,
        decay=0.95,
        levels=2,
        outer=(0.7, 0.9),
    ),
    "demo": DEMO,
}
VARIANTS = {
    **RECIPES,
    "sparse_loco_senders": SPARSE_LOCO._replace(
        make=functools.partial(SPARSE_LOCO.make, mean="senders"), by_senders=True
    ),
    "sparse_loco_turn": SPARSE_LOCO._replace(
        make=functools.partial(SPARSE_LOCO.make, rule=TURN), turn=True
    ),
    "demo_senders": DEMO._replace(
        make=functools.partial(DEMO.make, mean="senders"), by_senders=True
    ),
}


@functools.cache
def _centres(name):
    """Leading axes: rounds, workers, steps where there are such."""
    leading = (ROUNDS, M) if VARIANTS[name].inner is None else (ROUNDS, M, STEPS)
    rng = np.random.default_rng(5)
    shapes = {"b": (6,), "w": (4, 6)}
    return {k: rng.normal(size=(*leading, *s)).astype(np.float32) for k, s in shapes.items()}


# A loop of each recipe ----------------------------------------------------------------------------


def _way_of(inner):
    """``local, state = way(w, state, centres)``: a worker's steps, one after another."""

    @jax.jit
    def step(w, state, centre):
        grads = {name: w[name] - centre[name] for name in w}
        updates, state = inner.update(grads, state, w)
        return optax.apply_updates(w, updates), state

    def way(w, state, centres):
        for h in range(STEPS):
            w, state = step(w, state, problems.at(centres, h))
        return w, state

    return way


def _numbers(x, name, recipe):
    """Of a tensor, what its message holds by its coordinates: entries, or for demo frequencies."""
    dct, sides = recipe.inner is None, SIDES[name]
    if recipe.density is None:
        numbers = x
    elif dct:
        numbers = np.stack([t for _, t in by_hand.tiles_of(x, sides, recipe.density, dct)])
    else:
        kept = by_hand.tiles_of(x, sides, recipe.density, dct)
        numbers = by_hand.from_tiles(kept, x, sides, dct)
    return numbers if recipe.levels is None else by_hand.in_few_bits(numbers, recipe.levels)


def _decoded(numbers, x, name, recipe):
    if recipe.inner is not None:
        return numbers
    places = by_hand.places(by_hand.as_matrix(x, SIDES[name][1]).shape, SIDES[name])
    return by_hand.from_tiles(zip(places, numbers, strict=True), x, SIDES[name], True)


def _sparse_step(x):
    """The way down: half of the entries, one magnitude, which is a zero's too if it is chosen."""
    chosen = np.argsort(-np.abs(x.ravel()), kind="stable")[: x.size // 2]
    sent = np.zeros(x.size)
    sent[chosen] = by_hand.few_bits(x.ravel()[chosen], 1)
    return sent.reshape(x.shape)


@functools.cache
def _loop(name, down):
    """Parameters, and all workers' residuals."""
    recipe, centres = VARIANTS[name], _centres(name)
    w = {"b": np.zeros(6), "w": np.zeros((4, 6))}
    zeros = lambda: {name: np.zeros_like(x) for name, x in w.items()}
    float32 = lambda tree: {k: np.asarray(x, np.float32) for k, x in tree.items()}
    way = recipe.inner and _way_of(recipe.inner)
    states = [recipe.inner.init(float32(w)) for _ in range(M)] if way else []
    residuals, left, velocity = [zeros() for _ in range(M)], zeros(), zeros()
    for t in range(ROUNDS):
        sent = []
        for m in range(M):
            centre = problems.at(problems.at(centres, t), m)
            if way:
                local, states[m] = way(float32(w), states[m], centre)
                x = {k: w[k] - np.asarray(local[k]) for k in w}
            else:
                x = {k: _falling(t) * (w[k] - centre[k]) for k in w}
            p = {k: x[k] + recipe.decay * residuals[m][k] for k in w}
            numbers = {k: _numbers(p[k], k, recipe) for k in w}
            if recipe.turn and (t + m) % 2:
                residuals[m] = p
                numbers = {k: 0 * x for k, x in numbers.items()}
            else:
                residuals[m] = {k: p[k] - _decoded(numbers[k], p[k], k, recipe) for k in w}
            sent.append(numbers)
        over = by_hand.senders_mean if recipe.by_senders else functools.partial(np.mean, axis=0)
        step = {k: _decoded(over([x[k] for x in sent]), w[k], k, recipe) for k in w}
        if down:
            wanted = {k: step[k] + left[k] for k in w}
            step = {k: _sparse_step(wanted[k]) for k in w}
            left = {k: wanted[k] - step[k] for k in w}
        if not way:
            rate = _falling(t)
            w = {k: (1 - rate * recipe.decays) * w[k] - rate * np.sign(step[k]) for k in w}
            continue
        rate, momentum = recipe.outer
        velocity = {k: momentum * velocity[k] + step[k] for k in w}
        w = {k: w[k] - rate * (step[k] + momentum * velocity[k]) for k in w}
    return w, residuals


# Whole runs ---------------------------------------------------------------------------------------


def _run(name, driver, down):
    """The last state, and what every round reported."""
    direction, tx = VARIANTS[name].make(**({"downlink": DOWN} if down else {}))
    how: dict[str, Any] = {"driver": driver} if driver != "chunks" else {"chunk_size": 3}
    train_step = sasg_jax.make_train_step(direction, tx, num_workers=M, **how)
    state = train_step.init(problems.quadratic_params())
    return jax.jit(problems.scan_rounds(train_step.step))(state, (_centres(name),))


FAST = {
    *((name, "vmap", False) for name in VARIANTS),
    *((name, "shard_map", True) for name in RECIPES),
    ("sparse_loco_senders", "shard_map", False),
    ("sparse_loco_turn", "chunks", True),
    ("muloco", "chunks", False),
    ("demo_senders", "chunks", False),
}
CASES = [
    case if case in FAST else pytest.param(*case, marks=pytest.mark.slow)
    for name in VARIANTS
    for driver in ("vmap", "chunks", "shard_map")
    for down in (False, True)
    for case in [(name, driver, down)]
]


@pytest.mark.parametrize(("name", "driver", "down"), CASES)
def test_whole_run_equals_a_loop(name, driver, down):
    w, residuals = _loop(name, down)
    state, infos = _run(name, driver, down)
    turns = (np.arange(ROUNDS)[:, None] + np.arange(M)) % 2 == 0
    want = turns if VARIANTS[name].turn else np.ones((ROUNDS, M), bool)
    np.testing.assert_array_equal(infos.uploaded, want)
    assert infos.finite.all()
    kept = find_state(state.opt_state).worker.feedback
    for key in w:
        np.testing.assert_allclose(state.params[key], w[key], atol=3e-5, err_msg=key)
        if kept != ():
            each = [residual[key] for residual in residuals]
            np.testing.assert_allclose(kept.residual[key], each, atol=3e-5, err_msg=key)
    if driver == "shard_map":
        assert problems.same_on_all_devices(state.params)


def test_loops_are_worth_comparing():
    """Each choice of the table makes a difference that the comparison would see."""
    ends = {name: _loop(name, False)[0]["w"] for name in VARIANTS}
    ends["down"] = _loop("sparse_loco", True)[0]["w"]
    for name, end in ends.items():
        others = [np.abs(end - other).max() for key, other in ends.items() if key != name]
        assert min(others) > 1e-3, name


# Each recipe's traps ------------------------------------------------------------------------------


def _one_round(method, batch, params):
    train_step = sasg_jax.make_train_step(*method, num_workers=M, donate=False)
    return train_step.step(train_step.init(params), batch)[0]


def test_local_sgd_ends_at_the_mean_of_the_workers_parameters():
    """Old minus new, and the outer step goes the other way."""
    method = sasg_jax.local_sgd(problems.quadratic_loss, 0.5, **LOCAL)
    batch = jax.tree.map(lambda x: np.stack([x] * STEPS, 1), problems.centres())
    state = _one_round(method, batch, problems.quadratic_params())
    for name, centre in problems.centres().items():
        alone = centre * (1 - 0.5**STEPS)
        np.testing.assert_allclose(state.params[name], alone.mean(0), atol=1e-6)


def test_outer_rate_is_applied_once():
    """Neither what is sent nor what is kept has it."""
    batch = jax.tree.map(lambda x: np.stack([x] * STEPS, 1), problems.centres())
    states = {}
    for rate in (1.0, 0.25):
        method = sasg_jax.sparse_loco(
            problems.quadratic_loss, optax.sgd(0.1), **LOCAL, **TILES, outer_rate=rate
        )
        states[rate] = _one_round(method, batch, problems.quadratic_params())
    kept = [find_state(state.opt_state).worker.feedback.residual for state in states.values()]
    for name in ("b", "w"):
        np.testing.assert_array_equal(kept[0][name], kept[1][name])
        whole, quarter = (state.params[name] for state in states.values())
        np.testing.assert_allclose(quarter, 0.25 * whole, rtol=1e-6)


def test_muon_is_for_matrices_that_no_word_leaves_to_adam():
    params = {
        "Embed_0": {"embedding": jnp.ones((4, 4))},
        "dense": {"bias": jnp.ones(4), "kernel": jnp.ones((4, 4))},
        "lm_HEAD": jnp.ones((4, 4)),
    }
    loss = lambda params, batch: sum(jnp.vdot(x, x) for x in jax.tree.leaves(params))

    def orthogonalised(**how):
        direction, _ = sasg_jax.muloco(loss, 0.1, **LOCAL, **how)
        states = direction.init(params).inner_states
        return [x.shape for x in jax.tree.leaves(states["muon"]) if x.ndim == 2]

    assert len(orthogonalised()) == 1  # the momentum of the kernel
    assert len(orthogonalised(by_adam=())) == 3
    assert len(orthogonalised(by_adam=("dense", "Embed", "head"))) == 0


def test_rounds_of_a_schedule_of_the_outer_rate():
    """It counts rounds, the inner one a worker's steps."""
    seen = []

    def outer(count):
        seen.append(count)
        return 1.0

    sasg_jax.diloco(LOSS, ADAMW, **LOCAL, outer_rate=outer).tx.init(problems.quadratic_params())
    method = sasg_jax.diloco(LOSS, optax.sgd(0.0), **LOCAL, outer_rate=outer, outer_momentum=0.0)
    batch = jax.tree.map(lambda x: np.stack([x] * STEPS, 1), problems.centres())
    state = _one_round(method, batch, problems.quadratic_params())
    assert seen
    assert optax.tree.get(state.opt_state.after, "count") == 1


# What is sent -------------------------------------------------------------------------------------

PARAMS = {"w": jax.ShapeDtypeStruct((512, 256), jnp.float32)}
BYTES = {
    "local_sgd": 4 * 512 * 256,
    "diloco": 4 * 512 * 256,
    "sparse_loco": 32 * 64 * 14 // 8 + 2 * 4 + 32 * 12 // 8,  # 12 bits for each tile's count
    "muloco": 512 * 256 // 4 + 2 * 4,
    "demo": 32 * 32 * 4 + 32 * 32 * 12 // 8 + 32 * 11 // 8,
}


@pytest.mark.parametrize("name", BYTES)
def test_size_of_a_message(name):
    """With the authors' settings."""
    make = {
        "local_sgd": lambda: sasg_jax.local_sgd(LOSS, 0.1, **LOCAL),
        "diloco": lambda: sasg_jax.diloco(LOSS, ADAMW, **LOCAL),
        "sparse_loco": lambda: sasg_jax.sparse_loco(LOSS, ADAMW, **LOCAL),
        "muloco": lambda: sasg_jax.muloco(LOSS, 0.1, **LOCAL),
        "demo": lambda: sasg_jax.demo(LOSS, 0.1, num_workers=M),
    }
    assert make[name]().tx.method.compressor.message_size(PARAMS).bytes == BYTES[name]


# Parts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_takes_the_parts_of_a_method(name):
    parts = {"downlink": DOWN, "downlink_rule": TURN, "rule": TURN, "silence": "drop"}
    how = {"accumulate": 2, "has_key": True, "mean": "senders", "exchange": "sharded"}
    direction, tx = RECIPES[name].make(**parts, **how)
    method = tx.method
    assert (method.downlink, method.rule, method.silence) == (DOWN, TURN, "drop")
    assert (method.downlink_rule, method.mean, method.exchange.name) == (TURN, "senders", "sharded")
    assert direction.has_key
    steps = RECIPES[name].inner is not None
    assert direction.gradients == (2 * STEPS if steps else 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sasg_jax.local_sgd(LOSS, 0, **LOCAL), "learning_rate=0 to be a number above 0"),
        (
            lambda: sasg_jax.diloco(LOSS, 0.1, **LOCAL),  # pyright: ignore
            "inner=0.1 to be an optax optimiser",
        ),
        (
            lambda: sasg_jax.diloco(LOSS, ADAMW, num_workers=M, steps=0),
            "steps=0 to be an integer of at least 1",
        ),
        (
            lambda: sasg_jax.diloco(LOSS, ADAMW, **LOCAL, outer_rate=-1),
            "outer_rate=-1 to be a number above 0",
        ),
        (
            lambda: sasg_jax.diloco(LOSS, ADAMW, **LOCAL, outer_momentum=1),
            "outer_momentum=1 to be a number of at least 0 and below 1",
        ),
        (
            lambda: sasg_jax.diloco(LOSS, ADAMW, **LOCAL, mean="senders", exchange="psum"),
            "exchange='psum' to be another for mean='senders'",
        ),
        (lambda: sasg_jax.sparse_loco(LOSS, ADAMW, **LOCAL, decay=0), r"decay=0 in \(0, 1\]"),
        (
            lambda: sasg_jax.sparse_loco(LOSS, ADAMW, **LOCAL, feedback=sasg_jax.none()),
            "feedback=.* to be left out: the residual's decay is said by decay=",
        ),
        (lambda: sasg_jax.muloco(LOSS, -0.1, **LOCAL), "learning_rate=-0.1 to be a number above"),
        (
            lambda: sasg_jax.demo(LOSS, 0.1, num_workers=M, weight_decay=-1),
            "weight_decay=-1 to be a number of at least 0",
        ),
        (
            lambda: sasg_jax.demo(LOSS, 0.1, num_workers=M, mean="all"),
            "mean='all' to be one of 'workers', 'senders'",
        ),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=f"^Expected {message}"):
        make()


# Several processes --------------------------------------------------------------------------------

PROGRAM = """
import os, sys
process, port = int(sys.argv[1]), sys.argv[2]
import jax, jax.numpy as jnp, numpy as np, optax
jax.distributed.initialize(f"127.0.0.1:{port}", 4, process)
import test_local_algorithms as tests, problems, sasg_jax
M = jax.device_count()
split = jax.NamedSharding(jax.sharding.Mesh(jax.devices(), ("workers",)), jax.P("workers"))

def train(name, driver, parts):
    direction, tx = tests.RECIPES[name].make(**parts)
    train_step = sasg_jax.make_train_step(direction, tx, num_workers=M, driver=driver)
    state = train_step.init(problems.quadratic_params())
    place = lambda x: jax.make_array_from_callback(x.shape, split, lambda index: x[index])
    place = place if driver == "shard_map" else lambda x: x
    for t in range(5):
        batch = jax.tree.map(place, problems.at(tests._centres(name), t))
        state, info = jax.block_until_ready(train_step.step(state, batch))
    return [np.asarray(state.params[key].addressable_data(0)) for key in ("b", "w")]

for name in tests.RECIPES:
    parts = {"downlink": tests.DOWN} if name != "sparse_loco" else {"mean": "senders"}
    here = train(name, "shard_map", parts)
    if process == 0:
        for x, y in zip(here, train(name, "vmap", parts)):
            np.testing.assert_allclose(x, y, atol=1e-5)
    print("TOLD", name, b"".join(x.tobytes() for x in here).hex(), flush=True)
"""


@pytest.mark.processes
def test_four_processes_train_as_one():
    """With the same bits in all, and as the simulation."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    root = pathlib.Path(sasg_jax.__file__).parent.parent
    paths = [str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")]
    flags = "--xla_backend_optimization_level=0"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(paths)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(process), port],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for process in range(M)
    ]
    told = []
    try:
        for process in started:
            output, errors = process.communicate(timeout=1200)
            assert process.returncode == 0, errors
            told.append([x for x in output.splitlines() if x.startswith("TOLD ")])
    finally:
        for process in started:
            process.kill()
            process.communicate()
    assert len(told[0]) == len(RECIPES)
    assert told == [told[0]] * M
