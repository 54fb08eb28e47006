"""Image-classification data sets, their partitions over workers and the order of batches.

A run needs three things from here, all of them NumPy on the host:

1. a :class:`Dataset` from :func:`load`, or several joined by :func:`combine`;
2. ``shards``, one array of training indices per worker, from :func:`iid_shards`,
   :func:`by_source` or :func:`dirichlet_label_skew`;
3. the indices of each round's batches, from :func:`batch_order`.

Nothing heavy is imported before it is needed: ``digits`` takes scikit-learn, every other set
tensorflow-datasets, and TensorFlow itself only while a set is being prepared.
"""

import collections
import contextlib
import dataclasses
import hashlib
import importlib
import importlib.util
import json
import logging
import os
import pathlib
import tempfile
import urllib.parse
import uuid
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

_log = logging.getLogger(__name__)

_CACHE_DIR = "sasg_jax_cache"
_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
_MAX_SEED = 2**32 - 1  # A larger seed would take two words of a seed sequence and could collide.
_MAX_DRAWS = 1000
_READ_CHUNK = 1024


@dataclasses.dataclass(frozen=True)
class Dataset:
    """An image-classification data set held in memory.

    Attributes:
      name: what results are to be labelled with.
      train_images: shape (N, H, W, C), dtype uint8, values 0..255.
      train_labels: shape (N,), dtype int32, values 0..num_classes - 1.
      test_images: shape (N_test, H, W, C), dtype uint8.
      test_labels: shape (N_test,), dtype int32.
      num_classes: number of classes.
      test_source: of a combination, the data set that each test example came from, shape (N_test,),
        dtype int32; None otherwise.
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    num_classes: int
    test_source: np.ndarray | None = None


# --- Loading ----------------------------------------------------------------------------------


def load(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    archives: str | os.PathLike[str] | None = None,
) -> Dataset:
    """Loads a data set by name.

    ``digits`` is scikit-learn's bundled ``load_digits``: 1,797 scanned 8x8 digits, the values
    0..16 scaled to 0..255, of which 36 images of each class, always the same ones, are the test
    set (1,437 train, 360 test). It needs no file and no network.

    Any other name is that of an image-classification set of tensorflow-datasets with the splits
    ``train`` and ``test``, e.g. ``mnist``, ``cifar10`` or ``emnist/balanced``. A set already
    prepared in ``data_dir`` is only read, without TensorFlow; otherwise its own builder prepares it
    in the ``array_record`` format, which needs TensorFlow. The decoded arrays are kept in
    ``<data_dir>/sasg_jax_cache``, and read from there as long as the prepared set is the same.

    An archive whose sha256 is not the one registered in tensorflow-datasets, such as a rebuilt or
    shortened one, is used all the same, but never silently: a warning is logged and
    ``Dataset.name`` becomes ``"<name> (unregistered archive)"``, now and whenever that prepared set
    is read again. The first line of a file ``label.txt`` beside the archive takes the place of
    "unregistered archive", e.g. "JPEG" for recompressed images.

    Args:
      name: ``"digits"`` or a tensorflow-datasets name, optionally with a config.
      data_dir: where prepared sets are kept. Defaults to tensorflow-datasets' own default, the
        environment variable ``TFDS_DATA_DIR`` or ``~/tensorflow_datasets``.
      archives: directory with the original archive files, which are looked for in
        ``<archives>/<name>`` and then in ``archives`` itself. All files that tensorflow-datasets
        registers for the set must be in one of the two, also those of its other configs. Not
        looked at when the set is already prepared. With None the files are downloaded; without a
        network tensorflow-datasets retries for minutes before it gives up.

    Returns:
      A :class:`Dataset`. Examples come in the order in which they are stored, which for
      tensorflow-datasets is a fixed shuffle.

    Raises:
      ImportError: a package is missing; the message names the extra to install.
      FileNotFoundError: ``archives`` lacks files; the message names all of them.
      ValueError: the set has no image and class label as its supervised keys, lacks a ``train`` or
        ``test`` split, holds unlabelled examples or images of more than one shape; or a file in
        ``archives`` is the original archive of another data set.
    """
    if name == "digits":
        return _load_digits()

    _require("A data set other than digits", "datasets", "tensorflow_datasets", "PIL")
    tfds = importlib.import_module("tensorflow_datasets")
    if not hasattr(tfds, "builder"):  # It logs what fails inside it and comes out half empty.
        raise ImportError(
            "tensorflow_datasets failed to import, see its log: install what it lacks with "
            '`pip install "sasg_jax[datasets]"`.'
        )
    directory = None if data_dir is None else os.path.expanduser(data_dir)
    builder = tfds.builder(name, data_dir=directory)
    image_key, label_key = _supervised_keys(tfds, builder, name)
    cache = pathlib.Path(builder.data_dir_root) / _CACHE_DIR
    prepared = pathlib.Path(builder.data_dir)
    # Beside the prepared set, so that it can be written first: no unlabelled set can ever be left.
    marker = prepared.parent / f"unregistered_archive-{prepared.name}.json"

    if not prepared.exists():
        builder = tfds.builder(name, data_dir=directory, file_format="array_record")
        _prepare(tfds, builder, name, archives, cache, marker)
    label = name
    if marker.exists():
        label = f"{name} ({json.loads(marker.read_text())['label']})"
        _log.warning(
            "%s was prepared from archives that tensorflow-datasets does not know, see %s: its "
            "results are labelled %r.",
            name,
            marker,
            label,
        )

    for split in ("train", "test"):
        if split not in builder.info.splits:
            raise ValueError(
                f"Expected name={name!r} to have the splits 'train' and 'test', got "
                f"{sorted(builder.info.splits)}."
            )
    num_classes = builder.info.features[label_key].num_classes
    cache_file = cache / f"{builder.info.full_name.replace('/', '-')}.npz"
    info_stat = (prepared / "dataset_info.json").stat()
    fingerprint = f"{info_stat.st_mtime_ns} {info_stat.st_size}"
    arrays = _read_cache(cache_file, fingerprint)
    if arrays is None:
        arrays = {}
        for split in ("train", "test"):
            images, labels = _read_split(builder, split, image_key, label_key, name)
            arrays[f"{split}_images"], arrays[f"{split}_labels"] = images, labels
        shapes = [arrays[f"{split}_images"].shape[1:] for split in ("train", "test")]
        if shapes[0] != shapes[1]:
            raise _shapes_error(name, *shapes)
        _write_cache(cache_file, fingerprint, arrays)
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


def _load_digits() -> Dataset:
    _require("The digits data set", "experiments", "sklearn")
    digits = importlib.import_module("sklearn.datasets").load_digits()
    images = np.rint(digits.images[..., None] * (255 / 16)).astype(np.uint8)
    labels = digits.target.astype(np.int32)
    rng = np.random.default_rng(0)
    is_test = np.zeros(len(labels), bool)
    for label in range(10):
        is_test[rng.permutation(np.flatnonzero(labels == label))[:36]] = True
    return Dataset(
        name="digits",
        train_images=images[~is_test],
        train_labels=labels[~is_test],
        test_images=images[is_test],
        test_labels=labels[is_test],
        num_classes=10,
    )


def _require(purpose: str, extra: str, *modules: str) -> None:
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise ImportError(
            f"{purpose} needs {' and '.join(missing)}, not found here: install with "
            f'`pip install "sasg_jax[{extra}]"`.'
        )


def _supervised_keys(tfds: Any, builder: Any, name: str) -> tuple[str, str]:
    keys, features = builder.info.supervised_keys, builder.info.features
    if (
        not isinstance(keys, tuple)
        or len(keys) != 2
        or not all(isinstance(key, str) for key in keys)
        or not isinstance(features[keys[0]], tfds.features.Image)
        or not isinstance(features[keys[1]], tfds.features.ClassLabel)
        or features[keys[0]].np_dtype != np.uint8
    ):
        raise ValueError(
            f"Expected name={name!r} to be an image-classification set, with an image of dtype "
            f"uint8 and a class label as its supervised keys, got {keys}."
        )
    return keys


def _shapes_error(name: str, first: tuple[int, ...], second: tuple[int, ...]) -> ValueError:
    return ValueError(
        f"Expected name={name!r} to hold images of one shape, got {first} and {second}."
    )


def _read_split(
    builder: Any, split: str, image_key: str, label_key: str, name: str
) -> tuple[np.ndarray, np.ndarray]:
    source = builder.as_data_source(split)
    shape = source[0][image_key].shape
    images = np.empty((len(source), *shape), np.uint8)
    labels = np.empty(len(source), np.int32)
    for start in range(0, len(source), _READ_CHUNK):
        indices = list(range(start, min(start + _READ_CHUNK, len(source))))
        # Three times as fast as source[i] one by one.
        for i, example in zip(indices, source.__getitems__(indices), strict=True):
            if example[image_key].shape != shape:
                raise _shapes_error(name, shape, example[image_key].shape)
            images[i] = example[image_key]
            labels[i] = example[label_key]
    if labels.min() < 0:
        raise ValueError(
            f"Expected name={name!r} to have labelled examples only, but its {split!r} split has "
            f"{np.count_nonzero(labels < 0)} without a label."
        )
    return images, labels


# --- The cache of decoded arrays --------------------------------------------------------------


def _read_cache(path: pathlib.Path, fingerprint: str) -> dict[str, np.ndarray] | None:
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            if str(file["fingerprint"]) == fingerprint:
                return {key: file[key] for key in _ARRAYS}
    except FileNotFoundError:
        pass
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        _log.warning("Not using the damaged cache %s: %s", path, error)
    return None


def _write_cache(path: pathlib.Path, fingerprint: str, arrays: Mapping[str, np.ndarray]) -> None:
    contents: dict[str, Any] = {"fingerprint": np.array(fingerprint), **arrays}
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            np.savez(file, **contents)
        os.replace(temporary, path)
    except OSError as error:  # A full disk or a shared read-only folder: slower, but no failure.
        _log.warning("Could not cache the decoded arrays in %s: %s", path, error)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


# --- Preparing with tensorflow-datasets -------------------------------------------------------


def _prepare(
    tfds: Any,
    builder: Any,
    name: str,
    archives: str | os.PathLike[str] | None,
    cache: pathlib.Path,
    marker: pathlib.Path,
) -> None:
    """Prepares ``builder``'s data set, from ``archives`` if given."""
    _require(f"Preparing {name}", "datasets", "tensorflow", "importlib_resources")
    manual_dir, overrides, unregistered = None, {}, {}
    if archives is not None:
        manual_dir = _find_archives(builder, name, pathlib.Path(archives).expanduser())
        overrides, unregistered = _check_archives(builder, name, manual_dir)

    marker.unlink(missing_ok=True)
    if unregistered:
        _log.warning(
            "Preparing %s from files in %s whose sha256 is not the registered one: %s.",
            name,
            manual_dir,
            ", ".join(unregistered),
        )
        marker.parent.mkdir(parents=True, exist_ok=True)
        marked = {"label": _archive_label(manual_dir), "files": unregistered}
        marker.write_text(json.dumps(marked, indent=2) + "\n")

    # TensorFlow encodes a few images; it must not take the accelerators' memory for that.
    with contextlib.suppress(RuntimeError):  # It is already running: then that is the caller's.
        importlib.import_module("tensorflow").config.set_visible_devices([], "GPU")
    cache.mkdir(parents=True, exist_ok=True)
    # tensorflow-datasets takes an archive extracted earlier by its file name alone, which is the
    # same for MNIST and Fashion-MNIST and for a replaced archive: hence a new folder every time.
    with (
        tempfile.TemporaryDirectory(dir=cache, prefix="extract-") as extract_dir,
        _overridden(builder.url_infos, overrides),
    ):
        config = tfds.download.DownloadConfig(manual_dir=manual_dir, extract_dir=extract_dir)
        builder.download_and_prepare(download_config=config)


