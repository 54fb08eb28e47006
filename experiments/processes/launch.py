"""Starts the other processes of a run on this machine: this one becomes process 0."""

import contextlib
import os
import socket
import subprocess
from collections.abc import Iterator, Sequence

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
"""Environment variables instead of ``--coordinator``, ``--num-processes`` and ``--process-id``."""


@contextlib.contextmanager
def launched(command: Sequence[str], processes: int, devices: int) -> Iterator[None]:
    """Runs ``command`` in processes 1 and up, and sets this one's environment to be process 0.

    To be called before jax is imported. Those who have met end with process 0, and so do the others
    at the end of the ``with`` block.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    os.environ |= {"XLA_FLAGS": flags, ADDRESS: address, COUNT: str(processes)}
    os.environ["JAX_COORDINATOR_BIND_ADDRESS"] = address  # not on every network
    on_cpu = os.environ.setdefault("JAX_PLATFORMS", "cpu") == "cpu"
    started: list[subprocess.Popen[bytes]] = []
    try:
        for index in reversed(range(processes)):
            os.environ[INDEX] = str(index)
            if not on_cpu:
                own = range(index * devices, (index + 1) * devices)
                os.environ["JAX_LOCAL_DEVICE_IDS"] = ",".join(map(str, own))
            if index:  # in a session of its own, so that Ctrl-C reaches process 0 alone
                started.append(subprocess.Popen(command, start_new_session=True))
        yield
        for process in started:
            process.wait()
    finally:
        for process in started:
            process.kill()
