"""What the user can mend is told in one line; a traceback is for the program's own faults."""

import contextlib
import pathlib
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence


class ClusterError(RuntimeError):
    """Processes that do not find each other, or do not agree."""


_MENDABLE = (ValueError, OSError, ImportError, FloatingPointError, MemoryError, RuntimeError)


def explain(error: BaseException) -> str:
    """One line on an error; ``python -X dev`` also prints where one that can be mended arose."""
    if isinstance(error, KeyboardInterrupt):
        return str(error) or "interrupted."
    mendable = isinstance(error, _MENDABLE)
    if not mendable or sys.flags.dev_mode:
        traceback.print_exception(error)
    first = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, ModuleNotFoundError):
        return f'{first}. The experiments need: pip install -e ".[experiments]"'
    return first if mendable and first else f"{type(error).__name__}: {first}"


@contextlib.contextmanager
def resumable(arguments: Sequence[str], out: pathlib.Path) -> Iterator[None]:
    """Lets Ctrl-C say with which command to go on."""
    try:
        yield
    except KeyboardInterrupt:
        given = any(argument.split("=")[0] == "--out" for argument in arguments)
        where = [] if given else ["--out", str(out)]
        command = shlex.join(["python", "-m", "experiments", *arguments, *where])
        raise KeyboardInterrupt(f"interrupted. To go on: {command}") from None
