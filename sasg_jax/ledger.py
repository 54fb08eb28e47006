"""Uploads and bytes, counted on the host in Python integers, which never overflow or round."""

import dataclasses
from typing import Any

import jax
import numpy as np

from sasg_jax import exchange
from sasg_jax._checks import check_choice, check_int, expected
from sasg_jax.transform import WireSizes, find_state

PyTree = Any


class Ledger:
    """What a run has sent.

    Two pictures, always named. ``uplink_bytes`` and ``downlink_bytes`` are the paper's: M workers
    and a server apart from them; what has to cross the links of that star. ``sent_bytes`` and
    ``received_bytes`` are what the exchange in use moves over each worker's own link, when every
    worker has one: there the server is one of the workers, or all of them.

    Args:
      opt_state: any optimiser state that contains ours; only its static sizes are read.

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

    def __init__(self, opt_state: PyTree):
        self._wire: WireSizes = find_state(opt_state).wire
        self.uploads_by_worker = [0] * self._wire.num_workers
        self.rounds_by_uploads = [0] * (self._wire.num_workers + 1)
        """Entry u is the number of rounds in which u workers uploaded."""
        self.model_state_bytes = 0
        """Bytes of model state (BatchNorm statistics) that were averaged over workers."""

    def record(self, uploaded: Any) -> None:
        """Adds rounds.

        Args:
          uploaded: who uploaded. ``# shape=(M,) or (rounds, M), dtype=bool``

        Raises:
          ValueError: another shape or dtype.
        """
        flags = np.asarray(uploaded)
        workers = self._wire.num_workers
        if flags.dtype != np.bool_ or flags.ndim not in (1, 2) or flags.shape[-1] != workers:
            raise ValueError(
                f"Expected uploaded to be of dtype bool and shape ({workers},) or (rounds, "
                f"{workers}), got {flags.dtype} and {flags.shape}."
            )
        flags = flags.reshape(-1, workers)
        for worker, uploads in enumerate(flags.sum(0)):
            self.uploads_by_worker[worker] += int(uploads)
        for uploads in flags.sum(1):
            self.rounds_by_uploads[int(uploads)] += 1

    def record_model_state(self, model_state: PyTree) -> None:
        """Adds one averaging of ``model_state`` (leading axis M): every worker sends its own."""
        self.model_state_bytes += sum(leaf.nbytes for leaf in jax.tree.leaves(model_state))

    @property
    def rounds(self) -> int:
        """Rounds recorded."""
        return sum(self.rounds_by_uploads)

    @property
    def uploads(self) -> int:
        """Messages that workers sent."""
        return sum(self.uploads_by_worker)

    @property
    def paper_uplink_bits(self) -> int:
        """32 bits for every value uploaded and nothing for indices: the paper's Table II."""
        return self.uploads * self._wire.upload_paper_bits

    @property
    def uplink_bytes(self) -> int:
        """Values, indices and flags that workers send to the server."""
        flags = self.rounds * self._wire.num_workers * self._wire.flag_bytes
        return self.uploads * self._wire.upload_bytes + flags

    @property
    def downlink_bytes(self) -> int:
        """What the server sends: its step to every worker in every round, or, with the exchange
        ``"relay"``, every upload to all other workers."""
        if self._wire.exchange == "relay":
            return self.uploads * (self._wire.num_workers - 1) * self._wire.upload_bytes
        return self.rounds * self._wire.num_workers * self._wire.downlink_bytes

    @property
    def sent_bytes(self) -> tuple[int, ...]:
        """What the exchange sends from each worker, without the headers of the network below it."""
        return self._links(0)

    @property
    def received_bytes(self) -> tuple[int, ...]:
        """What each worker receives, as :attr:`sent_bytes`."""
        return self._links(1)

    def _links(self, direction: int) -> tuple[int, ...]:
        wire = self._wire
        uploads, rounds = self.uploads_by_worker, self.rounds_by_uploads
        if not wire.flag_bytes:  # every message moves, also one that a refused gradient left empty
            uploads = [self.rounds] * wire.num_workers
            rounds = [0] * wire.num_workers + [self.rounds]
        links = exchange.links(
            wire.exchange,
            upload_bytes=wire.upload_bytes,
            downlink_bytes=wire.downlink_bytes,
            flag_bytes=wire.flag_bytes,
            uploads_by_worker=uploads,
            rounds_by_uploads=rounds,
        )
        return tuple(links[direction])

    def to_dict(self) -> dict[str, Any]:
        """Everything needed to go on counting, for a checkpoint; exact in JSON."""
        return {
            "wire": dataclasses.asdict(self._wire),
            "uploads_by_worker": list(self.uploads_by_worker),
            "rounds_by_uploads": list(self.rounds_by_uploads),
            "model_state_bytes": self.model_state_bytes,
        }

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "Ledger":
        """Restores a ledger that :meth:`to_dict` saved.

        Raises:
          ValueError: a count is missing or is not a non-negative integer.
        """
        names = {"wire", "uploads_by_worker", "rounds_by_uploads", "model_state_bytes"}
        if missing := names - saved.keys():
            raise ValueError(f"Expected saved to have the keys {sorted(missing)}.")
        wire = dict(saved["wire"])
        name = check_choice("wire['exchange']", wire.pop("exchange", None), exchange.EXCHANGES)
        sizes = {k: check_int(f"wire[{k!r}]", v, minimum=0) for k, v in wire.items()}
        ledger = cls.__new__(cls)
        ledger._wire = WireSizes(**sizes, exchange=name)
        workers = ledger._wire.num_workers
        ledger.uploads_by_worker = _counts("uploads_by_worker", saved, workers)
        ledger.rounds_by_uploads = _counts("rounds_by_uploads", saved, workers + 1)
        ledger.model_state_bytes = check_int(
            "model_state_bytes", saved["model_state_bytes"], minimum=0
        )
        return ledger


def _counts(name: str, saved: dict[str, Any], length: int) -> list[int]:
    counts = list(saved[name])
    if len(counts) != length:
        raise expected(name, counts, f"to have {length} entries")
    return [check_int(f"{name}[{i}]", count, minimum=0) for i, count in enumerate(counts)]
