"""The digits, and combinations of data sets."""

import collections
import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from experiments import data


def multiset(pairs):
    return collections.Counter((image.tobytes(), int(label)) for image, label in pairs)


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
        ours = zip(unscaled, labels, strict=True)
        theirs = zip(raw.images, raw.target, strict=True)
        assert multiset(ours) == multiset(theirs)

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
        wide = dataclasses.replace(
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
        with pytest.raises(ValueError, match="'two' to have 1 or 3 channels, got 2"):
            data.combine([tiny("three", channels=3), tiny("two", channels=2)])


def test_import_is_light():
    code = (
        "import sys, experiments.data; "
        "heavy = {'jax', 'sklearn', 'tensorflow', 'tensorflow_datasets'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
