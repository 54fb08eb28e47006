"""Several processes as one run: what jax.distributed leaves out, to name who is missing or died.

All meet at the coordinator's port before jax.distributed starts its own service there, and stay
connected to process 0: a connection that closes without a word is a process that died.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.errors import ClusterError, explain


class Group:
    """The processes of a run, seen from one of them, which ends when another one is lost."""

    def __init__(self, index: int, names: list[str], peers: dict[int, socket.socket]):
        self.index, self.count, self.names, self._peers = index, len(names), names, peers
        self.is_main = index == 0
        self._ending = threading.Lock()  # who has it says why this process ends
        for peer in peers:
            threading.Thread(target=self._hear, args=(peer,), daemon=True).start()

    def gather(self, value: Any = None) -> list[Any]:
        """The values of all, through JSON, on each of them, who wait for each other here."""
        text = np.frombuffer(json.dumps(value).encode(), np.uint8)
        longest = int(multihost_utils.process_allgather(np.int32(len(text))).max())
        padding = longest + -longest % 1024 - len(text)  # few lengths, as each is compiled
        texts = multihost_utils.process_allgather(np.pad(text, (0, padding), constant_values=32))
        return [json.loads(bytes(text)) for text in texts]

    def leave(self, why: str | None = None) -> None:
        """Tells the others that this process ends: in peace, or why."""
        self._ending.acquire(timeout=5)
        for peer in self._peers.values():
            _send(peer, [self.index, why])

    def _hear(self, index: int) -> None:
        """Waits for the one thing that a process says to another: who ends, and why."""
        lost, why = _receive(self._peers[index]) or (index, "it was killed or crashed")
        if why is not None and self._ending.acquire(blocking=False):
            for other in self._peers.keys() - {index}:
                _send(self._peers[other], [lost, why])
            name = f"{lost} of {self.count} ({self.names[lost]})"
            _end_process(f"Lost process {name}: {why}. Process {self.index} ends too.")


@contextlib.contextmanager
def join(
    coordinator: str | None, count: int | None, index: int | None, purpose: str, timeout: float
) -> Iterator[Group]:
    """Meets the others and starts jax.distributed, which asks a scheduler for what is None.

    All must have come for the same purpose within ``timeout`` seconds, or there is a ClusterError.
    An exception in the block ends this process with status 1, and the others with it.
    """
    group = None
    if coordinator is not None and count is not None and index is not None:
        group = meet(coordinator, count, index, purpose, timeout)
    jax.config.update("jax_enable_preemption_service", False)  # it would catch SIGTERM
    jax.distributed.initialize(coordinator, count, index, initialization_timeout=int(timeout) + 1)
    if group is None:
        group = Group(jax.process_index(), [""] * jax.process_count(), {})
        with socket.create_server(("", 0)) as server:
            mine = f"{socket.gethostname()}:{server.getsockname()[1]}"
        group = meet(group.gather(mine)[0], group.count, group.index, purpose, timeout)
    try:
        group.gather()  # gloo, which connects at the first collective, waits 30 s then
        yield group
        group.gather()  # others may still compute or write
        group.leave()
        jax.distributed.shutdown()
    except BaseException as error:
        if "Gloo" in str(error):
            time.sleep(5)  # a collective that another process has left: be told which
        reason = explain(error)
        group.leave(f"it failed: {reason}")
        _end_process(reason)  # no exit handler of jax may wait for the others


def meet(coordinator: str, count: int, index: int, purpose: str, timeout: float) -> Group:
    """Waits until all processes are there, as :func:`join`."""
    host, _, port = coordinator.rpartition(":")
    me = [index, f"pid {os.getpid()} on {socket.gethostname()}", f"{purpose} in {count} processes"]
    deadline = time.monotonic() + timeout
    if index == 0:
        return _call_roll(int(port), count, me, deadline)
    while True:
        try:
            peer = socket.create_connection((host.strip("[]"), int(port)), timeout + 5)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise ClusterError(f"No process 0 at {coordinator} in {timeout:g} s.") from error
            time.sleep(0.2)
    _send(peer, me)
    answer = _receive(peer)  # process 0 gives up before
    if not isinstance(answer, list):
        raise ClusterError(answer or f"Nobody at {coordinator} waits for process {index}.")
    peer.settimeout(None)
    return Group(index, answer, {0: peer})


def _call_roll(port: int, count: int, me: list, deadline: float) -> Group:
    came, peers, problem = {0: me}, [], None
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    with socket.create_server(("", port), family=family, dualstack_ipv6=both) as server:
        while len(came) < count and problem is None:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                peer, _ = server.accept()
            except TimeoutError:
                absent = ", ".join(str(i) for i in range(count) if i not in came)
                problem = f"Of {count} processes, these did not come: {absent}."
                break
            peer.settimeout(2)
            if other := _receive(peer):  # else it is a stranger
                rival = came.get(other[0], me)
                if other[0] in came or other[2] != me[2]:
                    problem = "Process {} ({}) came for {}, and process {} ({}) for {}."
                    problem = problem.format(*other, *rival)
                came[other[0]] = other
                peers.append(peer)
    names = [came[i][1] for i in sorted(came)]
    for peer in peers:
        peer.settimeout(None)
        _send(peer, problem or names)
    if problem is not None:
        raise ClusterError(problem)
    return Group(0, names, dict(zip(list(came)[1:], peers, strict=True)))


def _send(peer: socket.socket, message: Any) -> None:
    with contextlib.suppress(OSError):  # that nobody is there shows in receiving
        peer.sendall(json.dumps(message).encode() + b"\n")


def _receive(peer: socket.socket) -> Any:
    """What the other one says next; None if nothing."""
    with contextlib.suppress(OSError, ValueError), peer.makefile("rb", buffering=0) as lines:
        return json.loads(lines.readline(2**16))


def _end_process(message: str) -> None:
    """Ends at once: the main thread may be waiting in a collective for ever."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        os.write(2, f"error: {message}\n".encode())
    os._exit(1)
