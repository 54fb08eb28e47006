"""One run: a method on a data set, simulated with all workers on one device."""

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sasg_jax
from experiments import data
from experiments.configs import Config
from experiments.methods import make_optimizer
from experiments.models import make_model
from experiments.records import Point, Record


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
    on_point: Callable[[Point], None] = lambda point: None,
    on_rounds: Callable[[int], None] = lambda rounds: None,
) -> Record:
    """Trains and evaluates.

    The initial parameters, the data order and the augmentation depend on the seed alone, so that
    methods are compared on the same of each.

    Args:
      config: the experiment.
      method: one of :data:`experiments.configs.METHODS`.
      seed: of everything random.
      dataset: the data.
      source: for a combination of data sets, where each training example comes from; the workers
        then hold one data set each, in turn.
      on_point: called after each evaluation.
      on_rounds: called with a number of rounds as they are done.

    Raises:
      FloatingPointError: the training loss is not finite.
    """
    params_key, workers_key = jax.random.split(jax.random.key(seed))
    shards = partition(config, dataset, source, seed)
    normalise = _normaliser(dataset.train_images)
    model = make_model(config, dataset.num_classes)
    variables = model.init(params_key, normalise(dataset.train_images[:2]), train=True)
    params, model_state = variables["params"], variables.get("batch_stats", {})
    has_model_state = bool(model_state)

    def loss_fn(params, batch, *, model_state=None, key: Any = None):
        images, labels = batch
        images = normalise(_augment(images, key) if config.augment else images)
        variables = {"params": params, "batch_stats": model_state or {}}
        logits, written = model.apply(variables, images, train=True, mutable=["batch_stats"])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return (loss, written["batch_stats"]) if has_model_state else loss

    tx = make_optimizer(config, method)
    train_step = sasg_jax.make_train_step(
        loss_fn,
        tx,
        num_workers=config.num_workers,
        has_model_state=has_model_state,
        has_key=config.augment,
    )
    state = train_step.init(params, model_state, workers_key if config.augment else None)
    ledger = sasg_jax.Ledger(state.opt_state)
    train_images, train_labels = (
        jnp.asarray(dataset.train_images),
        jnp.asarray(dataset.train_labels),
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def run_rounds(state, images, labels, order):
        def one_round(state, indices):
            return train_step.step(state, (images[indices], labels[indices]))

        return jax.lax.scan(one_round, state, order)

    @jax.jit
    def count_correct(params, model_state, images, labels):
        variables = {"params": params, "batch_stats": model_state}
        logits: Any = model.apply(variables, normalise(images), train=False)
        return jnp.sum(logits.argmax(-1) == labels)

    def test_accuracy(state):
        statistics = {}
        if has_model_state:
            statistics = sasg_jax.mean_model_state(state.model_state)
            ledger.record_model_state(state.model_state)
        chunks = math.ceil(len(dataset.test_labels) / 1000)
        correct = sum(
            int(count_correct(state.params, statistics, images, labels))
            for images, labels in zip(
                np.array_split(dataset.test_images, chunks),
                np.array_split(dataset.test_labels, chunks),
                strict=True,
            )
        )
        return correct / len(dataset.test_labels)

    compiled: dict[int, Any] = {}  # by number of rounds, so that compilation is not timed
    at_target: Point | None = None
    point: Point | None = None
    seconds: list[tuple[int, float]] = []
    infos: list[sasg_jax.RoundInfo] = []
    iteration = 0
    while iteration < config.iterations:
        to_evaluation = config.evaluate_every - iteration % config.evaluate_every
        rounds = min(config.rounds_per_call, to_evaluation, config.iterations - iteration)
        order = data.batch_order(shards, config.batch_size, rounds, seed, start=iteration)
        arguments = (state, train_images, train_labels, order)
        if rounds not in compiled:
            compiled[rounds] = run_rounds.lower(*arguments).compile()
        start = time.perf_counter()
        state, info = jax.block_until_ready(compiled[rounds](*arguments))
        seconds.append((rounds, time.perf_counter() - start))
        iteration += rounds
        infos.append(jax.device_get(info))
        ledger.record(info.uploaded)
        if not np.isfinite(infos[-1].loss).all():
            raise FloatingPointError(
                f"{method} (seed {seed}) diverged: the training loss is not finite after "
                f"{iteration} rounds. Lower the learning rate."
            )
        if iteration % config.evaluate_every == 0 or iteration == config.iterations:
            recent = jax.tree.map(lambda *parts: np.concatenate(parts), *_per_round(infos))
            infos.clear()
            point = Point(
                iteration=iteration,
                uploads=ledger.uploads,
                paper_uplink_bits=ledger.paper_uplink_bits,
                uplink_bytes=ledger.uplink_bytes,
                downlink_bytes=ledger.downlink_bytes,
                test_accuracy=test_accuracy(state),
                train_loss=float(recent["loss"].mean()),
                upload_fraction=float(recent["uploaded"].mean()),
                mean_staleness=float(recent["staleness"].mean()),
            )
            if at_target is None and point.test_accuracy >= config.target_accuracy:
                at_target = point
            on_point(point)
        on_rounds(rounds)

    assert point is not None  # the last round is always evaluated
    return Record(
        config=config.name,
        dataset=dataset.name,
        method=method,
        seed=seed,
        num_workers=config.num_workers,
        num_parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
        iterations=iteration,
        uploads=ledger.uploads,
        target_accuracy=config.target_accuracy,
        iterations_at_target=at_target and at_target.iteration,
        uploads_at_target=at_target and at_target.uploads,
        final_test_accuracy=point.test_accuracy,
        final_train_loss=point.train_loss,
        paper_uplink_bits=ledger.paper_uplink_bits,
        paper_uplink_bits_at_target=at_target and at_target.paper_uplink_bits,
        uplink_bytes=ledger.uplink_bytes,
        uplink_bytes_at_target=at_target and at_target.uplink_bytes,
        downlink_bytes=ledger.downlink_bytes,
        downlink_bytes_at_target=at_target and at_target.downlink_bytes,
        model_state_bytes=ledger.model_state_bytes,
        compute_seconds=sum(taken for _, taken in seconds),
        ms_per_iteration=1000 * float(np.median([taken / rounds for rounds, taken in seconds])),
    )


def _per_round(infos: list[sasg_jax.RoundInfo]) -> list[dict[str, np.ndarray]]:
    names = ("loss", "uploaded", "staleness")
    return [{name: np.asarray(getattr(info, name)) for name in names} for info in infos]


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
