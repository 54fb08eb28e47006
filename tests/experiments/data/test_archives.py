"""Sets of tensorflow-datasets that are prepared from archives: labelled and read."""

import collections
import gzip
import hashlib
import importlib
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
from typing import Any

import numpy as np
import pytest

from experiments import data

HAS_TFDS = importlib.util.find_spec("tensorflow_datasets") is not None
HAS_TENSORFLOW = importlib.util.find_spec("tensorflow") is not None
needs_tfds = pytest.mark.skipif(not HAS_TFDS, reason="tensorflow_datasets is not installed")
needs_preparing = pytest.mark.skipif(
    not (HAS_TFDS and HAS_TENSORFLOW),
    reason="preparing needs tensorflow_datasets and tensorflow, not both of which are installed",
)

UNREGISTERED = "unregistered archive"


def examples(images, labels):
    """The multiset of (image bytes, label)."""
    return collections.Counter(
        (image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)
    )


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


@pytest.mark.datasets
@needs_tfds
def test_missing_tensorflow_is_named_when_preparing(tmp_path):
    code = """
import sys
from experiments import data
try:
    data.load("mnist", data_dir=sys.argv[1], archives=sys.argv[1])
except ImportError as error:
    assert "Preparing mnist needs tensorflow" in str(error), error
    assert 'pip install "sasg_jax[datasets]"' in str(error), error
else:
    raise AssertionError("no ImportError")
"""
    run_python(NO_TENSORFLOW + code, tmp_path)


# Archives made by the tests, in the original layouts ----------------------------------------------


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


@pytest.mark.datasets
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
        with caplog.at_level(logging.WARNING, logger="experiments.data"):
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

    def test_label_outlives_the_preparation(self, cifar10, caplog):
        data_dir, _, train, test = cifar10
        with caplog.at_level(logging.WARNING, logger="experiments.data.prepared"):
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

    def test_reading_needs_no_tensorflow(self, cifar10):
        data_dir = cifar10[0]
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

    @pytest.mark.datasets
    def test_archive_of_another_data_set_is_refused(self, tmp_path, monkeypatch):
        checksums = importlib.import_module("tensorflow_datasets.core.download.checksums")

        archive = tmp_path / "cifar-10-binary.tar.gz"
        write_cifar10(archive, seed=0)
        registered = {"https://example.org/other.tar.gz": checksums.compute_url_info(archive)}
        monkeypatch.setattr(checksums, "get_all_url_infos", lambda: registered)
        with pytest.raises(ValueError, match=r"archive of cifar10, but .*example\.org/other"):
            data.load("cifar10", data_dir=tmp_path / "data", archives=tmp_path)
        assert not list((tmp_path / "data").glob("cifar10/*"))

    @pytest.mark.datasets
    def test_broken_archive_leaves_no_prepared_set(self, tmp_path):
        archive = tmp_path / "cifar-10-binary.tar.gz"
        archive.write_bytes(gzip.compress(b"not a tar"))
        with pytest.raises(Exception, match="cifar"):
            data.load("cifar10", data_dir=tmp_path / "data", archives=tmp_path)
        train, test = write_cifar10(archive, seed=0)
        dataset = data.load("cifar10", data_dir=tmp_path / "data", archives=tmp_path)
        assert_holds(dataset, train, test)


@pytest.mark.datasets
@needs_preparing
def test_what_was_downloaded_before_needs_no_network(tmp_path, monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody listens
    resource = importlib.import_module("tensorflow_datasets.core.download.resource")
    tfds: Any = importlib.import_module("tensorflow_datasets")
    archive = tmp_path / "cifar-10-binary.tar.gz"
    train, test = write_cifar10(archive, seed=0)
    ((url, info),) = tfds.builder("cifar10").url_infos.items()
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    monkeypatch.setattr(info, "checksum", sha256)
    monkeypatch.setattr(info, "size", type(info.size)(archive.stat().st_size))
    downloaded = tmp_path / "data" / "downloads" / "cifar10" / resource.get_dl_fname(url, sha256)
    downloaded.parent.mkdir(parents=True)
    shutil.copy(archive, downloaded)
    resource.write_info_file(
        url=url,
        path=downloaded,
        dataset_name="cifar10",
        original_fname=archive.name,
        url_info=info,
    )
    dataset = data.load("cifar10", data_dir=tmp_path / "data")
    assert dataset.name == "cifar10"
    assert_holds(dataset, train, test)


class TestOriginalArchives:
    """Against the original files, where the environment says where they are."""

    @pytest.fixture
    def archives(self):
        directory = os.environ.get("SASG_JAX_ARCHIVES")
        if not directory or not (pathlib.Path(directory) / "mnist").is_dir():
            pytest.skip("SASG_JAX_ARCHIVES names no directory that has mnist/")
        return pathlib.Path(directory)

    @pytest.mark.datasets
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