def _archive_label(directory: pathlib.Path | None) -> str:
    """What the results of an unregistered archive are labelled with."""
    path = None if directory is None else directory / "label.txt"
    text = path.read_text() if path is not None and path.exists() else ""
    return text.partition("\n")[0].strip() or "unregistered archive"


def _file_name(url: str, url_info: Any) -> str:
    """The name under which tensorflow-datasets would save ``url``."""
    path = urllib.parse.urlsplit(url).path
    return url_info.filename or urllib.parse.unquote(path.rsplit("/", 1)[-1])


def _find_archives(builder: Any, name: str, archives: pathlib.Path) -> pathlib.Path:
    """Returns the directory that has all registered files of ``builder``."""
    candidates = [archives / builder.name, archives]
    names = sorted({_file_name(url, info) for url, info in (builder.url_infos or {}).items()})
    missing = {
        directory: [file for file in names if not (directory / file).is_file()]
        for directory in candidates
        if directory.is_dir()
    }
    for directory, files in missing.items():
        if not files:
            return directory
    absent = min(missing.values(), key=len, default=names)
    raise FileNotFoundError(
        f"Expected the {len(names)} archives of {name} together in {candidates[0]} or in "
        f"{candidates[1]}; missing: {', '.join(absent) or 'both directories'}."
    )


