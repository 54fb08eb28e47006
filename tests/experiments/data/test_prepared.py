"""Sets of tensorflow-datasets: those that there are not, or that are not for us."""

import importlib
import importlib.util
import sys
import types
from typing import Any

import numpy as np
import pytest

from experiments import data
from experiments.data import prepared

HAS_TFDS = importlib.util.find_spec("tensorflow_datasets") is not None
HAS_TENSORFLOW = importlib.util.find_spec("tensorflow") is not None
needs_tfds = pytest.mark.skipif(not HAS_TFDS, reason="tensorflow_datasets is not installed")
needs_preparing = pytest.mark.skipif(
    not (HAS_TFDS and HAS_TENSORFLOW),
    reason="preparing needs tensorflow_datasets and tensorflow, not both of which are installed",
)


class TestMissingPackages:
    def test_missing_tensorflow_datasets_is_named(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
        with pytest.raises(
            ImportError, match=r'tensorflow_datasets.*pip install "sasg_jax\[datasets\]"'
        ):
            data.load("mnist")

    def test_half_imported_tensorflow_datasets_is_named(self, monkeypatch):
        # Whatever fails while it is imported, it only logs.
        empty = types.ModuleType("tensorflow_datasets")
        monkeypatch.setitem(sys.modules, "tensorflow_datasets", empty)
        with pytest.raises(ImportError, match=r'pip install "sasg_jax\[datasets\]"'):
            prepared.read("mnist", None, None)


@needs_preparing
class TestWithoutNetwork:
    """A proxy at which nobody listens: the servers cannot be reached, wherever the tests run."""

    @pytest.fixture(autouse=True)
    def no_network(self, monkeypatch):
        for scheme in ("http", "https"):
            monkeypatch.setenv(f"{scheme}_proxy", "http://127.0.0.1:9")
            monkeypatch.setenv(f"{scheme.upper()}_PROXY", "http://127.0.0.1:9")
        monkeypatch.setenv("NO_PROXY", "")
        monkeypatch.setenv("no_proxy", "")

    def test_it_is_said_before_anything_is_tried(self, tmp_path, monkeypatch):
        tfds: Any = importlib.import_module("tensorflow_datasets")
        monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", None)
        message = (
            r"mnist would have to be downloaded from \S+, which does not answer .*--archives DIR"
        )
        with pytest.raises(ConnectionError, match=message):
            data.load("mnist", data_dir=tmp_path)
        assert not list(tmp_path.iterdir())


@needs_tfds
class TestUnsuitableSets:
    @pytest.mark.parametrize("name", ["iris", "downsampled_imagenet", "imdb_reviews/plain_text"])
    def test_no_image_and_class_label(self, name, tmp_path):
        with pytest.raises(ValueError, match=f"Expected name='{name}' to be an image-classif"):
            data.load(name, data_dir=tmp_path, archives=tmp_path)

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("mnst", "did you mean mnist or kmnist or emnist?"),
            ("fashion-mnist", "did you mean fashion_mnist?"),
            ("digit", "did you mean digits?"),
            ("no_such_set", "nothing is called like it"),
            ("emnist/balance", 'Failed to construct dataset "emnist"'),
            ("", "nothing is called like it"),
        ],
    )
    def test_unknown_name(self, name, reason, tmp_path):
        """In one line, with the few names that are close to it."""
        with pytest.raises(ValueError, match="Expected name=") as caught:
            data.load(name, data_dir=tmp_path)
        said = str(caught.value)
        start = f"Expected name={name!r} to be 'digits' or a set of tensorflow-datasets: {reason}"
        assert said.startswith(start)
        assert "\n" not in said
        assert len(said) < 400

    @pytest.mark.datasets
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

    @pytest.mark.datasets
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
