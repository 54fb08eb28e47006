"""The command ``wire``: methods over exchanges, on links whose bytes the kernel counts."""

import contextlib
import dataclasses
import datetime
import json
import os
import pathlib
import selectors
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Annotated, Any, Literal, cast

import numpy as np
import rich.box
import rich.console
import rich.table
import tyro

import sasg_jax
from experiments.configs import CONFIGS
from experiments.methods import METHODS, make_optimizer
from experiments.processes.launch import free_port
from experiments.report.figures import plot_wire
from experiments.report.tables import format_bytes
from experiments.training.records import session, write_json
from experiments.wire import network
from sasg_jax.exchange import EXCHANGES

# After a round, until acknowledgements have come to rest.
_SETTLE = 0.03
# An exchange this short is made several times on end: starting it takes as long as waiting for it.
_SHORT, _REPEATS = 0.5, 5
# Before a round, so that all hosts are ready when it starts.
_LEAD = 0.15


class WireError(RuntimeError):
    """A host has failed."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What to measure."""

    config: str
    width: int | None
    hosts: int
    rounds: int
    compute: bool
    """Whether to train, or to move messages of the same sizes alone."""
    upload_fraction: float
    """Of the workers, in each round of an adaptive method; where nothing is trained."""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One method over one exchange. Bytes are of one host, a mean over rounds."""

    method: str
    exchange: str
    hosts: int
    rounds: int
    uploads_per_round: float
    message_bytes: int
    """One upload, as the ledger counts it."""
    ledger_sent: list[float]
    """By host: what the ledger says that it sends in a round."""
    ledger_received: list[float]
    kernel_sent: list[float] | None
    """By host: what its interface counted, all headers and acknowledgements included."""
    kernel_received: list[float] | None
    kernel_total: float
    """Sent by all hosts in a round."""
    round_ms: float | None
    """Median of whole rounds, from the common start to the last end on any host."""
    communication_ms: float
    """Median of the exchange alone, with the same workers uploading; if it is short, of several
    on end."""
    worker_state_bytes: int
    """Residual, stale parameters and counters of one worker."""
    server_state_bytes: int
    """Last messages, history and residual of the way down, on each device."""
    by_round: list[dict[str, Any]]
    """Who uploaded, and the kernel's bytes of each host."""

    def of_a_worker(self, by_host: Sequence[float]) -> float:
        """The mean over workers, without worker 0 where it is the server."""
        workers = by_host[1:] if self.exchange in ("server", "relay") else by_host
        return statistics.mean(workers)

    @property
    def compute_ms(self) -> float | None:
        """What is left of a round without its exchange."""
        return None if self.round_ms is None else max(0.0, self.round_ms - self.communication_ms)


# Hosts --------------------------------------------------------------------------------------------


class Conductor:
    """The processes of a measurement, and the counters of what they send."""

    def __init__(self, processes: list[subprocess.Popen[str]], logs: list[IO[str]]):
        self._processes, self._logs = processes, logs

    def ask(self, do: str, requests: Sequence[dict[str, Any]] | None = None, **same: Any):
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
        said = "".join(self._logs[host].readlines()[-12:])
        raise WireError(f"Host {host} has ended during a measurement. It said last:\n{said}")


@contextlib.contextmanager
def on_network(setting: Setting, net: network.Network) -> Iterator[tuple[Conductor, Callable]]:
    """Workers on the hosts of a test network, and a function that reads the hosts' counters."""

    def start(host, argv, **options):
        return net.popen(host, argv, **options)

    with _conduct(setting, start, net.addresses[0]) as conductor:
        yield conductor, net.counters


@contextlib.contextmanager
def on_loopback(setting: Setting) -> Iterator[tuple[Conductor, Callable]]:
    """Workers on this machine's loopback, and a function that reads its counters: one for all."""

    def start(host, argv, **options):
        del host
        return subprocess.Popen(argv, **options)

    def counters():
        return [network.read_counters("/proc/net/dev", "lo")]

    with _conduct(setting, start, "127.0.0.1") as conductor:
        yield conductor, counters


