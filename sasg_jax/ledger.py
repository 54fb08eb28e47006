"""Uploads and bytes, counted on the host in Python integers, which never overflow or round."""

import copy
import dataclasses
import warnings
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from sasg_jax._checks import check_choice, check_int, require
from sasg_jax.exchanges import EXCHANGES, Links, Traffic
from sasg_jax.numerics import PyTree
from sasg_jax.states import Wire, find_state

# What a ledger needs of the wire; the rest is for errors and for resize.
_LEFT_OUT = "method", "custom_exchange", "shares_memory"
_WIRE = [f.name for f in dataclasses.fields(Wire) if f.name not in _LEFT_OUT]
_COUNTS = ("uploads_by_worker", "rounds_by_uploads", "presences", "steps", "model_state_bytes")


def _counted(name: str, value: Any, start: Any) -> Any:
    """``value`` as a count, or as a list of as many counts as ``start`` has."""
    if not isinstance(start, list):
        return check_int(name, value, minimum=0)
    counts = list(value)
    require(len(counts) == len(start), name, counts, f"to have {len(start)} entries")
    return [check_int(f"{name}[{i}]", count, minimum=0) for i, count in enumerate(counts)]


class _Period:
    """The counts of some rounds with one number of workers and messages of one size."""

    def __init__(self, wire: Wire, gradients_per_round: int):
        name = "gradients_per_round"
        self.wire, self.gradients_per_round = wire, check_int(name, gradients_per_round, minimum=1)
        self.uploads_by_worker = [0] * wire.num_workers
        self.rounds_by_uploads = [0] * (wire.num_workers + 1)
        self.presences = self.steps = self.model_state_bytes = 0

    @property
    def rounds(self) -> int:
        return sum(self.rounds_by_uploads)

    @property
    def uploads(self) -> int:
        return sum(self.uploads_by_worker)

    @property
    def uplink_bytes(self) -> int:
        return self.uploads * self.wire.upload_bytes + self.presences * self.wire.flag_bytes

    @property
    def downlink_bytes(self) -> int:
        wire = self.wire
        if wire.exchange_object.forwards:
            return self.uploads * (wire.num_workers - 1) * wire.upload_bytes
        flags = self.rounds * wire.downlink_flag_bytes
        return wire.num_workers * (self.steps * wire.downlink_bytes + flags)

    def links(self) -> Links:
        wire = self.wire
        moved = wire.moved_upload_bytes, wire.moved_downlink_bytes, wire.flag_bytes
        counts = self.uploads_by_worker, self.rounds_by_uploads, self.steps
        traffic = Traffic(*moved, *counts, wire.downlink_flag_bytes)
        return wire.exchange_object.all_links(traffic)

    def to_dict(self) -> dict[str, Any]:
        wire = {name: getattr(self.wire, name) for name in _WIRE}
        counts = {name: copy.copy(getattr(self, name)) for name in _COUNTS}
        return {"wire": wire, "gradients_per_round": self.gradients_per_round, **counts}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "_Period":
        if missing := {"wire", "gradients_per_round", *_COUNTS} - saved.keys():
            raise ValueError(f"Expected saved to have the keys {sorted(missing)}.")
        wire = dict(saved["wire"])
        if wire.keys() != set(_WIRE):
            raise ValueError(f"Expected saved['wire'] to have the keys {_WIRE}, got {[*wire]}.")
        name = check_choice("wire['exchange']", wire.pop("exchange"), EXCHANGES)
        sizes: Any = {k: check_int(f"wire[{k!r}]", v, minimum=0) for k, v in wire.items()}
        period = cls(Wire(**sizes, exchange=name), saved["gradients_per_round"])
        for name in _COUNTS:
            setattr(period, name, _counted(name, saved[name], getattr(period, name)))
        return period


