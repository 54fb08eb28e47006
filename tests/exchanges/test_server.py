"""What ``server`` moves."""

from sasg_jax.exchanges import Traffic
from sasg_jax.exchanges.server import SERVER


def test_links_by_hand():
    """Worker 0 is the server: its own uploads stay, and its step goes to three others in all four
    rounds, also in the one without an upload."""
    traffic = Traffic(
        upload_bytes=16,
        downlink_bytes=120,
        flag_bytes=1,
        uploads_by_worker=[2, 2, 1, 0],
        rounds_by_uploads=[1, 1, 2, 0, 0],
        steps=4,
    )
    step = 4 * 120
    assert SERVER.links(traffic) == ([3 * step, 32, 16, 0], [48, step, step, step])
    fewer = SERVER.links(traffic._replace(steps=1))  # a server that is mostly silent
    assert fewer == ([3 * 120, 32, 16, 0], [48, 120, 120, 120])
    told = SERVER.all_links(traffic._replace(flag_bytes=0, downlink_flag_bytes=1))
    assert told == ([3 * step + 4 * 3, 32, 16, 0], [48, step + 4, step + 4, step + 4])
    assert SERVER.flag_links(4) == ([3 * 4, 1, 1, 1], [3, 4, 4, 4])


def test_one_worker_sends_nothing():
    traffic = Traffic(16, 120, 1, uploads_by_worker=[5], rounds_by_uploads=[0, 5], steps=5)
    assert SERVER.all_links(traffic) == ([0], [0])
