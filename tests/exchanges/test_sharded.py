"""What ``sharded`` moves."""

import jax
import jax.numpy as jnp

from sasg_jax.exchanges import Traffic
from sasg_jax.exchanges.sharded import SHARDED


def test_links_by_hand():
    """In two of three rounds a shard of each message, 12 bytes, goes to each of the three others;
    in all of them what each has made of its shard, 32 bytes."""
    traffic = Traffic(
        upload_bytes=12,
        downlink_bytes=32,
        flag_bytes=1,
        uploads_by_worker=[1, 1, 1, 0],
        rounds_by_uploads=[1, 1, 1, 0, 0],
        steps=3,
    )
    moved = 2 * 3 * 12 + 3 * 3 * 32
    assert SHARDED.links(traffic) == ([moved] * 4, [moved] * 4)
    assert SHARDED.flag_links(4) == ([3] * 4, [3] * 4)


def test_size_is_that_of_one_shard_in_whole_words():
    """Of 4 shards with 2 values and 2 one-byte indices each: 10 bytes in 12."""
    shapes = [
        jax.ShapeDtypeStruct((4, 2), jnp.float32),
        jax.ShapeDtypeStruct((4, 2), jnp.uint8),
    ]
    assert SHARDED.moved_bytes(shapes) == 12
