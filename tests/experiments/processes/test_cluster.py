"""Processes that meet and watch each other, as threads with a group each."""

import json
import queue
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from experiments.processes import cluster
from experiments.processes.cluster import ClusterError, Group, Place, find_place


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def meet_all(places, purposes=None, timeout=5.0) -> list[Any]:
    """What :func:`cluster.meet` gives or raises in each of several threads."""

    def one(place, purpose):
        try:
            return cluster.meet(place, purpose, timeout)
        except ClusterError as error:
            return error

    with ThreadPoolExecutor(len(places)) as threads:
        return list(threads.map(one, places, purposes or ["a run"] * len(places)))


def places(count, indices=None):
    port = free_port()
    return [Place(f"127.0.0.1:{port}", count, i) for i in indices or range(count)]


@pytest.fixture
def three():
    """Three groups that are connected, and why each would have ended its process."""
    pairs = [socket.socketpair() for _ in range(2)]
    names = ["zero", "one", "two"]
    ended = [queue.Queue() for _ in names]
    peers = [
        {1: cluster._Peer(pairs[0][0]), 2: cluster._Peer(pairs[1][0])},
        {0: cluster._Peer(pairs[0][1])},
        {0: cluster._Peer(pairs[1][1])},
    ]
    groups = [Group(i, names, peers[i], silence=2, end=ended[i].put) for i in range(3)]
    yield groups, ended, [pairs[0][0], pairs[0][1], pairs[1][1]]
    for group in groups:
        group.close()


class TestMeet:
    def test_all_come_and_gather(self):
        groups = meet_all(places(4))
        assert [(group.index, group.count) for group in groups] == [(i, 4) for i in range(4)]
        assert len({tuple(group.names) for group in groups}) == 1
        with ThreadPoolExecutor(4) as threads:
            for value in ("first", "second"):
                give = lambda group, value=value: group.gather([value, group.index])
                gathered = threads.map(give, groups)
                assert list(gathered) == [[[value, i] for i in range(4)]] * 4
        for group in groups:
            group.close()

    def test_one_process_needs_no_connection(self):
        group = cluster.meet(Place("127.0.0.1:1", 1, 0), "a run", 1)
        assert group.gather("alone") == ["alone"]
        group.close()

    def test_absent_processes_are_named(self):
        start = time.monotonic()
        for error in meet_all(places(4, [0, 2]), timeout=1):
            assert isinstance(error, ClusterError)
            assert "for 4 processes, but processes 1 and 3 did not come" in str(error)
        assert time.monotonic() - start < 5

    def test_an_unreachable_coordinator_is_named(self):
        (place,) = places(2, [1])
        (error,) = meet_all([place], timeout=0.5)
        assert "Process 1 tried for 0.5 s to reach process 0 at --coordinator=127.0." in str(error)
        assert "Connection refused" in str(error)
        (error,) = meet_all([Place("nowhere.invalid:1234", 2, 1)], timeout=0.5)
        assert "to reach process 0 at --coordinator=nowhere.invalid:1234: " in str(error)

    def test_different_counts_are_named(self):
        zero, one = places(2)
        for error in meet_all([zero, Place(one.coordinator, 3, 1)]):
            assert "was started with --num-processes=3, process 0" in str(error)
            assert str(error).endswith("with --num-processes=2.")

    def test_one_index_twice_is_named(self):
        for error in meet_all(places(3, [0, 1, 1])):
            assert "Two processes were started with --process-id=1" in str(error)

    def test_different_purposes_are_named(self):
        for error in meet_all(places(2), ["seed 1", "seed 2"]):
            assert "was started for something else than process 0: seed 2, not seed 1" in str(error)

    def test_a_stranger_is_sent_away(self):
        zero, one = places(2)
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(meet_all, [zero])
            while True:
                try:
                    stranger = socket.create_connection(zero.address)
                    break
                except ConnectionRefusedError:
                    time.sleep(0.05)
            with stranger:
                stranger.sendall(b"GET / HTTP/1.0\r\n\r\n")
                (group,) = meet_all([one])
            (other,) = waiting.result()
        assert (other.index, group.index) == (0, 1)
        for joined in (other, group):
            joined.close()

    def test_something_else_at_the_coordinators_port(self):
        with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as threads:
            place = Place(f"127.0.0.1:{server.getsockname()[1]}", 2, 1)
            waiting = threads.submit(meet_all, [place])
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"\x00\x01\n")
                (error,) = waiting.result()
        assert "got no answer of a process 0 that waits" in str(error)

    def test_a_taken_port_is_named(self):
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = f"127.0.0.1:{server.getsockname()[1]}"
            with pytest.raises(ClusterError, match=rf"cannot listen at --coordinator={address}"):
                cluster.meet(Place(address, 2, 0), "a run", 1)


