"""The training examples: whose they are, where they lie, and what a network sees of them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments import data
from experiments.configs import Config


def load(
    config: Config, data_dir: Any = None, archives: Any = None
) -> tuple[data.Dataset | data.Text, np.ndarray | None]:
    """The data of a configuration, and of several sets or packages which each training example is
    of. Errors are those of :func:`experiments.data.load_named` and ``load_stdlib``."""
    if config.dataset == "stdlib":
        packages = config.num_workers if config.partition == "package" else None
        return data.load_stdlib(config.context, packages)
    return data.load_named(config.dataset, data_dir, archives)


def partition(
    config: Config, dataset: data.Dataset | data.Text, source: np.ndarray | None, seed: int
) -> list[np.ndarray]:
    """The training examples of every worker, as indices."""
    if source is not None:
        return data.by_source(source, config.num_workers, seed)
    if config.partition == "dirichlet" and isinstance(dataset, data.Dataset):
        return data.dirichlet_label_skew(
            dataset.train_labels, config.num_workers, config.concentration, seed
        )
    return data.iid_shards(len(dataset.train[0]), config.num_workers, seed)


def stack_workers(
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


def pad(examples: np.ndarray, length: int) -> np.ndarray:
    """Repeats the first example up to a length. What is added is never in a batch."""
    return examples[np.minimum(np.arange(length), len(examples)) % len(examples)]


def normaliser(train_images: np.ndarray) -> Callable[[Any], jax.Array]:
    """Maps uint8 images so that every channel of the training set has mean 0 and deviation 1."""
    channels = train_images.reshape(-1, train_images.shape[-1]) / np.float32(255)
    mean, deviation = channels.mean(0, dtype=np.float64), channels.std(0, dtype=np.float64)
    mean, deviation = mean.astype(np.float32), np.maximum(deviation, 1e-6).astype(np.float32)
    return lambda images: (jnp.asarray(images, jnp.float32) / 255 - mean) / deviation


def augment(images: jax.Array, key: jax.Array) -> jax.Array:
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
