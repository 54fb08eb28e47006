"""The command ``bench``: how fast selection and rounds are, beside their floors and beside PyTorch.

Every number stands beside the least that it could be: of a selection, one pass over the vector; of
a round, two gradients of every worker and the norm of their difference, which rule (6) needs. All
that are compared take turns, so that what else the machine does falls on all of them; benchmark
libraries time one thing after the other. What needs memory is measured in processes of their own.
"""

import dataclasses
import functools
import itertools
import json
import multiprocessing
import pathlib
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.box
import rich.console
import rich.table

import sasg_jax
from experiments.configs import CONFIGS
from experiments.methods import METHODS, PAPER_METHODS, make_optimizer
from experiments.report.figures import plot_ratios
from experiments.training.records import session, write_json
from experiments.training.train import chunk_size
from sasg_jax.selection import MIN_FILL, approximate_top_k, magnitude_top_k

Part = Literal["selection", "round", "workers", "parameters"]

SIZES = (401_408, 2_359_296, 11_173_962)
"""Of the first layer of the paper's MLP, the largest of ResNet18, and all of ResNet18."""

BATCH = 4
"""Vectors in one selection under ``vmap`` or ``scan``."""

FEEDBACK_ROUNDS = 200
"""Rounds of error feedback; the approximate selection is judged by the second half of them. In the
first, at 1 % density, the residual still grows and the threshold with it."""

DENSITY = 0.01

SEPARATIONS = {"few upload": 0.5, "many upload": 0.1}
"""Of the classes of made-up images, beside noise with a standard deviation of 1 in each pixel. The
harder they are to tell apart, the more workers upload: one in ten, which is as seldom as they may,
or half of them. On MNIST it is 0.82 of them in the first hundred rounds and 0.27 in the last."""

WORKERS = (100, 1000)
PARAMETERS = 100_000_000
_ROUNDS_PER_CALL = 20
_WARM_UP_CALLS = 20
_ROUNDS = 600  # with ten workers of ten images an epoch of MNIST
_NOTE_WIDTH = 22  # of a terminal of 80 columns


@dataclasses.dataclass
class Bench:
    """Measures selection, rounds, and what many workers and many parameters take.

    Everything is beside its floor, and beside the same as a plain PyTorch loop where PyTorch is
    installed (`pip install -e ".[experiments,torch]"`).
    """

    parts: tuple[Part, ...] = ("selection", "round", "workers", "parameters")
    """What to measure."""

    repeats: int = 11
    """How many times each is timed, in turn with the others."""

    out: pathlib.Path = pathlib.Path("results/bench")
    """A folder for bench.png, and for a file in JSON for each part."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One thing that was measured, beside its floor."""

    part: str
    case: str
    seconds: float
    """Median."""
    low: float
    high: float
    floor: float
    """Seconds, or d-sized arrays where that is what is measured."""
    note: str = ""

    @property
    def ratio(self) -> float:
        return self.seconds / self.floor


def work(command: Bench, arguments: Sequence[str]) -> None:
    """Measures, prints and writes; raises ValueError for bad options."""
    if command.repeats < 1:
        raise ValueError(f"Expected --repeats={command.repeats} to be at least 1.")
    console = rich.console.Console()
    rows: list[Row] = []
    for part in command.parts:
        with console.status(f"measuring: {part}"):
            measured = _PARTS[part](command.repeats)
        content = [{**dataclasses.asdict(row), "ratio": row.ratio} for row in measured]
        write_json(command.out / f"{part}.json", {**session(arguments), "rows": content})
        rows += measured
    for part in dict.fromkeys(row.part for row in rows):
        console.print(table(part, [row for row in rows if row.part == part]))
    figure = command.out / "bench.png"
    plot_ratios(
        [(f"{row['part']}: {row['case']}", row["ratio"]) for row in read(command.out)], figure
    )
    console.print(f"Results: {command.out}\nFigure:  {figure}", soft_wrap=True)