def _check_archives(
    builder: Any, name: str, directory: pathlib.Path
) -> tuple[dict[str, Any], dict[str, dict[str, str]]]:
    """Compares the archives in ``directory`` with their registered checksums.

    Returns:
      The changes to make to ``builder.url_infos`` for tensorflow-datasets to take the files, and
      ``{file name: {"sha256": ..., "registered_sha256": ...}}`` of those not registered.

    Raises:
      ValueError: a file is the registered one of another URL, most likely of another data set with
        equal file names.
    """
    checksums = importlib.import_module("tensorflow_datasets.core.download.checksums")
    by_file = collections.defaultdict(list)
    for url, info in (builder.url_infos or {}).items():
        by_file[_file_name(url, info)].append((url, info))

    overrides, unregistered = {}, {}
    for file, entries in by_file.items():
        with open(directory / file, "rb") as opened:
            sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
            size = os.fstat(opened.fileno()).st_size
        for url, info in entries:
            if info.filename is None:  # Without it the file would be looked for on the network.
                overrides[url] = dataclasses.replace(info, filename=file)
        if any(info.checksum == sha256 for _, info in entries):
            continue
        urls = {url for url, _ in entries}
        for url, info in checksums.get_all_url_infos().items():
            if info.checksum == sha256 and url not in urls:
                raise ValueError(
                    f"Expected {directory / file} to be an archive of {name}, but it is that of "
                    f"{url}; keep each data set's archives in a folder of its own name."
                )
        if len(entries) == 1:  # Of several, which one it stands for is anyone's guess: tfds fails.
            url, info = entries[0]
            size = type(info.size)(size)
            overrides[url] = dataclasses.replace(info, size=size, checksum=sha256, filename=file)
            unregistered[file] = {"sha256": sha256, "registered_sha256": info.checksum}
    return overrides, unregistered


