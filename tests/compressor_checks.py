"""What is asked of every compressor: one line each in the tests of a compressor."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import problems
from problems import M

import sasg_jax

# In one program, since most of the time of a test goes into compiling.
SHAPES = {
    "bfloat16": ((5, 9), jnp.bfloat16),
    "float16": ((45,), jnp.float16),
    "matrix": ((12, 16), jnp.float32),
    "scalar": ((), jnp.float32),
    "vector": ((77,), jnp.float32),
}


def tree(seed: int = 0, *, all_types: bool = True) -> dict[str, jax.Array]:
    """Matrices, vectors and a scalar, of odd sizes and all types, with heavy tails."""
    rng = np.random.default_rng(seed)
    rows = {k: rng.standard_t(3, shape) for k, (shape, _) in SHAPES.items()}
    kept = {k: jnp.asarray(x, SHAPES[k][1]) for k, x in rows.items()}
    return kept if all_types else {k: kept[k] for k in ("matrix", "vector")}


def key_of(compressor: sasg_jax.Compressor, seed: int = 0) -> Any:
    return jax.random.key(seed) if compressor.random else None


def compress(compressor, x, key=None, memory=None):
    memory = compressor.init_memory(x) if memory is None else memory
    return _jitted(compressor)[0](x, memory, key)


def decompress(compressor, message, like, key=None):
    """As a receiver does, in a program of its own."""
    return _jitted(compressor)[1](message, like, key if compressor.shares_key else None)


@functools.lru_cache(maxsize=32)
def _jitted(compressor):
    return jax.jit(compressor.compress), jax.jit(compressor.decompress)


# Any numbers --------------------------------------------------------------------------------------


def _odd_numbers(shape, dtype):
    """Cases that others have failed at, with a leading axis."""
    finfo, size = jnp.finfo(dtype), int(np.prod(shape, dtype=int))
    largest, tiny = float(finfo.max), float(finfo.smallest_subnormal)
    rng = np.random.default_rng(1)
    normal, signs = rng.normal(size=size), rng.choice([-1.0, 1.0], size)
    one = np.eye(1, size, size // 2)[0]
    cases = {
        "zeros": np.zeros(size),
        "negative zeros": np.full(size, -0.0),
        "normal": normal,
        "heavy": rng.standard_t(2, size),
        "constant": np.full(size, -2.0),
        "one entry": 3 * one,
        "one huge": np.where(one > 0, -largest, 1e-3 * normal),
        "the largest": largest * signs,
        "denormals": tiny * signs,
        "huge and denormal": np.where(rng.random(size) < 0.5, largest, tiny) * signs,
        "small": float(finfo.smallest_normal) * 20 * normal,
    }
    return list(cases), np.stack(list(cases.values())).astype(dtype).reshape(-1, *shape)


def check_any_numbers(compressor: sasg_jax.Compressor) -> None:
    """Of odd numbers, finite ones come back, in the right types and of a size that does not depend
    on them, and the remainder is what was not decoded, bit for bit; zeros give zeros."""
    names = _odd_numbers((1,), jnp.float32)[0]
    trees = {k: _odd_numbers(*how)[1] for k, how in SHAPES.items()}
    keys = jax.random.split(jax.random.key(0), len(names))
    like = jax.tree.map(lambda x: jnp.asarray(x[0]), trees)

    def send(x, key):
        return compressor.compress(x, compressor.init_memory(x), key if compressor.random else None)

    def read(message, key):
        return compressor.decompress(message, like, key if compressor.shares_key else None)

    messages, remainders, _ = jax.jit(jax.vmap(send))(trees, keys)
    read = jax.jit(jax.vmap(read))
    decoded = read(messages, keys)
    for name, (_, dtype) in SHAPES.items():
        x, got, left = (np.asarray(part[name]) for part in (trees, decoded, remainders))
        assert got.dtype == left.dtype == dtype
        finite = np.isfinite(got.astype(np.float32)).reshape(len(names), -1).all(1)
        assert finite.all(), (name, np.asarray(names)[~finite])
        # XLA takes numbers too small for their exponent as zeros, NumPy does not.
        # (It has no such numbers of float16, which it widens.)
        tiny = 0 if dtype == jnp.float16 else float(jnp.finfo(dtype).smallest_normal)
        flush = lambda x: np.where(np.abs(x.astype(np.float32)) < tiny, 0, x)  # noqa: B023
        with np.errstate(over="ignore"):
            lacks = (flush(x) - flush(got)).astype(dtype)
        np.testing.assert_array_equal(flush(left), flush(lacks), name)
        assert not got[:2].any()
    one = jax.tree.map(lambda x: x[0], messages)
    num_bytes = sum(x.nbytes for x in jax.tree.leaves(one))
    assert num_bytes == compressor.message_size(like).bytes
    shapes = compressor.message_shapes(like)
    for x, s in zip(jax.tree.leaves(one), jax.tree.leaves(shapes), strict=True):
        assert (x.shape, x.dtype) == (s.shape, s.dtype)
    _check_any_bytes(read, shapes, len(names), keys, compressor.linear)


def _check_any_bytes(read: Any, shapes: Any, count: int, keys: Any, linear: bool) -> None:
    """Messages that nobody has written decode to finite numbers; one of zeros, to zeros. Where they
    add up, half precision need not hold one: it holds the mean."""
    rng = np.random.default_rng(2)

    def random(s):
        octets = rng.bytes(count * s.size * s.dtype.itemsize)
        rows = np.frombuffer(octets, s.dtype).reshape(count, *s.shape).copy()
        rows[0] = 0
        return rows

    for _ in range(20):
        for x in jax.tree.leaves(read(jax.tree.map(random, shapes), keys)):
            if not (linear and x.dtype.itemsize < 4):
                assert np.isfinite(np.asarray(x, np.float32)).all()
            assert not np.asarray(x[0]).any()


def check_programs(compressor: sasg_jax.Compressor) -> None:
    """One key, one message, alone and in a loop over messages under a map; another from another
    key, but where all draw the same. Messages add up in their order, each as it is alone."""
    x, keys = {"vector": tree()["matrix"]}, jax.random.split(jax.random.key(3), 3)
    memory = compressor.init_memory(x)
    send = lambda key: compressor.compress(x, memory, key if compressor.random else None)
    loop = lambda keys: jax.lax.scan(lambda carry, key: (carry, send(key)), (), keys)[1]
    alone = [compress(compressor, x, key if compressor.random else None) for key in keys]
    looped = jax.jit(jax.vmap(loop))(jnp.stack([keys, keys]))
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *alone)
    again = jax.tree.map(lambda x: x[1], looped)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 2e-6, 1e-6), stacked, again)
    differ = jax.tree.map(lambda m: bool(np.any(m[0] != m[1])), stacked.message)
    assert any(jax.tree.leaves(differ)) == compressor.random
    shared = keys[0] if compressor.shares_key else None
    total = jax.jit(compressor.decompress_sum)(stacked.message, x, shared)
    each = [decompress(compressor, m.message, x, keys[0]) for m in alone]
    want = jax.tree.map(lambda *xs: functools.reduce(np.add, map(np.asarray, xs)), *each)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 3e-6, 1e-6), total, want)


def plain_bytes(like: Any, size_of: Callable[[int], int]) -> int:
    """Of a code of ``size_of(n)`` bytes, or of the tensors where that is no shorter."""
    return sum(min(size_of(x.size), x.nbytes) for x in jax.tree.leaves(like))


# In the mean --------------------------------------------------------------------------------------


def check_mean(
    compressor: sasg_jax.Compressor, x: jax.Array, bound: float, *, draws: int = 8192, seed: int = 0
) -> float:
    """Every entry of the mean over many draws is within 5 standard errors of ``x``, and the mean
    squared error within 5 of the ``bound``. Returns that error as a part of ‖x‖²."""
    memory = compressor.init_memory(x)

    def once(key):
        message, _, _ = compressor.compress(x, memory, key)
        got = compressor.decompress(message, x, key if compressor.shares_key else None)
        return got - x

    keys = jax.random.split(jax.random.key(seed), draws)
    errors = jax.jit(lambda keys: jax.lax.map(once, keys, batch_size=256))(keys)
    errors = np.asarray(errors, np.float64).reshape(draws, -1)
    rounding = 1e-6 * float(jnp.abs(x).max())
    # What is seldom drawn has no normal mean: one draw more or less is to be allowed.
    spread = errors.std(0) / np.sqrt(draws) + np.abs(errors).max() / draws + rounding
    assert (np.abs(errors.mean(0)) / spread).max() < 5
    squares = (errors**2).sum(1)
    assert squares.mean() - 5 * squares.std() / np.sqrt(draws) <= bound * (1 + 1e-6) + 1e-12
    return squares.mean() / float(jnp.sum(jnp.square(x)))


# A run --------------------------------------------------------------------------------------------

RATE, ROUNDS = 0.2, 20
NAMES = sorted(problems.quadratic_params())  # in the order of the tree: "b" (6,), "w" (4, 6)


def check_run(
    compressor: sasg_jax.Compressor,
    in_numpy: Callable[[np.ndarray, Any], np.ndarray],
    draw: Callable[[Any, tuple[int, ...]], Any] = lambda key, shape: (),
    *,
    rule: sasg_jax.Rule | None = None,
    silence: str | None = None,
    key_of_tensor: Callable[[Any, int], Any] = jax.random.fold_in,
    rtol: float = 1e-4,
) -> None:
    """Rounds of :func:`sasg_jax.compressed_sgd` against a loop in NumPy.

    Args:
      in_numpy: what is decoded of a tensor, ``in_numpy(p, draw(key, p.shape))``.
      draw: the random numbers of one tensor, from the key of the round, the worker and the place of
        the tensor.
      silence: what those count as that the rule keeps silent.
      key_of_tensor: from that of the round and the worker, and the place in the tree."""
    base, rule = jax.random.key(7), sasg_jax.always() if rule is None else rule
    key = base if compressor.random else None
    tx = sasg_jax.compressed_sgd(RATE, compressor, rule, num_workers=M, key=key, silence=silence)
    step = sasg_jax.make_train_step(problems.quadratic_loss, tx, num_workers=M)
    centres = problems.centres(rounds=ROUNDS)
    state = step.init(problems.quadratic_params())
    state, infos = jax.jit(problems.scan_rounds(step.step))(state, (centres,))
    sent, method = np.asarray(infos.uploaded), tx.method
    assert sent.all() == rule.always
    w = {k: np.array(x, np.float64) for k, x in problems.quadratic_params().items()}
    draws = _draws(base, draw, compressor.shares_key, key_of_tensor)
    has_residual = method.feedback.name == "residual()"
    e = {k: np.zeros((M, *x.shape)) for k, x in w.items()}
    last = {k: np.zeros((M, *x.shape)) for k, x in w.items()}
    for t in range(ROUNDS):
        for place, k in enumerate(NAMES):
            total = np.zeros_like(w[k])
            for m in range(M):
                p = RATE * (w[k] - centres[k][t, m]) + e[k][m]
                if sent[t, m]:
                    own = jax.tree.map(lambda x: x[t, m], draws[place])  # noqa: B023
                    last[k][m] = in_numpy(p.astype(np.float32), own)
                    total += last[k][m]
                    e[k][m] = has_residual * (p - last[k][m])
                elif method.silence == "keep":
                    e[k][m] = p
                elif method.silence == "reuse":
                    total += last[k][m]
            w[k] = w[k] - total / M
    for k in NAMES:
        np.testing.assert_allclose(state.params[k], w[k], rtol=rtol, atol=rtol / 10)
        if has_residual:
            got = state.opt_state.worker.feedback.residual[k]
            np.testing.assert_allclose(got, e[k], rtol=rtol, atol=rtol / 10)


def _draws(key, draw, shares_key, key_of_tensor):
    """Of every tensor, with leading axes over rounds and workers."""
    params = problems.quadratic_params()

    def of(place, name):
        def one(round, worker):
            of_round = jax.random.fold_in(key, round)
            own = of_round if shares_key else jax.random.fold_in(of_round, worker)
            return draw(key_of_tensor(own, place), params[name].shape)

        each = jax.vmap(jax.vmap(one, in_axes=(None, 0)), in_axes=(0, None))
        return jax.tree.map(np.asarray, jax.jit(each)(jnp.arange(ROUNDS), jnp.arange(M)))

    return [of(*pair) for pair in enumerate(NAMES)]
