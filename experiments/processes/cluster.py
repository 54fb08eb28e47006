"""Several processes as one run: they meet, watch each other, and compare notes.

Every process keeps a connection to process 0, made on the coordinator's port before jax.distributed
starts its own service there. Without it, a process that is missing or dies shows in the others as
an abort of jax.distributed or a failed collective, which name nobody, or not at all.
"""

import contextlib
import ctypes
import dataclasses
import json
import os
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
"""Environment variables instead of ``--coordinator``, ``--num-processes`` and ``--process-id``."""

ENDED_WITH_ANOTHER = 3
"""Exit status of a process that ended because another one did."""

SILENCE = 40.0
"""Seconds without a sign of life after which a process is lost, e.g. with its machine. One that
ends is noticed at once."""

_BEAT = 5.0


class ClusterError(RuntimeError):
    """Processes that do not find each other, or do not agree."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Which process this is, of how many, and where they meet."""

    coordinator: str
    """HOST:PORT, on the host of process 0."""
    count: int
    index: int
    local_device_ids: tuple[int, ...] | None = None

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port)

    @property
    def is_loopback(self) -> bool:
        host = self.address[0]
        return host in ("localhost", "::1") or host.startswith("127.")


def find_place(
    *,
    detect: bool = False,
    coordinator: str | None = None,
    count: int | None = None,
    index: int | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Place | None:
    """This process's place among several, or None if there is nothing that speaks of several.

    Args:
      detect: whether to ask the cluster's scheduler, as ``jax.distributed.initialize`` does (SLURM,
        Open MPI, ...), although nothing else is given.
      coordinator: HOST:PORT; by default from the environment, then from the scheduler. So are:
      count: the number of processes.
      index: which of them this is, from 0.
      environment: where :data:`ADDRESS`, :data:`COUNT` and :data:`INDEX` are looked up.

    Raises:
      ValueError: one is missing everywhere, or is out of its range.
    """
    coordinator = coordinator or environment.get(ADDRESS)
    count = _integer(COUNT, environment.get(COUNT)) if count is None else count
    index = _integer(INDEX, environment.get(INDEX)) if index is None else index
    if not detect and coordinator is None and count is None and index is None:
        return None
    local_device_ids = None
    from jax._src.clusters import ClusterEnv  # what jax.distributed.initialize asks

    coordinator, count, index, local_device_ids = ClusterEnv.auto_detect_unset_distributed_params(
        coordinator, count, index, _local_device_ids(environment), None, 30
    )
    given = {
        f"--coordinator ({ADDRESS})": coordinator,
        f"--num-processes ({COUNT})": count,
        f"--process-id ({INDEX})": index,
    }
    missing = [name for name, value in given.items() if value is None]
    if missing or coordinator is None or count is None or index is None:
        raise ValueError(
            "A run over several processes needs --coordinator, --num-processes and --process-id, "
            "or a scheduler that knows them. No scheduler was found, and these are missing: "
            f"{', '.join(missing)}."
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"Expected --coordinator={coordinator} to be HOST:PORT.")
    if count < 1:
        raise ValueError(f"Expected --num-processes={count} to be at least 1.")
    if not 0 <= index < count:
        raise ValueError(
            f"Expected --process-id={index} to be from 0 to {count - 1}, as there are "
            f"--num-processes={count}."
        )
    ids = None if local_device_ids is None else tuple(local_device_ids)
    return Place(coordinator, count, index, ids)


def _integer(name: str, value: str | None) -> int | None:
    if value is None:
        return None
    if not value.strip().isdecimal():
        raise ValueError(f"Expected the environment variable {name}={value} to be a whole number.")
    return int(value)


def _local_device_ids(environment: Mapping[str, str]) -> list[int] | None:
    ids = environment.get("JAX_LOCAL_DEVICE_IDS")
    return [int(i) for i in ids.split(",")] if ids else None


# --- A group of processes -----------------------------------------------------------------------


class Group:
    """The processes of a run, from one's own point of view.

    When another one ends without :meth:`close`, or is silent for too long, this process ends with
    an error that names it, whatever it is doing.
    """

    def __init__(
        self,
        index: int,
        names: list[str],
        peers: "dict[int, _Peer]",
        *,
        silence: float = SILENCE,
        end: Callable[[str], None] | None = None,
    ):
        self.index = index
        self.count = len(names)
        self.doing = "at the start"
        """What an error says this process was doing."""
        self.names = names
        """Of all processes: their process number and host."""
        self._peers = peers
        self._silence = silence
        self._end = _end_process if end is None else end
        self._changed = threading.Condition()
        self._given: dict[int, dict[int, Any]] = {}  # by gathering and process; on process 0
        self._gathered: dict[int, list[Any]] = {}  # by gathering
        self._gatherings = 0
        self._ended = False
        self._watcher = threading.Thread(target=self._watch, daemon=True, name="watch")
        if peers:
            self._watcher.start()

    @property
    def is_main(self) -> bool:
        """Whether this process logs and writes."""
        return self.index == 0

    def gather(self, value: Any = None) -> list[Any]:
        """The values of all processes, on each of them: also a point at which they wait for each
        other. ``value`` goes through JSON.
        """
        number = self._gatherings
        self._gatherings += 1
        if self.is_main:
            self._give(number, 0, value)
        else:
            self._peers[0].send(number=number, value=value)
        with self._changed:
            self._changed.wait_for(lambda: number in self._gathered)
            return self._gathered.pop(number)

    def fail(self, why: str) -> None:
        """Tells the others that this process ends, and why."""
        self._ended = True
        for peer in self._peers.values():
            peer.send(lost=self.index, why=f"it failed: {why}")

    def close(self) -> None:
        """Leaves in peace."""
        self._ended = True
        for peer in self._peers.values():
            peer.send(bye=True)
        if self._peers:
            self._watcher.join()
        for peer in self._peers.values():
            peer.socket.close()

    def _watch(self) -> None:
        """In its own thread: hears the others and says that this process is alive."""
        with selectors.DefaultSelector() as selector:
            for index, peer in self._peers.items():
                selector.register(peer.socket, selectors.EVENT_READ, index)
            heard = dict.fromkeys(self._peers, time.monotonic())
            beat = time.monotonic()
            while heard and not self._ended:
                for key, _ in selector.select(timeout=0.2):
                    index = key.data
                    messages = self._peers[index].receive()
                    heard[index] = time.monotonic()
                    for message in messages or []:
                        self._handle(index, message)
                    if messages is None or any("bye" in message for message in messages):
                        selector.unregister(key.fileobj)
                        del heard[index]
                        if messages is None:
                            self._lose(index, "it was killed or crashed (its connection closed)")
                now = time.monotonic()
                for index, last in heard.items():
                    if now - last > self._silence:
                        self._lose(index, f"it has given no sign of life for {self._silence:g} s")
                if now - beat > min(_BEAT, self._silence / 4):
                    beat = now
                    for peer in self._peers.values():
                        peer.send(alive=True)

    def _handle(self, index: int, message: dict[str, Any]) -> None:
        if "lost" in message:
            self._lose(message["lost"], message["why"])
        elif "values" in message:
            with self._changed:
                self._gathered[message["number"]] = message["values"]
                self._changed.notify_all()
        elif "value" in message:
            self._give(message["number"], index, message["value"])

    def _give(self, number: int, index: int, value: Any) -> None:
        with self._changed:
            given = self._given.setdefault(number, {})
            given[index] = value
            if len(given) < self.count:
                return
            del self._given[number]
            # A copy as it comes out of JSON, like that of the others.
            values = json.loads(json.dumps([given[i] for i in range(self.count)]))
            self._gathered[number] = values
            self._changed.notify_all()
        for peer in self._peers.values():
            peer.send(number=number, values=values)

    def _lose(self, index: int, why: str) -> None:
        if self._ended:
            return
        self._ended = True
        for other, peer in self._peers.items():
            if other != index:
                peer.send(lost=index, why=why)
        self._end(
            f"Lost process {index} of {self.count} ({self.names[index]}) {self.doing}: {why}. "
            f"Process {self.index} ends too."
        )


@contextlib.contextmanager
def join(place: Place, purpose: str, timeout: float) -> Iterator[Group]:
    """Meets the other processes and starts jax.distributed, for the time of a ``with`` block.

    An exception in the block ends this process with status 1, and the others with it.

    Args:
      place: this process's.
      purpose: what the run is; all processes must have come for the same.
      timeout: how many seconds to wait for the others.

    Raises:
      ClusterError: the processes do not all come in time, or do not fit together.
    """
    group = meet(place, purpose, timeout)
    try:
        if place.count > 1:
            _start_jax(place, timeout)
        yield group
        if place.count > 1:
            group.doing = "at the end"
            group.gather()  # others may still compute or write: wait here, where none is timed
            jax.distributed.shutdown()
        group.close()
    except BaseException as error:
        if place.count == 1:
            raise
        if isinstance(error, jax.errors.JaxRuntimeError):
            # Most likely a collective that another process has left: wait to be told which.
            time.sleep(min(15, SILENCE))
            lines = str(error).strip().splitlines() or [""]
            reason = f"A collective or computation failed {group.doing}: {lines[0]}"
        elif isinstance(error, SystemExit):
            reason = str(error.code).removeprefix("error: ")
        elif isinstance(error, KeyboardInterrupt):
            reason = "interrupted"
        elif isinstance(error, ClusterError):
            reason = str(error)
        else:
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}"
        group.fail(reason)
        _end_process(reason, status=1)  # no exit handler of jax may wait for the others


