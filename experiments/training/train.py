"""One run: a method on a data set, simulated on one device or with a device for each worker."""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import sasg_jax
from experiments import data
from experiments.configs import Config
from experiments.methods import make
from experiments.metrics import metric_of
from experiments.processes.cluster import Group
from experiments.training.agreement import check_replicas, check_same_data, digest
from experiments.training.checkpoints import Checkpoints, Progress
from experiments.training.inputs import pad, partition, stack_workers
from experiments.training.records import Point, Record
from experiments.training.tasks import make_task
from sasg_jax.states import find_state

PyTree = Any

# Of simulated workers whose gradients are in memory at once.
_LARGEST_CHUNK = 32


def train(
    config: Config,
    method: str,
    seed: int,
    dataset: data.Dataset | data.Text,
    *,
    source: np.ndarray | None = None,
    group: Group | None = None,
    one_by_one: bool | None = None,
    on_point: Callable[[Point], None] = lambda point: None,
    on_rounds: Callable[[int], None] = lambda rounds: None,
    on_evaluation: Callable[[PyTree, sasg_jax.RoundInfo], None] = lambda params, info: None,
    checkpoints: Checkpoints | None = None,
    on_start: Callable[[int], None] = lambda iteration: None,
) -> Record:
    """Trains and evaluates.

    The initial parameters, the data order and the augmentation depend on the seed alone, so that
    methods are compared on the same of each. They do not depend on where the workers run.

    Args:
      config: the experiment.
      method: one of :data:`experiments.methods.METHODS`.
      seed: of everything random.
      dataset: the data.
      source: for a combination of data sets, where each training example comes from; the workers
        then hold one data set each, in turn.
      group: the processes that run this together: all call it with the same arguments, and each
        gets the record. Every worker then has a device of its own, and its examples lie there. None
        simulates all workers on one device.
      one_by_one: whether the simulation computes one worker's gradient after the other's, in the
        shapes that one worker has, and so rounds as devices of their own do: top k makes another
        choice of two nearly equal entries for a difference in the last bit. None takes what is
        faster: all at once, but for convolutions on a CPU.
      on_point: called after each evaluation.
      on_rounds: called with a number of rounds as they are done.
      on_evaluation: called at each evaluation, with the parameters on this process's first device
        and the reports of the rounds since the last one, with a leading axis over rounds.
      checkpoints: where the run saves what it needs to go on, and from where it goes on if it was
        stopped: with the same results, bit for bit, as if it had not been. None saves nothing.
      on_start: called once, with the number of rounds that were made before.

    Raises:
      FloatingPointError: the training loss is not finite.
      ClusterError: the processes hold different data, or parameters that are not the same bit for
        bit at an evaluation.
    """
    run = _Run(config, method, seed, dataset, source, group, one_by_one)
    run.restore(checkpoints)
    on_start(run.progress.iteration)
    point: Point | None = None
    while run.progress.iteration < config.iterations:
        rounds = run.advance()
        if run.is_evaluated:
            point = run.evaluate(on_evaluation)
            on_point(point)
        is_done = config.until_target and point is not None and _is_at_target(point, config)
        if not is_done:  # or it would go on from there, past its end
            run.save(checkpoints)
        on_rounds(rounds)
        if is_done:
            break
    assert point is not None  # the last round is always made, and evaluated
    return run.record(point)


def _is_at_target(point: Point, config: Config) -> bool:
    metric = metric_of(config)
    return metric.reaches(getattr(point, metric.key), getattr(config, metric.target))


