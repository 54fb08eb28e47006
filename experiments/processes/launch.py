"""Starts the processes of a run on this machine, and ends them together."""

import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from experiments.processes import cluster

_LAUNCHED = "SASG_JAX_LAUNCHED"
_GRACE = 5.0  # seconds in which the others may end by themselves and say why


def launch(
    command: Sequence[str],
    processes: int,
    devices_per_process: int = 1,
    *,
    program: Sequence[str] = ("-m", "experiments"),
) -> None:
    """Runs ``python -m experiments COMMAND`` in several processes that make up one run.

    The output of process 0 is this process's; that of the others comes with their number. When one
    process fails, or this one is interrupted, all are stopped.

    Raises:
      SystemExit: a process failed; the message names it.
    """
    port = free_port()
    command = [sys.executable, *program, *command]
    started: list[subprocess.Popen[str]] = []
    ended: queue.Queue[tuple[int, int]] = queue.Queue()
    readers: list[threading.Thread] = []
    with _signals_interrupt():
        try:
            for index in range(processes):
                process = _start(command, processes, devices_per_process, index, port)
                started.append(process)
                wait = lambda index=index, process=process: ended.put((index, process.wait()))
                threading.Thread(target=wait, daemon=True).start()
                if index:
                    reader = threading.Thread(target=_pass_on, args=(index, process), daemon=True)
                    reader.start()
                    readers.append(reader)
            failed = _first_failure(ended, processes)
        except KeyboardInterrupt:
            sys.exit(f"error: interrupted; stopped {_number(len(started))}.")
        finally:
            _stop(started)
            for reader in readers:
                reader.join(timeout=2)
            for process in started:
                for pipe in (process.stdin, process.stdout):
                    if pipe is not None:
                        pipe.close()
            if sys.stdout.isatty():
                sys.stdout.write("\x1b[?25h")  # the cursor, which a progress bar has hidden
    if failed is not None:
        index, status = failed
        others = f"; the other {processes - 1} were stopped" if processes > 2 else ""
        others = "; the other one was stopped" if processes == 2 else others
        sys.exit(f"error: process {index} {_describe(status)}{others}.")


def end_with_launcher() -> None:
    """Makes a process that :func:`launch` has started end when the launcher does."""
    if os.environ.pop(_LAUNCHED, None) is None:
        return

    def wait():
        while os.read(0, 1):  # the launcher keeps the other end open, and writes nothing
            pass
        with contextlib.suppress(OSError):
            os.write(2, b"error: the launcher has ended\n")
        os._exit(cluster.ENDED_WITH_ANOTHER)

    threading.Thread(target=wait, daemon=True).start()


def _start(
    command: Sequence[str], processes: int, devices: int, index: int, port: int
) -> subprocess.Popen[str]:
    count = f"--xla_force_host_platform_device_count={devices}"
    environment = {
        "JAX_PLATFORMS": "cpu",
        **os.environ,
        cluster.ADDRESS: f"127.0.0.1:{port}",
        cluster.COUNT: str(processes),
        cluster.INDEX: str(index),
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {count}".strip(),
        _LAUNCHED: "1",
    }
    if environment["JAX_PLATFORMS"] != "cpu":
        first = index * devices
        ids = ",".join(map(str, range(first, first + devices)))
        environment.setdefault("JAX_LOCAL_DEVICE_IDS", ids)
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE if index else None,
        stderr=subprocess.STDOUT if index else None,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C reaches the launcher alone
    )


def _pass_on(index: int, process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip():
            sys.stderr.write(f"[process {index}] {line.rstrip()}\n")
            sys.stderr.flush()


def _first_failure(ended: queue.Queue[tuple[int, int]], processes: int) -> tuple[int, int] | None:
    """Waits until all have ended, or one has failed and the others have had time to say so."""
    failures: list[tuple[int, int]] = []
    deadline = None
    for _ in range(processes):
        try:
            left = None if deadline is None else max(deadline - time.monotonic(), 0)
            index, status = ended.get(timeout=left)
        except queue.Empty:
            break
        if status:
            failures.append((index, status))
            deadline = deadline or time.monotonic() + _GRACE
    causes = [failure for failure in failures if failure[1] != cluster.ENDED_WITH_ANOTHER]
    return next(iter(causes + failures), None)


def _stop(processes: Sequence[subprocess.Popen[str]]) -> None:
    for number, seconds in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 5.0)):
        running = [process for process in processes if process.poll() is None]
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        deadline = time.monotonic() + seconds
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(deadline - time.monotonic(), 0))


def _describe(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"


def _number(processes: int) -> str:
    return "1 process" if processes == 1 else f"{processes} processes"


def free_port() -> int:
    """A port of the loopback that nobody listens at now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextlib.contextmanager
def _signals_interrupt():
    """Lets what asks the launcher to end interrupt it, like Ctrl-C."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {n: signal.signal(n, interrupt) for n in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