def _start_jax(place: Place, timeout: float) -> None:
    # It would catch SIGTERM.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    host, port = place.address
    bracketed = f"[{host}]" if ":" in host else host
    jax.distributed.initialize(
        coordinator_address=f"{bracketed}:{port}",
        num_processes=place.count,
        process_id=place.index,
        local_device_ids=place.local_device_ids,
        cluster_detection_method="deactivate",
        initialization_timeout=max(1, round(timeout)),
        heartbeat_timeout_seconds=50,  # the group notices before
        shutdown_timeout_seconds=30,
        coordinator_bind_address=f"{bracketed}:{port}" if place.is_loopback else None,
    )
    _delay_aborts()
    _first_collective()


def _delay_aborts() -> None:
    """Makes an abort wait a few seconds, in which the watch can say why.

    When process 0 has died, jax.distributed aborts the others as soon as the watch knows of it.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.signal(signal.SIGABRT, libc.sleep)  # called with the signal's number: sleep(6)


def _first_collective() -> None:
    """Connects the devices. Gloo says so on the standard output, where it is in the way."""
    mesh = Mesh(np.asarray(jax.devices()), ("devices",))
    split, everywhere = (
        NamedSharding(mesh, spec) for spec in (PartitionSpec("devices"), PartitionSpec())
    )
    one_each = jax.make_array_from_callback(
        (jax.device_count(),), split, lambda index: np.ones(1, np.int32)
    )
    sys.stdout.flush()
    standard_output = os.dup(1)
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 1)
            total = jax.jit(lambda x: x.sum(), out_shardings=everywhere)(one_each)
            assert int(total) == jax.device_count()
    finally:
        os.dup2(standard_output, 1)
        os.close(standard_output)


def _end_process(message: str, status: int = ENDED_WITH_ANOTHER) -> None:
    """Ends at once: the main thread may be waiting in a collective for ever."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    with contextlib.suppress(OSError):
        if sys.stdout.isatty():
            os.write(1, b"\x1b[?25h\n")  # the cursor, which a progress bar has hidden
        os.write(2, f"error: {message}\n".encode())
    os._exit(status)


