"""Processes that meet and hear of each other, as threads with a group each."""

import queue
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from experiments.errors import ClusterError
from experiments.processes import cluster
from experiments.processes.cluster import Group

# A process whose meeting has failed ends, and its connections with it; a thread does not.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def ended(monkeypatch):
    """What would have ended this process."""
    messages = queue.Queue()
    monkeypatch.setattr(cluster, "_end_process", messages.put)
    return messages


def free_address():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def meet_all(processes, timeout=5.0, address=None) -> list[Any]:
    """What each of several threads gets or has raised: processes as (count, index, purpose)."""
    address = address or free_address()

    def one(process):
        count, index, purpose = process
        try:
            return cluster.meet(address, count, index, purpose, timeout)
        except ClusterError as error:
            return str(error)

    with ThreadPoolExecutor(len(processes)) as threads:
        return list(threads.map(one, processes))


@pytest.fixture
def three():
    return meet_all([(3, i, "a run") for i in range(3)])


class TestMeet:
    def test_all_come_and_know_each_other(self, three):
        assert [(group.index, group.count, group.is_main) for group in three] == [
            (0, 3, True),
            (1, 3, False),
            (2, 3, False),
        ]
        assert len({tuple(group.names) for group in three}) == 1
        assert all(name.startswith("pid ") for name in three[0].names)

    def test_one_process_needs_no_connection(self):
        group = cluster.meet(free_address(), 1, 0, "a run", 1)
        assert group.gather("alone") == ["alone"]

    def test_absent_processes_are_named(self):
        for said in meet_all([(4, i, "a run") for i in (0, 2)], timeout=1):
            assert said == "Of 4 processes, these did not come: 1, 3."

    @pytest.mark.parametrize("host", ["127.0.0.1", "nowhere.invalid"])
    def test_an_unreachable_coordinator_is_named(self, host):
        address = f"{host}:{free_address().split(':')[1]}"
        (said,) = meet_all([(2, 1, "a run")], timeout=0.5, address=address)
        assert said == f"No process 0 at {address} in 0.5 s."

    @pytest.mark.parametrize(
        "processes",
        [[(2, 0, "a run"), (3, 1, "a run")], [(2, 0, "seed 1"), (2, 1, "seed 2")]],
        ids=["counts", "purposes"],
    )
    def test_what_differs_is_named(self, processes):
        wanted = [f"{purpose} in {count} processes" for count, _, purpose in processes]
        for said in meet_all(processes):
            assert said.startswith("Process 1 (pid ")
            assert all(purpose in said for purpose in wanted)

    def test_one_index_twice_is_named(self):
        for said in meet_all([(3, i, "a run") for i in (0, 1, 1)]):
            assert said.startswith("Process 1 (")
            assert "and process 1 (" in said

    def test_a_stranger_is_sent_away(self, ended):
        address = free_address()
        host, port = address.split(":")
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(meet_all, [(2, 0, "a run")], address=address)
            while True:
                try:
                    stranger = socket.create_connection((host, int(port)))
                    break
                except ConnectionRefusedError:
                    time.sleep(0.05)
            with stranger:
                stranger.sendall(b"GET / HTTP/1.0\r\n\r\n")
                (one,) = meet_all([(2, 1, "a run")], address=address)
            (zero,) = waiting.result()
        assert (zero.index, one.index) == (0, 1)
        for group in (zero, one):
            group.leave()
        assert ended.empty()

    def test_something_else_at_the_coordinators_port(self):
        with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as threads:
            address = f"127.0.0.1:{server.getsockname()[1]}"
            waiting = threads.submit(meet_all, [(2, 1, "a run")], address=address)
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"\x00\x01\n")
                (said,) = waiting.result()
        assert said == f"Nobody at {address} waits for process 1."

    def test_a_taken_port_is_an_error_that_names_it(self):
        address = free_address()
        with (
            socket.create_server(("127.0.0.1", int(address.split(":")[1]))),
            pytest.raises(OSError, match="in use"),
        ):
            cluster.meet(address, 2, 0, "a run", 1)


class TestWatch:
    def test_a_closed_connection_ends_the_others(self, three, ended):
        for peer in three[2]._peers.values():
            peer.shutdown(socket.SHUT_RDWR)
        said = sorted(ended.get(timeout=5) for _ in range(3))
        for index, message in ((0, said[1]), (1, said[2])):
            assert message.startswith(f"Lost process 2 of 3 ({three[0].names[2]}): it was killed")
            assert message.endswith(f"Process {index} ends too.")

    def test_a_failure_is_passed_on_with_its_reason(self, three, ended):
        three[1].leave("it failed: the loss is not finite")
        said = sorted(ended.get(timeout=5) for _ in range(2))
        for index, message in zip((0, 2), said, strict=True):
            assert message.startswith("Lost process 1 of 3 (")
            assert "it failed: the loss is not finite. " in message
            assert message.endswith(f"Process {index} ends too.")

    def test_leaving_in_peace_ends_nobody(self, three, ended):
        for group in three[1:]:
            group.leave()
            for peer in group._peers.values():
                peer.close()
        time.sleep(0.5)
        assert ended.empty()


def test_values_of_any_length_are_gathered():
    group = Group(0, ["zero"], {})
    for value in (None, 3, "x" * 3000, {"uploads": [1, 2]}):
        assert group.gather(value) == [value]
