"""The methods get the paper's settings from a configuration."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import pytest

import sasg_jax
from experiments.configs import CONFIGS, METHODS
from experiments.methods import learning_rate, make_optimizer

CIFAR = CONFIGS["cifar10_resnet18"]


def test_learning_rate_falls_tenfold_at_the_decay_rounds():
    config = dataclasses.replace(CIFAR, learning_rate=0.1, decay_iterations=(10, 20))
    rate: Any = learning_rate(config)
    assert [float(rate(t)) for t in (0, 9, 11, 19, 21)] == pytest.approx(
        [0.1, 0.1, 0.01, 0.01, 0.001]
    )


def test_learning_rate_without_decay_is_the_number():
    assert learning_rate(CONFIGS["mnist_fc"]) == 0.05


@pytest.mark.parametrize(
    ("method", "adaptive", "upload_bytes", "downlink_bytes"),
    [
        # 1,000 entries: 4,000 bytes dense; 10 values of 4 bytes and indices of 2 at 1 %.
        ("sgd", False, 4000, 4000),
        ("sparse", False, 60, 4000),
        ("lasg", True, 4000, 4000),
        ("sasg", True, 60, 4000),
        ("sparse_two_way", False, 60, 60),
        ("sasg_two_way", True, 60, 60),
    ],
)
def test_methods_send_what_they_say(method, adaptive, upload_bytes, downlink_bytes):
    state: Any = make_optimizer(CONFIGS["mnist_fc"], method).init({"w": jnp.zeros(1000)})
    assert state.wire == sasg_jax.WireSizes(
        num_workers=10,
        upload_bytes=upload_bytes,
        upload_paper_bits=32 * (1000 if upload_bytes == 4000 else 10),
        flag_bytes=int(adaptive),
        downlink_bytes=downlink_bytes,
        exchange="psum" if method == "sgd" else "gather",
    )
    assert len(state.server.history) == (10 if adaptive else 0)


def test_every_method_of_every_configuration_is_made():
    for config in CONFIGS.values():
        for method in METHODS:
            make_optimizer(config, method)
