"""One host of ``python -m experiments wire``: does what it is asked, a line at a time.

Each line on standard input is a request in JSON and each line on standard output its answer, so
that nothing but the messages of the methods (and jax's own signs of life) crosses the network.
"""

import dataclasses
import functools
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import sasg_jax
from experiments.configs import CONFIGS
from experiments.data.made_up import made_up
from experiments.methods import make
from experiments.training import grid
from experiments.training.tasks import make_task
from sasg_jax.exchanges.shards import one_shard
from sasg_jax.states import find_state

PyTree = Any

_AXIS = "workers"


def main() -> None:
    """Answers requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not get among the answers
    host: Host | None = None
    for line in sys.stdin:
        request = json.loads(line)
        action = request.pop("do")
        if action == "meet":
            host, answer = Host(**request), {}
        else:
            answer = getattr(host, action)(**request)
        answers.write(json.dumps(answer) + "\n")


class Host:
    """One worker: its device, its data, and the programs of the method that is being measured."""

    def __init__(
        self, coordinator: str, count: int, index: int, config: str, settings: dict[str, Any]
    ):
        jax.distributed.initialize(coordinator, count, index)
        if jax.local_device_count() != 1:
            raise RuntimeError(f"Expected one device on a host, got {jax.local_devices()}.")
        self.config = dataclasses.replace(CONFIGS[config], num_workers=count, **settings)
        self.index = index
        self._mesh = Mesh(np.asarray(jax.devices()), (_AXIS,))
        self._data = made_up(self.config, index)
        self._task = make_task(self.config, made_up(self.config, 0))  # the same on all hosts
        self._variables = functools.partial(self._task.init, jax.random.key(0))

    def prepare(self, method: str, exchange: str, compute: bool) -> dict[str, Any]:
        """Builds and compiles the programs of one method over one exchange. Returns the ledger, and
        bytes of the live arrays of the state that this worker has on its device."""
        config = dataclasses.replace(self.config, exchange=exchange)
        config = grid.of_method(config, method, None)
        has_model_state = bool(jax.eval_shape(self._variables)[1])
        direction, tx = make(config, method, self._task.loss, has_model_state=has_model_state)
        params = jax.eval_shape(self._variables)[0]
        # One after another: what of an earlier method is still in memory is not needed.
        self._state: Any = None
        self._train_step = self._batches = None
        self._make_exchange(tx.method, params)
        self.exchange_only(True, time.monotonic(), 1)
        if compute:
            self._make_train_step(direction, tx)
            self.whole_round(time.monotonic())
            self._reset()
            opt_state = self._state.opt_state
        else:
            opt_state = tx.init(self._variables()[0])
        state = find_state(opt_state)
        return {
            # What the rule keeps of past parameters and steps is the same on every worker.
            "worker": _local_bytes((state.worker, state.server.rule)),
            "server": _local_bytes(state.server._replace(rule=())),
            "ledger": sasg_jax.Ledger(opt_state).to_dict(),
        }

    def whole_round(self, start: float) -> dict[str, Any]:
        """Makes a round of training: gradients, rule, selection, exchange, step.

        ``start`` is when, on the clock that all hosts on this machine have in common.
        """
        assert self._train_step is not None
        assert self._batches is not None
        batch = jax.tree.map(self._of_this_worker, next(self._batches))
        _sleep_until(start)
        self._state, info = jax.block_until_ready(self._train_step.step(self._state, batch))
        return {"end": time.monotonic(), "uploaded": bool(_local(info.uploaded)[0])}

    def exchange_only(self, uploaded: bool, start: float, repeats: int) -> dict[str, Any]:
        """Moves what a round moves, so many times on end, and computes nothing."""
        flag = self._of_this_worker(np.asarray(uploaded))
        _sleep_until(start)
        jax.block_until_ready([self._exchange(*self._messages, flag) for _ in range(repeats)])
        return {"end": time.monotonic()}

    def _make_train_step(
        self, direction: sasg_jax.Direction, tx: optax.GradientTransformation
    ) -> None:
        self._steps = () if direction.steps is None else (direction.steps,)
        self._train_step = sasg_jax.make_train_step(
            direction,
            tx,
            num_workers=self.config.num_workers,
            driver="shard_map",
            devices=jax.devices(),
        )
        self._reset()

    def _reset(self) -> None:
        assert self._train_step is not None
        self._state = self._train_step.init(*self._variables())
        self._batches = self._examples()

    def _examples(self) -> Iterator[PyTree]:
        """This worker's batches, of made-up data."""
        shape = (*self._steps, self.config.batch_size)
        rng = np.random.default_rng([2, self.index])
        while True:
            chosen = rng.integers(len(self._data.train[0]), size=shape)
            yield tuple(array[chosen] for array in self._data.train)

    def _make_exchange(self, method: sasg_jax.Method, params: PyTree) -> None:
        """The collectives of a round, on messages of the sizes that the method's have."""
        used = method.exchange
        message = method.per_link(method.compressor).message_shapes(params)
        served = one_shard(params, method.num_workers) if used.sharded else params
        answer = method.downlink.message_shapes(served)

        def on_one_device(message, answer, uploaded):
            message, answer, uploaded = jax.tree.map(lambda x: x[0], (message, answer, uploaded))
            flags = used.tell(uploaded, _AXIS) if method.tells else None
            result = used.collect(message, flags, _AXIS), used.spread(answer, _AXIS)
            # An entry of each array, so that what arrives is not copied once more to be returned.
            return jax.tree.map(lambda x: x.reshape(-1)[:1], result)

        split = PartitionSpec(_AXIS)
        over = {"mesh": self._mesh, "in_specs": split, "out_specs": split, "check_vma": False}
        self._exchange = jax.jit(jax.shard_map(on_one_device, **over))
        self._messages = jax.tree.map(
            lambda s: self._of_this_worker(np.ones(s.shape, s.dtype)), (message, answer)
        )

    def _of_this_worker(self, x: np.ndarray) -> jax.Array:
        """A global array with a leading axis over workers, of which this one holds ``x``."""
        sharding = NamedSharding(self._mesh, PartitionSpec(_AXIS))
        shape = (self.config.num_workers, *x.shape)
        return jax.make_array_from_process_local_data(sharding, x[None], shape)


def _sleep_until(start: float) -> None:
    time.sleep(max(0.0, start - time.monotonic()))


def _local(x: jax.Array) -> np.ndarray:
    return np.asarray(x.addressable_shards[0].data)


def _local_bytes(tree: PyTree) -> int:
    return sum(shard.data.nbytes for x in jax.tree.leaves(tree) for shard in x.addressable_shards)


if __name__ == "__main__":
    main()