@contextlib.contextmanager
def _overridden(mapping: dict[str, Any] | None, overrides: Mapping[str, Any]) -> Iterator[None]:
    """Puts ``overrides`` in place of existing entries of ``mapping`` within the context."""
    if mapping is None or not overrides:
        yield
        return
    original = {key: mapping[key] for key in overrides}
    mapping.update(overrides)
    try:
        yield
    finally:
        mapping.update(original)


# --- Several data sets ------------------------------------------------------------------------


def combine(datasets: Sequence[Dataset]) -> tuple[Dataset, np.ndarray]:
    """Joins data sets into one, e.g. for workers that hold different ones.

    Grey images are repeated over the channels of the others, and smaller images are padded with
    zeros on all sides, to the largest height and width. Labels are kept as they are, so class 3 of
    every set becomes the same class 3.

    Args:
      datasets: one or more data sets.

    Returns:
      The joined :class:`Dataset`, whose ``num_classes`` is the largest of the parts', and
      ``train_source``, shape (N,), dtype int32: the position in ``datasets`` that each training
      example came from, as :func:`by_source` takes it.

    Raises:
      ValueError: there is no data set, or the numbers of channels cannot be brought together.
    """
    if not datasets:
        raise ValueError(f"Expected datasets={datasets!r} to hold at least 1 data set.")
    image_shapes = [dataset.train_images.shape[1:] for dataset in datasets]
    height, width, channels = (max(sizes) for sizes in zip(*image_shapes, strict=True))
    for dataset, image_shape in zip(datasets, image_shapes, strict=True):
        if image_shape[2] not in (1, channels):
            raise ValueError(
                f"Expected the images of {dataset.name!r} to have 1 or {channels} channels, got "
                f"{image_shape[2]}."
            )

    def join(parts: list[np.ndarray]) -> np.ndarray:
        joined = np.zeros((sum(map(len, parts)), height, width, channels), np.uint8)
        start = 0
        for part in parts:
            number, h, w, _ = part.shape
            top, left = (height - h) // 2, (width - w) // 2
            joined[start : start + number, top : top + h, left : left + w] = part
            start += number
        return joined

    sources = np.arange(len(datasets), dtype=np.int32)
    combined = Dataset(
        name=" + ".join(dataset.name for dataset in datasets),
        train_images=join([dataset.train_images for dataset in datasets]),
        train_labels=np.concatenate([dataset.train_labels for dataset in datasets]),
        test_images=join([dataset.test_images for dataset in datasets]),
        test_labels=np.concatenate([dataset.test_labels for dataset in datasets]),
        num_classes=max(dataset.num_classes for dataset in datasets),
        test_source=np.repeat(sources, [len(dataset.test_labels) for dataset in datasets]),
    )
    return combined, np.repeat(sources, [len(dataset.train_labels) for dataset in datasets])


