"""What ``relay`` moves."""

from sasg_jax.exchanges import Traffic
from sasg_jax.exchanges.relay import RELAY


def test_links_by_hand():
    """Worker 0's two uploads go from it to three others, each of the other three uploads to it and
    on to the two that are neither."""
    traffic = Traffic(
        upload_bytes=16,
        downlink_bytes=120,
        flag_bytes=1,
        uploads_by_worker=[2, 2, 1, 0],
        rounds_by_uploads=[1, 1, 2, 0, 0],
        steps=4,
    )
    forwarded = 2 * 3 + 3 * 2
    assert RELAY.links(traffic) == (
        [forwarded * 16, 32, 16, 0],
        [3 * 16, 3 * 16, 4 * 16, 5 * 16],
    )
    assert RELAY.flag_links(4) == ([3 * 4, 1, 1, 1], [3, 4, 4, 4])
    assert RELAY.forwards
