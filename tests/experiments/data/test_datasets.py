"""Tests of experiments.data: loading, caching, partitions and the order of batches."""

import collections
import gzip
import importlib
import importlib.machinery
import importlib.util
import io
import json
import logging
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import types
from typing import Any

import numpy as np
import pytest

from experiments.data import datasets as data

HAS_TFDS = importlib.util.find_spec("tensorflow_datasets") is not None
HAS_TENSORFLOW = importlib.util.find_spec("tensorflow") is not None
needs_tfds = pytest.mark.skipif(not HAS_TFDS, reason="tensorflow_datasets is not installed")
needs_preparing = pytest.mark.skipif(
    not (HAS_TFDS and HAS_TENSORFLOW),
    reason="preparing needs tensorflow_datasets and tensorflow, not both of which are installed",
)

UNREGISTERED = "unregistered archive"


def assert_partition(shards, num_examples):
    np.testing.assert_array_equal(np.sort(np.concatenate(shards)), np.arange(num_examples))
    for shard in shards:
        assert shard.dtype == np.int64
        np.testing.assert_array_equal(shard, np.sort(shard))


def examples(images, labels):
    """The multiset of (image bytes, label)."""
    return collections.Counter(
        (image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)
    )


def tiny(name="tiny", *, size=4, channels=1, num_classes=3, train=6, test=3, value=1):
    def images(number):
        return np.full((number, size, size, channels), value, np.uint8)

    def labels(number):
        return np.arange(number, dtype=np.int32) % num_classes

    return data.Dataset(name, images(train), labels(train), images(test), labels(test), num_classes)


class TestDigits:
    def test_holds_all_digits_once(self):
        sklearn_datasets = pytest.importorskip("sklearn.datasets")
        raw = sklearn_datasets.load_digits()
        digits = data.load("digits")
        assert digits.name == "digits"
        assert digits.num_classes == 10
        assert digits.train_images.shape == (1437, 8, 8, 1)
        assert digits.test_images.shape == (360, 8, 8, 1)
        assert digits.train_images.dtype == digits.test_images.dtype == np.uint8
        assert digits.train_labels.dtype == digits.test_labels.dtype == np.int32
        images = np.concatenate([digits.train_images, digits.test_images])
        assert images.max() == 255
        unscaled = np.rint(images[..., 0] / 255 * 16)
        labels = np.concatenate([digits.train_labels, digits.test_labels])
        assert examples(unscaled, labels) == examples(raw.images, raw.target)

    def test_split_is_stratified_and_fixed(self):
        sklearn_datasets = pytest.importorskip("sklearn.datasets")
        first, second = data.load("digits"), data.load("digits")
        np.testing.assert_array_equal(np.bincount(first.test_labels), np.full(10, 36))
        np.testing.assert_array_equal(first.test_images, second.test_images)
        # Not simply the end of the file, which other people wrote: spread over all of it.
        images = np.rint(sklearn_datasets.load_digits().images * (255 / 16)).astype(np.uint8)
        position = {image.tobytes(): i for i, image in enumerate(images)}
        positions = [position[image.tobytes()] for image in first.test_images]
        assert np.histogram(positions, bins=4, range=(0, 1797))[0].min() > 60

    def test_missing_scikit_learn_is_named(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "sklearn", None)
        with pytest.raises(ImportError, match=r'sklearn.*pip install "sasg_jax\[experiments\]"'):
            data.load("digits")


class TestMissingPackages:
    def test_missing_tensorflow_datasets_is_named(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
        with pytest.raises(
            ImportError, match=r'tensorflow_datasets.*pip install "sasg_jax\[datasets\]"'
        ):
            data.load("mnist")

    @needs_tfds
    def test_missing_tensorflow_is_named_when_preparing(self, tmp_path):
        code = """
import sys
from experiments.data import datasets as data
try:
    data.load("mnist", data_dir=sys.argv[1], archives=sys.argv[1])
except ImportError as error:
    assert "Preparing mnist needs tensorflow" in str(error), error
    assert 'pip install "sasg_jax[datasets]"' in str(error), error
else:
    raise AssertionError("no ImportError")
"""
        run_python(NO_TENSORFLOW + code, tmp_path)

    def test_half_imported_tensorflow_datasets_is_named(self, monkeypatch):
        # Whatever fails while it is imported, it only logs.
        empty = types.ModuleType("tensorflow_datasets")
        empty.__spec__ = importlib.machinery.ModuleSpec("tensorflow_datasets", None)
        monkeypatch.setitem(sys.modules, "tensorflow_datasets", empty)
        monkeypatch.setattr(data, "_require", lambda *args: None)
        with pytest.raises(ImportError, match=r'pip install "sasg_jax\[datasets\]"'):
            data.load("mnist")

    def test_import_is_light(self):
        code = (
            "import sys, experiments.data.datasets; "
            "heavy = {'jax', 'sklearn', 'tensorflow', 'tensorflow_datasets'} & set(sys.modules); "
            "assert not heavy, heavy"
        )
        run_python(code)


# In a process of its own: tensorflow_datasets remembers what it once failed to import.
NO_TENSORFLOW = """
from importlib.machinery import PathFinder
find_spec = PathFinder.find_spec
def find_spec_but_tensorflow(name, *args):
    return None if name.split(".")[0] == "tensorflow" else find_spec(name, *args)
PathFinder.find_spec = find_spec_but_tensorflow
"""


def run_python(code, *arguments):
    root = pathlib.Path(data.__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


# --- Archives made by the tests, in the original layouts --------------------------------------


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for member, content in members.items():
            entry = tarfile.TarInfo(member)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def cifar_rows(images, *labels):
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), 3072)
    return np.concatenate([*(label[:, None] for label in labels), planes], 1).tobytes()


