"""Checkpoints, from which a run that was stopped goes on as if it had not been.

A checkpoint holds everything that the next round depends on, and everything that the record will
say. orbax writes it into a folder of another name, which it renames when all is there: one that was
being written when the process died is never taken for a checkpoint.
"""

import dataclasses
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from experiments.training.records import ResultsError
from sasg_jax import RoundInfo

PyTree = Any


@dataclasses.dataclass
class Progress:
    """How far a run is, besides the state that its rounds carry."""

    iteration: int = 0
    ledger: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Of :meth:`sasg_jax.Ledger.to_dict`."""
    seconds: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    """Rounds of each call of compiled code, and what it took."""
    reports: list[RoundInfo] = dataclasses.field(default_factory=list)
    """Of the rounds since the last evaluation, as NumPy arrays."""


class Checkpoints:
    """The checkpoints of one run, of which the newest is kept.

    Args:
      directory: where they are, and nothing else.
      every_seconds: how much time passes between two; 0 saves as often as can be.
    """

    def __init__(self, directory: pathlib.Path, every_seconds: float = 60.0):
        self._every_seconds = every_seconds
        self._saved_at = time.monotonic()
        # Saved at once, not beside the next rounds: these reuse the memory of the state.
        options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._manager.close()

    def is_due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() - self._saved_at >= self._every_seconds

    def save(self, state: PyTree, progress: Progress) -> None:
        """Saves; all is on disk when this returns. Over several processes, all call it."""
        content = dataclasses.asdict(dataclasses.replace(progress, reports=[]))
        content["reports"] = list(map(_to_json, progress.reports))
        self._manager.save(
            progress.iteration,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_to_arrays(state)), progress=ocp.args.JsonSave(content)
            ),
        )
        self._saved_at = time.monotonic()

    def restore(self, like: PyTree) -> tuple[PyTree, Progress] | None:
        """The newest checkpoint, or None if there is none.

        Args:
          like: a state of the same structure, shapes, dtypes and devices.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, _to_arrays(like))
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(shapes), progress=ocp.args.JsonRestore()
                ),
            )
        except Exception as error:  # there are as many kinds as there are kinds of files
            where = self._manager.directory / str(step)
            raise ResultsError(f"{where} is broken; without it the run begins anew.") from error
        content: dict[str, Any] = dict(restored["progress"])
        content["seconds"] = [tuple(entry) for entry in content["seconds"]]
        content["reports"] = list(map(_from_json, content["reports"]))
        return _from_arrays(restored["state"], like), Progress(**content)


def save_params(directory: pathlib.Path, params: PyTree) -> None:
    """Saves parameters by themselves; ``orbax.checkpoint.StandardCheckpointer`` restores them.

    Over several processes one of them calls it.
    """
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix="params"
    )
    with ocp.Checkpointer(
        ocp.StandardCheckpointHandler(multiprocessing_options=alone), multiprocessing_options=alone
    ) as checkpointer:
        arrays = jax.device_get(params)
        checkpointer.save(directory.absolute(), args=ocp.args.StandardSave(arrays), force=True)


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _to_arrays(state: PyTree) -> list[jax.Array]:
    """The leaves, with PRNG keys as integers: the structure is the program's, not the file's."""
    return [jax.random.key_data(x) if _is_key(x) else x for x in jax.tree.leaves(state)]


def _from_arrays(arrays: list[jax.Array], like: PyTree) -> PyTree:
    leaves, treedef = jax.tree.flatten(like)
    return treedef.unflatten(
        jax.random.wrap_key_data(x, impl=jax.random.key_impl(leaf)) if _is_key(leaf) else x
        # Copied, since a round that reuses the memory of its state must own it.
        for x, leaf in zip(map(jnp.copy, arrays), leaves, strict=True)
    )


def _to_json(report: RoundInfo) -> dict[str, Any]:
    """Its arrays as lists, in which every float comes back as it was."""
    arrays = report._asdict()
    del arrays["aux"]  # a run's loss has none
    return {name: [str(x.dtype), x.tolist()] for name, x in arrays.items()}


def _from_json(content: dict[str, Any]) -> RoundInfo:
    arrays: dict[str, Any] = {
        name: np.asarray(values, dtype) for name, (dtype, values) in content.items()
    }
    return RoundInfo(**arrays, aux=())
