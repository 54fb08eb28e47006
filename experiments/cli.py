"""The command line: which command does what. What a command needs is imported in it."""

import argparse
import contextlib
import datetime
import importlib
import os
import pathlib
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from experiments.errors import explain, resumable


def _parse(options: type, given: Sequence[str]) -> Any:
    import tyro

    return tyro.cli(options, prog=f"python -m experiments {given[0]}", args=given[1:])


def _train(given: Sequence[str]) -> None:
    from experiments import options

    parsed = _parse(options.TRAINING[given[0]], given)
    from experiments.training import command

    command.work(parsed, given)


_STUDIES = {
    "reproduce": "studies.reproduce",
    "silence": "studies.silence",
    "scale_free": "studies.scale_free",
    "coding": "studies.coding",
    "language": "studies.language",
    "bench": "studies.bench",
    "wire": "wire.measure",
}


def _study(given: Sequence[str]) -> None:
    """What a module does, whose options are called like the command."""
    module = importlib.import_module(f"experiments.{_STUDIES[given[0]]}")
    options = _parse(getattr(module, given[0].capitalize()), given)
    if given[0] == "wire" and options.out is None:
        options.out = pathlib.Path("results") / f"wire-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    with contextlib.ExitStack() as stack:
        if options.out is not None:
            # At once, so that a folder that cannot be is not missed after hours of work.
            options.out.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=options.out).close()
            if given[0] != "bench":  # which measures all anew
                stack.enter_context(resumable(given, options.out))
        module.work(options, given)


def _report(given: Sequence[str]) -> None:
    from experiments.options import Report

    options = _parse(Report, given)
    from experiments.report import build

    print(f"Report: {build.write_report(options.directory)}")


def _launch(given: Sequence[str]) -> None:
    from experiments import options
    from experiments.processes.launch import launched

    launch = _parse(options.Launch, given)
    for name in ("processes", "devices_per_process"):
        if getattr(launch, name) < 1:
            option = f"--{name.replace('_', '-')}={getattr(launch, name)}"
            raise ValueError(f"Expected {option} to be at least 1.")
    inner = launch.command
    if not inner or inner[0] not in options.TRAINING:
        got = shlex.join(inner) or "nothing"
        raise ValueError(f"Expected a command after --, `run ...` or `compare ...`, got {got}.")
    parsed = _parse(options.TRAINING[inner[0]], inner)
    if (parsed.coordinator, parsed.num_processes, parsed.process_id) != (None,) * 3:
        raise ValueError("Expected no --coordinator, --num-processes or --process-id: launch knows")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported
    from experiments.training import command

    command.check(parsed, devices=launch.processes * launch.devices_per_process)
    program = [sys.executable, "-m", "experiments", *inner]
    with launched(program, launch.processes, launch.devices_per_process):
        command.work(_parse(options.TRAINING[inner[0]], inner), given)


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "compare": (_train, "train several methods on the same data, and say what each needs"),
    "run": (_train, "train one method once"),
    "reproduce": (_study, "make what is behind the paper's tables and figures"),
    "report": (_report, "make a page of what `reproduce` has left, beside what the paper says"),
    "silence": (_study, "measure what becomes of a silent worker's gradient"),
    "scale_free": (_study, "try the rule without an alpha on tasks that it is not told about"),
    "coding": (_study, "count the bits that an entry takes, beside its entropy"),
    "language": (_study, "train a language model with all methods, and leave out parts of ours"),
    "bench": (_study, "time the library beside the least that there is to do"),
    "wire": (_study, "measure bytes and times of rounds on a network of several hosts"),
    "launch": (_launch, "start `run` or `compare` in several processes on this machine"),
}


def main(arguments: list[str] | None = None) -> None:
    """Runs a command; what goes wrong ends it with one line and status 1."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments",
        description="Train with little communication, and count what it takes.",
        epilog="COMMAND --help shows a command's options.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (_, purpose) in COMMANDS.items():
        commands.add_parser(name, help=purpose, add_help=False)
    given = sys.argv[1:] if arguments is None else arguments
    work, _ = COMMANDS[parser.parse_args(given[:1]).command]
    try:
        work(given)
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(f"error: {explain(error)}")