class Ledger:
    """What a run has sent; of ``opt_state``, any that contains ours, only static sizes are read.

    Two pictures, always named. ``uplink_bytes`` and ``downlink_bytes`` are the paper's: M workers
    and a server apart from them; what has to cross the links of that star. ``sent_bytes`` and
    ``received_bytes`` are what the exchange in use moves over each worker's own link, when every
    worker has one: there the server is one of the workers, or all of them.

    >>> import jax.numpy as jnp, sasg_jax
    >>> tx = sasg_jax.sasg(0.1, num_workers=4, density=0.01, exchange="server")
    >>> ledger = Ledger(tx.init({"w": jnp.zeros((100, 100))}))
    >>> ledger.record(np.array([True, False, True, False]))
    >>> ledger.uploads, ledger.uplink_bytes, ledger.paper_uplink_bits, ledger.downlink_bytes
    (2, 1204, 6400, 160000)

    Worker 0 is the server: its own upload and its own copy of the step stay at home. Each other
    worker sends a flag that says whether it uploads, and hears the flags of all four.

    >>> ledger.sent_bytes, ledger.received_bytes
    ((120012, 1, 601, 1), (603, 40004, 40004, 40004))
    """

    def __init__(self, opt_state: PyTree, *, gradients_per_round: int = 1):
        """``gradients_per_round``, at least 1, or ValueError: how many gradients a worker takes in
        a round, at most: H where its direction has H steps, twice that for a rule that compares in
        every round, as (6)."""
        self._start([_Period(find_state(opt_state).wire, gradients_per_round)])

    def _start(self, periods: list[_Period]) -> None:
        self._periods, self._now = periods, periods[-1]
        self._staleness = np.full(self._now.wire.num_workers, self._now.wire.max_staleness)
        self._silent_rounds, self._warned = 0, False

    def resize(self, opt_state: PyTree, *, gradients_per_round: int | None = None) -> None:
        """Goes on with the workers of ``opt_state``, e.g. that of :func:`sasg_jax.resize`, and with
        the sizes of their messages; and with the gradients of a round, unless they are said anew.

        Counts go on: those that are one number are of the whole run, each round as it was when it
        was recorded; those by worker, or by number of workers, are from here on. What these were
        before is in :attr:`earlier`."""
        given = gradients_per_round
        given = self._now.gradients_per_round if given is None else given
        self._start([*self._periods, _Period(find_state(opt_state).wire, given)])

    @property
    def earlier(self) -> tuple["Ledger", ...]:
        """What was counted up to each :meth:`resize` since the one before, in ledgers that count
        by themselves from there."""
        return tuple(self._of([copy.deepcopy(period)]) for period in self._periods[:-1])

    @classmethod
    def _of(cls, periods: list[_Period]) -> "Ledger":
        ledger = cls.__new__(cls)
        ledger._start(periods)
        return ledger

    def _sum(self, name: str) -> int:
        return sum(getattr(period, name) for period in self._periods)

    def record(self, uploaded: Any, present: Any = None, sent_down: Any = None) -> None:
        """Adds rounds. Over several processes, ``uploaded`` may lie on the devices of all: then all
        must call this.

        Args:
          uploaded: who uploaded. ``# shape=(M,) or (rounds, M), dtype=bool`` Where all always
            upload and nobody tells, every message is sent, also one that a refused gradient has
            left empty: who is present counts as having uploaded.
          present: who took part; None for all. ValueError for another shape or dtype.
          sent_down: whether the server sent a step, for methods with a ``downlink_rule``, or
            ValueError. ``# shape=() or (rounds,), dtype=bool``

        Warns once, when in ``2 max_staleness`` rounds that asked the rule it let nobody upload."""
        flags = self._flags("uploaded", uploaded)
        there = np.ones_like(flags) if present is None else self._flags("present", present)
        if flags.shape != there.shape:
            why = f"Expected present to have the shape of uploaded, {flags.shape}, got "
            raise ValueError(why + f"{there.shape}.")
        now = self._now
        now.steps += self._steps(sent_down, len(flags))
        flags = flags if now.wire.flag_bytes else there
        for worker, uploads in enumerate(flags.sum(0)):
            now.uploads_by_worker[worker] += int(uploads)
        for uploads in flags.sum(1):
            now.rounds_by_uploads[int(uploads)] += 1
        now.presences += int(there.sum())
        self._watch(flags, there)

    def _steps(self, sent_down: Any, rounds: int) -> int:
        if not self._now.wire.downlink_flag_bytes:
            return rounds
        sent = np.asarray(False if sent_down is None else sent_down)
        if sent_down is None or sent.dtype != np.bool_ or sent.shape not in ((), (rounds,)):
            why = f"Expected sent_down to be of dtype bool and shape () or ({rounds},) for a "
            raise ValueError(why + f"method with a downlink_rule, got {sent_down!r}.")
        return int(np.broadcast_to(sent, rounds).sum())

    def _flags(self, name: str, value: Any) -> np.ndarray:
        if isinstance(value, jax.Array) and not value.is_fully_addressable:
            value = multihost_utils.process_allgather(value, tiled=True)
        flags, workers = np.asarray(value), self._now.wire.num_workers
        if flags.dtype != np.bool_ or flags.ndim not in (1, 2) or flags.shape[-1] != workers:
            why = f"Expected {name} to be of dtype bool and shape ({workers},) or (rounds, "
            raise ValueError(why + f"{workers}), got {flags.dtype} and {flags.shape}.")
        return flags.reshape(-1, workers)

    def _watch(self, flags: np.ndarray, there: np.ndarray) -> None:
        """Warns of a rule that lets nobody upload."""
        cap = self._now.wire.max_staleness
        if cap < 2 or self._warned:
            return
        for row, asked in zip(flags, there, strict=True):
            free = asked & (self._staleness < cap)
            self._silent_rounds = 0 if (row & free).any() else self._silent_rounds + free.any()
            self._staleness = np.where(row, 1, self._staleness + 1)
        if self._silent_rounds >= 2 * cap:
            self._warned = True
            warnings.warn(
                f"In {self._silent_rounds} rounds in which it was asked the rule has let nobody "
                f"upload, but for what is forced every {cap} rounds: its threshold is too high to "
                "tell anything. Choose a smaller alpha or theta, or sasg_jax.always().",
                stacklevel=3,
            )

    def record_model_state(self, model_state: PyTree) -> None:
        """Adds one averaging of ``model_state`` (leading axis M): every worker sends its own."""
        self._now.model_state_bytes += sum(leaf.nbytes for leaf in jax.tree.leaves(model_state))

    @property
    def uploads_by_worker(self) -> list[int]:
        """Messages that each worker sent. Length M."""
        return self._now.uploads_by_worker

    @property
    def rounds_by_uploads(self) -> list[int]:
        """Entry u: rounds in which u workers uploaded. Length M + 1."""
        return self._now.rounds_by_uploads

    @property
    def rounds(self) -> int:
        """Rounds recorded."""
        return self._sum("rounds")

    @property
    def gradients_per_worker(self) -> int:
        """Gradients that a worker who was there all the time has taken, at most."""
        return sum(period.rounds * period.gradients_per_round for period in self._periods)

    @property
    def presences(self) -> int:
        """Over all rounds, how many workers took part."""
        return self._sum("presences")

    @property
    def steps(self) -> int:
        """Rounds in which the server sent a step."""
        return self._sum("steps")

    @property
    def uploads(self) -> int:
        """Messages that workers sent."""
        return self._sum("uploads")

    @property
    def paper_uplink_bits(self) -> int:
        """32 bits for every value uploaded and nothing for indices: the paper's Table II."""
        return sum(period.uploads * period.wire.upload_paper_bits for period in self._periods)

    @property
    def uplink_bytes(self) -> int:
        """Values, indices and flags that workers send to the server."""
        return self._sum("uplink_bytes")

    @property
    def downlink_bytes(self) -> int:
        """The server's step to every worker in every round in which it sends one, and a flag in
        each where it may not; or, with ``"relay"``, every upload to all other workers."""
        return self._sum("downlink_bytes")

    @property
    def model_state_bytes(self) -> int:
        """Of model state (BatchNorm statistics) that was averaged."""
        return self._sum("model_state_bytes")

    @property
    def sent_bytes(self) -> tuple[int, ...]:
        """What the exchange sends from each worker, without the headers of the network below it."""
        return tuple(self._now.links().sent)

    @property
    def received_bytes(self) -> tuple[int, ...]:
        """What each worker receives, as :attr:`sent_bytes`."""
        return tuple(self._now.links().received)

    def to_dict(self) -> dict[str, Any]:
        """Everything needed to go on counting, for a checkpoint; exact in JSON."""
        earlier = [period.to_dict() for period in self._periods[:-1]]
        return {**self._now.to_dict(), "earlier": earlier}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "Ledger":
        """Restores what :meth:`to_dict` saved; ValueError where a count is missing or is not
        a non-negative integer."""
        if "earlier" not in saved:
            raise ValueError("Expected saved to have the keys ['earlier'].")
        return cls._of([*map(_Period.from_dict, saved["earlier"]), _Period.from_dict(saved)])
