"""What ``compare``, ``run``, ``launch`` and ``report`` take. Importing it needs no jax."""

import dataclasses
import os
import pathlib
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from experiments.configs import CONFIGS
from experiments.methods import (
    EXCHANGES,
    OPTIMIZERS,
    DownRuleName,
    ExchangeName,
    MethodName,
    OptimizerName,
)
from experiments.processes.launch import ADDRESS, COUNT, INDEX

if TYPE_CHECKING:
    ConfigName = str
else:
    ConfigName = Literal[tuple(CONFIGS)]
SCOPE = Literal["tensor", "tree"]
SILENCE = Literal["reuse", "keep", "drop"]
VALUES = Literal["plain", "bfloat16", "sign", "sign2", "sign4", "sign8"]
INDICES = Literal["plain", "fixed", "tiled", "bitmap", "elias_fano"]


def optional(metavar: str, default: str = "the configuration's") -> Any:
    """How the help shows an option whose default is not a value."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


def _number(name: str) -> int | None:
    """The environment variable, if there is one."""
    text = os.environ.get(name)
    if text is not None and not text.isdecimal():
        raise ValueError(f"Expected the environment variable {name}={text} to be a whole number.")
    return None if text is None else int(text)


@dataclasses.dataclass
class Options:
    """What both commands that train take."""

    config: tyro.conf.Positional[ConfigName]
    """The experiment: which data, model and settings. `digits` needs no download and a minute;
    `mnist_fc` is the paper's setting for MNIST (784-512-10); the ResNet18 ones want a GPU, but for
    the narrow ones. `stdlib_lm` is a transformer on the sources of Python's own library, which is
    on every machine, in an hour a method, or `stdlib_lm_smoke` in a minute."""
    iterations: Annotated[int | None, optional("INT")] = None
    """Training rounds."""
    gradients: Annotated[
        int | None, optional("INT", "as --iterations has it; the configuration's for stdlib_lm")
    ] = None
    """Gradients of a worker, in place of --iterations: of several in a round, fewer rounds."""
    evaluate_every: Annotated[int | None, optional("INT")] = None
    """Rounds between two evaluations on the test set."""
    num_workers: Annotated[int | None, optional("INT")] = None
    """How many workers compute gradients. Over several processes there is one for each device."""
    exchange: Annotated[ExchangeName | None, optional("|".join(EXCHANGES), "the method's")] = None
    """How messages travel between workers and server. Not every method can take every one."""
    dataset: Annotated[str | None, optional("NAME")] = None
    """`digits` or the name of an image classification set of tensorflow-datasets; several joined by
    `+` (`cifar10+mnist`) go to the workers in turn."""
    partition: Annotated[
        Literal["iid", "dirichlet", "package"] | None, optional("iid|dirichlet|package")
    ] = None
    """How training examples are dealt to workers: evenly at random; images with skewed labels; text
    with a top-level package for each worker."""
    concentration: Annotated[float | None, optional("FLOAT")] = None
    """Of the Dirichlet distribution of labels over workers; smaller is more skewed."""
    width: Annotated[int | None, optional("INT")] = None
    """Hidden units of the fully connected network, channels of the ResNet18's first stage (64 in
    the paper; 8 is small enough for a CPU), or of the transformer, a multiple of 32."""
    target: Annotated[float | None, optional("FLOAT")] = None
    """The test accuracy that is to be reached, in (0, 1], or the bits per byte."""
    optimizer: Annotated[
        OptimizerName | None,
        optional("|".join(OPTIMIZERS), "SGD with the learning rate inside the compressor"),
    ] = None
    """What steps with the mean of the workers' messages, which are then of gradients alone. With
    --local-steps see --inner."""
    data_dir: Annotated[pathlib.Path | None, optional("DIR", "~/tensorflow_datasets")] = None
    """Where tensorflow-datasets keeps prepared data."""
    archives: Annotated[pathlib.Path | None, optional("DIR", "download them")] = None
    """A folder with the original archives of the data set (in it, or in a subfolder named like the
    set), to prepare it from without a network."""
    out: Annotated[pathlib.Path | None, optional("DIR", "results/CONFIG-DATE-TIME")] = None
    """Where results go; nothing there is overwritten. The same command again skips what is done
    there and goes on with what was stopped. (Several processes must all see the folder.)"""
    quiet: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print plain lines, and no progress bars."""
    checkpoint_seconds: float = 60
    """Time between two checkpoints, from which a run that was stopped goes on."""
    coordinator: Annotated[str | None, optional("HOST:PORT", ADDRESS)] = dataclasses.field(
        default_factory=lambda: os.environ.get(ADDRESS)
    )
    """To run over several processes, which you start yourself, all with the same command: where
    they meet, a free port on the host of process 0. (On one machine, `launch` starts them.) The
    defaults of these three are environment variables."""
    num_processes: Annotated[int | None, optional("INT", COUNT)] = dataclasses.field(
        default_factory=lambda: _number(COUNT)
    )
    """How many processes there are."""
    process_id: Annotated[int | None, optional("INT", INDEX)] = dataclasses.field(
        default_factory=lambda: _number(INDEX)
    )
    """Which of them this is, from 0. Process 0 prints and writes."""
    distributed: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Run over the processes that SLURM, Open MPI or another scheduler known to JAX has started."""
    connect_timeout: float = 60
    """Seconds to wait for the other processes at the start."""


@dataclasses.dataclass
class Compare(Options):
    """Trains several methods on the same data, in the same order, from the same parameters.

    Each of 10 workers computes a gradient on its own images in every round, simulated on one device
    unless there are several processes; the methods differ in what is sent to the server that
    averages them:

    sgd sends every gradient whole; sparse sends the 1 % largest entries and keeps the rest for
    later; lasg sends whole gradients, but only from workers whose gradient has changed enough;
    sasg does both; in `turn` workers send the 1 % in turns, and sasg_keep in turns that come sooner
    where gradients change faster: who is silent keeps its gradient for later. The two_way ones also
    send only 1 % of the step back, and the coded ones write both in few bits: signs, and indices as
    Elias and Fano do.

    With several values for an option, e.g. --learning-rates 0.05 0.1 0.2, each method is tuned: all
    combinations of what it takes are run with the first seed, until they reach the target, and the
    best of them with the other seeds, which are reported.

    Prints a table of what each needed to reach the target accuracy, and writes summary.json, a
    folder for each run, curves.png, and best.json where methods were tuned.
    """

    methods: Annotated[
        tuple[MethodName, ...], optional("[NAME ...]", "sgd sparse lasg sasg, or the text's")
    ] = ()
    """Which methods to train."""
    seeds: tuple[int, ...] = (1,)
    """One run of every method for each seed."""
    pick: Literal["uploads", "bytes", "rounds"] = "uploads"
    """Of what the best setting takes least until the target, where an option below has several
    values: bytes are those of both ways."""
    learning_rates: Annotated[
        tuple[float, ...], optional("[FLOAT ...]", "the configuration's")
    ] = ()
    """γ, for a mean over workers."""
    alpha_c: Annotated[tuple[float, ...], optional("[FLOAT ...]", "the configuration's")] = ()
    """c of α = c·M/γ, of the paper's rule (6): lasg, sasg."""
    local_steps: Annotated[tuple[int, ...], optional("[INT ...]", "1")] = ()
    """Steps of each worker's own in a round, after which it sends how far they led."""
    inner: Annotated[tuple[OptimizerName, ...], optional("[NAME ...]", "sgd, adamw for text")] = ()
    """With what it makes them: sgd, momentum, adamw or muon, whose state stays with it."""
    outer_rate: Annotated[tuple[float, ...], optional("[FLOAT ...]", "the method's")] = ()
    """Of the step with the mean of how far they led."""
    outer_momentum: Annotated[tuple[float, ...], optional("[FLOAT ...]", "the method's")] = ()
    """Of that step, as Nesterov has it; 0 is none."""
    density: Annotated[tuple[float, ...], optional("[FLOAT ...]", "0.01")] = ()
    """Part of the entries that the sparse methods send, in (0, 1]."""
    down_density: Annotated[tuple[float, ...], optional("[FLOAT ...]", "that up")] = ()
    """Part of the entries that the server of a two_way or coded method sends back."""
    down_period: Annotated[tuple[int, ...], optional("[INT ...]", "1")] = ()
    """Rounds from one step that it sends back to the next; in between it keeps them for later."""
    down_rule: Annotated[tuple[DownRuleName, ...], optional("[NAME ...]", "every")] = ()
    """In which of the rounds it sends: in turn (every), or in as many, those in which a rule
    measures most: message_share, residual_norm, direction_change."""
    scope: Annotated[tuple[SCOPE, ...], optional("[tensor|tree ...]", "the method's")] = ()
    """Whether these are the largest of each tensor or of all."""
    values: Annotated[tuple[VALUES, ...], optional("[NAME ...]", "the method's")] = ()
    """How kept values are written: plain, bfloat16, or their signs and 1, 2, 4 or 8 magnitudes."""
    indices: Annotated[tuple[INDICES, ...], optional("[NAME ...]", "the method's")] = ()
    """And which they are: plain, fixed, tiled, bitmap, elias_fano."""
    residual_decay: Annotated[tuple[float, ...], optional("[FLOAT ...]", "1")] = ()
    """What remains in a round of what a worker has not sent, in (0, 1]."""
    batch_size: Annotated[tuple[int, ...], optional("[INT ...]", "the configuration's")] = ()
    """Examples of each worker in a round."""
    period: Annotated[tuple[int, ...], optional("[INT ...]", "the method's")] = ()
    """Rounds from one turn of a worker to its next: turn; the most of them: sasg_keep."""
    theta: Annotated[tuple[float, ...], optional("[FLOAT ...]", "the method's")] = ()
    """The change of a gradient, as a part of it, above which turns come sooner: sasg_keep."""
    max_staleness: Annotated[tuple[int, ...], optional("[INT ...]", "the rule's")] = ()
    """Rounds after which a worker sends anyway: lasg, sasg."""
    silence: Annotated[tuple[SILENCE, ...], optional("[reuse|keep|drop ...]", "the rule's")] = ()
    """What a silent worker counts as: its last message again, nothing while it keeps its gradient
    for later, or nothing."""


