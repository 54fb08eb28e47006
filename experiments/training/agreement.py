"""What all processes of a run must have alike: the data, and the parameters bit for bit."""

import hashlib
from typing import Any

import jax
import numpy as np

from experiments import data
from experiments.errors import ClusterError
from experiments.processes.cluster import Group

PyTree = Any


def check_same_data(group: Group, dataset: data.Dataset | data.Text) -> None:
    """Raises ClusterError unless all processes hold the same data."""
    train, test = dataset.train, dataset.test
    last = hashlib.sha256(train[-1].tobytes()).hexdigest()  # labels, where there are any
    mine = [dataset.name, *train[0].shape, *test[0].shape, last]
    everyone = group.gather(mine)
    different = [index for index, other in enumerate(everyone) if other != everyone[0]]
    if different:
        raise ClusterError(
            f"Expected all processes to hold the same data, but that of processes {different} is "
            f"not that of process 0: {everyone[different[0]]}, not {everyone[0]}."
        )


def check_replicas(group: Group, params: PyTree, iteration: int) -> None:
    """Raises ClusterError unless the parameters are the same, bit for bit, on all devices."""
    devices: dict[Any, Any] = {}
    for leaf in jax.tree.leaves(params):
        for shard in leaf.addressable_shards:
            of_device = devices.setdefault(shard.device, hashlib.sha256())
            of_device.update(np.asarray(shard.data).tobytes())
    everyone = group.gather([of_device.hexdigest() for of_device in devices.values()])
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
