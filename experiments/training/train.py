"""One run: a method on a data set, simulated on one device or with a device for each worker."""

import hashlib
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import sasg_jax
from experiments import data
from experiments.configs import Config
from experiments.methods import make_optimizer
from experiments.processes.cluster import ClusterError, Group
from experiments.training.checkpoints import Checkpoints, Progress
from experiments.training.models import make_model
from experiments.training.records import Point, Record
from sasg_jax.transform import find_state

PyTree = Any

# Of simulated workers whose gradients are in memory at once.
_LARGEST_CHUNK = 32


def partition(
    config: Config, dataset: data.Dataset, source: np.ndarray | None, seed: int
) -> list[np.ndarray]:
    """The training examples of every worker, as indices."""
    if source is not None:
        return data.by_source(source, config.num_workers, seed)
    if config.partition == "dirichlet":
        return data.dirichlet_label_skew(
            dataset.train_labels, config.num_workers, config.concentration, seed
        )
    return data.iid_shards(len(dataset.train_labels), config.num_workers, seed)


def train(
    config: Config,
    method: str,
    seed: int,
    dataset: data.Dataset,
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
    params_key, workers_key = jax.random.split(jax.random.key(seed))
    shards = partition(config, dataset, source, seed)
    normalise = _normaliser(dataset.train_images)
    model = make_model(config, dataset.num_classes)
    variables = model.init(params_key, normalise(dataset.train_images[:2]), train=False)
    params, model_state = variables["params"], variables.get("batch_stats", {})
    num_parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    params_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    has_model_state = bool(model_state)

    def loss_fn(params, batch, *, model_state=None, key: Any = None):
        images, labels = batch
        images = normalise(_augment(images, key) if config.augment else images)
        variables = {"params": params, "batch_stats": model_state or {}}
        logits, written = model.apply(variables, images, train=True, mutable=["batch_stats"])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return (loss, written["batch_stats"]) if has_model_state else loss

    if one_by_one is None:
        one_by_one = config.model == "resnet18" and jax.default_backend() == "cpu" and group is None
    if one_by_one:
        loss_fn = _one_by_one(loss_fn, has_aux=has_model_state)
    mesh = None if group is None else Mesh(np.asarray(jax.devices()), ("workers",))
    train_step = sasg_jax.make_train_step(
        loss_fn,
        make_optimizer(config, method, simulated=mesh is None),
        num_workers=config.num_workers,
        driver="vmap" if mesh is None else "shard_map",
        chunk_size=chunk_size(config) if mesh is None else None,
        devices=None if mesh is None else jax.devices(),
        has_model_state=has_model_state,
        has_key=config.augment,
    )
    state = train_step.init(params, model_state, workers_key if config.augment else None)
    ledger = sasg_jax.Ledger(state.opt_state)
    if group is not None:
        check_same_data(group, dataset)
    most = max(map(len, shards))
    positions = [np.arange(len(shard)) for shard in shards]

    def with_workers(array):
        """Every worker's own examples, one after the other. shape=(M, largest shard, ...)"""
        part = lambda worker: _pad(array[shards[worker]], most)
        return _stack_workers(part, len(shards), 0, mesh)

    def batch_order(start, rounds):
        """Positions in each worker's own examples. shape=(rounds, M, B)"""
        arguments = positions, config.batch_size, rounds, seed, start
        part = lambda worker: data.batch_order(*arguments, workers=[worker])[:, 0]
        return _stack_workers(part, len(shards), 1, mesh)

    examples = with_workers(dataset.train_images), with_workers(dataset.train_labels)
    batch = jax.vmap(lambda examples, order: examples[order])
    if mesh is not None:
        split = PartitionSpec("workers")
        batch = jax.shard_map(batch, mesh=mesh, in_specs=split, out_specs=split)

    def run_rounds(state, examples, order):
        def one_round(state, order):
            return train_step.step(state, tuple(batch(array, order) for array in examples))

        return jax.lax.scan(one_round, state, order)

    # The report of all rounds of a call is brought to every process, once.
    shardings = {}
    if mesh is not None:
        everywhere = NamedSharding(mesh, PartitionSpec())
        shardings["out_shardings"] = jax.tree.map(lambda x: x.sharding, state), everywhere
        mean_model_state = jax.jit(sasg_jax.mean_model_state, out_shardings=everywhere)
    else:
        mean_model_state = sasg_jax.mean_model_state
    run_rounds = jax.jit(run_rounds, donate_argnums=0, **shardings)

    @jax.jit
    def count_correct(params, model_state, images, labels):
        variables = {"params": params, "batch_stats": model_state}
        logits: Any = model.apply(variables, normalise(images), train=False)
        return jnp.sum(logits.argmax(-1) == labels)

    # Where workers hold different data sets, each test set is for the workers that hold its like:
    # BatchNorm statistics averaged over all of them would fit none.
    by_source = _test_examples_by_source(dataset)
    test_sets = [
        (examples, slice(source, None, len(by_source))) for source, examples in enumerate(by_source)
    ]

    def test_accuracy(state):
        """Of the whole test set, of which each process takes a part."""
        params = _local(state.params)
        if has_model_state:
            ledger.record_model_state(state.model_state)
        correct = 0
        for examples, workers in test_sets:
            statistics = {}
            if has_model_state:
                of_workers = jax.tree.map(lambda x, workers=workers: x[workers], state.model_state)
                statistics = _local(mean_model_state(of_workers))
            chunks = np.array_split(examples, math.ceil(len(examples) / 1000))
            mine = slice(None) if group is None else slice(group.index, None, group.count)
            for chunk in chunks[mine]:
                images, labels = dataset.test_images[chunk], dataset.test_labels[chunk]
                correct += int(count_correct(params, statistics, images, labels))
        if group is not None:
            correct = sum(group.gather(correct))
        return correct / len(dataset.test_labels)

    compiled: dict[int, Any] = {}  # by number of rounds, so that compilation is not timed
    progress = Progress()
    if checkpoints is not None:
        restored = checkpoints.restore(state)
        if restored is not None:
            state, progress = restored
            ledger = sasg_jax.Ledger.from_dict(progress.ledger)
    on_start(progress.iteration)
    point: Point | None = None
    while progress.iteration < config.iterations:
        start = progress.iteration
        to_evaluation = config.evaluate_every - start % config.evaluate_every
        rounds = min(config.rounds_per_call, to_evaluation, config.iterations - start)
        arguments = (state, examples, batch_order(start, rounds))
        if rounds not in compiled:
            compiled[rounds] = run_rounds.lower(*arguments).compile()
        if group is not None:
            group.doing = f"in rounds {start + 1:,} to {start + rounds:,} of {method}"
            group.gather()  # a collective does not wait as long as another compilation may take
        started_at = time.perf_counter()
        state, info = jax.block_until_ready(compiled[rounds](*arguments))
        progress.seconds.append((rounds, time.perf_counter() - started_at))
        progress.iteration = iteration = start + rounds
        progress.reports.append(jax.device_get(info))
        ledger.record(info.uploaded)
        if not np.isfinite(progress.reports[-1].loss).all():
            raise FloatingPointError(
                f"{method} (seed {seed}) diverged: the training loss is not finite after "
                f"{iteration} rounds. Lower the learning rate."
            )
        if iteration % config.evaluate_every == 0 or iteration == config.iterations:
            if group is not None:
                check_replicas(group, state.params, iteration)
            recent = jax.tree.map(lambda *parts: np.concatenate(parts), *progress.reports)
            progress.reports.clear()
            on_evaluation(_local(state.params), recent)
            point = Point(
                iteration=iteration,
                uploads=ledger.uploads,
                paper_uplink_bits=ledger.paper_uplink_bits,
                uplink_bytes=ledger.uplink_bytes,
                downlink_bytes=ledger.downlink_bytes,
                dense_bytes=2 * iteration * config.num_workers * params_bytes,
                test_accuracy=test_accuracy(state),
                train_loss=float(recent.loss.mean()),
                upload_fraction=float(recent.uploaded.mean()),
                mean_staleness=float(recent.staleness.mean()),
            )
            on_point(point)
        if checkpoints is not None and iteration < config.iterations:
            due = checkpoints.is_due()
            if due if group is None else group.gather(due)[0]:
                progress.ledger = ledger.to_dict()
                checkpoints.save(state, progress)
        on_rounds(rounds)

    assert point is not None  # the last round is always made, and evaluated
    taken = progress.seconds
    return Record(
        config=config.name,
        dataset=dataset.name,
        method=method,
        seed=seed,
        num_workers=config.num_workers,
        exchange=find_state(state.opt_state).wire.exchange,
        driver="vmap" if mesh is None else "shard_map",
        processes=1 if group is None else group.count,
        num_parameters=num_parameters,
        iterations=progress.iteration,
        uploads=ledger.uploads,
        final_test_accuracy=point.test_accuracy,
        final_train_loss=point.train_loss,
        paper_uplink_bits=ledger.paper_uplink_bits,
        uplink_bytes=ledger.uplink_bytes,
        downlink_bytes=ledger.downlink_bytes,
        model_state_bytes=ledger.model_state_bytes,
        params_sha256=digest(_local(state.params)),
        compute_seconds=sum(seconds for _, seconds in taken),
        ms_per_iteration=1000 * float(np.median([seconds / rounds for rounds, seconds in taken])),
    )


def chunk_size(config: Config) -> int | None:
    """How many simulated workers compute at a time: as many as divide them, but not too many."""
    if config.num_workers <= _LARGEST_CHUNK or config.exchange == "sharded":
        return None
    sizes = range(1, _LARGEST_CHUNK + 1)
    return max(size for size in sizes if config.num_workers % size == 0)


def _test_examples_by_source(dataset: data.Dataset) -> list[np.ndarray]:
    """The test examples of each data set in a combination, as indices; all where there is one."""
    if dataset.test_source is None:
        return [np.arange(len(dataset.test_labels))]
    last = int(dataset.test_source.max())
    return [np.flatnonzero(dataset.test_source == source) for source in range(last + 1)]


def check_same_data(group: Group, dataset: data.Dataset) -> None:
    """Raises ClusterError unless all processes hold the same data."""
    labels = hashlib.sha256(dataset.train_labels.tobytes()).hexdigest()
    mine = [dataset.name, *dataset.train_images.shape, *dataset.test_images.shape, labels]
    everyone = group.gather(mine)
    different = [index for index, other in enumerate(everyone) if other != everyone[0]]
    if different:
        raise ClusterError(
            f"Expected all processes to hold the same data, but that of processes {different} is "
            f"not that of process 0: {everyone[different[0]]}, not {everyone[0]}."
        )


def check_replicas(group: Group, params: PyTree, iteration: int) -> None:
    """Raises ClusterError unless the parameters are the same, bit for bit, on all devices."""
    devices = range(jax.local_device_count())
    digests = [digest(jax.tree.map(lambda x, i=i: x.addressable_data(i), params)) for i in devices]
    everyone = group.gather(digests)
    different = [i for i, digests in enumerate(everyone) if set(digests) != {everyone[0][0]}]
    if different:
        raise ClusterError(
            f"Expected the parameters after round {iteration:,} to be the same on all devices, bit "
            f"for bit, but on processes {different} they are not those of process 0's first device."
        )


def digest(params: PyTree) -> str:
    """The SHA-256 of all parameters, by which to tell whether two sets are the same bit for bit."""
    result = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        result.update(np.asarray(leaf).tobytes())
    return result.hexdigest()


def _one_by_one(loss_fn: Callable[..., Any], *, has_aux: bool) -> Callable[..., Any]:
    """A loss whose gradients a map over workers computes one after the other."""

    @jax.custom_batching.sequential_vmap
    def value_and_grad(params, batch, extra):
        return jax.value_and_grad(loss_fn, has_aux=has_aux)(params, batch, **extra)

    @jax.custom_vjp
    def loss(params, batch, extra):
        return value_and_grad(params, batch, extra)[0]

    def backward(grads, cotangent):
        scale = cotangent[0] if has_aux else cotangent
        return jax.tree.map(lambda g: scale * g, grads), None, None

    loss.defvjp(value_and_grad, backward)
    return lambda params, batch, **extra: loss(params, batch, extra)


def _local(tree: PyTree) -> PyTree:
    """This process's copy of arrays that are the same everywhere."""
    return jax.tree.map(lambda x: x.addressable_data(0), tree)


def _stack_workers(
    part: Callable[[int], np.ndarray], num_workers: int, axis: int, mesh: Mesh | None
) -> jax.Array:
    """The workers' parts along a new axis; on a mesh, each is made and lies where its worker is."""
    if mesh is None:
        return jnp.asarray(np.stack([part(worker) for worker in range(num_workers)], axis))
    devices: Any = enumerate(mesh.devices.flat)
    made = {
        worker: part(worker)
        for worker, device in devices
        if device.process_index == jax.process_index()
    }
    shape = list(next(iter(made.values())).shape)
    shape.insert(axis, num_workers)
    sharding = NamedSharding(mesh, PartitionSpec(*[None] * axis, "workers"))

    def block(index: Any) -> np.ndarray:
        return np.expand_dims(made[index[axis].start or 0], axis)

    return jax.make_array_from_callback(tuple(shape), sharding, block)


def _pad(examples: np.ndarray, length: int) -> np.ndarray:
    """Repeats the first example up to a length. What is added is never in a batch."""
    return examples[np.minimum(np.arange(length), len(examples)) % len(examples)]


def _normaliser(train_images: np.ndarray) -> Callable[[Any], jax.Array]:
    """Maps uint8 images so that every channel of the training set has mean 0 and deviation 1."""
    channels = train_images.reshape(-1, train_images.shape[-1]) / np.float32(255)
    mean, deviation = channels.mean(0, dtype=np.float64), channels.std(0, dtype=np.float64)
    mean, deviation = mean.astype(np.float32), np.maximum(deviation, 1e-6).astype(np.float32)
    return lambda images: (jnp.asarray(images, jnp.float32) / 255 - mean) / deviation


def _augment(images: jax.Array, key: jax.Array) -> jax.Array:
    """Random crops of the images padded by 4 pixels, and horizontal flips."""
    crop_key, flip_key = jax.random.split(key)
    batch, height, width, channels = images.shape
    padded = jnp.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    corners = jax.random.randint(crop_key, (batch, 2), 0, 9)

    def crop(image, corner):
        return jax.lax.dynamic_slice(image, (*corner, 0), (height, width, channels))

    cropped = jax.vmap(crop)(padded, corners)
    flip = jax.random.bernoulli(flip_key, shape=(batch, 1, 1, 1))
    return jnp.where(flip, cropped[:, :, ::-1], cropped)
