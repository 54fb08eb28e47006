"""The processes of a measurement, one on each host, and the counters of what they send."""

import contextlib
import json
import os
import pathlib
import selectors
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, cast

from experiments.wire import network

_PORT = 29400  # where workers meet on a test network, on which there is nobody else


class WireError(RuntimeError):
    """A host has failed."""


class Hosts:
    """Workers that do what they are asked. ``counters()`` is what each host's link has moved."""

    def __init__(
        self,
        processes: list[subprocess.Popen[str]],
        logs: list[IO[str]],
        counters: Callable[[], list[network.Counters]],
    ):
        self._processes, self._logs, self.counters = processes, logs, counters

    def ask(
        self, do: str, requests: Sequence[dict[str, Any]] | None = None, **same: Any
    ) -> list[dict[str, Any]]:
        """Has every host do something at once; returns their answers."""
        for i, process in enumerate(self._processes):
            own = requests[i] if requests else {}
            assert process.stdin
            with contextlib.suppress(BrokenPipeError):  # its answer will be missing
                process.stdin.write(json.dumps({"do": do, **same, **own}) + "\n")
                process.stdin.flush()
        answers: dict[int, dict[str, Any]] = {}
        with selectors.DefaultSelector() as waiting:
            for i, process in enumerate(self._processes):
                assert process.stdout
                waiting.register(process.stdout, selectors.EVENT_READ, i)
            while len(answers) < len(self._processes):
                for key, _ in waiting.select():  # the first that ends is the one to name
                    waiting.unregister(key.fileobj)
                    line = cast(IO[str], key.fileobj).readline()
                    if not line:
                        self._fail(key.data)
                    answers[key.data] = json.loads(line)
        return [answers[i] for i in range(len(answers))]

    def _fail(self, host: int) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._processes[host].wait(5)
        self._logs[host].seek(0)
        said = self._logs[host].readlines()[-12:] or ["nothing"]
        sys.stderr.writelines(said)
        raise WireError(f"host {host} has ended during a measurement; it said last: {said[-1]}")


@contextlib.contextmanager
def start_hosts(
    count: int, net: network.Network | None, config: str, settings: Mapping[str, Any]
) -> Iterator[Hosts]:
    """Workers of a configuration, on the hosts of a test network or on this machine's loopback.

    Over loopback there is one counter, of all workers together.
    """
    if net is None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            coordinator = f"127.0.0.1:{server.getsockname()[1]}"
        popen = lambda host, argv, **options: subprocess.Popen(argv, **options)
        counters = lambda: [network.read_counters("/proc/net/dev", "lo")]
    else:
        coordinator, popen, counters = f"{net.addresses[0]}:{_PORT}", net.popen, net.counters
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
    environment["XLA_FLAGS"] = ""  # one device on each host
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-m", "experiments.wire.worker"]
    root = pathlib.Path(__file__).parents[2]
    processes, logs = [], []
    with contextlib.ExitStack() as stack:
        for host in range(count):
            logs.append(stack.enter_context(tempfile.TemporaryFile("w+")))
            process = popen(host, command, stderr=logs[-1], env=environment, cwd=root, **pipes)
            stack.callback(process.communicate)
            stack.callback(process.kill)
            processes.append(process)
        hosts = Hosts(processes, logs, counters)
        indices = [{"index": i} for i in range(count)]
        same = {"coordinator": coordinator, "count": count, "config": config}
        hosts.ask("meet", indices, **same, settings=dict(settings))
        yield hosts
