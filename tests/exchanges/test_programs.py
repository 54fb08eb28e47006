"""The ledger counts what a general reader finds in the compiled program, for every exchange."""

import functools

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sasg_jax
from sasg_jax.compressors import Compressed
from sasg_jax.exchanges import EXCHANGES

M = 4
# Odd sizes, so that words and shards are padded. Tensors of both types travel together.
TREES = {
    "float32": {"w": (16, jnp.float32)},
    "bfloat16": {"w": (15, jnp.bfloat16)},
    "mixed": {"b": (7, jnp.bfloat16), "w": (16, jnp.float32)},
    "long": {"b": (7, jnp.float32), "w": (301, jnp.float32)},
}
TOP_K = sasg_jax.top_k(0.2)
CODED = {
    "signs": sasg_jax.top_k(0.2, values="sign", indices="elias_fano"),
    "levels": sasg_jax.top_k(
        0.1, scope="tree", values=sasg_jax.coders.signs(4, block=16), indices="tiled"
    ),
    "halves": sasg_jax.top_k(0.4, values="bfloat16", indices="bitmap"),
}
WAYS = [(name, "one way") for name in EXCHANGES] + [("server", "two-way"), ("sharded", "two-way")]
# Where types are summed apart; packed into words they are in the slow tier.
CASES = [
    pytest.param(*way, tree, marks=[pytest.mark.slow] * (tree == "mixed" and way[0] != "psum"))
    for tree in ("float32", "bfloat16", "mixed")
    for way in WAYS
]
# Everybody, two of whom one is the root, one that is not, and nobody.
ROUNDS = ["1111", "1010", "0100", "0000"]


def _loss(params, batch):
    return batch * sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(params))


@functools.cache
def _program(exchange, tree, way, tells, num_workers=M, compressor=None):
    """A compiled round in which those upload that are present, and a state."""
    if compressor is None:
        compressor = sasg_jax.identity() if EXCHANGES[exchange].sums else TOP_K
    tx = sasg_jax.compressed_sgd(
        0.1,
        compressor,
        num_workers=num_workers,
        silence="reuse" if tells else "keep",
        downlink=compressor if way == "two-way" else None,
        exchange=exchange,
    )
    train_step = sasg_jax.make_train_step(
        _loss, tx, num_workers=num_workers, driver="shard_map", donate=False
    )
    params = {name: jnp.ones(size, dtype) for name, (size, dtype) in TREES[tree].items()}
    state, batch = train_step.init(params), jnp.ones(num_workers)
    present = jnp.ones(num_workers, bool)
    return train_step.step.lower(state, batch, present).compile(), (state, batch)


def _check(program, flags, num_workers=M):
    """That both agree on one round; what moved."""
    compiled, arguments = program
    present = np.array([flag == "1" for flag in flags])
    (_, info), moved = hlo.moved(
        compiled, *arguments, jnp.asarray(present), num_devices=num_workers
    )
    np.testing.assert_array_equal(info.uploaded, present)
    ledger = sasg_jax.Ledger(arguments[0].opt_state)
    ledger.record(info.uploaded, present)
    assert (ledger.sent_bytes, ledger.received_bytes) == moved
    return moved


@pytest.mark.parametrize(("exchange", "way", "tree"), CASES)
def test_ledger_equals_the_compiled_program(exchange, way, tree):
    program = _program(exchange, tree, way, tells=not EXCHANGES[exchange].sums)
    moved = [_check(program, flags) for flags in ROUNDS]
    # Fewer uploads move less, but in a sum; a round without any has flags left, or the step down.
    totals = [sum(sent) for sent, _ in moved]
    assert all(total > 0 for total in totals)
    if EXCHANGES[exchange].sums:
        assert len(set(totals)) == 1
    else:
        assert totals[0] > totals[3]


@pytest.mark.parametrize("code", CODED)
@pytest.mark.parametrize(("exchange", "way"), [way for way in WAYS if way[0] != "psum"])
def test_coded_messages_are_as_small_as_is_said(exchange, way, code):
    """Types narrower than a byte would be widened on their way."""
    compressor = CODED[code]
    program = _program(exchange, "long", way, True, M, compressor)
    everybody, *_ = [_check(program, flags) for flags in ROUNDS]
    plain = _check(_program(exchange, "long", way, tells=True), "1111")
    assert sum(everybody.sent) < sum(plain.sent)
    if exchange == "gather":
        size = -(-compressor.message_size(program[1][0].params).bytes // 4) * 4
        assert everybody.sent == ((M - 1) * (size + 1),) * M


def test_without_flags_where_nobody_need_tell():
    """Who is absent is known to all, and who is present sends."""
    silent = _program("server", "float32", "one way", tells=False)
    for flags in ("1111", "1010"):
        moved = _check(silent, flags)
        told = _check(_program("server", "float32", "one way", tells=True), flags)
        assert all(more > less for more, less in zip(told.sent, moved.sent, strict=True))


def test_lazy_fills_several_slots():
    """Of six workers one or two sum slots, and three or more are gathered."""
    program = _program("lazy", "float32", "one way", tells=True, num_workers=6)
    totals = [
        sum(_check(program, flags, num_workers=6).sent)
        for flags in ("010000", "010010", "011100", "111111")
    ]
    assert totals[0] < totals[1] < totals[2] == totals[3]


def test_means_in_the_middle_of_a_compressor():
    """Two of them, of which one is of half precision and travels wider."""

    def compress_mean(tree, memory, key, mean):
        scale = mean(jnp.max(jnp.abs(tree["w"])))
        decoded = mean(jax.tree.map(lambda x: (x / scale).astype(jnp.bfloat16), tree))
        decoded = jax.tree.map(lambda x, like: (scale * x).astype(like.dtype), decoded, tree)
        return Compressed(decoded, jax.tree.map(jnp.subtract, tree, decoded), memory)

    compressor = sasg_jax.Compressor(name="scaled()", compress_mean=compress_mean)
    program = _program("psum", "mixed", "one way", False, M, compressor)
    assert sum(_check(program, "1111").sent) == M * (2 * (4 + 4 * (16 + 7)) * (M - 1) // M)