class _Run:
    """What is computed, and how far it is."""

    def __init__(
        self,
        config: Config,
        method: str,
        seed: int,
        dataset: data.Dataset | data.Text,
        source: np.ndarray | None,
        group: Group | None,
        one_by_one: bool | None,
    ):
        self.config, self.method, self.seed, self.dataset = config, method, seed, dataset
        self.group = group
        self.shards = partition(config, dataset, source, seed)
        self.mesh = None if group is None else Mesh(np.asarray(jax.devices()), ("workers",))
        self.task = make_task(config, dataset)
        if one_by_one is None:
            slow = config.model == "resnet18" and jax.default_backend() == "cpu"
            one_by_one = slow and group is None
        self.state = self._begin(one_by_one)
        self.ledger = sasg_jax.Ledger(self.state.opt_state)
        self.progress = Progress()
        if group is not None:
            check_same_data(group, dataset)
        self.examples = tuple(map(self._of_workers, dataset.train))
        self._compiled: dict[int, Any] = {}  # by number of rounds, so that it is not timed

    def _begin(self, one_by_one: bool) -> sasg_jax.TrainState:
        """Makes the step, and the state before the first."""
        params_key, workers_key = jax.random.split(jax.random.key(self.seed))
        params, model_state = self.task.init(params_key)
        self.num_parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
        self.params_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        self.has_model_state = bool(model_state)
        config, simulated = self.config, self.mesh is None
        has = {"has_model_state": self.has_model_state, "has_key": config.augment}
        loss = self._one_by_one() if one_by_one else self.task.loss
        direction, tx = make(config, self.method, loss, simulated=simulated, **has)
        self.has_steps = direction.steps is not None
        self.train_step = sasg_jax.make_train_step(
            direction,
            tx,
            num_workers=config.num_workers,
            driver="vmap" if simulated else "shard_map",
            chunk_size=chunk_size(config) if simulated else None,
            devices=None if simulated else jax.devices(),
        )
        key = workers_key if config.augment else None
        return self.train_step.init(params, model_state, key)

    def _one_by_one(self) -> Callable[..., Any]:
        """The loss, whose gradients a map over workers computes one after the other."""
        has_aux = self.has_model_state

        @jax.custom_batching.sequential_vmap
        def value_and_grad(params, batch, extra):
            return jax.value_and_grad(self.task.loss, has_aux=has_aux)(params, batch, **extra)

        @jax.custom_vjp
        def loss(params, batch, extra):
            return value_and_grad(params, batch, extra)[0]

        def backward(grads, cotangent):
            scale = cotangent[0] if has_aux else cotangent
            return jax.tree.map(lambda g: scale * g, grads), None, None

        loss.defvjp(value_and_grad, backward)
        return lambda params, batch, **extra: loss(params, batch, extra)

    # --- Rounds ----------------------------------------------------------------------------------

    def _of_workers(self, array: np.ndarray) -> jax.Array:
        """Every worker's own examples, one after the other. shape=(M, largest shard, ...)"""
        most = max(map(len, self.shards))
        part = lambda worker: pad(array[self.shards[worker]], most)
        return stack_workers(part, len(self.shards), 0, self.mesh)

    def _batch_order(self, rounds: int) -> jax.Array:
        """Positions in each worker's own examples. shape=(rounds, M, B), or, of H local steps,
        (rounds, M, H, B)"""
        positions = [np.arange(len(shard)) for shard in self.shards]
        steps, size = self.config.local_steps, self.config.batch_size
        start = self.progress.iteration * steps
        arguments = positions, size, rounds * steps, self.seed, start
        shape = (rounds, steps, size) if self.has_steps else (rounds, size)
        part = lambda worker: data.batch_order(*arguments, workers=[worker])[:, 0].reshape(shape)
        return stack_workers(part, len(self.shards), 1, self.mesh)

    def _rounds(self, *arguments: Any) -> Any:
        """The compiled code of a number of rounds."""
        batch = jax.vmap(lambda examples, order: examples[order])
        shardings: dict[str, Any] = {}
        if self.mesh is not None:
            split, everywhere = PartitionSpec("workers"), PartitionSpec()
            batch = jax.shard_map(batch, mesh=self.mesh, in_specs=split, out_specs=split)
            # The report of all rounds of a call is brought to every process, once.
            report = NamedSharding(self.mesh, everywhere)
            shardings["out_shardings"] = jax.tree.map(lambda x: x.sharding, self.state), report

        def rounds(state, examples, order):
            def one(state, order):
                return self.train_step.step(state, tuple(batch(array, order) for array in examples))

            return jax.lax.scan(one, state, order)

        return jax.jit(rounds, donate_argnums=0, **shardings).lower(*arguments).compile()

    def advance(self) -> int:
        """Makes the rounds up to an evaluation, but no more than fit one call."""
        config, progress = self.config, self.progress
        to_evaluation = config.evaluate_every - progress.iteration % config.evaluate_every
        to_end = config.iterations - progress.iteration
        rounds = min(config.rounds_per_call, to_evaluation, to_end)
        arguments = (self.state, self.examples, self._batch_order(rounds))
        if rounds not in self._compiled:
            self._compiled[rounds] = self._rounds(*arguments)
            if self.group is not None:
                self.group.gather()  # the others may still compile, and what follows is timed
        started_at = time.perf_counter()
        self.state, info = jax.block_until_ready(self._compiled[rounds](*arguments))
        progress.seconds.append((rounds, time.perf_counter() - started_at))
        progress.iteration += rounds
        progress.reports.append(jax.device_get(info))
        self.ledger.record(info.uploaded, sent_down=info.sent_down)
        if not np.isfinite(progress.reports[-1].loss).all():
            raise FloatingPointError(
                f"{self.method} (seed {self.seed}) diverged: the training loss is not finite after "
                f"{progress.iteration} rounds. Lower the learning rate."
            )
        return rounds

    # --- Evaluation ------------------------------------------------------------------------------

    @property
    def is_evaluated(self) -> bool:
        """Whether the last round is one after which to evaluate."""
        iteration = self.progress.iteration
        return iteration % self.config.evaluate_every == 0 or iteration == self.config.iterations

    def evaluate(self, on_evaluation: Callable[[PyTree, sasg_jax.RoundInfo], None]) -> Point:
        """The point of the curve after the last round."""
        iteration, reports = self.progress.iteration, self.progress.reports
        if self.group is not None:
            check_replicas(self.group, self.state.params, iteration)
        recent = jax.tree.map(lambda *parts: np.concatenate(parts), *reports)
        reports.clear()
        on_evaluation(_local(self.state.params), recent)
        score = {metric_of(self.config).key: self._score()}
        return Point(
            iteration=iteration,
            uploads=self.ledger.uploads,
            paper_uplink_bits=self.ledger.paper_uplink_bits,
            uplink_bytes=self.ledger.uplink_bytes,
            downlink_bytes=self.ledger.downlink_bytes,
            dense_bytes=self._dense_bytes(iteration),
            train_loss=float(recent.loss.mean()),
            upload_fraction=float(recent.uploaded.mean()),
            mean_staleness=float(recent.staleness.mean()),
            **score,
        )

    def _dense_bytes(self, rounds: int) -> int:
        """Both ways, of dense SGD with as many steps."""
        config = self.config
        return 2 * rounds * config.local_steps * config.num_workers * self.params_bytes

    def _score(self) -> float:
        """Of the whole test set, of which each process takes a part."""
        if self.has_model_state:
            self.ledger.record_model_state(self.state.model_state)
        group, total, task = self.group, 0.0, self.task
        mine = slice(None) if group is None else slice(group.index, None, group.count)
        by_source = _test_examples_by_source(self.dataset)
        params = _local(self.state.params)
        for source, examples in enumerate(by_source):
            statistics = self._statistics(slice(source, None, len(by_source)))
            for chunk in np.array_split(examples, math.ceil(len(examples) / task.chunk))[mine]:
                arrays = [array[chunk] for array in self.dataset.test]
                total += float(task.score(params, statistics, *arrays))
        if group is not None:
            total = sum(group.gather(total))
        return total / self.dataset.test_weight

    def _statistics(self, workers: slice) -> PyTree:
        """Of BatchNorm, averaged over the workers that hold the like of a test set: an average
        over workers of different data sets would fit none."""
        mean = sasg_jax.mean_model_state
        if self.mesh is not None:
            mean = jax.jit(mean, out_shardings=NamedSharding(self.mesh, PartitionSpec()))
        of_workers = jax.tree.map(lambda x: x[workers], self.state.model_state)
        return _local(mean(of_workers)) if self.has_model_state else {}

    # --- Stopping and going on -------------------------------------------------------------------

    def restore(self, checkpoints: Checkpoints | None) -> None:
        """Goes back to where a run was stopped."""
        restored = None if checkpoints is None else checkpoints.restore(self.state)
        if restored is not None:
            self.state, self.progress = restored
            self.ledger = sasg_jax.Ledger.from_dict(self.progress.ledger)

    def save(self, checkpoints: Checkpoints | None) -> None:
        """Saves what it needs to go on, if it is time and there is more to do."""
        if checkpoints is None or self.progress.iteration == self.config.iterations:
            return
        due = checkpoints.is_due()
        if due if self.group is None else self.group.gather(due)[0]:
            self.progress.ledger = self.ledger.to_dict()
            checkpoints.save(self.state, self.progress)

    def record(self, point: Point) -> Record:
        """The outcome, after the last evaluation."""
        taken, ledger = self.progress.seconds, self.ledger
        return Record(
            config=self.config.name,
            dataset=self.dataset.name,
            method=self.method,
            seed=self.seed,
            num_workers=self.config.num_workers,
            exchange=find_state(self.state.opt_state).wire.exchange,
            driver="vmap" if self.mesh is None else "shard_map",
            processes=1 if self.group is None else self.group.count,
            num_parameters=self.num_parameters,
            iterations=self.progress.iteration,
            uploads=ledger.uploads,
            final_train_loss=point.train_loss,
            paper_uplink_bits=ledger.paper_uplink_bits,
            uplink_bytes=ledger.uplink_bytes,
            downlink_bytes=ledger.downlink_bytes,
            model_state_bytes=ledger.model_state_bytes,
            params_sha256=digest(_local(self.state.params)),
            compute_seconds=sum(seconds for _, seconds in taken),
            ms_per_iteration=1000 * float(np.median([time / rounds for rounds, time in taken])),
            **{(metric := metric_of(self.config)).final: getattr(point, metric.key)},
        )


def chunk_size(config: Config) -> int | None:
    """How many simulated workers compute at a time: as many as divide them, but not too many."""
    exchange = sasg_jax.exchanges.EXCHANGES.get(config.exchange or "")
    if config.num_workers <= _LARGEST_CHUNK or (exchange and exchange.sharded):
        return None
    sizes = range(1, _LARGEST_CHUNK + 1)
    return max(size for size in sizes if config.num_workers % size == 0)


def _test_examples_by_source(dataset: data.Dataset | data.Text) -> list[np.ndarray]:
    """The test examples of each data set in a combination, as indices; all where there is one."""
    if dataset.test_source is None:
        return [np.arange(len(dataset.test[0]))]
    last = int(dataset.test_source.max())
    return [np.flatnonzero(dataset.test_source == source) for source in range(last + 1)]


def _local(tree: PyTree) -> PyTree:
    """This process's copy of arrays that are the same everywhere."""
    return jax.tree.map(lambda x: x.addressable_data(0), tree)
