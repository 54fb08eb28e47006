"""How messages travel: the same mathematics under vmap and on several devices."""

import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from jax.sharding import AxisType, PartitionSpec
from problems import M

import sasg_jax
from sasg_jax import exchange
from sasg_jax.transform import find_state

MESSAGE = {
    "values": np.random.default_rng(0).normal(size=(M, 5)).astype(np.float32),
    "indices": np.arange(M * 5, dtype=np.uint8).reshape(M, 5),
    "half": jnp.arange(M * 6, dtype=jnp.bfloat16).reshape(M, 2, 3),
    "short": np.arange(M, dtype=np.uint16).reshape(M, 1) + 300,
    # Bits that a sum or a comparison of floats would not keep.
    "odd": np.tile(np.array([-0.0, np.nan, 1e-45], np.float32), (M, 1)),
}
FLAGS = [[1, 1, 1, 1], [1, 0, 1, 1], [0, 1, 0, 1], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]


def _on_devices(fn, *args):
    """``fn`` for each worker on its own device; what every device returned, leading axis M."""

    def on_one_device(*blocks):
        result = fn(*problems.at(blocks, 0))
        return jax.tree.map(lambda x: x[None], result)

    mesh = jax.make_mesh((M,), ("workers",), axis_types=(AxisType.Auto,), devices=jax.devices()[:M])
    spec = PartitionSpec("workers")
    mapped = jax.shard_map(on_one_device, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return jax.device_get(problems.one_at_a_time(jax.jit(mapped))(*args))


def _on_workers(fn, *args):
    return jax.jit(jax.vmap(fn, axis_name="workers"))(*args)


def _pmapped(fn, *args):
    mapped = jax.pmap(fn, axis_name="workers", devices=jax.devices()[:M])
    return jax.device_get(mapped(*args))


DRIVERS = pytest.mark.parametrize("run", [_on_workers, _pmapped, _on_devices])


def _bits(tree):
    return jax.tree.map(lambda x: np.asarray(x).tobytes(), tree)


@DRIVERS
@pytest.mark.parametrize("name", exchange.SERVED)
def test_collect_brings_uploads_to_the_server(name, run):
    """Bit for bit, for the servers that there are: worker 0, all of them, or one for each shard."""
    served = exchange.SERVED[name]
    message = MESSAGE
    if served.sharded:  # a leading axis over shards; every shard's message says whose it is
        message = jax.tree.map(
            lambda x: np.stack([np.roll(np.asarray(x), s, axis=-1) for s in range(M)], 1), MESSAGE
        )
    collect = lambda m, flag: served.collect(m, served.tell(flag, "workers"), "workers")
    for flags in np.array(FLAGS, bool):
        rows = run(collect, message, flags)
        for worker in range(1 if name == "server" else M):
            for sender in np.flatnonzero(flags):
                want = problems.at(message, int(sender))
                if served.sharded:
                    want = problems.at(want, worker)
                assert _bits(problems.at(problems.at(rows, worker), int(sender))) == _bits(want)


@DRIVERS
@pytest.mark.parametrize("name", exchange.SERVED)
def test_collect_without_flags_brings_everything(name, run):
    served = exchange.SERVED[name]
    stack = (lambda x: np.stack([np.asarray(x)] * M, 1)) if served.sharded else np.asarray
    message = jax.tree.map(stack, MESSAGE)
    rows = run(lambda m: served.collect(m, None, "workers"), message)
    for worker in range(1 if name == "server" else M):
        assert _bits(problems.at(rows, worker)) == _bits(MESSAGE)


@DRIVERS
@pytest.mark.parametrize("name", exchange.SERVED)
def test_memory_changes_where_the_server_is_and_its_answer_reaches_everybody(name, run):
    served = exchange.SERVED[name]

    def serve(memory, x):
        return memory + x, {"down": 10 * (memory + x)}

    def worker_round(memory, x):
        everywhere = lambda x: jax.lax.all_gather(x, "workers")[0]
        if not served.sharded:  # the same on all workers, and known to be
            memory, x = everywhere(memory), everywhere(x)
        memory, down = served.serve(serve, "workers", memory, x)
        return memory, served.spread(down, "workers")

    memory = np.arange(M, dtype=np.float32)[:, None]
    memory, down = run(worker_round, memory, np.ones((M, 1), np.float32))
    if served.sharded:
        np.testing.assert_array_equal(memory[:, 0], [1, 2, 3, 4])
        np.testing.assert_array_equal(down["down"][:, :, 0], [[10, 20, 30, 40]] * M)
    else:
        assert float(memory[0, 0]) == 1
        np.testing.assert_array_equal(down["down"][:, 0], [10] * M)


@pytest.mark.parametrize("name", [n for n, e in exchange.SERVED.items() if not e.sharded])
def test_simulated_rows_do_not_depend_on_the_worker(name):
    """vmap may return them as shared: that is how it checks that replicas agree."""
    collect = lambda m: exchange.SERVED[name].collect(m, None, "workers")
    rows = jax.vmap(collect, out_axes=None, axis_name="workers")(MESSAGE)
    assert _bits(rows) == _bits(MESSAGE)


@pytest.mark.parametrize("name", exchange.SERVED)
def test_collect_under_a_vmap_over_seeds(name):
    served = exchange.SERVED[name]
    x = np.arange(3 * M * M, dtype=np.float32).reshape(3, M, M, 1)  # seeds, workers, shards
    x = x if served.sharded else x[:, :, 0]
    collect = lambda m: served.collect({"x": m}, None, "workers")["x"]
    over_workers = jax.vmap(collect, axis_name="workers")
    rows = jax.vmap(over_workers)(x)
    for seed in range(3):
        np.testing.assert_array_equal(rows[seed], over_workers(x[seed]))


@DRIVERS
def test_psum_sums_over_workers(run):
    dense = {"x": MESSAGE["values"], "scalar": MESSAGE["values"][:, 0]}
    got = run(lambda message: exchange.psum(message, "workers"), dense)
    want = jax.tree.map(lambda x: x.sum(0, dtype=np.float64), dense)
    for worker in range(M):
        chex.assert_trees_all_close(problems.at(got, worker), want, atol=1e-6)
    for x in jax.tree.leaves(got):  # every replica has the same bits
        assert len({np.asarray(row).tobytes() for row in x}) == 1


@DRIVERS
def test_psum_of_half_precision_is_taken_in_float32(run):
    """256 + 1 + 1 + 2 is 260; in bfloat16 the ones would be rounded away."""
    x = jnp.array([256, 1, 1, 2], jnp.bfloat16)
    got = run(lambda x: exchange.psum(x, "workers"), x)
    chex.assert_type(got, jnp.bfloat16)
    assert got.tolist() == [260.0] * M


def test_psum_of_what_all_workers_share():
    """Under vmap a value that does not depend on the worker still counts once for each."""
    got = _on_workers(lambda m: exchange.psum(jnp.float32(3), "workers") + 0 * m, jnp.zeros(M))
    assert got.tolist() == [3.0 * M] * M


def test_simulated_psum_does_not_depend_on_the_worker():
    """vmap may return it as shared: that is how it checks that replicas agree."""
    fn = jax.vmap(lambda x: exchange.psum(x, "workers"), out_axes=None, axis_name="workers")
    np.testing.assert_array_equal(fn(jnp.arange(4.0)), 6.0)


def test_psum_under_a_vmap_over_seeds():
    x = np.arange(12, dtype=np.float32).reshape(3, M)
    over_workers = jax.vmap(
        lambda x: exchange.psum(x, "workers"), out_axes=None, axis_name="workers"
    )
    np.testing.assert_array_equal(jax.vmap(over_workers)(x), x.sum(1))


# What moves ---------------------------------------------------------------------------------------

# A round of the mlp with four workers and four tensors of 16, 5, 320 and 80 entries. At 10 % a
# message holds 1, 1, 32 and 8 of them: 4-byte values, and indices of one byte but for the third.
MESSAGE_BYTES = 42 * 4 + 1 + 1 + 64 + 8
WORDS = 4 * 61  # those 242 bytes in whole words
DENSE = 4 * 421
SHARD = 4 * 15  # four shards of 4, 2, 80 and 20 entries: 1, 1, 8 and 2 of them, and 12 indices


def _collectives(name, exchange_name):
    """(opcode, bytes of its result, source and target) of each collective in the program."""
    tx = problems.METHODS[name](problems.LEARNING_RATE, num_workers=M, exchange=exchange_name)
    train_step = sasg_jax.make_train_step(
        problems.mlp_loss, tx, num_workers=M, driver="shard_map", donate=False
    )
    state = train_step.init(problems.mlp_params())
    batch = problems.at(problems.mlp_batches(M), 0)
    text = train_step.step.lower(state, batch).compile().as_text()  # pyright: ignore
    opcodes = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    found = []
    for line in text.splitlines():
        match = re.search(rf"= (.*?) ({opcodes})(-start)?\(", line)
        if match:
            sizes = re.findall(r"(u8|u32|f32)\[([\d,]*)\]", match[1])
            size = sum(
                (1 if dtype == "u8" else 4) * math.prod(map(int, filter(None, dims.split(","))))
                for dtype, dims in sizes
            )
            pairs = re.search(r"source_target_pairs={(.*?)}}", line)
            ends = None
            if pairs:
                ends = tuple((int(a), int(b)) for a, b in re.findall(r"(\d),(\d)", pairs[1]))
            found.append((match[2], size, ends))
    return sorted(found, key=str)


def _permutes(pairs, size):
    return [("collective-permute", size, (pair,)) for pair in pairs]


# Flags: two steps among all, of one byte and of two; or one byte to the root, and four from it.
AROUND_1, AROUND_2 = ((tuple((m, (m - d) % M) for m in range(M))) for d in (1, 2))
FLAGS_AMONG_ALL = [("collective-permute", 1, AROUND_1), ("collective-permute", 2, AROUND_2)]
TO_ROOT, FROM_ROOT = [(1, 0), (2, 0), (3, 0)], [(0, 1), (0, 2), (0, 3)]
FLAGS_THROUGH_ROOT = _permutes(TO_ROOT, 1) + _permutes(FROM_ROOT, M)
PROGRAMS = {
    ("sgd", "psum"): [("all-reduce", DENSE, None)],
    ("sparse_sgd", "gather"): [("all-gather", M * WORDS, None)],
    ("sparse_sgd", "server"): _permutes(TO_ROOT, WORDS) + _permutes(FROM_ROOT, DENSE),
    ("sasg", "gather"): [("all-gather", M * WORDS, None), *FLAGS_AMONG_ALL],
    # One slot for one upload; for more, four workers had better gather.
    ("sasg", "lazy"): [
        ("all-reduce", WORDS, None),
        ("all-gather", M * WORDS, None),
        *FLAGS_AMONG_ALL,
    ],
    ("sasg", "server"): [
        *_permutes(TO_ROOT, WORDS),
        *_permutes(FROM_ROOT, DENSE),
        *FLAGS_THROUGH_ROOT,
    ],
    ("two_way", "server"): [
        *_permutes(TO_ROOT, WORDS),
        *_permutes(FROM_ROOT, WORDS),
        *FLAGS_THROUGH_ROOT,
    ],
    ("sasg", "relay"): [
        *_permutes(TO_ROOT, WORDS),
        *_permutes(FROM_ROOT, WORDS),
        *FLAGS_THROUGH_ROOT,
    ],
    ("lasg", "relay"): [
        *_permutes(TO_ROOT, DENSE),
        *_permutes(FROM_ROOT, DENSE),
        *FLAGS_THROUGH_ROOT,
    ],
    ("two_way", "sharded"): [
        ("all-to-all", M * SHARD, None),
        ("all-gather", M * SHARD, None),
        *FLAGS_AMONG_ALL,
    ],
}


@pytest.mark.parametrize(("name", "exchange_name"), PROGRAMS)
def test_compiled_program_moves_messages_and_nothing_else(name, exchange_name):
    """The sizes of all collectives in the optimised program are those of the messages."""
    want = sorted(PROGRAMS[name, exchange_name], key=str)
    assert _collectives(name, exchange_name) == want


@pytest.mark.parametrize(("name", "exchange_name"), PROGRAMS)
def test_ledger_counts_what_the_program_moves(name, exchange_name):
    """In a round in which all upload, and, where the rule is adaptive, in one with one upload."""
    tx = problems.METHODS[name](problems.LEARNING_RATE, num_workers=M, exchange=exchange_name)
    program = PROGRAMS[name, exchange_name]
    rounds = [[True] * M]
    if name in problems.ADAPTIVE:
        rounds += [[False, True, False, False], [False] * M]
    for flags in rounds:
        sent, received = [0] * M, [0] * M
        uploads = sum(flags)
        for opcode, size, ends in program:
            for source, target in ends or ():
                times = 1
                if size > M and target == 0:
                    times = int(flags[source])
                elif size > M and exchange_name == "relay":  # an upload goes to all but its sender
                    times = uploads - flags[target]
                sent[source] += times * size
                received[target] += times * size
            if ends is None:
                steps = {"all-gather": 1, "all-to-all": 1, "all-reduce": 2}[opcode]
                down = exchange_name == "sharded" and opcode == "all-gather"
                if uploads == 0 and not down:
                    steps = 0
                if exchange_name == "lazy":
                    steps *= opcode == ("all-reduce" if uploads == 1 else "all-gather")
                for worker in range(M):
                    sent[worker] += steps * size * (M - 1) // M
                    received[worker] += steps * size * (M - 1) // M
        ledger = sasg_jax.Ledger(tx.init(problems.mlp_params()))
        ledger.record(flags)
        assert ledger.sent_bytes == tuple(sent)
        assert ledger.received_bytes == tuple(received)


def test_message_sizes_of_the_programs():
    """The sizes above are those that the ledger counts by."""
    state = problems.METHODS["sasg"](0.1, num_workers=M).init(problems.mlp_params())
    assert find_state(state).wire.upload_bytes == MESSAGE_BYTES
    assert exchange.packed_bytes(MESSAGE_BYTES) == WORDS
