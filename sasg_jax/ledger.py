"""Uploads and bytes, counted on the host in Python integers, which never overflow or round."""

import dataclasses
from typing import Any

import jax
import numpy as np

from sasg_jax._checks import check_int
from sasg_jax.transform import WireSizes, find_state

PyTree = Any


class Ledger:
    """What a run has sent, in the picture of the paper: M workers and a server.

    ``uplink_bytes`` and ``downlink_bytes`` are what has to cross the links of that star: values,
    indices and flags up, and the way down to each of the M workers in every round. They are not
    what a collective moves that sends silent workers' messages too, such as the ``gather``
    exchange on several devices.

    Args:
      opt_state: any optimiser state that contains ours; only its static sizes are read.

    >>> import jax.numpy as jnp, sasg_jax
    >>> tx = sasg_jax.sasg(0.1, num_workers=4, density=0.01)
    >>> ledger = Ledger(tx.init({"w": jnp.zeros((100, 100))}))
    >>> ledger.record(np.array([True, False, True, False]))
    >>> ledger.uploads, ledger.uplink_bytes, ledger.paper_uplink_bits, ledger.downlink_bytes
    (2, 1204, 6400, 160000)
    """

    def __init__(self, opt_state: PyTree):
        self._wire: WireSizes = find_state(opt_state).wire
        self.rounds = 0
        self.uploads = 0
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
        self.rounds += 1 if flags.ndim == 1 else len(flags)
        self.uploads += int(np.count_nonzero(flags))

    def record_model_state(self, model_state: PyTree) -> None:
        """Adds one averaging of ``model_state`` (leading axis M): every worker sends its own."""
        self.model_state_bytes += sum(leaf.nbytes for leaf in jax.tree.leaves(model_state))

    @property
    def paper_uplink_bits(self) -> int:
        """32 bits for every value uploaded and nothing for indices: the paper's Table II."""
        return self.uploads * self._wire.upload_paper_bits

    @property
    def uplink_bytes(self) -> int:
        """Values, indices and flags that workers send."""
        flags = self.rounds * self._wire.num_workers * self._wire.flag_bytes
        return self.uploads * self._wire.upload_bytes + flags

    @property
    def downlink_bytes(self) -> int:
        """What the server sends, to every worker in every round."""
        return self.rounds * self._wire.num_workers * self._wire.downlink_bytes

    def to_dict(self) -> dict[str, Any]:
        """Everything needed to go on counting, for a checkpoint; exact in JSON."""
        counts = {name: getattr(self, name) for name in _COUNTS}
        return {"wire": dataclasses.asdict(self._wire), **counts}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "Ledger":
        """Restores a ledger that :meth:`to_dict` saved.

        Raises:
          ValueError: a count is missing or is not a non-negative integer.
        """
        missing = {"wire", *_COUNTS} - saved.keys()
        if missing:
            raise ValueError(f"Expected saved to have the keys {sorted(missing)}.")
        ledger = cls.__new__(cls)
        wire = {k: check_int(f"wire[{k!r}]", v, minimum=0) for k, v in saved["wire"].items()}
        ledger._wire = WireSizes(**wire)
        for name in _COUNTS:
            setattr(ledger, name, check_int(name, saved[name], minimum=0))
        return ledger


_COUNTS = ("rounds", "uploads", "model_state_bytes")
