"""What the tests of a method beside its own NumPy loop share: least squares of workers that differ,
of which a loop has the gradients in float64, and a run of the library with all that it did."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import sasg_jax
from sasg_jax.states import find_state

SIZE = 5


class Data(NamedTuple):
    """Of T rounds and M workers, each with N rows."""

    rows: np.ndarray  # shape=(T, M, N, SIZE), dtype=float32
    targets: np.ndarray  # shape=(T, M, N), dtype=float32

    def grad(self, t, m, w):
        """Of worker m's batch in round t, at w. shape=(SIZE,), dtype=float64"""
        a, y = self.rows[t, m].astype(np.float64), self.targets[t, m].astype(np.float64)
        return a.T @ (a @ w - y) / len(y)


def data(num_workers, rounds, *, noise=0.0, seed=0):
    """Each worker has curvatures and a minimum of its own, and the same rows in every round but for
    ``noise``, with which they and their targets differ."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(num_workers, 6, SIZE))
    rows *= 0.5 * 1.7 ** np.arange(num_workers)[:, None, None] ** 0.5
    targets = rows @ rng.normal(size=SIZE) + rng.normal(size=(num_workers, 6))
    targets = targets + noise * rng.normal(size=(rounds, *targets.shape))
    rows = rows + 0.5 * noise * rng.normal(size=(rounds, *rows.shape))
    return Data(rows.astype(np.float32), targets.astype(np.float32))


def loss(params, batch):
    """Two tensors, so that what is said of a tree is not true of each of its tensors."""
    rows, targets = batch
    return 0.5 * jnp.mean((rows @ flat(params) - targets) ** 2)


def params(dtype=jnp.float32):
    return {"a": jnp.full(2, 0.3, dtype), "b": jnp.full((3, 1), -0.2, dtype)}


def flat(tree):
    return jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(tree)])


def start():
    """The parameters before the first round. shape=(SIZE,), dtype=float64"""
    return np.asarray(flat(params()), np.float64)


class Run(NamedTuple):
    """What a run of the library did."""

    path: np.ndarray  # parameters before each round, and after the last. shape=(T + 1, SIZE)
    uploaded: np.ndarray  # shape=(T, M), dtype=bool
    innovation: np.ndarray  # shape=(T, M)
    threshold: np.ndarray  # shape=(T,)
    finite: np.ndarray  # shape=(T, M)
    staleness: np.ndarray  # after each round. shape=(T, M)
    state: Any  # AggregateState, after the last


def run(tx, given, *, present=None, direction=loss):
    """Trains by ``tx`` on ``given``, with ``present`` workers (all by default)."""
    rounds, num_workers = given.targets.shape[:2]
    train_step = sasg_jax.make_train_step(direction, tx, num_workers=num_workers)

    def step(state, now):
        batch, here = now
        state, info = train_step.step(state, batch, here)
        return state, (info, flat(state.params))

    @jax.jit
    def everything(state, given, present):
        return jax.lax.scan(step, state, (given, present))

    given = jax.tree.map(jnp.asarray, tuple(given))
    state, (infos, path) = everything(train_step.init(params()), given, present)
    infos, path = jax.device_get((infos, path))
    path = np.concatenate([start()[None], path])
    report = infos.uploaded, infos.innovation, infos.threshold, infos.finite, infos.staleness
    assert path.shape == (rounds + 1, SIZE)
    return Run(path, *report, jax.device_get(find_state(state.opt_state)))


class Compared(NamedTuple):
    """What a loop has compared, and with what: the check that nothing hung on rounding."""

    found: list[float]
    bound: list[float]

    def __call__(self, found, bound):
        """Whether the first is at least as large."""
        self.found.append(found)
        self.bound.append(bound)
        return found >= bound

    @property
    def margin(self):
        """The smallest relative distance, of those of which both are not zero."""
        found, bound = np.asarray(self.found), np.asarray(self.bound)
        real = (found > 0) & (bound > 0)
        return np.min(np.abs(found - bound)[real] / np.maximum(found, bound)[real])


def compared():
    return Compared([], [])


def squared(x):
    return float(x @ x)


def assert_same_path(run, path, *, tolerance=1e-4):
    np.testing.assert_allclose(run.path, path, rtol=tolerance, atol=tolerance)


def view(direction, *, again=None, pending=None, rate=None, round=3, num_workers=4, **other):
    """What a rule sees of worker 0 in round 3; whoever asks for what is not given fails."""
    now = sasg_jax.Round(
        other.pop("params", params()),
        jnp.int32(round),
        num_workers,
        None if rate is None else jnp.float32(rate),
    )

    def give(what):
        assert what is not None, "nobody asked for it"
        return what

    defaults = {
        "worker": jnp.int32(0),
        "feedback": (),
        "staleness": jnp.int32(1),
        "memory": (),
        "shared": (),
        "threshold": jnp.float32(0),
        "forced": jnp.asarray(False),
        "remainder": lambda: give(None),
    }
    return sasg_jax.View(
        round=now,
        direction=direction,
        reevaluate=lambda params: give(again),
        pending=lambda: give(pending),
        **(defaults | other),
    )
