"""What a compiled program moves between devices, read from XLA's text and from how often it ran.

A general reader: it knows XLA's collectives and nothing of who wrote the program. What one of them
moves is in the text. How often it runs depends on the branches that are taken, which the profiler
saw.
"""

import collections
import glob
import math
import re
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np


class Collective(NamedTuple):
    """What one instruction moves each time it runs, by device."""

    name: str
    opcode: str
    sent: tuple[int, ...]
    received: tuple[int, ...]


class Moved(NamedTuple):
    """Bytes by device."""

    sent: tuple[int, ...]
    received: tuple[int, ...]


# Operand bytes B in a group of n devices -> bytes that each of them sends, and receives.
_WITHIN_A_GROUP: dict[str, Callable[[int, int], int]] = {
    # As a ring does it: every part goes round twice, but for the steps at its start and end.
    "all-reduce": lambda size, n: 2 * size * (n - 1) // n,
    "reduce-scatter": lambda size, n: size * (n - 1) // n,
    "all-gather": lambda size, n: size * (n - 1),
    "all-to-all": lambda size, n: size * (n - 1) // n,
}
# What else moves something, of which there is none so far: better no answer than a wrong one.
_UNREAD = ("send", "recv", "collective-broadcast", "ragged-all-to-all")

_INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<shape>.+?) (?P<opcode>[a-z][a-z\-]*)"
    r"\((?P<operands>.*?)\)(?P<attributes>.*)$",
    re.MULTILINE,
)


def collectives(text: str, num_devices: int) -> list[Collective]:
    """All collectives in the text of a compiled program."""
    instructions = list(_INSTRUCTION.finditer(text))
    shapes = {found["name"]: found["shape"] for found in instructions}
    result = []
    for found in instructions:
        opcode = found["opcode"].removesuffix("-start")  # of an asynchronous one, "-done" is free
        if opcode in _UNREAD:
            raise NotImplementedError(f"{opcode} in {found[0]}")
        if opcode not in (*_WITHIN_A_GROUP, "collective-permute"):
            continue
        operands = re.findall(r"%([\w.\-]+)", found["operands"])
        size = sum(_bytes(shapes[operand]) for operand in operands)
        sent, received = [0] * num_devices, [0] * num_devices
        if opcode == "collective-permute":
            for source, target in _pairs(found["attributes"]):
                if source != target:
                    sent[source] += size
                    received[target] += size
        else:
            for group in _groups(found["attributes"], num_devices):
                for device in group:
                    moved = _WITHIN_A_GROUP[opcode](size, len(group))
                    sent[device] += moved
                    received[device] += moved
        result.append(Collective(found["name"], opcode, tuple(sent), tuple(received)))
    return result


def moved(compiled: Any, *args: Any, num_devices: int) -> tuple[Any, Moved]:
    """Runs a compiled program once: what it returns, and what all its collectives moved."""
    output, runs = _count_runs(lambda: compiled(*args))
    sent, received = np.zeros((2, num_devices), int)
    for collective in collectives(compiled.as_text(), num_devices):
        times, rest = divmod(runs[collective.name], num_devices)
        assert rest == 0, f"{collective.name} ran {runs[collective.name]} times"
        sent += times * np.array(collective.sent)
        received += times * np.array(collective.received)
    return output, Moved(tuple(sent.tolist()), tuple(received.tolist()))


def _count_runs(run: Callable[[], Any]) -> tuple[Any, collections.Counter[str]]:
    """How often each instruction runs, by name, on all devices together."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            output = jax.block_until_ready(run())
        (file,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        planes = jax.profiler.ProfileData.from_file(file).planes
        names = [event.name for plane in planes for line in plane.lines for event in line.events]
    return output, collections.Counter(names)


def _bytes(shape: str) -> int:
    """Bytes of an array or a tuple of arrays, e.g. of ``(f32[4,5]{1,0}, u8[3]{0})``."""
    arrays = re.findall(r"(pred|[a-z]+?\d+)\w*\[([\d,]*)\]", shape)
    if not arrays:
        raise NotImplementedError(f"the size of {shape}")
    sizes = ((_width(dtype), filter(None, dims.split(","))) for dtype, dims in arrays)
    return sum(width * math.prod(map(int, dims)) for width, dims in sizes)


def _width(dtype: str) -> int:
    bits = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype))
    assert bits % 8 == 0, dtype
    return bits // 8


def _pairs(attributes: str) -> Iterator[tuple[int, int]]:
    listed = re.search(r"source_target_pairs={((?:{\d+,\d+},?)*)}", attributes)
    assert listed, attributes
    for source, target in re.findall(r"{(\d+),(\d+)}", listed[1]):
        yield int(source), int(target)


def _groups(attributes: str, num_devices: int) -> list[list[int]]:
    """The groups of devices among which a collective runs; without any, all are one."""
    if listed := re.search(r"replica_groups={({[\d,{}]*})}", attributes):
        return [list(map(int, g.split(","))) for g in re.findall(r"{([\d,]+)}", listed[1])]
    short = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if short:
        numbers = [[int(x) for x in (part or "").split(",") if x] for part in short.groups()]
        shape, dims, order = numbers
        devices = np.arange(math.prod(dims)).reshape(dims)
        return (devices.transpose(order) if order else devices).reshape(shape).tolist()
    return [list(range(num_devices))]