# --- Partitions over workers ------------------------------------------------------------------


def iid_shards(num_examples: int, num_workers: int, seed: int) -> list[np.ndarray]:
    """Deals all examples out evenly, at random.

    Args:
      num_examples: size of the training set.
      num_workers: number of shards, from 1 to ``num_examples``.
      seed: integer from 0 to 2**32 - 1.

    Returns:
      One sorted int64 array of indices per worker: disjoint, covering all examples, with sizes
      that differ by at most one.

    Raises:
      ValueError: an argument is out of range.
    """
    _check_integer("num_examples", num_examples, 1)
    _check_integer("num_workers", num_workers, 1, num_examples)
    permutation = _partition_rng(seed).permutation(num_examples)
    return [np.sort(shard) for shard in np.array_split(permutation, num_workers)]


def by_source(train_source: np.ndarray, num_workers: int, seed: int) -> list[np.ndarray]:
    """Gives worker m examples of data set m % num_sources only, at random within it.

    Args:
      train_source: shape (N,), integer: each example's source, 0..num_sources - 1, as
        :func:`combine` returns it.
      num_workers: number of shards, at least num_sources.
      seed: integer from 0 to 2**32 - 1.

    Returns:
      One sorted int64 array of indices per worker: disjoint, covering all examples; the sizes of
      the shards of one source differ by at most one.

    Raises:
      ValueError: an argument is out of range, or a source has fewer examples than workers.
    """
    train_source = _check_vector("train_source", train_source)
    num_sources = int(train_source.max()) + 1
    _check_integer("num_workers", num_workers, num_sources)
    rng = _partition_rng(seed)
    shards = [np.empty(0, np.int64)] * num_workers
    for source in range(num_sources):
        indices = rng.permutation(np.flatnonzero(train_source == source))
        workers = range(source, num_workers, num_sources)
        if len(indices) < len(workers):
            raise ValueError(
                f"Expected num_workers={num_workers!r} to leave every worker an example, but "
                f"{len(workers)} workers share the {len(indices)} of source {source}."
            )
        for worker, shard in zip(workers, np.array_split(indices, len(workers)), strict=True):
            shards[worker] = np.sort(shard)
    return shards


