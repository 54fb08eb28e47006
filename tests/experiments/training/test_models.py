"""The models have the paper's sizes and PyTorch's initial scale."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.configs import CONFIGS
from experiments.training import models
from experiments.training.models import MLP, ResNet18, Transformer, make_model


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("model", "shape", "parameters"),
    [
        (MLP(10), (1, 28, 28, 1), 407_050),
        (ResNet18(10), (1, 32, 32, 3), 11_173_962),
        (ResNet18(100), (1, 32, 32, 3), 11_173_962 + 90 * 513),
    ],
)
def test_number_of_parameters_is_the_papers(model, shape, parameters):
    init = lambda: model.init(jax.random.key(0), jnp.zeros(shape), train=True)
    assert count(jax.eval_shape(init)["params"]) == parameters


def test_dense_layers_start_uniform_within_one_over_the_root_of_fan_in():
    params: Any = MLP(10).init(jax.random.key(0), jnp.zeros((1, 784)), train=True)["params"]
    for layer, fan_in in (("Dense_0", 784), ("Dense_1", 512)):
        bound = 1 / np.sqrt(fan_in)
        kernel = np.asarray(params[layer]["kernel"])
        assert np.abs(kernel).max() <= bound
        np.testing.assert_allclose(kernel.std(), bound / np.sqrt(3), rtol=0.03)
        assert np.abs(params[layer]["bias"]).max() <= bound
        assert np.abs(params[layer]["bias"]).max() > 0


def test_convolutions_start_uniform_within_one_over_the_root_of_fan_in():
    block = models._ResNetBlock(64, 1)
    variables: Any = block.init(jax.random.key(0), jnp.zeros((1, 4, 4, 64)), train=True)
    kernel = np.asarray(variables["params"]["Conv_1"]["kernel"])
    assert kernel.shape == (3, 3, 64, 64)
    bound = 1 / np.sqrt(9 * 64)
    assert np.abs(kernel).max() <= bound
    np.testing.assert_allclose(kernel.std(), bound / np.sqrt(3), rtol=0.02)


def test_resnet_halves_the_image_three_times_and_writes_statistics_only_in_training():
    model = ResNet18(10, width=4)
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    init, apply = model.init_with_output, functools.partial(model.apply, mutable=["batch_stats"])
    train, test = (jax.jit(functools.partial(apply, train=train)) for train in (True, False))
    _, variables = jax.jit(functools.partial(init, train=True))(jax.random.key(0), images)
    logits, written = train(variables, images)
    assert logits.shape == (2, 10)
    before, after = variables["batch_stats"], written["batch_stats"]
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
    assert all(jax.tree.leaves(changed))
    _, untouched = test(variables, images)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), before, untouched["batch_stats"]))


def test_every_configuration_makes_its_model():
    for config in CONFIGS.values():
        if config.model == "transformer":  # which tests/experiments/training/test_tasks.py makes
            continue
        model = make_model(config, 7)
        assert (model.num_classes, model.width) == (7, config.width)


@pytest.mark.parametrize(("size", "stride", "height"), [(3, 1, 8), (3, 2, 8), (1, 2, 8), (3, 2, 7)])
def test_a_convolution_as_a_product_is_jaxs_own(size, stride, height):
    images = jax.random.normal(jax.random.key(0), (2, height, height, 3))
    kernel = jax.random.normal(jax.random.key(1), (size, size, 3, 5))
    padding = ((size // 2, size // 2),) * 2

    def reference(images, kernel):
        return jax.lax.conv_general_dilated(
            images,
            kernel,
            (stride, stride),
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision="highest",
        )

    def ours(images, kernel):
        return models._as_product(images, kernel, (stride, stride), padding)

    want, got = reference(images, kernel), ours(images, kernel)
    np.testing.assert_allclose(got, want, atol=1e-5)
    cotangent = jax.random.normal(jax.random.key(2), want.shape)
    for want, got in zip(
        jax.vjp(reference, images, kernel)[1](cotangent),
        jax.vjp(ours, images, kernel)[1](cotangent),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, atol=1e-4)


def test_number_of_parameters_of_the_transformer():
    tokens = jnp.zeros((1, 8), jnp.int32)
    init = lambda model: lambda: model.init(jax.random.key(0), tokens)
    params = jax.eval_shape(init(Transformer()))["params"]
    # Tied embeddings; of each layer attention (4 w²), the network (8 w²) and two norms; one more.
    assert count(params) == 256 * 128 + 4 * (12 * 128**2 + 2 * 128) + 128 == 820_352


def test_the_transformer_does_not_look_ahead_and_tells_places_apart():
    tokens = jnp.arange(12, dtype=jnp.int32)[None]
    model = Transformer(64, 2)
    params = model.init(jax.random.key(0), tokens)
    before = np.asarray(model.apply(params, tokens))
    after = np.asarray(model.apply(params, tokens.at[0, 7].set(99)))
    np.testing.assert_array_equal(before[0, :7], after[0, :7])
    assert (np.abs(before[0, 7:] - after[0, 7:]).max(-1) > 0).all()
    swapped = np.asarray(model.apply(params, tokens.at[0, jnp.array([2, 4])].set([4, 2])))
    assert np.abs(swapped[0, -1] - before[0, -1]).max() > 0
    assert before.shape == (1, 12, 256)