# --- Meeting ------------------------------------------------------------------------------------


def meet(place: Place, purpose: str, timeout: float) -> Group:
    """Waits until all processes are there.

    Raises:
      ClusterError: some are not there after ``timeout`` seconds, or do not fit together.
    """
    me = f"pid {os.getpid()} on {socket.gethostname()}"
    if place.count == 1:
        return Group(0, [me], {})
    if place.index == 0:
        names, peers = _call_roll(place, me, purpose, timeout)
        return Group(0, names, peers)
    names, peer = _answer_roll(place, me, purpose, timeout)
    return Group(place.index, names, {0: peer})


def _call_roll(
    place: Place, me: str, purpose: str, timeout: float
) -> "tuple[list[str], dict[int, _Peer]]":
    deadline = time.monotonic() + timeout
    try:
        server = _listen(place)
    except OSError as error:
        raise ClusterError(
            f"Process 0 cannot listen at --coordinator={place.coordinator}: {_reason(error)}."
        ) from error
    peers: dict[int, _Peer] = {}
    names: dict[int, str] = {0: me}
    problem = None
    with server:
        while len(names) < place.count and problem is None:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                absent = sorted(set(range(place.count)) - set(names))
                problem = (
                    f"Waited {timeout:g} s at {place.coordinator} for {place.count} processes, "
                    f"but {_list(absent)} did not come. Was --num-processes={place.count} meant?"
                )
                break
            peer = _Peer(connection)
            hello = peer.wait(2)
            if not hello or "process" not in hello:  # a stranger
                peer.socket.close()
                continue
            index, count = hello["process"], hello["of"]
            if count != place.count:
                problem = (
                    f"Process {index} ({hello['name']}) was started with --num-processes={count}, "
                    f"process 0 ({me}) with --num-processes={place.count}."
                )
            elif index in names:
                problem = (
                    f"Two processes were started with --process-id={index}: {names[index]}, and "
                    f"{hello['name']}."
                )
                index = -1  # tell both
            elif hello["purpose"] != purpose:
                problem = (
                    f"Process {index} ({hello['name']}) was started for something else than "
                    f"process 0: {hello['purpose']}, not {purpose}."
                )
            peers[index] = peer
            names[index] = hello["name"]
    if problem is not None:
        for peer in peers.values():
            peer.send(problem=problem)
            peer.socket.close()
        raise ClusterError(problem)
    listed = [names[index] for index in range(place.count)]
    for peer in peers.values():
        peer.send(names=listed)
    return listed, peers


