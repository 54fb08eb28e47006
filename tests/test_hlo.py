"""The reader of compiled programs counts what is known to move."""

import functools

import hlo
import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec

M = 4
TEXT = """
%branch (p: f32[6]) -> f32[6] {
  %p = f32[6]{0} parameter(0)
  %half = bf16[6]{0} convert(%p)
  ROOT %permuted = f32[6]{0} collective-permute(%p), channel_id=1, source_target_pairs={{1,0},{2,2}}
}
ENTRY %main (x: f32[2,3], y: u8[5], flag: pred[4]) -> f32[2,3] {
  %x = f32[2,3]{1,0:T(8,128)} parameter(0)
  %y = u8[5]{0} parameter(1)
  %flag = pred[4]{0} parameter(2)
  %one = f32[] constant(1)
  %sum = f32[2,3]{1,0} all-reduce(%x), replica_groups=[1,4]<=[4], to_apply=%add
  %both = (f32[2,3]{1,0}, /*index=1*/u8[5]{0}) all-reduce(%x, %y), replica_groups={}, to_apply=%add
  %pairs = f32[] all-reduce(%one), replica_groups=[2,2]<=[2,2]T(1,0), to_apply=%add
  %some = u8[15]{0} all-gather(%y), replica_groups={{0,2,3}}, dimensions={0}
  %begun = (pred[4]{0}, pred[16]{0}) all-gather-start(%flag), replica_groups={{0,1,2,3}}
  %ended = pred[16]{0} all-gather-done(%begun)
  %split = (f32[2,3]{1,0}, f32[2,3]{1,0}) all-to-all(%x, %x), replica_groups={{0,1},{2,3}}
}
"""


def test_text_by_hand():
    found = {c.name: c for c in hlo.collectives(TEXT, M)}
    assert found["permuted"].sent == (0, 24, 0, 0)  # one that sends to itself sends nothing
    assert found["permuted"].received == (24, 0, 0, 0)
    by_hand = {
        "sum": [36] * M,  # 2 * 24 * 3/4
        "both": [43] * M,  # 2 * 29 * 3/4, whole bytes of it
        "pairs": [4] * M,
        "some": [10, 0, 10, 10],
        "begun": [12] * M,
        "split": [24] * M,
    }
    for name, moved in by_hand.items():
        assert list(found[name].sent) == list(found[name].received) == moved
    assert found.keys() == {"permuted", *by_hand}


def test_what_it_cannot_read_is_refused():
    text = "  %sent = (f32[2], u32[], token[]) send(%x, %token), channel_id=1"
    with pytest.raises(NotImplementedError, match="send"):
        hlo.collectives(text, M)
    with pytest.raises(NotImplementedError, match="size"):
        hlo.collectives("  %x = token[] t()\n  %y = token[] all-gather(%x), dimensions={0}", M)


def test_counts_how_often_each_runs():
    """A branch that is not taken moves nothing, and what stands in a loop moves each time."""
    mesh = jax.make_mesh((M,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(PartitionSpec("d"), PartitionSpec()),
        out_specs=PartitionSpec("d"), check_vma=False,
    )  # fmt: skip
    def program(x, times):
        to_root = lambda i, x: x + lax.ppermute(x, "d", [(1, 0)])
        x = lax.fori_loop(0, times, to_root, x)
        return lax.cond(times == 1, lambda x: x + lax.psum(x, "d"), lambda x: x, x)

    x = jnp.ones(M * 2)
    compiled = program.lower(x, jnp.int32(0)).compile()
    for times in (0, 1, 3):
        output, moved = hlo.moved(compiled, x, jnp.int32(times), num_devices=M)
        summed = 12 if times == 1 else 0  # 2 * 8 * 3/4
        assert moved.sent == (summed, 8 * times + summed, summed, summed)
        assert moved.received == (8 * times + summed, summed, summed, summed)
        assert output[0] == 1 + times + (5 if times == 1 else 0)
