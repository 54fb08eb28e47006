"""Trains with every method and exchange, as a simulation or as one of several processes.

``python replicas.py PROCESSES DEVICES FOLDER NAME ...`` leaves what each process has seen of the
named pairs in FOLDER, one file for a process and a pair. With 0 processes, it leaves what the
simulation of all workers has seen.
"""

import contextlib
import dataclasses
import gzip
import os
import pathlib
import sys

import jax
import numpy as np

from experiments import data
from experiments.configs import CONFIGS
from experiments.processes import cluster, launch
from experiments.training import train as training

CONFIG = dataclasses.replace(CONFIGS["mnist_fc"], num_workers=4, iterations=300)
METHODS_AND_EXCHANGES = (
    ("sgd", "psum"),
    ("sparse", "gather"),
    ("lasg", "lazy"),
    ("sasg", "gather"),
    ("sasg", "lazy"),
    ("sasg", "relay"),
    ("sasg", "server"),
    ("sasg_two_way", "server"),
    ("sasg_two_way", "sharded"),
)
PAIRS = {
    f"{method}-{exchange}": dataclasses.replace(CONFIG, exchange=exchange)
    for method, exchange in METHODS_AND_EXCHANGES
}
"""What is compared: every method, and every exchange."""

NARROW = {
    f"{method}-{exchange}-narrow": dataclasses.replace(CONFIG, exchange=exchange, width=32)
    for method, exchange in METHODS_AND_EXCHANGES
}
"""The same with a small network, which takes little time."""


def mnist() -> data.Dataset:
    """MNIST from the original archives where they are at hand, or else something like it."""
    folder = pathlib.Path(os.environ.get("SASG_JAX_ARCHIVES") or os.devnull) / "mnist"
    if folder.is_dir():
        images, labels = [], []
        for split in ("train", "t10k"):
            pixels = gzip.decompress((folder / f"{split}-images-idx3-ubyte.gz").read_bytes())[16:]
            images.append(np.frombuffer(pixels, np.uint8).reshape(-1, 28, 28, 1))
            digits = gzip.decompress((folder / f"{split}-labels-idx1-ubyte.gz").read_bytes())[8:]
            labels.append(np.frombuffer(digits, np.uint8).astype(np.int32))
        return data.Dataset("mnist", images[0], labels[0], images[1], labels[1], 10)
    rng = np.random.default_rng(0)
    strokes = rng.integers(0, 200, (10, 7, 7, 1)).repeat(4, 1).repeat(4, 2)

    def examples(size):
        labels = np.arange(size, dtype=np.int32) % 10
        noise = rng.integers(-120, 120, (size, 28, 28, 1))
        return np.clip(strokes[labels] + noise, 0, 255).astype(np.uint8), labels

    # 6,001 and 1,001: shards of unequal size, and parts of the test set.
    return data.Dataset("synthetic", *examples(6001), *examples(1001), 10)


def run(name: str, dataset: data.Dataset, group: cluster.Group | None) -> dict:
    """What happened: uploads in every round, and the parameters at every checkpoint."""
    config = (PAIRS | NARROW)[name]
    method = name.split("-")[0]
    seen = {"uploaded": [], "params": []}

    def on_evaluation(params, info):
        seen["uploaded"].extend(info.uploaded)
        seen["params"].append(np.concatenate([np.ravel(x) for x in jax.tree.leaves(params)]))

    record = training.train(
        config,
        method,
        1,
        dataset,
        group=group,
        one_by_one=group is None,
        on_evaluation=on_evaluation,
    )
    arrays = {name: np.asarray(values) for name, values in seen.items()}
    return {**arrays, "uploads": record.uploads, "accuracy": record.final_test_accuracy}


def main(processes: str, devices: str, folder: str, *names: str) -> None:
    if processes == "0":
        for name in names:
            np.savez(pathlib.Path(folder) / f"{name}-simulated.npz", **run(name, mnist(), None))
        return
    with contextlib.ExitStack() as stack:
        if launch.INDEX not in os.environ:
            command = [sys.executable, *sys.argv]
            stack.enter_context(launch.launched(command, int(processes), int(devices)))
        place = os.environ[launch.ADDRESS], int(processes), int(os.environ[launch.INDEX])
        group = stack.enter_context(cluster.join(*place, "a comparison", timeout=120))
        dataset = mnist()
        for name in names:
            seen = run(name, dataset, group)
            np.savez(pathlib.Path(folder) / f"{name}-{group.index}.npz", **seen)


if __name__ == "__main__":
    main(*sys.argv[1:])