def _answer_roll(place: Place, me: str, purpose: str, timeout: float) -> "tuple[list[str], _Peer]":
    deadline = time.monotonic() + timeout
    while True:
        try:
            left = max(deadline - time.monotonic(), 0.1)
            peer = _Peer(socket.create_connection(place.address, timeout=left))
            break
        except OSError as error:
            if time.monotonic() + 0.2 >= deadline:
                raise ClusterError(
                    f"Process {place.index} tried for {timeout:g} s to reach process 0 at "
                    f"--coordinator={place.coordinator}: {_reason(error)}."
                ) from error
        time.sleep(0.2)
    peer.send(process=place.index, of=place.count, name=me, purpose=purpose)
    answer = peer.wait(timeout + 5)  # process 0 gives up before
    if answer and "names" in answer:
        return answer["names"], peer
    peer.socket.close()
    if answer and "problem" in answer:
        raise ClusterError(answer["problem"])
    raise ClusterError(
        f"Process {place.index} reached --coordinator={place.coordinator}, but got no answer of a "
        "process 0 that waits for others: it has ended, it has begun without this process (a wrong "
        "--num-processes?), or something else listens there."
    )


def _listen(place: Place) -> socket.socket:
    host, port = place.address
    if place.is_loopback:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=place.count)
    if socket.has_dualstack_ipv6():
        family = socket.AF_INET6
        return socket.create_server(
            ("", port), family=family, dualstack_ipv6=True, backlog=place.count
        )
    return socket.create_server(("", port), backlog=place.count)


def _reason(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__


def _list(indices: list[int]) -> str:
    *most, last = map(str, indices)
    return f"process {last}" if not most else f"processes {', '.join(most)} and {last}"


class _Peer:
    """Messages over a connection: one JSON object a line."""

    def __init__(self, connection: socket.socket):
        connection.settimeout(10)
        self.socket = connection
        self._lock = threading.Lock()
        self._partial = b""

    def send(self, **message: Any) -> None:
        """Sends, if there still is somebody; that nobody is there shows in :meth:`receive`."""
        with self._lock, contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that have come, once the socket is readable. None: the connection closed."""
        try:
            received = self.socket.recv(2**16)
        except OSError:
            return None
        if not received:
            return None
        *lines, self._partial = (self._partial + received).split(b"\n")
        messages = []
        for line in lines:
            try:
                message = json.loads(line)
            except ValueError:
                return None
            messages.append(message if isinstance(message, dict) else {})
        return messages

    def wait(self, timeout: float) -> dict[str, Any] | None:
        """The first message, or None if none comes in time."""
        deadline = time.monotonic() + timeout
        messages: list[dict[str, Any]] | None = []
        try:
            while messages == []:
                self.socket.settimeout(max(deadline - time.monotonic(), 0.001))
                messages = self.receive()
                if len(self._partial) > 2**16:
                    return None
        finally:
            self.socket.settimeout(10)
        return messages[0] if messages else None