@dataclasses.dataclass
class Run(Options):
    """Trains one method once; the same outputs as `compare`, with one record."""

    method: MethodName = "sasg"
    """Which method to train."""
    seed: int = 1
    """Of the initial parameters, the data order and the augmentation."""
    learning_rate: Annotated[float | None, optional("FLOAT", "the configuration's")] = None
    """γ, for a mean over workers."""
    alpha_c: Annotated[float | None, optional("FLOAT", "the configuration's")] = None
    """c of α = c·M/γ, of the paper's rule (6): lasg, sasg."""
    local_steps: Annotated[int | None, optional("INT", "1")] = None
    """Steps of each worker's own in a round, after which it sends how far they led."""
    inner: Annotated[OptimizerName | None, optional("NAME", "sgd, adamw for text")] = None
    """With what it makes them: sgd, momentum, adamw or muon, whose state stays with it."""
    outer_rate: Annotated[float | None, optional("FLOAT", "the method's")] = None
    """Of the step with the mean of how far they led."""
    outer_momentum: Annotated[float | None, optional("FLOAT", "the method's")] = None
    """Of that step, as Nesterov has it; 0 is none."""
    density: Annotated[float | None, optional("FLOAT", "0.01")] = None
    """Part of the entries that the sparse methods send, in (0, 1]."""
    down_density: Annotated[float | None, optional("FLOAT", "that up")] = None
    """Part of the entries that the server of a two_way or coded method sends back."""
    down_period: Annotated[int | None, optional("INT", "1")] = None
    """Rounds from one step that it sends back to the next; in between it keeps them for later."""
    down_rule: Annotated[DownRuleName | None, optional("NAME", "every")] = None
    """In which of the rounds it sends: in turn (every), or in as many, those in which a rule
    measures most: message_share, residual_norm, direction_change."""
    scope: Annotated[SCOPE | None, optional("tensor|tree", "the method's")] = None
    """Whether these are the largest of each tensor or of all."""
    values: Annotated[VALUES | None, optional("NAME", "the method's")] = None
    """How kept values are written: plain, bfloat16, or their signs and 1, 2, 4 or 8 magnitudes."""
    indices: Annotated[INDICES | None, optional("NAME", "the method's")] = None
    """And which they are: plain, fixed, tiled, bitmap, elias_fano."""
    residual_decay: Annotated[float | None, optional("FLOAT", "1")] = None
    """What remains in a round of what a worker has not sent, in (0, 1]."""
    batch_size: Annotated[int | None, optional("INT", "the configuration's")] = None
    """Examples of each worker in a round."""
    period: Annotated[int | None, optional("INT", "the method's")] = None
    """Rounds from one turn of a worker to its next: turn; the most of them: sasg_keep."""
    theta: Annotated[float | None, optional("FLOAT", "the method's")] = None
    """The change of a gradient, as a part of it, above which turns come sooner: sasg_keep."""
    max_staleness: Annotated[int | None, optional("INT", "the rule's")] = None
    """Rounds after which a worker sends anyway: lasg, sasg."""
    silence: Annotated[SILENCE | None, optional("reuse|keep|drop", "the rule's")] = None
    """What a silent worker counts as: its last message again, nothing while it keeps its gradient
    for later, or nothing."""


TRAINING = {"compare": Compare, "run": Run}
"""The commands that train, and that `launch` starts."""


@dataclasses.dataclass
class Launch:
    """Starts `run` or `compare` in several processes on this machine, joined over its loopback:

    python -m experiments launch --processes 4 -- run mnist_fc --method sasg

    Each has one worker on each of its devices. They use CPU devices, unless JAX_PLATFORMS says
    otherwise. When one of them dies, all end.
    """

    command: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        tyro.conf.arg(metavar="-- run|compare ...", help_behavior_hint=""),
    ] = ()
    """What to run, after `--`."""
    processes: int = 2
    """How many processes to start."""
    devices_per_process: int = 1
    """How many devices, and so workers, each of them has."""


@dataclasses.dataclass
class Report:
    """Makes one page of all that `reproduce` has left in a folder, beside what the paper says.

    Writes report.html, which needs nothing else to be looked at, and the figures and tables by
    themselves (PNG, CSV) in a folder `report`. What is not there yet is said to be missing.
    """

    directory: tyro.conf.Positional[pathlib.Path]
    """The folder of the results, as given to `reproduce --out`."""
