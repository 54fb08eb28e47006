"""A test network: hosts on one machine, with shaped links and counted bytes.

A host is a set of Linux namespaces: a network, a host name, an ``/etc/hosts`` and processes of its
own, on the machine's files and devices. A switch (a bridge in a namespace of its own) joins the
hosts, and nothing else: no route leads out, and nothing shows outside, so that several networks can
be up at once.

Nothing is left behind, ever. The namespaces have no names: each lives as long as its first process,
which waits at a pipe that only the owner of the network holds open. However the owner ends
(``kill -9`` included), the pipe closes, the first process ends, and the kernel kills all others of
that host and removes links, addresses and mounts.
"""

import concurrent.futures
import contextlib
import ctypes
import dataclasses
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Annotated, Any, NamedTuple

import rich.box
import rich.console
import rich.table
import tyro

from experiments.options import optional

_RATES = {"kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
_DELAYS = {"us": 1, "ms": 10**3, "s": 10**6}
_TOOLS = {"ip": "iproute2", "tc": "iproute2", "bridge": "iproute2"}
_TOOLS |= {"unshare": "util-linux", "nsenter": "util-linux", "mount": "util-linux"}
_NAMESPACES = ("--net", "--mount", "--uts")
_PRINTING = threading.Lock()

# A host's first process, given its name and its /etc/hosts. /sys has to be mounted anew to show the
# host's own interfaces; until then, the file that is mounted over /etc/hosts is made there.
_FIRST_PROCESS = """
mount -t tmpfs hosts /sys
printf %s "$2" > /sys/hosts
mount --bind /sys/hosts /etc/hosts
umount /sys
mount -t sysfs sysfs /sys
printf %s "$1" > /proc/sys/kernel/hostname
for switch in /proc/sys/net/ipv6/conf/*/disable_ipv6; do
  [ ! -e "$switch" ] || echo 1 > "$switch"
done
echo ready
read -r end
"""


def why_unavailable() -> str | None:
    """What is missing to make a network here; None where nothing is."""
    if sys.platform != "linux":
        return f"A test network needs Linux; this is {sys.platform}."
    if os.geteuid() != 0:
        return "A test network needs root, to make network namespaces."
    missing = [f"{tool} (of {_TOOLS[tool]})" for tool in _TOOLS if not shutil.which(tool)]
    if missing:
        return f"A test network needs programs that are not installed: {', '.join(missing)}."
    attempt = ["unshare", *_NAMESPACES, "--pid", "--fork", "true"]
    result = subprocess.run(attempt, capture_output=True, text=True)
    if result.returncode:
        return f"A test network needs namespaces; the kernel refuses: {result.stderr.strip()}"
    return None


class Counters(NamedTuple):
    """Bytes that have crossed a host's link, as seen from the host."""

    sent: int
    received: int


def read_counters(path: str, interface: str) -> Counters:
    """What has crossed an interface, by a file like ``/proc/net/dev``."""
    (line,) = re.findall(rf"\b{interface}:(.*)", pathlib.Path(path).read_text())
    fields = line.split()
    return Counters(sent=int(fields[8]), received=int(fields[0]))


class Network:
    """Hosts on this machine, joined by a switch. A context manager.

    Host i has the address ``addresses[i]`` and the name ``host<i>``. Hosts know each other's names,
    and their own as that address: it is the one that Gloo (``jax.distributed`` on CPUs) binds.

    The rate of a link, in each of its two directions, is kept to by what a wire would carry, all
    headers included. After a pause a link passes 1 ms' worth (at least two packets) at once; of
    what waits for it, all over 100 ms' worth (at least 64 kB) is dropped, as a switch does when
    several hosts send to one. A packet takes the delay from one host to another, beside the time
    that the rate gives.

    Counted are the bytes of Ethernet frames at the host's end of its link. So n bytes over TCP are
    counted as n, with 14 + 20 + 32 bytes of headers (Ethernet, IP, TCP) for each segment; the
    receiver sends an acknowledgement of that size for every segment or few. On a wire a segment is
    1448 bytes, and headers are 4.6 %. Here it is longer: the kernel hands on up to 64 kB or 1 ms'
    worth of the rate whole (GSO), and counts the headers once: 0.1 % at 1gbit, 0.6 % at 100mbit,
    and as on a wire at 10mbit. What TCP sends again counts again. Nothing else is sent: there is no
    IPv6, and hosts and switch know all hardware addresses from the start.

    Guarantees:
      - Traffic is between the hosts only.
      - When the ``with`` block has ended, however it did, no process of any host is left. Nor is
        one after the end of this process, however it was.
    """

    def __init__(self, hosts: int = 4, rate: str = "1gbit", delay: str | None = None):
        if not 1 <= hosts <= 250:
            raise ValueError(f"Expected hosts={hosts} to be from 1 to 250.")
        bits = _parse("rate", rate, _RATES, "100kbit", "100gbit")
        burst, queue = max(3028, bits // 8000), max(2**16, bits // 80)
        self._shaping = f"tbf rate {bits}bit burst {burst} limit {queue}"
        self._segment = min(2**16, burst * 15 // 16)  # with its headers on the wire, in the burst
        self._egress = [f"qdisc add dev eth0 root {self._shaping}"]
        if delay is not None:
            latency = _parse("delay", delay, _DELAYS, "0us", "10s")
            netem = f"qdisc add dev eth0 root handle 1: netem limit 100000 delay {latency}us"
            self._egress = [netem, f"qdisc add dev eth0 parent 1:1 {self._shaping}"]
        self.addresses = tuple(f"10.0.0.{host + 1}" for host in range(hosts))
        self._first: list[int] = []  # the first process of each host
        self._commands: list[subprocess.Popen] = []

    def __enter__(self) -> "Network":
        if reason := why_unavailable():
            raise RuntimeError(reason)
        with contextlib.ExitStack() as stack:
            self._build(stack)
            self._end = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.close()

    def popen(
        self, host: int, argv: Sequence[str], *, env: Any = None, cwd: Any = ".", **options: Any
    ) -> subprocess.Popen:
        """Starts a program on a host; as :class:`subprocess.Popen`, whose options it takes.

        The program leads a session, so that ``os.killpg`` reaches its children too. It finds in its
        environment, beside ``env`` (or this process's own), ``SASG_HOST_INDEX``,
        ``SASG_HOST_COUNT`` and ``SASG_HOST_ADDRESSES`` (of all hosts, joined by commas).
        """
        first = self._first[host]
        env = {
            **(os.environ if env is None else env),
            "SASG_HOST_INDEX": str(host),
            "SASG_HOST_COUNT": str(len(self.addresses)),
            "SASG_HOST_ADDRESSES": ",".join(self.addresses),
        }
        enter = ["nsenter", f"--target={first}", *_NAMESPACES]
        enter += ["env", f"--chdir={os.path.abspath(cwd)}", *argv]
        with _children_in(f"/proc/{first}/ns/pid_for_children"):
            process = subprocess.Popen(enter, env=env, **{"start_new_session": True, **options})
        self._commands.append(process)
        return process

    def counters(self) -> list[Counters]:
        """What has crossed each host's link since the network was made."""
        return [read_counters(f"/proc/{first}/net/dev", "eth0") for first in self._first]

    def _build(self, stack: contextlib.ExitStack) -> None:
        hosts = range(len(self.addresses))
        hosts_file = "127.0.0.1 localhost\n"
        hosts_file += "".join(f"{self.addresses[i]} host{i}\n" for i in hosts)
        processes = [_start_first(f"host{i}", hosts_file, stack) for i in hosts]
        processes.append(_start_first("switch", hosts_file, stack))
        stack.callback(self._forget)
        for process in processes:  # all are told to end before any is waited for
            stack.callback(_end_first, process)
        for process in processes:
            assert process.stdout
            if (line := process.stdout.readline()) != "ready\n":
                raise RuntimeError(f"A host of the test network could not be made: {line.strip()}")
        *self._first, switch = (process.pid for process in processes)

        macs = [f"02:00:00:00:00:{i + 1:02x}" for i in hosts]
        links = ["link add switch type bridge mcast_snooping 0", "link set switch up"]
        for i in hosts:
            peer = f"name eth0 address {macs[i]} netns {self._first[i]}"
            links += [f"link add port{i} type veth peer {peer}"]
            links += [f"link set port{i} master switch up"]
        _batch(switch, "ip", links)
        _batch(switch, "tc", [f"qdisc add dev port{i} root {self._shaping}" for i in hosts])
        static = "master static"
        _batch(switch, "bridge", [f"fdb replace {macs[i]} dev port{i} {static}" for i in hosts])
        up = ["link set lo up", f"link set eth0 up gso_max_size {self._segment}"]
        for i in hosts:
            up += [f"neighbour add {self.addresses[i]} lladdr {macs[i]} dev eth0 nud permanent"]
        for i in hosts:
            _batch(self._first[i], "ip", [f"address add {self.addresses[i]}/24 dev eth0", *up])
            _batch(self._first[i], "tc", self._egress)

    def _forget(self) -> None:
        """Reaps the programs; the kernel ends no first process before that."""
        self._first = []
        while self._commands:
            self._commands.pop().wait()


def _start_first(name: str, hosts_file: str, stack: contextlib.ExitStack) -> subprocess.Popen[str]:
    """Starts the first process of a host, which the stack waits for."""
    namespaces = ["unshare", *_NAMESPACES, "--pid", "--kill-child", "--mount-proc"]
    command = [*namespaces, "sh", "-ec", _FIRST_PROCESS, "sh", name, hosts_file]
    how: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    how |= {"text": True, "start_new_session": True}  # out of reach of Ctrl-C
    return stack.enter_context(subprocess.Popen(command, **how))


def _end_first(process: subprocess.Popen[str]) -> None:
    """Ends it with a word, as a child forked from this process may hold the pipe open as well."""
    assert process.stdin
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write("end\n")
        process.stdin.close()


def _batch(first: int, tool: str, lines: Sequence[str]) -> None:
    """Has ip, tc or bridge do something in a host's network."""
    argv = ["nsenter", f"--target={first}", "--net", tool, "-batch", "-"]
    text = "".join(f"{line}\n" for line in lines)
    result = subprocess.run(argv, input=text, capture_output=True, text=True)
    if result.returncode:
        error = result.stderr.strip()
        if "netem" in text and "qdisc kind is unknown" in error:
            raise RuntimeError("A delay needs netem, which this kernel does not have (sch_netem).")
        raise RuntimeError(f"The test network could not be made: {tool}: {error}")


@contextlib.contextmanager
def _children_in(pid_namespace: str) -> Iterator[None]:
    """Processes that this thread starts meanwhile are in the PID namespace."""

    def enter(file: IO) -> None:  # os.setns is of Python 3.12
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0x20000000):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), file.name)

    with open("/proc/self/ns/pid") as own, open(pid_namespace) as other:
        enter(other)
        try:
            yield
        finally:
            enter(own)


