"""What ``gather`` moves."""

from sasg_jax.exchanges import Traffic
from sasg_jax.exchanges.gather import GATHER


def test_links_by_hand():
    """Rounds with three, one and no uploads of four: in two of them each message, also that of a
    silent worker, goes to three others. No step crosses the wire."""
    traffic = Traffic(
        upload_bytes=16,
        downlink_bytes=120,
        flag_bytes=1,
        uploads_by_worker=[1, 2, 1, 0],
        rounds_by_uploads=[1, 1, 0, 1, 0],
        steps=3,
    )
    assert GATHER.links(traffic) == ([2 * 3 * 16] * 4, [2 * 3 * 16] * 4)
    assert GATHER.flag_links(4) == ([3] * 4, [3] * 4)


def test_one_worker_sends_nothing():
    traffic = Traffic(16, 120, 1, uploads_by_worker=[5], rounds_by_uploads=[0, 5], steps=5)
    assert GATHER.all_links(traffic) == ([0], [0])