@contextlib.contextmanager
def _conduct(setting: Setting, start: Callable, address: str) -> Iterator[Conductor]:
    root = pathlib.Path(__file__).parents[2]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
    environment["XLA_FLAGS"] = ""  # one device on each host
    with contextlib.ExitStack() as stack:
        processes, logs = [], []
        for host in range(setting.hosts):
            logs.append(stack.enter_context(tempfile.TemporaryFile("w+")))
            process = start(
                host,
                [sys.executable, "-m", "experiments.wire.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=logs[-1],
                text=True,
                env=environment,
                cwd=root,
            )
            stack.callback(_end, process)
            processes.append(process)
        conductor = Conductor(processes, logs)
        coordinator = f"{address}:{free_port() if address == '127.0.0.1' else 29400}"
        conductor.ask(
            "meet",
            [{"index": i} for i in range(setting.hosts)],
            coordinator=coordinator,
            count=setting.hosts,
            config=setting.config,
            width=setting.width,
        )
        yield conductor


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


# Measurements -------------------------------------------------------------------------------------


def measure(
    conductor: Conductor, counters: Callable, setting: Setting, method: str, exchange: str
) -> Measurement:
    """Measures one method over one exchange, round by round."""
    prepared = conductor.ask("prepare", method=method, exchange=exchange, compute=setting.compute)
    ledger = _ledger(prepared[0]["wire"])
    adaptive = bool(prepared[0]["wire"]["flag_bytes"])
    whole: list[float] = []
    alone: list[float] = []
    by_round: list[dict[str, Any]] = []
    if setting.compute and adaptive:  # in the first rounds everybody uploads
        for _ in range(CONFIGS[setting.config].history):
            conductor.ask("whole_round", start=time.monotonic())
    same = {"uploaded": True, "repeats": 1}
    _, took, _ = _counted(counters, conductor, "exchange_only", [same] * setting.hosts)
    repeats = _REPEATS if took < _SHORT else 1
    for t in range(setting.rounds):
        if setting.compute:
            answers, took, moved = _counted(counters, conductor, "whole_round")
            flags = [answer["uploaded"] for answer in answers]
            whole.append(took)
        else:
            flags, moved = _some(setting, t) if adaptive else [True] * setting.hosts, None
        own = [{"uploaded": flag, "repeats": repeats} for flag in flags]
        _, took, moved_alone = _counted(counters, conductor, "exchange_only", own)
        alone.append(took / repeats)
        ledger.record(np.asarray(flags))
        counted, rounds_counted = (moved_alone, repeats) if moved is None else (moved, 1)
        by_round.append(
            {
                "uploaded": flags,
                "sent": [m.sent / rounds_counted for m in counted],
                "received": [m.received / rounds_counted for m in counted],
                "communication_ms": 1e3 * alone[-1],
            }
        )
    rounds = setting.rounds
    sent = np.mean([r["sent"] for r in by_round], axis=0).tolist()
    received = np.mean([r["received"] for r in by_round], axis=0).tolist()
    per_host = len(sent) == setting.hosts
    return Measurement(
        method=method,
        exchange=exchange,
        hosts=setting.hosts,
        rounds=rounds,
        uploads_per_round=ledger.uploads / rounds,
        message_bytes=prepared[0]["wire"]["upload_bytes"],
        ledger_sent=[b / rounds for b in ledger.sent_bytes],
        ledger_received=[b / rounds for b in ledger.received_bytes],
        kernel_sent=sent if per_host else None,
        kernel_received=received if per_host else None,
        kernel_total=sum(sent),
        round_ms=1e3 * statistics.median(whole) if whole else None,
        communication_ms=1e3 * statistics.median(alone),
        worker_state_bytes=max(answer["worker"] for answer in prepared),
        server_state_bytes=max(answer["server"] for answer in prepared),
        by_round=by_round,
    )


def _ledger(wire: dict[str, Any]) -> sasg_jax.Ledger:
    workers = wire["num_workers"]
    return sasg_jax.Ledger.from_dict(
        {
            "wire": wire,
            "uploads_by_worker": [0] * workers,
            "rounds_by_uploads": [0] * (workers + 1),
            "model_state_bytes": 0,
        }
    )


def _some(setting: Setting, t: int) -> list[bool]:
    """As many workers as the fraction says, others in every round."""
    count = round(setting.upload_fraction * setting.hosts)
    return [(i - t * count) % setting.hosts < count for i in range(setting.hosts)]


def _counted(
    counters: Callable,
    conductor: Conductor,
    do: str,
    requests: list[dict[str, Any]] | None = None,
) -> tuple[list[dict[str, Any]], float, list[network.Counters]]:
    """The hosts' answers, the seconds until the last was done, and what each host's link moved."""
    before = counters()
    start = time.monotonic() + _LEAD
    answers = conductor.ask(do, requests, start=start)
    took = max(answer["end"] for answer in answers) - start
    time.sleep(_SETTLE)
    after = counters()
    moved = [
        network.Counters(a.sent - b.sent, a.received - b.received)
        for a, b in zip(after, before, strict=True)
    ]
    return answers, took, moved


# The command --------------------------------------------------------------------------------------


@dataclasses.dataclass
class Wire:
    """Measures what each method really sends, over each exchange, between processes on a network.

    Makes a test network of hosts on this machine, with a worker on each, and makes rounds one by
    one. For each it compares the bytes that the ledger counts with those that the kernel counted on
    every host's link, and takes the time of the whole round and of the exchange alone. Without
    root, the processes are joined over loopback: bytes are then those of all together, and no link
    is slow.

    Images are made up; nothing is downloaded. Prints two tables, and writes wire.json (every round)
    and wire.png.
    """

    config: tyro.conf.Positional[Literal["mnist_fc", "cifar10_resnet18"]] = "mnist_fc"
    """Which model and settings."""

    hosts: int = 4
    """How many hosts, with one worker each."""

    rate: str = "1gbit"
    """Of every link, in each direction: a number with kbit, mbit or gbit."""

    delay: Annotated[
        str | None, tyro.conf.arg(metavar="STR", help_behavior_hint="(default: none)")
    ] = None
    """One way from host to host: a number with us, ms or s. Needs the kernel's netem."""

    rounds: int = 20
    """How many rounds of each method and exchange."""

    methods: tuple[
        Literal["sgd", "sparse", "lasg", "sasg", "sparse_two_way", "sasg_two_way"], ...
    ] = ("sgd", "sparse", "lasg", "sasg", "sparse_two_way", "sasg_two_way")
    """Which methods to measure."""

    exchanges: Annotated[
        tuple[str, ...], tyro.conf.arg(help_behavior_hint="(default: those that suit a method)")
    ] = ()
    """Over which exchanges, of psum, gather, lazy, relay, server and sharded."""

    compute: bool = True
    """Whether to train. Without, messages of the right sizes are moved and nothing is computed:
    for models that are too slow for all hosts on one machine."""

    upload_fraction: float = 0.4
    """Without compute: how many of the workers upload in each round of lasg and sasg."""

    width: Annotated[
        int | None,
        tyro.conf.arg(metavar="INT", help_behavior_hint="(default: the configuration's)"),
    ] = None
    """Hidden units of the fully connected network, or channels of the ResNet18's first stage."""

    out: Annotated[
        pathlib.Path | None,
        tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: results/wire-DATE-TIME)"),
    ] = None
    """Where results go; nothing there is overwritten. The same command again goes on with what was
    stopped."""

    loopback: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Join the processes over loopback also where a network can be made."""


def check(command: Wire) -> list[tuple[str, str]]:
    """The pairs of methods and exchanges to measure; raises ValueError for bad options."""
    for name in ("hosts", "rounds", "width"):
        value = getattr(command, name)
        least = 2 if name == "hosts" else 1
        if value is not None and value < least:
            raise ValueError(f"Expected --{name}={value} to be at least {least}.")
    if not 0 <= command.upload_fraction <= 1:
        raise ValueError(f"Expected --upload-fraction={command.upload_fraction} in [0, 1].")
    network.Network(command.hosts, command.rate, command.delay)  # raises for a malformed rate
    for exchange in command.exchanges:
        if exchange not in EXCHANGES:
            raise ValueError(f"Expected --exchanges={exchange} to be of {', '.join(EXCHANGES)}.")
    pairs = []
    for method in command.methods:
        for exchange in command.exchanges or METHODS[method].exchanges:
            config = dataclasses.replace(CONFIGS[command.config], exchange=exchange)
            try:
                make_optimizer(config, method)
            except ValueError:  # an exchange that this method cannot take
                continue
            pairs.append((method, exchange))
    if not pairs:
        raise ValueError(
            f"Expected --exchanges={' '.join(command.exchanges)} to suit one of --methods="
            f"{' '.join(command.methods)}."
        )
    return pairs


def work(command: Wire, arguments: Sequence[str]) -> None:
    """Measures, prints and writes; raises ValueError, RuntimeError or OSError."""
    pairs = check(command)
    console = rich.console.Console()
    why_loopback = "as asked" if command.loopback else network.why_unavailable()
    now = datetime.datetime.now()
    directory = command.out or pathlib.Path("results") / f"wire-{now:%Y%m%d-%H%M%S}"
    directory.mkdir(parents=True, exist_ok=True)
    setting = Setting(
        config=command.config,
        width=command.width,
        hosts=command.hosts,
        rounds=command.rounds,
        compute=command.compute,
        upload_fraction=command.upload_fraction,
    )
    rate = None if why_loopback else command.rate
    about = {
        **session(arguments),
        "network": f"{rate} links" if rate else f"loopback, {why_loopback}",
        "setting": dataclasses.asdict(setting),
    }
    path = directory / "wire.json"
    measurements: list[Measurement] = []
    if path.exists():
        about, measurements = _go_on(path, about)
        done = [(m.method, m.exchange) for m in measurements]
        pairs = [pair for pair in pairs if pair not in done]
    if why_loopback:
        console.print(f"Loopback, with links of no particular rate. {why_loopback}", style="yellow")
    if pairs:
        with contextlib.ExitStack() as stack:
            if why_loopback:
                hosts = on_loopback(setting)
            else:
                net = network.Network(command.hosts, command.rate, command.delay)
                hosts = on_network(setting, stack.enter_context(net))
            status = stack.enter_context(console.status("starting"))
            conductor, counters = stack.enter_context(hosts)
            for number, (method, exchange) in enumerate(pairs, 1):
                label = f"{METHODS[method].label} over {exchange}"
                status.update(f"{label} ({number} of {len(pairs)})")
                measurements.append(measure(conductor, counters, setting, method, exchange))
                write_json(
                    path, {**about, "measurements": [dataclasses.asdict(m) for m in measurements]}
                )
                if not console.is_terminal:
                    console.print(f"{label}: {measurements[-1].communication_ms:.1f} ms a round")
    title = f"{command.config}, {command.hosts} hosts, {about['network']}"
    for table in wire_tables(title, measurements):
        console.print(table)
    plot_wire(measurements, directory / "wire.png", title)
    console.print(
        f"Results: {directory / 'wire.json'}\nFigure:  {directory / 'wire.png'}", soft_wrap=True
    )


def _go_on(path: pathlib.Path, about: dict[str, Any]) -> tuple[dict[str, Any], list[Measurement]]:
    """What was measured before, by a command that was stopped or had fewer methods.

    Raises:
      ValueError: it was another setting, network or machine.
    """
    earlier = json.loads(path.read_text())
    measurements = [Measurement(**m) for m in earlier.pop("measurements")]
    for key in ("setting", "network", "machine", "versions"):
        if earlier[key] != about[key]:
            raise ValueError(
                f"{path} was measured with another {key}, {earlier[key]}, not {about[key]}. "
                "Choose another --out."
            )
    return earlier, measurements


def wire_tables(title: str, measurements: Sequence[Measurement]) -> list[rich.table.Table]:
    """Bytes of one worker, by ledger and by kernel; then times and memory."""

    def table(heading, *columns, caption):
        result = rich.table.Table(
            title=f"{title}: {heading}", box=rich.box.SIMPLE_HEAD, padding=0, caption=caption
        )
        result.add_column("Method", no_wrap=True)
        result.add_column("Exchange", no_wrap=True)
        for column in columns:
            result.add_column(column, justify="right", no_wrap=True)
        return result

    by_host = all(m.kernel_sent for m in measurements)
    moved = table(
        "what moves in a round",
        "Uploads",
        *(("Sent", "by kernel", "Received", "by kernel") if by_host else ("Sent", "by kernel")),
        caption="Uploads: of all hosts, a round. "
        + ("Of one worker that is not the server, a mean: " if by_host else "Of all hosts: ")
        + "by ledger, and as the kernel counted, headers and acknowledgements included.",
    )
    times = table(
        "times and memory",
        *("Round ms", "Compute", "Exchange", "Faster", "Worker state", "Server state"),
        caption="Medians of rounds. Exchange: alone, with the same workers uploading; compute is "
        "the rest of a round. Faster: the exchange of SGD over psum takes so many times as long. "
        "State, on one device: residual and stale parameters; last messages and the residual of "
        "the way down.",
    )
    dense = [m for m in measurements if (m.method, m.exchange) == ("sgd", "psum")]
    for m in measurements:
        counts = [sum(m.ledger_sent), m.kernel_total]
        if by_host and m.kernel_sent and m.kernel_received:
            sides = m.ledger_sent, m.kernel_sent, m.ledger_received, m.kernel_received
            counts = [m.of_a_worker(side) for side in sides]
        moved.add_row(
            METHODS[m.method].label,
            m.exchange,
            f"{m.uploads_per_round:.1f}",
            *map(format_bytes, counts),
        )
        times.add_row(
            METHODS[m.method].label,
            m.exchange,
            "" if m.round_ms is None else f"{m.round_ms:.1f}",
            "" if m.compute_ms is None else f"{m.compute_ms:.1f}",
            f"{m.communication_ms:.1f}",
            f"{dense[0].communication_ms / m.communication_ms:.1f}×" if dense else "",
            format_bytes(m.worker_state_bytes),
            format_bytes(m.server_state_bytes),
        )
    return [moved, times]