def write_cifar10(path, seed, batch=4):
    """Writes a tiny cifar-10-binary.tar.gz; returns its train and test images and labels."""
    rng = np.random.default_rng(seed)
    images = rng.integers(256, size=(6 * batch, 32, 32, 3), dtype=np.uint8)
    labels = rng.permutation(np.arange(6 * batch) % 10).astype(np.uint8)
    files = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    members = {
        f"cifar-10-batches-bin/{file}": cifar_rows(
            images[i * batch : (i + 1) * batch], labels[i * batch : (i + 1) * batch]
        )
        for i, file in enumerate(files)
    }
    members["cifar-10-batches-bin/batches.meta.txt"] = names_file(10)
    write_tar(path, members)
    train = 5 * batch
    return (images[:train], labels[:train]), (images[train:], labels[train:])


def write_cifar100(path, seed, train=12, test=5):
    rng = np.random.default_rng(seed)
    images = rng.integers(256, size=(train + test, 32, 32, 3), dtype=np.uint8)
    fine = rng.integers(100, size=train + test).astype(np.uint8)
    coarse = (fine // 5).astype(np.uint8)
    write_tar(
        path,
        {
            "cifar-100-binary/train.bin": cifar_rows(images[:train], coarse[:train], fine[:train]),
            "cifar-100-binary/test.bin": cifar_rows(images[train:], coarse[train:], fine[train:]),
            "cifar-100-binary/coarse_label_names.txt": names_file(20),
            "cifar-100-binary/fine_label_names.txt": names_file(100),
        },
    )
    return (images[:train], fine[:train]), (images[train:], fine[train:])


def names_file(number):
    return "".join(f"class{i}\n" for i in range(number)).encode()


def assert_holds(dataset, train, test):
    assert dataset.train_images.dtype == dataset.test_images.dtype == np.uint8
    assert dataset.train_labels.dtype == dataset.test_labels.dtype == np.int32
    assert examples(dataset.train_images, dataset.train_labels) == examples(*train)
    assert examples(dataset.test_images, dataset.test_labels) == examples(*test)


@needs_preparing
class TestUnregisteredArchives:
    """Tiny archives in the original layout, whose checksums cannot be the registered ones."""

    @pytest.fixture
    def cifar10(self, tmp_path):
        """(data_dir, archives, train, test) of a prepared tiny CIFAR-10."""
        data_dir, archives = tmp_path / "data", tmp_path / "archives"
        train, test = write_cifar10(archives / "cifar-10-binary.tar.gz", seed=0)
        data.load("cifar10", data_dir=data_dir, archives=archives)
        return data_dir, archives, train, test

    def test_cifar10(self, tmp_path, caplog):
        train, test = write_cifar10(tmp_path / "cifar-10-binary.tar.gz", seed=0)
        with caplog.at_level(logging.WARNING, logger="experiments.data.datasets"):
            dataset = data.load("cifar10", data_dir=tmp_path / "data", archives=tmp_path)
        assert dataset.name == f"cifar10 ({UNREGISTERED})"
        assert dataset.num_classes == 10
        assert_holds(dataset, train, test)
        warnings = [record.getMessage() for record in caplog.records]
        assert any("cifar-10-binary.tar.gz" in warning for warning in warnings)
        assert any(UNREGISTERED in warning for warning in warnings)

    def test_cifar100_in_a_folder_of_its_own(self, tmp_path):
        archive = tmp_path / "archives" / "cifar100" / "cifar-100-binary.tar.gz"
        train, test = write_cifar100(archive, seed=0)
        dataset = data.load("cifar100", data_dir=tmp_path / "data", archives=tmp_path / "archives")
        assert dataset.name == f"cifar100 ({UNREGISTERED})"
        assert dataset.num_classes == 100  # The fine labels: the supervised ones.
        assert_holds(dataset, train, test)

    def test_a_file_beside_the_archive_says_what_it_is(self, tmp_path):
        write_cifar10(tmp_path / "archives" / "cifar-10-binary.tar.gz", seed=0)
        (tmp_path / "archives" / "label.txt").write_text("JPEG\nmore about it\n")
        archives, data_dir = tmp_path / "archives", tmp_path / "data"
        for again in ({"archives": archives}, {}):
            dataset = data.load("cifar10", data_dir=data_dir, **again)
            assert dataset.name == "cifar10 (JPEG)"

    @pytest.mark.parametrize("cached", [True, False])
    def test_label_outlives_the_preparation(self, cifar10, cached, caplog):
        data_dir, _, train, test = cifar10
        if not cached:
            shutil.rmtree(data_dir / "sasg_jax_cache")
        with caplog.at_level(logging.WARNING, logger="experiments.data.datasets"):
            dataset = data.load("cifar10", data_dir=data_dir)
        assert dataset.name == f"cifar10 ({UNREGISTERED})"
        assert UNREGISTERED in caplog.text
        assert_holds(dataset, train, test)

    def test_registration_is_left_alone(self, cifar10):
        tfds: Any = importlib.import_module("tensorflow_datasets")

        data_dir = cifar10[0]
        builder = tfds.builder("cifar10", data_dir=data_dir)
        (info,) = builder.url_infos.values()
        checksum_file = tfds.core.utils.tfds_path() / "url_checksums" / "cifar10.txt"
        assert info.checksum in checksum_file.read_text()
        (marker,) = data_dir.glob("cifar10/unregistered_archive-*.json")
        recorded = json.loads(marker.read_text())["files"]["cifar-10-binary.tar.gz"]
        assert recorded["registered_sha256"] == info.checksum
        assert recorded["sha256"] not in checksum_file.read_text()

    def test_registered_archive_loses_the_label(self, cifar10, monkeypatch):
        tfds: Any = importlib.import_module("tensorflow_datasets")

        data_dir, archives, train, test = cifar10
        (marker,) = data_dir.glob("cifar10/unregistered_archive-*.json")
        sha256 = json.loads(marker.read_text())["files"]["cifar-10-binary.tar.gz"]["sha256"]
        size = (archives / "cifar-10-binary.tar.gz").stat().st_size
        shutil.rmtree(data_dir / "cifar10" / str(tfds.builder("cifar10").version))
        # As if this archive were the registered one.
        (info,) = tfds.builder("cifar10").url_infos.values()
        monkeypatch.setattr(info, "checksum", sha256)
        monkeypatch.setattr(info, "size", type(info.size)(size))
        dataset = data.load("cifar10", data_dir=data_dir, archives=archives)
        assert dataset.name == "cifar10"
        assert_holds(dataset, train, test)

    def test_prepared_set_is_only_read(self, cifar10):
        data_dir, archives, train, test = cifar10
        write_cifar10(archives / "cifar-10-binary.tar.gz", seed=1)
        assert_holds(data.load("cifar10", data_dir=data_dir, archives=archives), train, test)
        shutil.rmtree(archives)
        assert_holds(data.load("cifar10", data_dir=data_dir, archives=archives), train, test)

    def test_new_preparation_uses_nothing_of_the_old_one(self, cifar10):
        data_dir, archives, old_train, _ = cifar10
        shutil.rmtree(data_dir / "cifar10")
        train, test = write_cifar10(archives / "cifar-10-binary.tar.gz", seed=1)
        assert examples(*train) != examples(*old_train)
        assert_holds(data.load("cifar10", data_dir=data_dir, archives=archives), train, test)

    def test_second_load_reads_the_cache(self, cifar10, monkeypatch):
        data_dir, _, train, test = cifar10
        monkeypatch.setattr(data, "_read_split", None)
        assert_holds(data.load("cifar10", data_dir=data_dir), train, test)
        (cache_file,) = (data_dir / "sasg_jax_cache").iterdir()  # And nothing temporary is left.
        assert cache_file.suffix == ".npz"
        cache_file.unlink()
        with pytest.raises(TypeError):
            data.load("cifar10", data_dir=data_dir)

    @pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
    def test_damaged_cache_is_made_again(self, cifar10, damage):
        data_dir, _, train, test = cifar10
        (cache_file,) = (data_dir / "sasg_jax_cache").glob("*.npz")
        intact = cache_file.read_bytes()
        damaged = {"truncated": intact[: len(intact) // 2], "garbage": b"x" * 99, "empty": b""}
        cache_file.write_bytes(damaged[damage])
        assert_holds(data.load("cifar10", data_dir=data_dir), train, test)
        with np.load(cache_file) as file:
            assert examples(file["train_images"], file["train_labels"]) == examples(*train)

    def test_cache_that_cannot_be_written_is_no_failure(self, cifar10, monkeypatch, caplog):
        data_dir, _, train, test = cifar10
        shutil.rmtree(data_dir / "sasg_jax_cache")

        def full_disk(file, **arrays):
            file.write(b"half")
            raise OSError("No space left on device")

        monkeypatch.setattr(data.np, "savez", full_disk)
        assert_holds(data.load("cifar10", data_dir=data_dir), train, test)
        assert "No space left" in caplog.text
        assert not list((data_dir / "sasg_jax_cache").iterdir())

    def test_reading_needs_no_tensorflow(self, cifar10):
        data_dir = cifar10[0]
        shutil.rmtree(data_dir / "sasg_jax_cache")
        code = """
import sys
from experiments.data import datasets as data
dataset = data.load("cifar10", data_dir=sys.argv[1])
assert dataset.train_images.shape == (20, 32, 32, 3)
assert "tensorflow_datasets" in sys.modules
assert "tensorflow" not in sys.modules
"""
        run_python(NO_TENSORFLOW + code, data_dir)


@needs_preparing
class TestArchivesErrors:
    MNIST = (
        "t10k-images-idx3-ubyte.gz",
        "t10k-labels-idx1-ubyte.gz",
        "train-images-idx3-ubyte.gz",
        "train-labels-idx1-ubyte.gz",
    )

    @pytest.mark.parametrize("folder", ["", "mnist"])
    @pytest.mark.parametrize("present", [0, 1, 3])
    def test_every_missing_file_is_named(self, tmp_path, folder, present):
        (tmp_path / folder).mkdir(exist_ok=True)
        for file in self.MNIST[:present]:
            (tmp_path / folder / file).write_bytes(b"")
        with pytest.raises(FileNotFoundError) as error:
            data.load("mnist", data_dir=tmp_path / "data", archives=tmp_path)
        for file in self.MNIST:
            assert (file in str(error.value)) == (file not in self.MNIST[:present])
        assert f"{tmp_path / 'mnist'} or in {tmp_path};" in str(error.value)

    def test_missing_directory(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"4 archives of mnist.*missing: t10k"):
            data.load("mnist", data_dir=tmp_path / "data", archives=tmp_path / "nowhere")

    def test_archive_of_another_data_set_is_refused(self, tmp_path, monkeypatch):
        checksums = importlib.import_module("tensorflow_datasets.core.download.checksums")

        archive = tmp_path / "cifar-10-binary.tar.gz"
        write_cifar10(archive, seed=0)
        registered = {"https://example.org/other.tar.gz": checksums.compute_url_info(archive)}
        monkeypatch.setattr(checksums, "get_all_url_infos", lambda: registered)
        with pytest.raises(ValueError, match=r"archive of cifar10, but .*example\.org/other"):
            data.load("cifar10", data_dir=tmp_path / "data", archives=tmp_path)
        assert not list((tmp_path / "data").glob("cifar10/*"))

    def test_broken_archive_leaves_no_prepared_set(self, tmp_path):
        archive = tmp_path / "cifar-10-binary.tar.gz"
        archive.write_bytes(gzip.compress(b"not a tar"))
        with pytest.raises(Exception, match="cifar"):
            data.load("cifar10", data_dir=tmp_path / "data", archives=tmp_path)
        train, test = write_cifar10(archive, seed=0)
        dataset = data.load("cifar10", data_dir=tmp_path / "data", archives=tmp_path)
        assert_holds(dataset, train, test)


@needs_tfds
class TestUnsuitableSets:
    @pytest.mark.parametrize("name", ["iris", "downsampled_imagenet", "imdb_reviews/plain_text"])
    def test_no_image_and_class_label(self, name, tmp_path):
        with pytest.raises(ValueError, match=f"Expected name='{name}' to be an image-classif"):
            data.load(name, data_dir=tmp_path, archives=tmp_path)

    def test_unknown_name(self, tmp_path):
        with pytest.raises(Exception, match="no_such_set not found"):
            data.load("no_such_set", data_dir=tmp_path)

    @needs_preparing
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("made_up_train_only", r"splits 'train' and 'test', got \['train'\]"),
            ("made_up_many_shapes", r"one shape, got \(\d, 4, 1\) and \(\d, 4, 1\)"),
            ("made_up_two_shapes", r"one shape, got \(2, 4, 1\) and \(3, 4, 1\)"),
            ("made_up_unlabelled", r"'test' split has 2 without a label"),
        ],
    )
    def test_made_up_sets(self, made_up_builders, name, message, tmp_path):
        with pytest.raises(ValueError, match=f"Expected name='{name}' to .*{message}"):
            data.load(name, data_dir=tmp_path)

    @needs_preparing
    def test_other_file_format(self, made_up_builders, tmp_path):
        tfds: Any = importlib.import_module("tensorflow_datasets")

        tfds.builder("made_up_good", data_dir=tmp_path / "records").download_and_prepare()
        with pytest.raises(NotImplementedError, match="choose another data_dir"):
            data.load("made_up_good", data_dir=tmp_path / "records")
        dataset = data.load("made_up_good", data_dir=tmp_path / "arrays")
        assert dataset.name == "made_up_good"
        assert sorted(dataset.train_images[:, 0, 0, 0]) == [0, 1, 2]


@pytest.fixture(scope="module")
def made_up_builders():
    """Registers builders that need no file: {split: [(height, label), ...]} each."""
    tfds: Any = importlib.import_module("tensorflow_datasets")

    def make(name, splits, height=None):
        class MadeUp(  # pyright: ignore[reportGeneralTypeIssues, reportCallIssue]
            tfds.core.GeneratorBasedBuilder,
            skip_registration=True,  # pyright: ignore[reportCallIssue]
        ):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                features = {
                    "image": tfds.features.Image(shape=(height, 4, 1)),
                    "label": tfds.features.ClassLabel(num_classes=3),
                }
                return tfds.core.DatasetInfo(
                    builder=self,
                    features=tfds.features.FeaturesDict(features),
                    supervised_keys=("image", "label"),
                )

            def _split_generators(self, dl_manager):
                return {split: self._generate_examples(split) for split in splits}

            def _generate_examples(self, split):
                for i, (height, label) in enumerate(splits[split]):
                    yield i, {"image": np.full((height, 4, 1), i, np.uint8), "label": label}

        return type(name, (MadeUp,), {"__module__": __name__})

    good = [(2, 0), (2, 1), (2, 2)]
    return [
        make("MadeUpGood", {"train": good, "test": good}, height=2),
        make("MadeUpTrainOnly", {"train": good}),
        make("MadeUpManyShapes", {"train": [(2, 0), (3, 1)], "test": good}),
        make("MadeUpTwoShapes", {"train": good, "test": [(3, 0)]}),
        make("MadeUpUnlabelled", {"train": good, "test": [(2, -1), (2, -1), (2, 0)]}),
    ]


class TestOriginalArchives:
    """Against the original files, where the environment says where they are."""

    @pytest.fixture
    def archives(self):
        directory = os.environ.get("SASG_JAX_ARCHIVES")
        if not directory or not (pathlib.Path(directory) / "mnist").is_dir():
            pytest.skip("SASG_JAX_ARCHIVES names no directory that has mnist/")
        return pathlib.Path(directory)

    @needs_preparing
    def test_mnist(self, archives, tmp_path):
        dataset = data.load("mnist", data_dir=tmp_path, archives=archives)
        assert dataset.name == "mnist"
        assert dataset.num_classes == 10

        def raw(part):
            def read(kind):
                return gzip.decompress((archives / "mnist" / f"{part}-{kind}.gz").read_bytes())

            images = np.frombuffer(read("images-idx3-ubyte"), np.uint8, offset=16)
            labels = np.frombuffer(read("labels-idx1-ubyte"), np.uint8, offset=8)
            return images.reshape(len(labels), 28, 28, 1), labels

        assert dataset.train_images.shape == (60000, 28, 28, 1)
        assert dataset.test_images.shape == (10000, 28, 28, 1)
        assert_holds(dataset, raw("train"), raw("t10k"))

        # Fashion-MNIST has the same file names: MNIST's must not be taken for them.
        with pytest.raises(ValueError, match="archive of fashion_mnist, but"):
            data.load("fashion_mnist", data_dir=tmp_path, archives=archives / "mnist")


class TestCombine:
    def test_grey_and_small_images(self):
        colour = tiny("colour", size=6, channels=3, num_classes=4, train=5, test=2, value=7)
        grey = tiny("grey", size=3, channels=1, num_classes=3, train=6, test=3, value=9)
        combined, source = data.combine([colour, grey])
        assert combined.name == "colour + grey"
        assert combined.num_classes == 4
        np.testing.assert_array_equal(source, [0] * 5 + [1] * 6)
        np.testing.assert_array_equal(combined.test_source, [0] * 2 + [1] * 3)
        assert source.dtype == np.int32
        assert combined.train_images.shape == (11, 6, 6, 3)
        assert combined.test_images.shape == (5, 6, 6, 3)
        assert combined.train_images.dtype == np.uint8
        np.testing.assert_array_equal(combined.train_images[:5], colour.train_images)
        expected = np.zeros((6, 6), np.uint8)
        expected[1:4, 1:4] = 9  # Padded by 1 before and 2 after.
        for channel in range(3):
            np.testing.assert_array_equal(combined.test_images[-1, :, :, channel], expected)
        np.testing.assert_array_equal(
            combined.train_labels, np.concatenate([colour.train_labels, grey.train_labels])
        )
        np.testing.assert_array_equal(
            combined.test_labels, np.concatenate([colour.test_labels, grey.test_labels])
        )
        assert combined.train_labels.dtype == np.int32

    def test_height_and_width_of_different_sets(self):
        first, second = tiny(), tiny()
        wide = data.dataclasses.replace(
            first,
            train_images=np.ones((6, 2, 8, 1), np.uint8),
            test_images=np.ones((3, 2, 8, 1), np.uint8),
        )
        combined, _ = data.combine([wide, second])
        assert combined.train_images.shape == (12, 4, 8, 1)
        assert combined.train_images.sum() == 6 * 16 + 6 * 16

    def test_one_data_set_is_itself(self):
        dataset = tiny()
        combined, source = data.combine([dataset])
        np.testing.assert_array_equal(combined.train_images, dataset.train_images)
        assert not source.any()

    def test_errors(self):
        with pytest.raises(ValueError, match="at least 1 data set"):
            data.combine([])
        with pytest.raises(ValueError, match="'two' to have 1 or 3 channels, got 2"):
            data.combine([tiny("three", channels=3), tiny("two", channels=2)])


class TestIidShards:
    @pytest.mark.parametrize(("num_examples", "num_workers"), [(10, 1), (10, 3), (10, 10), (7, 4)])
    def test_partition_of_even_sizes(self, num_examples, num_workers):
        shards = data.iid_shards(num_examples, num_workers, seed=0)
        assert len(shards) == num_workers
        assert_partition(shards, num_examples)
        sizes = [len(shard) for shard in shards]
        assert max(sizes) - min(sizes) <= 1

    def test_random_and_reproducible(self):
        first, again, other = (data.iid_shards(1000, 4, seed) for seed in (0, 0, 1))
        assert all(map(np.array_equal, first, again))
        assert not any(map(np.array_equal, first, other))
        # Each quarter of the examples is spread over all workers.
        for shard in first:
            counts = np.bincount(shard // 250, minlength=4)
            assert counts.min() > 30


class TestBySource:
    SOURCE = np.repeat(np.array([0, 1, 2], np.int32), [20, 31, 9])

    @pytest.mark.parametrize("num_workers", [3, 4, 7, 12])
    def test_each_worker_holds_one_source(self, num_workers):
        shards = data.by_source(self.SOURCE, num_workers, seed=0)
        assert len(shards) == num_workers
        assert_partition(shards, 60)
        for worker, shard in enumerate(shards):
            assert set(self.SOURCE[shard]) == {worker % 3}
        for source in range(3):
            sizes = [len(shard) for shard in shards[source::3]]
            assert max(sizes) - min(sizes) <= 1

    def test_random_and_reproducible(self):
        first, again, other = (data.by_source(self.SOURCE, 6, seed) for seed in (0, 0, 1))
        assert all(map(np.array_equal, first, again))
        assert not all(map(np.array_equal, first, other))
        assert not np.array_equal(first[0], np.arange(10))

    def test_errors(self):
        with pytest.raises(ValueError, match=r"num_workers=2 to be an integer of at least 3\."):
            data.by_source(self.SOURCE, 2, seed=0)
        with pytest.raises(ValueError, match=r"10 workers share the 9 of source 2"):
            data.by_source(self.SOURCE, 30, seed=0)
        with pytest.raises(ValueError, match="Expected train_source to be a non-empty vector"):
            data.by_source(np.zeros(4), 2, seed=0)


class TestDirichletLabelSkew:
    LABELS = np.random.default_rng(0).integers(10, size=2000).astype(np.int32)

    @pytest.mark.parametrize("concentration", [0.05, 0.5, 5.0, 1e6])
    @pytest.mark.parametrize("num_workers", [1, 3, 10])
    def test_partition(self, concentration, num_workers):
        shards = data.dirichlet_label_skew(self.LABELS, num_workers, concentration, seed=0)
        assert len(shards) == num_workers
        assert_partition(shards, len(self.LABELS))
        assert all(len(shard) for shard in shards)

    @pytest.mark.parametrize("concentration", [0.5, 4.0])
    def test_shares_are_dirichlet(self, concentration):
        # 500 classes of 200 examples: 500 draws of the shares of 4 workers.
        num_classes, size, num_workers = 500, 200, 4
        labels = np.random.default_rng(1).permutation(np.arange(num_classes * size) % num_classes)
        shards = data.dirichlet_label_skew(labels, num_workers, concentration, seed=0)
        shares = np.stack([np.bincount(labels[s], minlength=num_classes) for s in shards], 1) / size
        np.testing.assert_allclose(shares.sum(1), 1)
        mean = 1 / num_workers
        variance = mean * (1 - mean) / (num_workers * concentration + 1)
        np.testing.assert_allclose(shares.mean(0), mean, atol=4 * np.sqrt(variance / num_classes))
        np.testing.assert_allclose(shares.var(), variance, rtol=0.15)

    def test_large_concentration_is_even(self):
        shards = data.dirichlet_label_skew(self.LABELS, 5, 1e8, seed=0)
        whole = np.bincount(self.LABELS)
        for shard in shards:
            assert np.abs(np.bincount(self.LABELS[shard]) - whole / 5).max() <= 1

    def test_examples_of_a_class_are_dealt_at_random(self):
        shards = data.dirichlet_label_skew(np.zeros(100, int), 2, 1e8, seed=0)
        assert not np.array_equal(shards[0], np.arange(len(shards[0])))

    def test_draws_until_all_have_enough(self):
        def smallest(seed, min_examples):
            shards = data.dirichlet_label_skew(self.LABELS, 10, 0.3, seed, min_examples)
            return min(map(len, shards))

        assert min(smallest(seed, 1) for seed in range(10)) < 100  # So there is work to do.
        assert min(smallest(seed, 100) for seed in range(10)) >= 100

    def test_random_and_reproducible(self):
        first, again, other = (
            data.dirichlet_label_skew(self.LABELS, 4, 0.5, seed) for seed in (0, 0, 1)
        )
        assert all(map(np.array_equal, first, again))
        assert not any(map(np.array_equal, first, other))

    def test_gives_up(self):
        # Nearly all examples of the only class go to one worker.
        with pytest.raises(ValueError, match=r"concentration=0\.001 .*one of 1000 draws"):
            data.dirichlet_label_skew(np.zeros(100, int), 10, 0.001, seed=0)

    @pytest.mark.parametrize("concentration", [0, -1.0, float("inf"), float("nan")])
    def test_concentration_errors(self, concentration):
        with pytest.raises(
            ValueError, match=f"Expected concentration={concentration} to be positive and finite"
        ):
            data.dirichlet_label_skew(self.LABELS, 2, concentration, seed=0)

    def test_other_errors(self):
        with pytest.raises(ValueError, match=r"num_workers=2001 to be an integer from 1 to 2000\."):
            data.dirichlet_label_skew(self.LABELS, 2001, 1.0, seed=0)
        with pytest.raises(ValueError, match=r"min_examples=201 to be an integer from 1 to 200\."):
            data.dirichlet_label_skew(self.LABELS, 10, 1.0, seed=0, min_examples=201)
        with pytest.raises(ValueError, match=r"min_examples=0 to be an integer from 1"):
            data.dirichlet_label_skew(self.LABELS, 10, 1.0, seed=0, min_examples=0)
        for labels in ([], [0.0, 1.0], [[0], [1]], [0, -1]):
            with pytest.raises(ValueError, match="Expected labels to be a non-empty vector"):
                data.dirichlet_label_skew(np.array(labels), 1, 1.0, seed=0)


class TestBatchOrder:
    SHARDS = (np.array([3, 1, 4, 15, 9]), np.array([2, 6]), np.arange(20, 37))

    @pytest.mark.parametrize("batch_size", [1, 2, 4, 5, 7, 40])
    def test_every_epoch_is_a_permutation_of_the_shard(self, batch_size):
        order = data.batch_order(self.SHARDS, batch_size, 60, seed=0)
        assert order.shape == (60, 3, batch_size)
        assert order.dtype == np.int32
        for worker, shard in enumerate(self.SHARDS):
            walk = order[:, worker].ravel()
            whole = len(walk) // len(shard) * len(shard)
            epochs = walk[:whole].reshape(-1, len(shard))
            np.testing.assert_array_equal(
                np.sort(epochs, axis=1), np.tile(np.sort(shard), (len(epochs), 1))
            )
            rest = walk[whole:]
            assert len(set(rest)) == len(rest)

    @pytest.mark.parametrize("batch_size", [1, 3, 5, 40])
    def test_slices_agree_with_the_whole(self, batch_size):
        whole = data.batch_order(self.SHARDS, batch_size, 50, seed=7)
        for start, iterations in [(0, 50), (0, 1), (1, 1), (3, 20), (17, 33), (49, 1)]:
            part = data.batch_order(self.SHARDS, batch_size, iterations, seed=7, start=start)
            np.testing.assert_array_equal(part, whole[start : start + iterations])

    def test_the_walk_does_not_depend_on_the_batch_size(self):
        by_one = data.batch_order(self.SHARDS, 1, 60, seed=0)
        by_six = data.batch_order(self.SHARDS, 6, 10, seed=0)
        for worker in range(3):
            np.testing.assert_array_equal(by_one[:, worker].ravel(), by_six[:, worker].ravel())

    def test_order_differs_by_epoch_worker_and_seed(self):
        shards = [np.arange(50), np.arange(50)]
        epochs = data.batch_order(shards, 50, 3, seed=0)
        other = data.batch_order(shards, 50, 3, seed=1)
        walks = [tuple(walk) for walk in np.concatenate([epochs, other]).reshape(-1, 50)]
        assert len(set(walks)) == 12
        assert tuple(range(50)) not in walks

    def test_shard_is_kept(self):
        shards = [np.arange(10)]
        data.batch_order(shards, 3, 10, seed=0)
        np.testing.assert_array_equal(shards[0], np.arange(10))

    def test_only_the_epochs_needed_are_drawn(self, monkeypatch):
        seeds = []
        default_rng = np.random.default_rng

        def counting(seed):
            seeds.append(seed)
            return default_rng(seed)

        monkeypatch.setattr(data.np.random, "default_rng", counting)
        data.batch_order([np.arange(100)], 10, 12, seed=5, start=100_005)
        # Examples 1,000,050 to 1,000,170.
        assert seeds == [[5, 0, 10_000], [5, 0, 10_001]]
        seeds.clear()
        data.batch_order([np.arange(100)], 10, 10, seed=5, start=10)  # Exactly the second epoch.
        assert seeds == [[5, 0, 1]]

    def test_errors(self):
        shards = self.SHARDS
        with pytest.raises(ValueError, match=r"at least 1 shard\."):
            data.batch_order([], 1, 1, seed=0)
        with pytest.raises(ValueError, match=r"Expected shards\[1\] to be a non-empty vector"):
            data.batch_order([np.arange(3), np.arange(0)], 1, 1, seed=0)
        with pytest.raises(ValueError, match=r"batch_size=0 to be an integer of at least 1\."):
            data.batch_order(shards, 0, 1, seed=0)
        with pytest.raises(ValueError, match=r"iterations=0 to be an integer of at least 1\."):
            data.batch_order(shards, 1, 0, seed=0)
        with pytest.raises(ValueError, match=r"start=-1 to be an integer of at least 0\."):
            data.batch_order(shards, 1, 1, seed=0, start=-1)


PARTITIONS = {
    "iid_shards": lambda num_workers, seed: data.iid_shards(10, num_workers, seed),
    "by_source": lambda num_workers, seed: data.by_source(np.zeros(10, int), num_workers, seed),
    "dirichlet_label_skew": lambda num_workers, seed: data.dirichlet_label_skew(
        np.zeros(10, int), num_workers, 1.0, seed
    ),
}


@pytest.mark.parametrize("partition", PARTITIONS.values(), ids=PARTITIONS)
class TestPartitionErrors:
    @pytest.mark.parametrize("num_workers", [0, -1, 1.0, True, "2"])
    def test_num_workers(self, partition, num_workers):
        with pytest.raises(ValueError, match=f"Expected num_workers={num_workers!r} to be an int"):
            partition(num_workers, 0)

    def test_more_workers_than_examples(self, partition):
        with pytest.raises(ValueError, match="Expected num_workers=11 to "):
            partition(11, 0)

    @pytest.mark.parametrize("seed", [-1, 0.5, 2**32])
    def test_seed(self, partition, seed):
        with pytest.raises(ValueError, match=f"Expected seed={seed} to be an integer from 0 to"):
            partition(2, seed)

    def test_numpy_integers_are_integers(self, partition):
        assert all(map(np.array_equal, partition(np.int64(2), np.uint32(3)), partition(2, 3)))


def test_partition_and_order_use_different_generators():
    shuffled = [np.random.default_rng([3, 0, epoch]).permutation(100) for epoch in range(5)]
    (half, _) = data.iid_shards(100, 2, seed=3)
    assert not any(np.array_equal(half, np.sort(epoch[:50])) for epoch in shuffled)
