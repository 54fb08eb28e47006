"""What is trained: a model, the loss of a batch, and how well it does on what it has not seen."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.configs import Config
from experiments.data import Dataset, Text
from experiments.training.inputs import augment, normaliser
from experiments.training.models import Transformer, make_model

PyTree = Any


class Images:
    """Classification of images."""

    chunk = 1000  # test examples at a time

    def __init__(self, config: Config, dataset: Dataset):
        self._normalise = normaliser(dataset.train_images)
        self._first = dataset.train_images[:2]
        self._augment = config.augment
        self._model = make_model(config, dataset.num_classes)

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        """Parameters and model state."""
        variables = self._model.init(key, self._normalise(self._first), train=False)
        self._has_model_state = "batch_stats" in variables
        return variables["params"], variables.get("batch_stats", {})

    def loss(self, params: PyTree, batch: Any, *, model_state: Any = None, key: Any = None) -> Any:
        """Of one worker's examples, as ``sasg_jax.gradient`` takes it."""
        images, labels = batch
        images = self._normalise(augment(images, key) if self._augment else images)
        variables = {"params": params, "batch_stats": model_state or {}}
        logits, written = self._model.apply(variables, images, train=True, mutable=["batch_stats"])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return (loss, written["batch_stats"]) if self._has_model_state else loss

    @functools.partial(jax.jit, static_argnums=0)
    def score(self, params: PyTree, model_state: PyTree, images, labels) -> jax.Array:
        """How many of the examples are right."""
        variables = {"params": params, "batch_stats": model_state}
        logits: Any = self._model.apply(variables, self._normalise(images), train=False)
        return jnp.sum(logits.argmax(-1) == labels)


class Bytes:
    """Prediction of the next byte of a text."""

    chunk = 100

    def __init__(self, config: Config, dataset: Text):
        self._model = Transformer(config.width)
        self._first = jnp.zeros((1, dataset.train_windows.shape[1] - 1), jnp.int32)

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        return self._model.init(key, self._first)["params"], {}

    def _nats(self, params: PyTree, windows: jax.Array) -> jax.Array:
        """Of every byte but the first of each window."""
        tokens = windows.astype(jnp.int32)
        logits: Any = self._model.apply({"params": params}, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])

    def loss(self, params: PyTree, batch: Any) -> jax.Array:
        (windows,) = batch
        return self._nats(params, windows).mean()

    @functools.partial(jax.jit, static_argnums=0)
    def score(self, params: PyTree, model_state: PyTree, windows, lengths) -> jax.Array:
        """How many bits the bytes of the windows take."""
        del model_state
        is_there = jnp.arange(windows.shape[1] - 1) < lengths[:, None]
        return jnp.sum(self._nats(params, windows) * is_there) / np.log(2)


def make_task(config: Config, dataset: Dataset | Text) -> Images | Bytes:
    """What ``config`` trains, on its data."""
    return Bytes(config, dataset) if isinstance(dataset, Text) else Images(config, dataset)
