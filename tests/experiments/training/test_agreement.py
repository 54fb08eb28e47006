"""Data and parameters that are not the same everywhere are an error that says where."""

import jax
import numpy as np
import pytest

from experiments import data
from experiments.errors import ClusterError
from experiments.training.agreement import check_replicas, check_same_data


class Others:
    """A group of three in which the other two say what a test wants."""

    index, count = 0, 3

    def __init__(self, *others):
        self.others = others

    def gather(self, value):
        return [value, *(value if other is None else other for other in self.others)]


def replicated(*copies):
    """An array that is called the same on all devices, and is not where the copies are not."""
    devices = jax.devices()[: len(copies)]
    mesh = jax.sharding.Mesh(np.array(devices), ("devices",))
    arrays = [jax.device_put(x, device) for x, device in zip(copies, devices, strict=True)]
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.make_array_from_single_device_arrays(copies[0].shape, everywhere, arrays)


def test_parameters_that_differ_are_an_error_that_names_processes_and_round():
    same, other = np.arange(3.0), np.arange(3.0) + 1e-7
    params = {"v": replicated(same, same, same), "w": replicated(same, same, same)}
    check_replicas(Others(None, None), params, 100)  # pyright: ignore
    with pytest.raises(ClusterError, match=r"after round 1,100 .* processes \[2\]"):
        check_replicas(Others(None, ["another"]), params, 1100)  # pyright: ignore
    params["w"] = replicated(same, same, other)
    with pytest.raises(ClusterError, match=r"after round 7 .* processes \[0, 1, 2\]"):
        check_replicas(Others(None, None), params, 7)  # pyright: ignore


def test_data_that_differs_is_an_error_that_names_processes():
    dataset = data.load("digits")
    check_same_data(Others(None, None), dataset)  # pyright: ignore
    with pytest.raises(ClusterError, match=r"that of processes \[1\] is not"):
        check_same_data(Others(["other"], None), dataset)  # pyright: ignore