def read(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of all parts that were measured into a folder, now or before."""
    files = [folder / f"{part}.json" for part in Bench.parts]
    return [row for file in files if file.exists() for row in json.loads(file.read_text())["rows"]]


def table(part: str, rows: Sequence[Row]) -> rich.table.Table:
    """The rows of one part, for a terminal: medians, the range, and how far above the floor."""
    long = [f"{row.case}: {row.note}" for row in rows if len(row.note) > _NOTE_WIDTH]
    shown = rich.table.Table(
        title=part,
        title_justify="left",
        caption="\n".join(long),
        caption_justify="left",
        box=rich.box.SIMPLE_HEAD,
    )
    shown.add_column("Case", no_wrap=True)
    for heading in ("Median", "Range", "× floor"):
        shown.add_column(heading, justify="right", no_wrap=True)
    shown.add_column("")
    for row in rows:
        shown.add_row(
            row.case,
            _milliseconds(row.seconds),
            f"{_milliseconds(row.low)} – {_milliseconds(row.high)}",
            f"{row.ratio:.2f}",
            row.note if len(row.note) <= _NOTE_WIDTH else "below",
        )
    return shown


def interleave(cases: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds that each case takes, ``repeats`` times, in turn. The first time is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for case in cases.values():
        case()
    for _ in range(repeats):
        for name, case in cases.items():
            began = time.perf_counter()
            case()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def _rows(
    part: str,
    seconds: Mapping[str, Sequence[float]],
    floor: str,
    *,
    per: float = 1,
    notes: Mapping[str, str] | None = None,
) -> list[Row]:
    """A row for each case; ``per`` is how many rounds, say, each time is of."""
    medians = {name: statistics.median(times) / per for name, times in seconds.items()}
    return [
        Row(
            part,
            name,
            medians[name],
            min(times) / per,
            max(times) / per,
            medians[floor],
            (notes or {}).get(name, ""),
        )
        for name, times in seconds.items()
    ]


# Selection ----------------------------------------------------------------------------------------


def _measure_selection(repeats: int) -> list[Row]:
    torch = _torch()
    rows = []
    for size in SIZES:
        x = np.random.default_rng(0).normal(size=(BATCH, size)).astype(np.float32)
        vectors, k = jnp.asarray(x), int(DENSITY * size)
        ours = functools.partial(magnitude_top_k, k=k)
        reference = functools.partial(magnitude_top_k, k=k, method="lax")
        cases = {
            "one pass": _compiled(lambda x: jnp.abs(x).max(), vectors[0]),
            "ours": _compiled(ours, vectors[0]),
            "approximate": _with_memory(functools.partial(approximate_top_k, k=k), vectors[0]),
            "lax.top_k": _compiled(reference, vectors[0]),
        }
        if torch:
            tensor = torch.from_numpy(x[0])
            cases["torch.topk"] = lambda tensor=tensor, k=k: torch.topk(tensor.abs(), k)
        beside = {name: "ours" for name in cases if name not in ("one pass", "ours")}
        batched = {}
        for name, over in (("vmap", jax.vmap), ("scan", _scanned)):
            batched[f"ours, {name}"] = _compiled(over(ours), vectors)
            batched[f"lax.top_k, {name}"] = _compiled(over(reference), vectors)
            beside[f"lax.top_k, {name}"] = f"ours, {name}"
        seconds = interleave(cases | batched, repeats)
        seconds |= {name: [total / BATCH for total in seconds[name]] for name in batched}
        notes = {name: _times_as_long(seconds, name, other) for name, other in beside.items()}
        if size == SIZES[0]:  # it does not depend on the size
            notes["approximate"] = _judge_approximate(size, k)
        rows += _rows(f"top 1 % of {size:,}", seconds, "one pass", notes=notes)
    return rows


def _compiled(fn: Callable[[jax.Array], jax.Array], x: jax.Array) -> Callable[[], Any]:
    run = jax.jit(fn)
    return lambda: jax.block_until_ready(run(x))


def _with_memory(fn: Callable[..., Any], x: jax.Array) -> Callable[[], Any]:
    """As :func:`_compiled`, for a function that wants back the threshold that it gave last."""
    run, threshold = jax.jit(lambda x, threshold: fn(x, threshold=threshold)), jnp.float32(0)

    def once():
        nonlocal threshold
        _, threshold = jax.block_until_ready(run(x, threshold))

    for _ in range(10):
        once()
    return once


def _scanned(fn: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    return lambda rows: jax.lax.scan(lambda carried, x: (carried, fn(x)), None, rows)[1]


def _times_as_long(seconds: Mapping[str, Sequence[float]], name: str, other: str) -> str:
    """How many times as long as another case one takes."""
    ratio = statistics.median(seconds[name]) / statistics.median(seconds[other])
    return f"{ratio:.2g} × {other}"


def _judge_approximate(size: int, k: int) -> str:
    """Its contraction factor ‖x - C(x)‖²/‖x‖² beside that of the k largest, under error feedback.

    Of gradients whose entries have scales of their own, from a lognormal distribution.
    """

    @jax.jit
    def one_round(carried, key):
        residual, threshold, scales = carried
        x = residual + scales * jax.random.normal(key, (size,))
        count = (jnp.abs(x) >= threshold).sum()
        renewed = (count < MIN_FILL * k) | (count > k)
        indices, threshold = approximate_top_k(x, k, threshold)
        squares = jnp.square(x)
        total = squares.sum()
        residual = x.at[indices].set(0)
        best = 1 - squares[magnitude_top_k(x, k)].sum() / total
        left = jnp.square(residual).sum() / total
        return (residual, threshold, scales), (left, best, renewed)

    scales = jnp.exp(jax.random.normal(jax.random.key(0), (size,)))
    start = jnp.zeros(size), jnp.float32(0), scales
    keys = jax.random.split(jax.random.key(1), FEEDBACK_ROUNDS)
    rounds = jax.lax.scan(one_round, start, keys)[1]
    left, best, renewed = (np.asarray(x)[FEEDBACK_ROUNDS // 2 :] for x in rounds)
    return (
        f"contraction {left.mean():.3f} (exact {best.mean():.3f}), "
        f"{renewed.mean():.0%} of thresholds found anew"
    )


# A round ------------------------------------------------------------------------------------------


def _measure_round(repeats: int) -> list[Row]:
    """Of the paper's MLP for MNIST, ten workers of ten images."""
    return [row for how in SEPARATIONS for row in _measure_round_where(how, repeats)]


def _measure_round_where(how: str, repeats: int) -> list[Row]:
    config = CONFIGS["mnist_fc"]
    separation = SEPARATIONS[how]
    calls = _calls(*_examples(config.num_workers, config.batch_size, _ROUNDS, separation))
    cases: dict[str, Callable[[], Any]] = {"floor": _floor(config, calls)}
    uploads: dict[str, Callable[[], float]] = {}
    for method in PAPER_METHODS:
        cases[METHODS[method].label], uploads[METHODS[method].label] = _simulated(
            config, method, calls, {}
        )
    cases["SASG, approximate"], uploads["SASG, approximate"] = _simulated(
        config, "sasg", calls, {}, selection="approximate"
    )
    torch = _torch()
    if torch:
        loop = _TorchLoop(torch, config, calls)
        cases["SASG, PyTorch loop"], uploads["SASG, PyTorch loop"] = loop.run, loop.fraction
    seconds = interleave(cases, repeats)
    notes = {name: f"{fraction():.0%} upload" for name, fraction in uploads.items()}
    if torch:
        notes["SASG, PyTorch loop"] += f", {_times_as_long(seconds, 'SASG, PyTorch loop', 'SASG')}"
    part = f"round of MNIST-FC, {how}"
    return _rows(part, seconds, "floor", per=_ROUNDS_PER_CALL, notes=notes)


def _examples(
    num_workers: int, batch_size: int, rounds: int, separation: float
) -> tuple[jax.Array, jax.Array]:
    """Noisy images of ten classes.

    shape=(rounds, M, B, 784), dtype=float32 and shape=(rounds, M, B), dtype=int32
    """
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, (rounds, num_workers, batch_size), np.int32)
    means = rng.normal(size=(10, 784)).astype(np.float32)
    images = rng.standard_normal((*labels.shape, 784), np.float32)
    images += separation * means[labels]
    return jnp.asarray(images), jnp.asarray(labels)


