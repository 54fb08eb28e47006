"""Two processes of two devices each, on this machine."""

import os
import pathlib
import socket
import subprocess
import sys

import sasg_jax

ENVIRONMENT = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}


def outputs(code: str, *, timeout: float) -> list[str]:
    """What each prints that runs ``code``, with its number and where they meet as arguments."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(process), address],
            env=ENVIRONMENT,
            cwd=pathlib.Path(sasg_jax.__file__).parent.parent,
            stdout=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    return [process.communicate(timeout=timeout)[0] for process in started]