def _parse(name: str, value: str, units: Mapping[str, int], low: str, high: str) -> int:
    """The value in the smallest unit; raises ValueError if malformed or out of bounds."""

    def number(text: str) -> float:
        match = re.fullmatch(rf"(\d+(?:\.\d+)?)({'|'.join(units)})", text)
        return float(match[1]) * units[match[2]] if match else float("nan")

    if not number(low) <= number(value) <= number(high):
        kinds = ", ".join(units)
        raise ValueError(
            f"Expected {name}={value!r} to be a number and a unit ({kinds}), from {low} to {high}."
        )
    return round(number(value))


@dataclasses.dataclass
class Options:
    """Runs a command on every host of a test network, and counts what crosses their links:

    python -m experiments.wire.network --hosts 4 --rate 100mbit -- COMMAND ...

    The hosts are on this machine: they share its files and devices, and talk to each other only,
    over links of a given rate. Each is told who it is: its index from 0 in SASG_HOST_INDEX, the
    number of hosts in SASG_HOST_COUNT, and the addresses of all, joined by commas, in
    SASG_HOST_ADDRESSES. The names host0, host1, ... stand for the addresses.

    Ends with the first status that is not 0, after the other hosts' commands have been terminated.
    Needs Linux, root and iproute2.
    """

    command: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        tyro.conf.arg(metavar="COMMAND ...", help_behavior_hint="(required)"),
    ] = ()
    """What to run, and its arguments; after --."""
    hosts: int = 4
    """How many, from 1 to 250."""
    rate: str = "1gbit"
    """Of every link, in each direction: a number with kbit, mbit or gbit."""
    delay: Annotated[str | None, optional("STR", "none")] = None
    """One way from host to host: a number with us, ms or s. Needs the kernel's netem."""


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; what the user can mend ends it with a message and status 1."""
    options = tyro.cli(Options, prog="python -m experiments.wire.network", args=arguments)
    try:
        if not options.command:
            raise ValueError("Expected command=() to be a program and its arguments, after --.")
        network = Network(options.hosts, options.rate, options.delay)
        status, counters = run(network, options.command)
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    for heading in ("Host", "Address", "Bytes sent", "Bytes received"):
        table.add_column(heading, justify="right", no_wrap=True)
    for host, (sent, received) in enumerate(counters):
        table.add_row(str(host), network.addresses[host], f"{sent:,}", f"{received:,}")
    rich.console.Console().print(table)
    sys.exit(status)


def run(network: Network, command: Sequence[str]) -> tuple[int, list[Counters]]:
    """Makes the network, runs the command on every host, and prints "[host i]" and what it says.

    Returns the first exit status that is not 0, or 0, and the counters of all hosts. After a
    failure the other hosts' commands get SIGTERM, and 5 seconds.
    """
    running: dict[int, subprocess.Popen[str]] = {}
    status, deadline = 0, float("inf")
    hosts, pipe = range(len(network.addresses)), subprocess.PIPE
    with concurrent.futures.ThreadPoolExecutor(2 * len(hosts)) as readers, network:
        for host in hosts:
            how = {"stdin": subprocess.DEVNULL, "stdout": pipe, "stderr": pipe}
            process = network.popen(host, command, **how, text=True, errors="replace")
            readers.submit(_pass_on, host, process.stdout, sys.stdout)
            readers.submit(_pass_on, host, process.stderr, sys.stderr)
            running[host] = process
        while running and time.monotonic() < deadline:
            time.sleep(0.02)
            ended = [host for host in running if running[host].poll() is not None]
            codes = [running.pop(host).returncode for host in ended]
            failed = [(host, code) for host, code in zip(ended, codes, strict=True) if code]
            if failed and not status:
                host, code = failed[0]
                status, deadline = code if code > 0 else 128 - code, time.monotonic() + 5
                print(f"host {host} has ended with status {status}", file=sys.stderr)
                for process in running.values():
                    os.killpg(process.pid, signal.SIGTERM)
        return status, network.counters()


def _pass_on(host: int, lines: Any, to: IO[str]) -> None:
    with lines:
        for line in lines:
            with _PRINTING:
                print(f"[host {host}]", line.removesuffix("\n"), file=to, flush=True)


if __name__ == "__main__":
    main()
