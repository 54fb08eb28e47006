"""Image-classification data sets: those of tensorflow-datasets, and one that needs no download.

NumPy on the host. Nothing heavy is imported before it is needed: ``digits`` takes scikit-learn,
every other set tensorflow-datasets, and TensorFlow itself only while a set is being prepared.
"""

import dataclasses
import importlib
import importlib.util
import os
from collections.abc import Sequence

import numpy as np

ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


@dataclasses.dataclass(frozen=True)
class Dataset:
    """An image-classification data set held in memory."""

    name: str  # what results are to be labelled with
    train_images: np.ndarray  # shape=(N, H, W, C), dtype=uint8
    train_labels: np.ndarray  # from 0. shape=(N,), dtype=int32
    test_images: np.ndarray  # shape=(N_test, H, W, C), dtype=uint8
    test_labels: np.ndarray  # shape=(N_test,), dtype=int32
    num_classes: int
    test_source: np.ndarray | None = None
    """Of a combination, the set that each test example is of. shape=(N_test,), dtype=int32"""

    @property
    def train(self) -> tuple[np.ndarray, ...]:
        """The arrays whose leading axis is over training examples."""
        return self.train_images, self.train_labels

    @property
    def test(self) -> tuple[np.ndarray, ...]:
        """Those whose leading axis is over test examples."""
        return self.test_images, self.test_labels

    @property
    def test_weight(self) -> int:
        """What a sum over all test examples is divided by: their number."""
        return len(self.test_labels)


def load(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    archives: str | os.PathLike[str] | None = None,
) -> Dataset:
    """Loads a data set by name.

    ``digits`` is scikit-learn's: 1,797 scanned 8x8 digits, of which 36 of each class, always the
    same ones, are the test set. It needs no file and no network.

    Any other name is that of an image-classification set of tensorflow-datasets with the splits
    ``train`` and ``test``, e.g. ``mnist`` or ``emnist/balanced``. A set already prepared in
    ``data_dir`` (tensorflow-datasets' own by default) is only read, without TensorFlow; otherwise
    its own builder prepares it, from the original files in ``<archives>/<name>`` or in
    ``archives``, all that are registered for the set, or from downloads where that is None.

    An archive whose sha256 is not the registered one is used all the same, but never silently: a
    warning is logged and ``Dataset.name`` becomes ``"<name> (unregistered archive)"``, now and
    whenever that prepared set is read again. The first line of a file ``label.txt`` beside the
    archive takes the place of "unregistered archive", e.g. "JPEG" for recompressed images.

    Raises:
      ImportError: a package is missing; the message names the extra to install.
      FileNotFoundError: ``archives`` lacks files; the message names all of them.
      ConnectionError: files would have to be downloaded, and cannot be.
      ValueError: there is no such set, or it has no image and class label as its supervised keys,
        lacks a ``train`` or ``test`` split, holds unlabelled examples or images of more than one
        shape; or a file in ``archives`` is the original archive of another data set.
    """
    if name == "digits":
        return _load_digits()
    require("A data set other than digits", "datasets", "tensorflow_datasets", "PIL")
    from experiments.data import prepared

    directory = None if data_dir is None else os.path.expanduser(data_dir)
    label, num_classes, arrays = prepared.read(name, directory, archives)
    return Dataset(name=label, num_classes=num_classes, **arrays)


def load_named(
    names: str,
    data_dir: str | os.PathLike[str] | None = None,
    archives: str | os.PathLike[str] | None = None,
) -> tuple[Dataset, np.ndarray | None]:
    """One data set, or several joined by "+" with the set that each training example is of.

    Args and errors are those of :func:`load` and :func:`combine`.
    """
    datasets = [load(name, data_dir=data_dir, archives=archives) for name in names.split("+")]
    return combine(datasets) if len(datasets) > 1 else (datasets[0], None)


def combine(datasets: Sequence[Dataset]) -> tuple[Dataset, np.ndarray]:
    """Joins data sets into one, e.g. for workers that hold different ones.

    Grey images are repeated over the channels of the others, and smaller images are padded with
    zeros on all sides, to the largest height and width. Labels are kept as they are, so class 3 of
    every set becomes the same class 3.

    Returns the joined :class:`Dataset`, and the position in ``datasets`` that each training example
    came from, as :func:`experiments.data.partition.by_source` takes it. shape=(N,), dtype=int32

    ValueError where the numbers of channels cannot be brought together.
    """
    shape = np.max([dataset.train_images.shape[1:] for dataset in datasets], axis=0)
    for dataset in datasets:
        channels = dataset.train_images.shape[3]
        if channels not in (1, shape[2]):
            raise ValueError(
                f"Expected the images of {dataset.name!r} to have 1 or {shape[2]} channels, got "
                f"{channels}."
            )

    def join(part: str) -> np.ndarray:
        arrays = [getattr(dataset, part) for dataset in datasets]
        if part.endswith("labels"):
            return np.concatenate(arrays)
        joined = np.zeros((sum(map(len, arrays)), *shape), np.uint8)
        start = 0
        for array in arrays:
            count, height, width, _ = array.shape
            top, left = (shape[0] - height) // 2, (shape[1] - width) // 2
            joined[start : start + count, top : top + height, left : left + width] = array
            start += count
        return joined

    sources = np.arange(len(datasets), dtype=np.int32)
    combined = Dataset(
        name=" + ".join(dataset.name for dataset in datasets),
        num_classes=max(dataset.num_classes for dataset in datasets),
        test_source=np.repeat(sources, [len(dataset.test_labels) for dataset in datasets]),
        **{name: join(name) for name in ARRAYS},
    )
    return combined, np.repeat(sources, [len(dataset.train_labels) for dataset in datasets])


def require(purpose: str, extra: str, *modules: str) -> None:
    """Raises ImportError, naming the extra to install, where a module is not there."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise ImportError(
            f"{purpose} needs {' and '.join(missing)}, not found here: install with "
            f'`pip install "sasg_jax[{extra}]"`.'
        )


def _load_digits() -> Dataset:
    require("The digits data set", "experiments", "sklearn")
    digits = importlib.import_module("sklearn.datasets").load_digits()
    images = np.rint(digits.images[..., None] * (255 / 16)).astype(np.uint8)
    labels = digits.target.astype(np.int32)
    rng = np.random.default_rng(0)
    is_test = np.zeros(len(labels), bool)
    for label in range(10):
        is_test[rng.permutation(np.flatnonzero(labels == label))[:36]] = True
    train, test = (images[~is_test], labels[~is_test]), (images[is_test], labels[is_test])
    return Dataset("digits", *train, *test, num_classes=10)
