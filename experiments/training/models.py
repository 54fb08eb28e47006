"""Models in flax: the paper's, initialised as PyTorch initialises them, and a transformer.

The numbers of rounds in the paper's tables depend on the initial scale: PyTorch draws weights and
biases from U(-1/sqrt(fan_in), 1/sqrt(fan_in)).
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.configs import Config

# Variance 1 / (3 fan_in), that is a bound of 1 / sqrt(fan_in).
torch_kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def torch_bias_init(fan_in: int) -> nn.initializers.Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""

    def init(key, shape, dtype=jnp.float32):
        bound = 1 / math.sqrt(fan_in)
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def _dense(features: int, fan_in: int) -> nn.Dense:
    return nn.Dense(features, kernel_init=torch_kernel_init, bias_init=torch_bias_init(fan_in))


def _conv(features: int, size: int, stride: int = 1, *, train: bool) -> nn.Conv:
    """A square convolution without bias that keeps the image's size, but for its stride."""
    padding = size // 2
    return nn.Conv(
        features,
        (size, size),
        stride,
        padding=((padding, padding), (padding, padding)),
        use_bias=False,
        kernel_init=torch_kernel_init,
        conv_general_dilated=_as_product if train and jax.default_backend() == "cpu" else None,
    )


def _as_product(
    images: jax.Array,
    kernel: jax.Array,
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **no_others: Any,
) -> jax.Array:
    """A convolution as one matrix product of all windows with the kernel.

    XLA's own is five times slower on the CPU inside of loops and conditions, which training is made
    of (https://github.com/jax-ml/jax/issues/12868); elsewhere it is the faster one.

    Args:
      images: ``# shape=(batch, height, width, channels)``
      kernel: ``# shape=(kernel height, kernel width, channels, features)``
      window_strides: down and across.
      padding: before and after, down and across.
      **no_others: what flax also hands over, at its default (no dilation, no groups).
    """
    del no_others
    padded = jnp.pad(images, ((0, 0), *padding, (0, 0)))
    (down, across), (rows, columns, channels, features) = window_strides, kernel.shape
    height = (padded.shape[1] - rows) // down + 1
    width = (padded.shape[2] - columns) // across + 1
    shifted = [
        padded[:, i : i + down * height : down, j : j + across * width : across][:, :height, :width]
        for i in range(rows)
        for j in range(columns)
    ]
    windows = jnp.concatenate(shifted, -1).reshape(-1, rows * columns * channels)
    product = windows @ kernel.reshape(-1, features)
    return product.reshape(len(images), height, width, features)


class MLP(nn.Module):
    """One hidden layer with ReLU; 784-512-10 has 407,050 parameters."""

    num_classes: int
    width: int = 512

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Logits of ``images``. ``# shape=(batch, num_classes)``"""
        del train
        x = images.reshape(len(images), -1)
        x = nn.relu(_dense(self.width, x.shape[-1])(x))
        return _dense(self.num_classes, self.width)(x)


class _ResNetBlock(nn.Module):
    channels: int
    stride: int

    @nn.compact
    def __call__(self, x, *, train):
        norm = functools.partial(
            nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5
        )
        y = nn.relu(norm()(_conv(self.channels, 3, self.stride, train=train)(x)))
        y = norm()(_conv(self.channels, 3, train=train)(y))
        if x.shape != y.shape:
            x = norm()(_conv(self.channels, 1, self.stride, train=train)(x))
        return nn.relu(x + y)


class ResNet18(nn.Module):
    """The CIFAR ResNet18 (3x3 stem, no pooling before the stages).

    With a width of 64 and 10 classes it has 11,173,962 parameters.
    """

    num_classes: int
    width: int = 64

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Logits of ``images``. ``# shape=(batch, num_classes)``"""
        x = _conv(self.width, 3, train=train)(images)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5)(x)
        x = nn.relu(x)
        for stage in range(4):
            for block in range(2):
                stride = 2 if stage > 0 and block == 0 else 1
                x = _ResNetBlock(self.width * 2**stage, stride)(x, train=train)
        x = x.mean((1, 2))
        return _dense(self.num_classes, x.shape[-1])(x)


class Transformer(nn.Module):
    """A language model of bytes: pre-norm, rotary positions, tied embeddings, no biases.

    With a width of 128 and 4 layers it has 820,352 parameters.
    """

    width: int = 128
    layers: int = 4

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits of the byte after each. ``# shape=(batch, length, 256)``"""
        norm = functools.partial(nn.RMSNorm, epsilon=1e-6)
        embed = nn.Embed(256, self.width, embedding_init=nn.initializers.normal(0.02))
        x = embed(tokens)
        for _ in range(self.layers):
            x = x + _attention(norm()(x), self.layers)
            hidden = _linear(4 * self.width)(norm()(x))
            x = x + _linear(self.width, 2 * self.layers)(jnp.square(nn.relu(hidden)))
        return embed.attend(norm()(x))


_HEAD = 32  # entries of a head


def _attention(x: jax.Array, layers: int) -> jax.Array:
    """Causal self-attention, in the module that calls it."""
    batch, length, width = x.shape
    heads = batch, length, width // _HEAD, _HEAD
    q, k, v = (part.reshape(heads) for part in jnp.split(_linear(3 * width)(x), 3, -1))
    mixed = jax.nn.dot_product_attention(_rotate(q), _rotate(k), v, is_causal=True)
    return _linear(width, 2 * layers)(mixed.reshape(x.shape))


def _linear(features: int, parts: int = 1) -> nn.Dense:
    """Without bias, of variance 1 / fan_in; less for one of so many ``parts`` of a sum."""
    init = nn.initializers.variance_scaling(1 / parts, "fan_in", "normal")
    return nn.Dense(features, use_bias=False, kernel_init=init)


def _rotate(x: jax.Array) -> jax.Array:
    """Rotary positions. ``# shape=(batch, length, heads, entries)``"""
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None] * 1e4 ** (-jnp.arange(half) / half)
    cos, sin = (fn(angles)[:, None].astype(x.dtype) for fn in (jnp.cos, jnp.sin))
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def make_model(config: Config, num_classes: int) -> nn.Module:
    """The model of images that ``config`` names."""
    models: dict[str, Any] = {"mlp": MLP, "resnet18": ResNet18}
    return models[config.model](num_classes, config.width)
