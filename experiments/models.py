"""The paper's models in flax, initialised as PyTorch initialises them.

The numbers of rounds in the paper's tables depend on the initial scale: PyTorch draws weights and
biases from U(-1/sqrt(fan_in), 1/sqrt(fan_in)).
"""

import functools
import math
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
        conv = functools.partial(
            nn.Conv, use_bias=False, kernel_init=torch_kernel_init, padding=((1, 1), (1, 1))
        )
        norm = functools.partial(
            nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5
        )
        y = nn.relu(norm()(conv(self.channels, (3, 3), self.stride)(x)))
        y = norm()(conv(self.channels, (3, 3))(y))
        if x.shape != y.shape:
            x = conv(self.channels, (1, 1), self.stride, padding="VALID")(x)
            x = norm()(x)
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
        x = nn.Conv(
            self.width,
            (3, 3),
            use_bias=False,
            kernel_init=torch_kernel_init,
            padding=((1, 1), (1, 1)),
        )(images)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5)(x)
        x = nn.relu(x)
        for stage in range(4):
            for block in range(2):
                stride = 2 if stage > 0 and block == 0 else 1
                x = _ResNetBlock(self.width * 2**stage, stride)(x, train=train)
        x = x.mean((1, 2))
        return _dense(self.num_classes, x.shape[-1])(x)


def make_model(config: Config, num_classes: int) -> nn.Module:
    """The model that ``config`` names."""
    models: dict[str, Any] = {"mlp": MLP, "resnet18": ResNet18}
    return models[config.model](num_classes, config.width)
