"""Text that is on every machine: the sources of Python's own standard library, in bytes."""

import collections
import dataclasses
import hashlib
import pathlib
import platform
import sysconfig
from collections.abc import Iterable, Mapping

import numpy as np

HELD_OUT = 32
"""One file of so many is held out, by the hash of its path."""

_TESTS = frozenset({"test", "tests", "idle_test"})
_NOT_THEIRS = frozenset({"site-packages", "dist-packages", "__pycache__"})


@dataclasses.dataclass(frozen=True)
class Text:
    """Windows of text, held in memory: of each, a model predicts every byte but the first."""

    name: str  # what results are to be labelled with
    train_windows: np.ndarray  # shape=(N, context + 1), dtype=uint8
    test_windows: np.ndarray  # of whole files that are held out. shape=(N_test, context + 1)
    test_lengths: np.ndarray  # bytes to predict in each, context but in the last. shape=(N_test,)
    test_source: np.ndarray | None = None
    """Where each worker has a package of its own, whose each test window is. shape=(N_test,)"""

    @property
    def train(self) -> tuple[np.ndarray, ...]:
        """The arrays whose leading axis is over training examples."""
        return (self.train_windows,)

    @property
    def test(self) -> tuple[np.ndarray, ...]:
        """Those whose leading axis is over test examples."""
        return self.test_windows, self.test_lengths

    @property
    def test_weight(self) -> int:
        """What a sum over all test examples is divided by: bytes."""
        return int(self.test_lengths.sum())


def load_stdlib(context: int, packages: int | None = None) -> tuple[Text, np.ndarray | None]:
    """The standard library of the Python that runs this, without its tests.

    Args:
      context: bytes that a window is predicted from, at most.
      packages: so many of its top-level packages, the largest, in place of all files.

    Returns the text and, of ``packages``, which of them each training window is of, from the
    largest. ``# shape=(N,), dtype=int32``

    ValueError for fewer packages than that."""
    files = _read(pathlib.Path(sysconfig.get_paths()["stdlib"]))
    digest = hashlib.sha256()
    for path, content in files.items():
        digest.update(path.encode() + b"\0" + content + b"\0")
    name = f"stdlib of Python {platform.python_version()}, {digest.hexdigest()[:12]}"
    if packages is None:
        groups = [files]
    else:
        groups = _largest(files, packages)
        name += f", {packages} packages"
    train, test = zip(*(_split(group, context) for group in groups), strict=True)
    windows, lengths = zip(*test, strict=True)
    sources = np.arange(len(groups), dtype=np.int32)
    of = lambda parts: None if packages is None else np.repeat(sources, [*map(len, parts)])
    join = np.concatenate
    return Text(name, join(train), join(windows), join(lengths), of(windows)), of(train)


def is_held_out(path: str) -> bool:
    """Whether a file, by its path within the library, is one of the test set."""
    return hashlib.sha256(path.encode()).digest()[0] % HELD_OUT == 0


def _read(root: pathlib.Path) -> dict[str, bytes]:
    """All sources by their path, in its order."""
    found = {}
    for file in root.rglob("*.py"):
        path = file.relative_to(root)
        if not (_TESTS | _NOT_THEIRS).intersection(path.parts):
            found[path.as_posix()] = file.read_bytes()
    return dict(sorted(found.items()))


def _largest(files: Mapping[str, bytes], count: int) -> list[dict[str, bytes]]:
    """The files of each of the largest packages that have a part in both sets."""
    packages: dict[str, dict[str, bytes]] = collections.defaultdict(dict)
    for path, content in files.items():
        package, _, inside = path.partition("/")
        if inside:
            packages[package][path] = content
    sides = lambda package: {is_held_out(path) for path, content in package.items() if content}
    whole = [package for package in packages.values() if len(sides(package)) == 2]
    if count > len(whole):
        allowed = f"at most {len(whole)} packages, each with files on both sides"
        raise ValueError(f"Expected num_workers={count} to be {allowed}, for one a worker.")
    size = lambda package: sum(map(len, package.values()))
    return sorted(whole, key=size, reverse=True)[:count]


def _split(files: Mapping[str, bytes], context: int):
    """Windows of the training files; and of those held out, with the lengths of these."""
    sides = [[], []]
    for path, content in files.items():
        sides[is_held_out(path)].append(content)
    train, _ = _windows(sides[False], context)
    return train, _windows(sides[True], context)


def _windows(contents: Iterable[bytes], context: int) -> tuple[np.ndarray, np.ndarray]:
    """Every byte but the first is predicted once. The last window is filled up with zeros."""
    text = np.frombuffer(b"".join(contents), np.uint8)
    count = max(0, -(-(len(text) - 1) // context))
    padded = np.zeros(count * context + 1, np.uint8)
    padded[: len(text)] = text[: len(padded)]
    starts = context * np.arange(count)
    lengths = np.minimum(context, len(text) - 1 - starts).astype(np.int32)
    return padded[starts[:, None] + np.arange(context + 1)], lengths