def _calls(images: jax.Array, labels: jax.Array) -> Sequence[tuple[jax.Array, jax.Array]]:
    """The rounds of each call. After the last comes the first again, in another epoch."""
    count = len(images) // _ROUNDS_PER_CALL
    return list(zip(jnp.split(images, count), jnp.split(labels, count), strict=True))


def _params(width: int = 512) -> dict[str, jax.Array]:
    rng = np.random.default_rng(1)
    uniform = lambda *shape: jnp.asarray(rng.uniform(-1, 1, shape) / np.sqrt(shape[0]), jnp.float32)
    return {
        "w1": uniform(784, width),
        "b1": jnp.zeros(width),
        "w2": uniform(width, 10),
        "b2": jnp.zeros(10),
    }


def _loss(params: Any, batch: Any) -> jax.Array:
    images, labels = batch
    hidden = jax.nn.relu(images @ params["w1"] + params["b1"])
    logits = hidden @ params["w2"] + params["b2"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _floor(config: Any, calls: Sequence[tuple[jax.Array, jax.Array]]) -> Callable[[], Any]:
    """Two gradients of every worker, one at parameters of its own, and their distance."""
    params = _params()
    own = jax.tree.map(lambda x: jnp.stack([x] * config.num_workers), params)
    grad = jax.grad(_loss)

    def one_worker(params, stale, batch):
        difference = jax.tree.map(jnp.subtract, grad(params, batch), grad(stale, batch))
        return optax.tree.norm(difference, squared=True)

    @jax.jit
    def run(params, own, images, labels):
        def one_round(total, batch):
            return total + jax.vmap(one_worker, (None, 0, 0))(params, own, batch).sum(), None

        return jax.lax.scan(one_round, 0.0, (images, labels))[0]

    batches = itertools.cycle(calls)
    return lambda: jax.block_until_ready(run(params, own, *next(batches)))


def _simulated(
    config: Any,
    method: str,
    calls: Sequence[tuple[jax.Array, jax.Array]],
    carried: dict[str, Any],
    **options: Any,
) -> tuple[Callable[[], Any], Callable[[], float]]:
    """Rounds of a run that is under way, and the part of the workers that upload in them.

    ``carried`` holds the state from one call to the next.
    """
    train_step = sasg_jax.make_train_step(
        _loss,
        make_optimizer(config, method, simulated=True, **options),
        num_workers=config.num_workers,
        chunk_size=chunk_size(config),
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def rounds(state, images, labels):
        state, info = jax.lax.scan(train_step.step, state, (images, labels))
        return state, info.uploaded

    carried["state"] = train_step.init(_params())
    batches, uploaded = itertools.cycle(calls), []

    def run():
        carried["state"], flags = jax.block_until_ready(rounds(carried["state"], *next(batches)))
        uploaded.append(flags)

    for _ in range(_WARM_UP_CALLS):
        run()
    return run, lambda: float(np.mean(uploaded[_WARM_UP_CALLS:]))


# The same in PyTorch ------------------------------------------------------------------------------


def _torch() -> Any:
    """PyTorch, or None where it is not installed."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    return torch


class _TorchLoop:
    """SASG as a user of PyTorch would write it: a loop over workers, and over tensors in each."""

    def __init__(self, torch: Any, config: Any, calls: Sequence[tuple[jax.Array, jax.Array]]):
        self.torch, self.config = torch, config
        tensor = lambda x: torch.from_numpy(np.array(x))  # copied: torch wants to write
        self.batches = itertools.cycle(
            [(tensor(images), tensor(labels).long()) for images, labels in calls]
        )
        start = [torch.from_numpy(np.array(x)) for x in jax.tree.leaves(_params())]
        self.params = [p.clone().requires_grad_() for p in start]
        workers = range(config.num_workers)
        self.residuals = [[torch.zeros_like(p) for p in start] for _ in workers]
        self.stale = [[p.clone().requires_grad_() for p in start] for _ in workers]
        self.messages: list[Any] = [None for _ in workers]
        self.staleness = [config.max_staleness for _ in workers]
        self.steps: list[float] = []
        self.rounds, self.uploads = 0, []
        for _ in range(_WARM_UP_CALLS):
            self.run()

    def fraction(self) -> float:
        return statistics.mean(self.uploads[_WARM_UP_CALLS:])

    def run(self) -> None:
        images, labels = next(self.batches)
        uploads = sum(self.one_round(*batch) for batch in zip(images, labels, strict=True))
        self.uploads.append(uploads / (len(images) * self.config.num_workers))

    def grads(self, params: Any, images: Any, labels: Any) -> Any:
        b1, b2, w1, w2 = params  # in the order of the tree's leaves
        logits = self.torch.relu(images @ w1 + b1) @ w2 + b2
        loss = self.torch.nn.functional.cross_entropy(logits, labels)
        return self.torch.autograd.grad(loss, params)

    def one_round(self, images: Any, labels: Any) -> int:
        torch, config = self.torch, self.config
        count, rate = config.num_workers, config.learning_rate
        alpha = config.alpha_c["sasg"] * count / rate
        threshold = alpha * sum(self.steps[-config.history :]) / count**2
        uploads = 0
        for m in range(count):
            grads = self.grads(self.params, images[m], labels[m])
            must = self.rounds < config.history or self.staleness[m] >= config.max_staleness
            if not must:
                stale = self.grads(self.stale[m], images[m], labels[m])
                innovation = sum(((g - s) ** 2).sum() for g, s in zip(grads, stale, strict=True))
                if innovation <= threshold:
                    self.staleness[m] += 1
                    continue
            message = []
            with torch.no_grad():
                for g, residual in zip(grads, self.residuals[m], strict=True):
                    residual.add_(g, alpha=rate)
                    flat = residual.view(-1)
                    indices = torch.topk(flat.abs(), max(1, int(config.density * flat.numel())))[1]
                    message.append((indices, flat[indices]))
                    flat[indices] = 0
                for stale, p in zip(self.stale[m], self.params, strict=True):
                    stale.copy_(p)
            self.messages[m], self.staleness[m] = message, 1
            uploads += 1
        moved = 0.0
        with torch.no_grad():
            for i, p in enumerate(self.params):
                step = torch.zeros(p.numel())
                for message in self.messages:
                    indices, values = message[i]
                    step[indices] += values
                step /= count
                p -= step.view_as(p)
                moved += float((step**2).sum())
        self.steps.append(moved)
        self.rounds += 1
        return uploads


# Many workers and many parameters -----------------------------------------------------------------


def _measure_workers(repeats: int) -> list[Row]:
    """Time for each worker in a round of SASG, beside that of the fewest workers."""
    found = {count: _in_a_process(_many_workers, count, repeats) for count in WORKERS}
    floor = statistics.median(found[WORKERS[0]][0]) / WORKERS[0]
    return [
        Row(
            "SASG round of MNIST-FC, per worker",
            f"{count:,} workers",
            statistics.median(seconds) / count,
            min(seconds) / count,
            max(seconds) / count,
            floor,
            f"peak memory {_gibibytes(peak)}",
        )
        for count, (seconds, peak) in found.items()
    ]


def _many_workers(count: int, repeats: int) -> tuple[list[float], int]:
    config = dataclasses.replace(CONFIGS["mnist_fc"], num_workers=count)
    images, labels = _examples(count, config.batch_size, config.history, SEPARATIONS["many upload"])
    train_step = sasg_jax.make_train_step(
        _loss,
        make_optimizer(config, "sasg", simulated=True),
        num_workers=count,
        chunk_size=chunk_size(config),
    )
    state = train_step.init(_params())
    seconds = []
    for t in range(config.history + repeats):
        began = time.perf_counter()
        state, _ = jax.block_until_ready(
            train_step.step(state, (images[t % len(images)], labels[t % len(images)]))
        )
        seconds.append(time.perf_counter() - began)
    return seconds[config.history :], _peak_bytes()


def _measure_parameters(repeats: int) -> list[Row]:
    """One worker's step with 100 M parameters: time, and memory in arrays of that size."""
    seconds, peak, needed = _in_a_process(_many_parameters, PARAMETERS, max(3, repeats // 3))
    array = 4 * PARAMETERS
    case = f"{PARAMETERS:,} parameters"
    median = statistics.median(seconds)
    return [
        Row(
            "SASG step of one worker",
            case,
            median,
            min(seconds),
            max(seconds),
            median,
            f"{needed / array:.1f} arrays of that size by the compiler's count; peak memory of the "
            f"process {_gibibytes(peak)}",
        )
    ]


def _many_parameters(size: int, repeats: int) -> tuple[list[float], int, int]:
    width = 10_000

    def loss(params, batch):
        return jnp.square(jax.nn.relu(batch @ params["w1"]) @ params["w2"]).mean()

    tx = sasg_jax.sasg(1e-3, num_workers=1, density=DENSITY, history=1)
    train_step = sasg_jax.make_train_step(loss, tx, num_workers=1, driver="shard_map")
    shape = (width, size // (2 * width))

    def start():
        return {"w1": jnp.full(shape, 1e-3), "w2": jnp.full(shape[::-1], 1e-3)}

    examples = jax.ShapeDtypeStruct((1, 4, width), jnp.float32)
    step: Any = train_step.step
    shapes = jax.eval_shape(train_step.init, jax.eval_shape(start))
    compiled = step.lower(shapes, examples).compile()
    memory = compiled.memory_analysis()
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes  # outputs are donated inputs
    params = start()
    state = jax.block_until_ready(train_step.init(params))
    del params
    seconds = []
    for t in range(1 + repeats):
        batch = jax.random.normal(jax.random.key(t), (1, 4, width))
        began = time.perf_counter()
        state, _ = jax.block_until_ready(compiled(state, batch))
        seconds.append(time.perf_counter() - began)
    return seconds[1:], _peak_bytes(), needed


def _peak_bytes() -> int:
    """The most memory that this process has had, where the system tells, else 0."""
    # getrusage would count the memory of the process that started this one too: Linux hands its
    # high-water mark on.
    status = pathlib.Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return 1024 * int(found[1]) if found else 0


def _gibibytes(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size else "unknown"


def _in_a_process(fn: Callable[..., Any], *arguments: Any) -> Any:
    """What ``fn`` returns in a new process, whose memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(fn, arguments)


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.3g} ms" if seconds < 1 else f"{1000 * seconds:,.0f} ms"


_PARTS: dict[str, Callable[[int], list[Row]]] = {
    "selection": _measure_selection,
    "round": _measure_round,
    "workers": _measure_workers,
    "parameters": _measure_parameters,
}
