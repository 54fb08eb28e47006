"""The command ``wire``: methods over exchanges, on links whose bytes the kernel counts."""

import contextlib
import dataclasses
import pathlib
import statistics
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import tyro
from rich.table import Table

from experiments.configs import CONFIGS
from experiments.methods import EXCHANGES, METHODS, MethodName, OptimizerName, make_optimizer
from experiments.options import INDICES, VALUES, optional
from experiments.report.tables import format_bytes, numbers_table
from experiments.wire import network
from experiments.wire.hosts import Hosts, start_hosts

# After a round, until acknowledgements have come to rest.
_SETTLE = 0.03
# An exchange this short is made several times on end: starting it takes as long as waiting for it.
_SHORT, _REPEATS = 0.5, 5
# Before a round, so that all hosts are ready when it starts.
_LEAD = 0.15


@dataclasses.dataclass
class Wire:
    """Measures what each method really sends, over each exchange, between processes on a network.

    Makes a test network of hosts on this machine, with a worker on each, and makes rounds one by
    one. For each it compares the bytes that the ledger counts with those that the kernel counted on
    every host's link, and takes the time of the whole round and of the exchange alone. Without
    root, the processes are joined over loopback: bytes are then those of all together, and no link
    is slow.

    Data are made up; nothing is downloaded. Prints two tables, and writes wire.json (every round)
    and wire.png.
    """

    config: tyro.conf.Positional[Literal["mnist_fc", "cifar10_resnet18", "stdlib_lm"]] = "mnist_fc"
    """Which model and settings."""
    hosts: int = 4
    """How many hosts, with one worker each."""
    rate: str = "1gbit"
    """Of every link, in each direction: a number with kbit, mbit or gbit."""
    delay: Annotated[str | None, optional("STR", "none")] = None
    """One way from host to host: a number with us, ms or s. Needs the kernel's netem."""
    rounds: int = 20
    """How many rounds of each method and exchange."""
    methods: tuple[MethodName, ...] = tuple(
        name for name, row in METHODS.items() if not (row.recipe or row.optimizer)
    )
    """Which methods to measure."""
    exchanges: Annotated[tuple[str, ...], optional("NAME ...", "those that suit a method")] = ()
    """Over which exchanges, of psum, gather, lazy, relay, server and sharded."""
    compute: bool = True
    """Whether to train. Without, messages of the right sizes are moved and nothing is computed:
    for models that are too slow for all hosts on one machine."""
    upload_fraction: float = 0.4
    """Without compute: how many of the workers upload in each round of lasg and sasg."""
    width: Annotated[int | None, optional("INT")] = None
    """Hidden units of the fully connected network, channels of the ResNet18's first stage, or those
    of the transformer."""
    density: Annotated[float | None, optional("FLOAT", "the method's")] = None
    """Part of the entries that the sparse methods send, in (0, 1]."""
    down_density: Annotated[float | None, optional("FLOAT", "that up")] = None
    """Part of the entries that the server sends back."""
    local_steps: Annotated[int | None, optional("INT", "the configuration's")] = None
    """Steps of each worker's own in a round."""
    inner: Annotated[OptimizerName | None, optional("NAME", "the configuration's")] = None
    """With what it makes them."""
    period: Annotated[int | None, optional("INT", "the method's")] = None
    """Rounds from one turn of a worker to its next."""
    values: Annotated[VALUES | None, optional("NAME", "the method's")] = None
    """How the sparse methods write values: plain, bfloat16, sign, sign2, sign4, sign8."""
    indices: Annotated[INDICES | None, optional("NAME", "the method's")] = None
    """And indices: plain, fixed, tiled, bitmap, elias_fano."""
    out: Annotated[pathlib.Path | None, optional("DIR", "results/wire-DATE-TIME")] = None
    """Where results go; nothing there is overwritten. The same command again goes on with what was
    stopped."""
    loopback: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Join the processes over loopback also where a network can be made."""


def work(command: Wire, arguments: Sequence[str]) -> None:
    """Measures, prints and writes; raises ValueError, RuntimeError or OSError."""
    pairs = check(command)
    import rich.console

    from experiments.report.figures import plot_wire
    from experiments.training.records import session, write_json

    assert command.out is not None  # the command line has chosen one
    command.out.mkdir(parents=True, exist_ok=True)
    path = command.out / "wire.json"
    console = rich.console.Console()
    why_loopback = "as asked" if command.loopback else network.why_unavailable()
    fields = (*SETTINGS, "config", "hosts", "rounds", "compute", "upload_fraction")
    setting = {name: getattr(command, name) for name in fields}
    links = f"loopback, {why_loopback}" if why_loopback else f"{command.rate} links"
    about = {**session(arguments), "network": links, "setting": setting}
    measurements: list[Measurement] = []
    if path.exists():
        about, measurements = _go_on(path, about)
        done = [(m.method, m.exchange) for m in measurements]
        pairs = [pair for pair in pairs if pair not in done]
    if why_loopback:
        console.print(f"Loopback, with links of no particular rate. {why_loopback}", style="yellow")
    if pairs:
        net = None if why_loopback else network.Network(command.hosts, command.rate, command.delay)
        with (
            net or contextlib.nullcontext(),
            console.status("starting") as status,
            start_hosts(command.hosts, net, command.config, settings_of(command)) as hosts,
        ):
            for number, (method, exchange) in enumerate(pairs, 1):
                label = f"{METHODS[method].label} over {exchange}"
                status.update(f"{label} ({number} of {len(pairs)})")
                measurements.append(measure(hosts, command, method, exchange))
                found = [dataclasses.asdict(m) for m in measurements]
                write_json(path, {**about, "measurements": found})
                if not console.is_terminal:
                    console.print(f"{label}: {measurements[-1].communication_ms:.1f} ms a round")
    title = f"{command.config}, {command.hosts} hosts, {about['network']}"
    for table in wire_tables(title, measurements):
        console.print(table)
    figure = path.with_suffix(".png")
    plot_wire(measurements, figure, title)
    console.print(f"Results: {path}\nFigure:  {figure}", soft_wrap=True)


SETTINGS = ("width density down_density local_steps inner period values indices").split()
"""Of a configuration, what may be changed."""


def settings_of(command: Wire) -> dict[str, Any]:
    """Those that are."""
    given = {name: getattr(command, name) for name in SETTINGS}
    return {name: value for name, value in given.items() if value is not None}


def check(command: Wire) -> list[tuple[str, str]]:
    """The pairs of methods and exchanges to measure; raises ValueError for bad options."""
    least_of = {"hosts": 2, "rounds": 1, "width": 1, "local_steps": 1, "period": 1}
    for name, least in least_of.items():
        value = getattr(command, name)
        if value is not None and value < least:
            option = f"--{name.replace('_', '-')}={value}"
            raise ValueError(f"Expected {option} to be at least {least}.")
    for name in ("density", "down_density"):
        value = getattr(command, name)
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"Expected --{name.replace('_', '-')}={value} in (0, 1].")
    if not 0 <= command.upload_fraction <= 1:
        raise ValueError(f"Expected --upload-fraction={command.upload_fraction} in [0, 1].")
    network.Network(command.hosts, command.rate, command.delay)  # raises for a malformed rate
    from experiments.training import grid  # imports jax

    for exchange in command.exchanges:
        if exchange not in EXCHANGES:
            raise ValueError(f"Expected --exchanges={exchange} to be of {', '.join(EXCHANGES)}.")
    pairs = []
    for method in command.methods:
        for exchange in command.exchanges or METHODS[method].exchanges:
            base = dataclasses.replace(CONFIGS[command.config], **settings_of(command))
            config = grid.of_method(dataclasses.replace(base, exchange=exchange), method, None)
            with contextlib.suppress(ValueError):  # an exchange that this method cannot take
                make_optimizer(config, method)
                pairs.append((method, exchange))
    if not pairs:
        raise ValueError(
            f"Expected --exchanges={' '.join(command.exchanges)} to suit one of --methods="
            f"{' '.join(command.methods)}."
        )
    return pairs


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One method over one exchange. Bytes are of one host, a mean over rounds."""

    method: str
    exchange: str
    hosts: int
    rounds: int
    uploads_per_round: float
    message_bytes: int  # one upload, as the ledger counts it
    ledger_sent: list[float]  # by host: what the ledger says that it sends in a round
    ledger_received: list[float]
    kernel_sent: list[float] | None  # by host, all headers and acknowledgements included
    kernel_received: list[float] | None
    kernel_total: float  # sent by all hosts in a round
    round_ms: float | None  # median of whole rounds, from the common start to the last end
    communication_ms: float  # median of the exchange alone, with the same workers uploading
    worker_state_bytes: int  # residual, past parameters and counters of one worker
    server_state_bytes: int  # last messages and the residual of the way down, on each device
    by_round: list[dict[str, Any]]  # who uploaded, and the kernel's bytes of each host

    def of_a_worker(self, by_host: Sequence[float]) -> float:
        """The mean over workers, without worker 0 where it is the server."""
        from sasg_jax.exchanges import EXCHANGES

        return statistics.mean(by_host[EXCHANGES[self.exchange].has_root :])

    @property
    def compute_ms(self) -> float | None:
        """What is left of a round without its exchange."""
        return None if self.round_ms is None else max(0.0, self.round_ms - self.communication_ms)


