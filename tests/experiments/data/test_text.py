"""The text is Python's own library, in windows that miss no byte, and held-out files are whole."""

import numpy as np
import pytest

from experiments.data import text
from experiments.data.text import is_held_out, load_stdlib


@pytest.fixture(scope="module")
def stdlib():
    return load_stdlib(128)


def _side(paths, held_out):
    return next(path for path in paths if is_held_out(path) is held_out)


def _names(package):
    return [f"{package}/{number}.py" for number in range(200)]


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Packages of known bytes: large, mid and small ones, and what is not to be read."""
    monkeypatch.setattr(text.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    contents = {}
    for package, size in (("mid", 40), ("large", 70), ("small", 20)):
        for held_out in (False, True):
            path = _side(_names(package), held_out)
            contents[path] = (f"{package} {held_out} " * size).encode()[:size]
    contents[_side([f"{n}.py" for n in range(200)], False)] = b"alone"
    others = ["site-packages/x.py", "large/test/x.py", "large/tests/x.py", "large/data.txt"]
    for path, content in [*contents.items(), *((path, b"not this") for path in others)]:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return contents


def _join(files, held_out):
    """In the order of their paths."""
    return b"".join(files[path] for path in sorted(files) if is_held_out(path) is held_out)


def _predicted(windows, lengths):
    return b"".join(
        row[1 : 1 + length].tobytes() for row, length in zip(windows, lengths, strict=True)
    )


def test_every_byte_but_the_first_is_predicted_once(library):
    found, source = load_stdlib(7)
    held_out = _join(library, True)
    assert source is found.test_source is None
    assert _predicted(*found.test) == held_out[1:]
    assert found.test_weight == len(held_out) - 1
    train = _join(library, False)
    assert (
        _predicted(found.train_windows, [7] * len(found.train_windows))[: len(train) - 1]
        == (train[1:])
    )
    # What a byte is predicted from comes right before it.
    assert found.test_windows[1].tobytes() == held_out[7:15]
    assert found.test_windows.dtype == found.train_windows.dtype == np.uint8


def test_each_worker_has_a_package_of_its_own(library):
    found, source = load_stdlib(7, packages=2)
    assert source is not None
    assert found.test_source is not None
    for place, package in enumerate(("large", "mid")):
        own = {path: content for path, content in library.items() if path.startswith(package)}
        mine = found.train_windows[source == place]
        assert _predicted(mine, [7] * len(mine)).startswith(_join(own, False)[1:])
        rows = found.test_source == place
        assert (
            _predicted(found.test_windows[rows], found.test_lengths[rows]) == (_join(own, True)[1:])
        )
    assert found.name.endswith(", 2 packages")
    with pytest.raises(ValueError, match="Expected num_workers=4 to be at most 3 packages"):
        load_stdlib(7, packages=4)


def test_its_name_says_which_text_it_is(library, tmp_path):
    before = load_stdlib(7)[0].name
    assert load_stdlib(9)[0].name == before
    (tmp_path / "large" / "more.py").write_bytes(b"x")
    assert load_stdlib(7)[0].name != before


def test_the_library_of_this_python(stdlib):
    found, _ = stdlib
    size = found.train_windows.size
    assert size > 5e6
    assert found.test_windows.shape[1] == 129
    # One file of 32 is held out; they are of all sizes.
    assert 0.003 < found.test_weight / size < 0.1
    assert found.test_lengths.min() > 0
    assert found.test_lengths[:-1].min() == 128