def dirichlet_label_skew(
    labels: np.ndarray, num_workers: int, concentration: float, seed: int, min_examples: int = 1
) -> list[np.ndarray]:
    r"""Gives every worker another mixture of classes.

    For every class the shares of the workers are drawn from a symmetric Dirichlet distribution,

    .. math:: (q_{c,1}, \dots, q_{c,M}) \sim \mathrm{Dir}(\alpha, \dots, \alpha),

    and worker m gets that share of the class's examples, at random and rounded. The smaller
    :math:`\alpha` is, the fewer workers hold a class; for large ones the shards become i.i.d. All
    shares are drawn again until every worker has at least ``min_examples``.

    Args:
      labels: shape (N,), integer, not negative.
      num_workers: number of shards :math:`M`, from 1 to N.
      concentration: :math:`\alpha`, positive and finite.
      seed: integer from 0 to 2**32 - 1.
      min_examples: the least size of a shard, from 1 to N // num_workers.

    Returns:
      One sorted int64 array of indices per worker: disjoint, covering all examples.

    Raises:
      ValueError: an argument is out of range, or 1,000 draws left a worker with too few examples.

    References: Hsu et al., `Measuring the Effects of Non-Identical Data Distribution for Federated
    Visual Classification <https://arxiv.org/abs/1909.06335>`_, 2019; drawn by class as in Yurochkin
    et al., `Bayesian Nonparametric Federated Learning of Neural Networks
    <https://arxiv.org/abs/1905.12022>`_, 2019
    """
    labels = _check_vector("labels", labels)
    _check_integer("num_workers", num_workers, 1, len(labels))
    _check_integer("min_examples", min_examples, 1, len(labels) // num_workers)
    if not 0 < concentration < np.inf:
        raise ValueError(f"Expected concentration={concentration!r} to be positive and finite.")
    rng = _partition_rng(seed)
    counts = np.bincount(labels)
    for _ in range(_MAX_DRAWS):
        shares = rng.dirichlet(np.full(num_workers, concentration), size=len(counts))
        # Where worker m's share of class c ends, rounded.
        ends = np.rint(np.cumsum(shares, axis=1) * counts[:, None]).astype(np.int64)
        if np.diff(ends, axis=1, prepend=0).sum(axis=0).min() >= min_examples:
            break
    else:
        raise ValueError(
            f"Expected concentration={concentration!r} to leave each of {num_workers} workers at "
            f"least {min_examples} examples in one of {_MAX_DRAWS} draws: use a larger "
            "concentration, fewer workers or a smaller min_examples."
        )
    pieces = [
        np.split(rng.permutation(np.flatnonzero(labels == label)), ends[label, :-1])
        for label in range(len(counts))
    ]
    return [np.sort(np.concatenate(shard)) for shard in zip(*pieces, strict=True)]


# --- Order of batches -------------------------------------------------------------------------


def batch_order(
    shards: Sequence[np.ndarray],
    batch_size: int,
    iterations: int,
    seed: int,
    start: int = 0,
    workers: Sequence[int] | None = None,
) -> np.ndarray:
    """Returns the training examples in the batches of rounds start..start + iterations - 1.

    Every worker walks through its own shard in a new random order each epoch. Epochs follow each
    other without a gap, so no example is dropped: a batch may span two epochs, or many where the
    shard is smaller than the batch.

    The order depends on ``shards``, ``batch_size`` and ``seed`` alone, so a run that is resumed or
    works in chunks gets the same batches as one that asks for all rounds at once. Only the epochs
    in these rounds are drawn, each from its own generator.

    Args:
      shards: M arrays of training indices, not empty, of any integer dtype.
      batch_size: examples per worker and round, B.
      iterations: number of rounds, at least 1.
      seed: integer from 0 to 2**32 - 1.
      start: the first round, from 0.
      workers: whose batches to return, W of the M workers; all of them by default.

    Returns:
      Indices into the training set, shape (iterations, W, B), dtype int32.

    Raises:
      ValueError: an argument is out of range, or a shard is not a non-empty integer vector.
    """
    _check_integer("batch_size", batch_size, 1)
    _check_integer("iterations", iterations, 1)
    _check_integer("seed", seed, 0, _MAX_SEED)
    _check_integer("start", start, 0)
    if not len(shards):
        raise ValueError(f"Expected shards={shards!r} to hold at least 1 shard.")
    workers = range(len(shards)) if workers is None else workers
    for worker in workers:
        _check_integer("workers", worker, 0, len(shards) - 1)
    order = np.empty((iterations, len(workers), batch_size), np.int32)
    begin, end = start * batch_size, (start + iterations) * batch_size
    for column, worker in enumerate(workers):
        shard = _check_vector(f"shards[{worker}]", shards[worker])
        epochs = range(begin // len(shard), -(-end // len(shard)))
        walk = np.concatenate(
            [np.random.default_rng([seed, worker, epoch]).permutation(shard) for epoch in epochs]
        )
        skipped = begin - epochs.start * len(shard)
        order[:, column] = walk[skipped : skipped + end - begin].reshape(iterations, batch_size)
    return order


def _partition_rng(seed: int) -> np.random.Generator:
    _check_integer("seed", seed, 0, _MAX_SEED)
    # The last word sets it apart from every [seed, worker, epoch] of batch_order: missing words
    # count as zeros, so [seed] alone would be the generator of worker 0's first epoch.
    return np.random.default_rng([seed, 0, 0, 1])


def _check_integer(name: str, value: Any, minimum: int, maximum: int | None = None) -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | np.integer)
        or value < minimum
        or (maximum is not None and value > maximum)
    ):
        allowed = f"of at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
        raise ValueError(f"Expected {name}={value!r} to be an integer {allowed}.")


def _check_vector(name: str, value: Any) -> np.ndarray:
    array = np.asarray(value)
    if array.ndim != 1 or not array.size or array.dtype.kind not in "iu" or array.min() < 0:
        raise ValueError(
            f"Expected {name} to be a non-empty vector of integers of at least 0, got shape "
            f"{array.shape} and dtype {array.dtype}."
        )
    return array