def measure(hosts: Hosts, command: Wire, method: str, exchange: str) -> Measurement:
    """Measures one method over one exchange, round by round."""
    import sasg_jax

    same = {"method": method, "exchange": exchange, "compute": command.compute}
    prepared = hosts.ask("prepare", **same)
    ledger, adaptive = sasg_jax.Ledger.from_dict(prepared[0]["ledger"]), METHODS[method].alpha
    whole: list[float] = []
    alone: list[float] = []
    by_round: list[dict[str, Any]] = []
    if command.compute and adaptive:  # in the first rounds everybody uploads
        for _ in range(CONFIGS[command.config].history):
            hosts.ask("whole_round", start=time.monotonic())
    everybody = [{"uploaded": True, "repeats": 1}] * command.hosts
    _, took, _ = _counted(hosts, "exchange_only", everybody)
    repeats = _REPEATS if took < _SHORT else 1
    for t in range(command.rounds):
        if command.compute:
            answers, took, moved = _counted(hosts, "whole_round")
            flags = [answer["uploaded"] for answer in answers]
            whole.append(took)
        else:
            flags, moved = some(command, t) if adaptive else [True] * command.hosts, None
        own = [{"uploaded": flag, "repeats": repeats} for flag in flags]
        _, took, moved_alone = _counted(hosts, "exchange_only", own)
        alone.append(took / repeats)
        ledger.record(flags)
        counted, count = (moved_alone, repeats) if moved is None else (moved, 1)
        by_round.append(
            {
                "uploaded": flags,
                "sent": [m.sent / count for m in counted],
                "received": [m.received / count for m in counted],
                "communication_ms": 1e3 * alone[-1],
            }
        )
    rounds = command.rounds
    sent, received = (
        [statistics.mean(host) for host in zip(*(r[key] for r in by_round), strict=True)]
        for key in ("sent", "received")
    )
    per_host = len(sent) == command.hosts
    return Measurement(
        method=method,
        exchange=exchange,
        hosts=command.hosts,
        rounds=rounds,
        uploads_per_round=ledger.uploads / rounds,
        message_bytes=prepared[0]["ledger"]["wire"]["upload_bytes"],
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


def some(command: Wire, t: int) -> list[bool]:
    """As many workers as the fraction says, others in every round."""
    count = round(command.upload_fraction * command.hosts)
    return [(i - t * count) % command.hosts < count for i in range(command.hosts)]


def _counted(
    hosts: Hosts, do: str, requests: list[dict[str, Any]] | None = None
) -> tuple[list[dict[str, Any]], float, list[network.Counters]]:
    """The hosts' answers, the seconds until the last was done, and what each host's link moved."""
    before = hosts.counters()
    start = time.monotonic() + _LEAD
    answers = hosts.ask(do, requests, start=start)
    took = max(answer["end"] for answer in answers) - start
    time.sleep(_SETTLE)
    moved = [
        network.Counters(a.sent - b.sent, a.received - b.received)
        for a, b in zip(hosts.counters(), before, strict=True)
    ]
    return answers, took, moved


def _go_on(path: pathlib.Path, about: dict[str, Any]) -> tuple[dict[str, Any], list[Measurement]]:
    """What was measured before, by a command that was stopped or had fewer methods. ValueError
    where it was another setting, network or machine."""
    from experiments.training.records import read_json

    earlier = read_json(path, "setting network machine versions measurements")
    measurements = [Measurement(**m) for m in earlier.pop("measurements")]
    for key in ("setting", "network", "machine", "versions"):
        if earlier[key] != about[key]:
            raise ValueError(
                f"{path} was measured with another {key}, {earlier[key]}, not {about[key]}. "
                "Choose another --out."
            )
    return earlier, measurements


def wire_tables(title: str, measurements: Sequence[Measurement]) -> list[Table]:
    """Bytes of one worker, by ledger and by kernel; then times and memory."""
    by_host = all(m.kernel_sent for m in measurements)
    names = "Method", "Exchange"
    counts = ("Sent", "by kernel", "Received", "by kernel") if by_host else ("Sent", "by kernel")
    moved = numbers_table(f"{title}: what moves in a round", names, ("Uploads", *counts))
    moved.caption = (
        "Uploads: of all hosts, a round. "
        f"{'Of one worker that is not the server, a mean' if by_host else 'Of all hosts'}: by "
        "ledger, and as the kernel counted, headers and acknowledgements included."
    )
    headings = ("Round ms", "Compute", "Exchange", "Faster", "Worker state", "Server state")
    times = numbers_table(f"{title}: times and memory", names, headings)
    times.caption = (
        "Medians of rounds. Exchange: alone, with the same workers uploading; compute is the rest "
        "of a round. Faster: the exchange of SGD over psum takes so many times as long. State, on "
        "one device: residual and stale parameters; last messages and the residual of the way down."
    )
    from sasg_jax.exchanges import EXCHANGES

    dense = [m for m in measurements if EXCHANGES[m.exchange].sums]
    for m in measurements:
        name = METHODS[m.method].label, m.exchange
        sizes = [sum(m.ledger_sent), m.kernel_total]
        if by_host and m.kernel_sent and m.kernel_received:
            sides = m.ledger_sent, m.kernel_sent, m.ledger_received, m.kernel_received
            sizes = [m.of_a_worker(side) for side in sides]
        moved.add_row(*name, f"{m.uploads_per_round:.1f}", *map(format_bytes, sizes))
        times.add_row(
            *name,
            "" if m.round_ms is None else f"{m.round_ms:.1f}",
            "" if m.compute_ms is None else f"{m.compute_ms:.1f}",
            f"{m.communication_ms:.1f}",
            f"{dense[0].communication_ms / m.communication_ms:.1f}×" if dense else "",
            format_bytes(m.worker_state_bytes),
            format_bytes(m.server_state_bytes),
        )
    return [moved, times]
