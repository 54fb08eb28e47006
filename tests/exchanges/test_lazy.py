"""What ``lazy`` moves."""

import pytest

from sasg_jax.exchanges import Traffic
from sasg_jax.exchanges.lazy import LAZY


def test_links_by_hand():
    """Six workers. One or two uploads fill slots of a sum, which sends 2 * 5/6 of them; three and
    six are gathered, to five others each; without any nothing moves."""
    traffic = Traffic(
        upload_bytes=12,
        downlink_bytes=120,
        flag_bytes=1,
        uploads_by_worker=[2, 3, 3, 2, 1, 1],
        rounds_by_uploads=[2, 1, 1, 1, 0, 0, 1],
    )
    moved = 20 * 1 + 20 * 2 + 2 * 5 * 12
    assert LAZY.links(traffic) == ([moved] * 6, [moved] * 6)
    assert LAZY.flag_links(6) == ([5] * 6, [5] * 6)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 33])
def test_it_never_moves_more_than_a_gather_nor_than_a_sum_of_slots(size):
    for uploads in range(size + 1):
        rounds = [int(count == uploads) for count in range(size + 1)]
        by_worker = [int(worker < uploads) for worker in range(size)]
        sent = LAZY.links(Traffic(size * 100, 0, 1, by_worker, rounds)).sent
        gathered = (size - 1) * size * 100
        slots = uploads * 2 * (size - 1) * 100
        assert sent == [min(gathered, slots)] * size