class TestWatch:
    def test_a_closed_connection_ends_the_others(self, three):
        groups, ended, sockets = three
        groups[0].doing = groups[1].doing = "in round 7"
        sockets[2].shutdown(socket.SHUT_RDWR)
        for index in (0, 1):
            message = ended[index].get(timeout=5)
            assert message.startswith("Lost process 2 of 3 (two) in round 7: it was killed or")
            assert message.endswith(f"Process {index} ends too.")

    def test_the_first_process_is_named_too(self, three):
        _, ended, sockets = three
        sockets[1].shutdown(socket.SHUT_RDWR)
        assert "Lost process 0 of 3 (zero)" in ended[1].get(timeout=5)

    def test_a_failure_is_passed_on_with_its_reason(self, three):
        groups, ended, _ = three
        groups[1].fail("the loss is not finite")
        for index in (0, 2):
            message = ended[index].get(timeout=5)
            assert "Lost process 1 of 3 (one)" in message
            assert "it failed: the loss is not finite" in message

    def test_a_silent_process_is_lost(self):
        mine, other = socket.socketpair()
        ended = queue.Queue()
        with other:
            group = Group(0, ["zero", "one"], {1: cluster._Peer(mine)}, silence=1, end=ended.put)
            message = ended.get(timeout=10)
            group.close()
        assert "Lost process 1 of 2 (one)" in message
        assert "it has given no sign of life for 1 s" in message

    def test_leaving_in_peace_ends_nobody(self, three):
        groups, ended, _ = three
        for group in groups[1:]:
            group.close()
        time.sleep(1)
        assert all(messages.empty() for messages in ended)


class TestFindPlace:
    def test_nothing_given_is_no_cluster(self):
        assert find_place(environment={}) is None

    def test_options_come_before_the_environment(self):
        environment = {cluster.ADDRESS: "there:1", cluster.COUNT: "3", cluster.INDEX: "2"}
        assert find_place(environment=environment) == Place("there:1", 3, 2)
        place: Any = find_place(coordinator="[::1]:5", index=0, environment=environment)
        assert place == Place("[::1]:5", 3, 0)
        assert place.address == ("::1", 5)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"count": 2}, r"missing: --coordinator \(JAX_COORDINATOR_ADDRESS\), --process-id"),
            ({"detect": True}, "No scheduler was found"),
            (
                {"coordinator": "host", "count": 2, "index": 0},
                "Expected --coordinator=host to be HOST:PORT",
            ),
            (
                {"coordinator": "host:1", "count": 0, "index": 0},
                "Expected --num-processes=0 to be at least 1",
            ),
            (
                {"coordinator": "host:1", "count": 2, "index": 2},
                "Expected --process-id=2 to be from 0 to 1",
            ),
            (
                {"environment": {cluster.COUNT: "two"}},
                "environment variable JAX_NUM_PROCESSES=two to be a whole number",
            ),
        ],
    )
    def test_errors_name_the_option(self, given, message):
        with pytest.raises(ValueError, match=message):
            find_place(**{"environment": {}, **given})

    @pytest.mark.parametrize(
        ("variables", "coordinator"),
        [
            (
                {
                    "SLURM_JOB_ID": "77",
                    "SLURM_STEP_NODELIST": "node[03,05]",
                    "SLURM_NTASKS": "2",
                    "SLURM_PROCID": "1",
                    "SLURM_LOCALID": "0",
                    "SLURM_STEP_NUM_NODES": "2",
                },
                "node03:61517",
            ),
            (
                {
                    "OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp://10.96.0.1,10.148.0.1:34911",
                    "OMPI_COMM_WORLD_SIZE": "2",
                    "OMPI_COMM_WORLD_RANK": "1",
                    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
                },
                None,
            ),
        ],
    )
    def test_schedulers_are_detected(self, monkeypatch, variables, coordinator):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert find_place(environment={}) is None  # only when asked
        place = find_place(detect=True, environment={})
        assert place is not None
        assert (place.count, place.index, place.local_device_ids) == (2, 1, (0,))
        assert coordinator in (None, place.coordinator)


def test_messages_may_come_in_pieces_and_together():
    mine, other = socket.socketpair()
    with mine, other:
        peer = cluster._Peer(mine)
        text = "".join(json.dumps({"number": i}) + "\n" for i in range(3)).encode()
        other.sendall(text[:5])
        assert peer.receive() == []
        other.sendall(text[5:])
        assert peer.receive() == [{"number": i} for i in range(3)]
        other.sendall(b"no json\n")
        assert peer.receive() is None
