"""Preparing a set of tensorflow-datasets, from a folder of archives or from the network."""

import collections
import contextlib
import dataclasses
import hashlib
import importlib
import json
import logging
import os
import pathlib
import tempfile
import urllib.parse
from collections.abc import Mapping
from typing import Any

from experiments.data.datasets import require

_log = logging.getLogger(__name__)

_REACH_SECONDS = 10


def marker_path(builder: Any) -> pathlib.Path:
    """The file that says of a prepared set that its archives are not the registered ones.

    It lies beside the set, so that it can be written first: no unlabelled set can ever be left.
    """
    prepared = pathlib.Path(builder.data_dir)
    return prepared.parent / f"unregistered_archive-{prepared.name}.json"


def prepare(tfds: Any, builder: Any, name: str, archives: str | os.PathLike[str] | None) -> None:
    """Prepares the set of ``builder``, from ``archives`` if given.

    Errors are those of :func:`experiments.data.datasets.load`.
    """
    require(f"Preparing {name}", "datasets", "tensorflow", "importlib_resources")
    manual_dir, overrides = None, {}
    marker = marker_path(builder)
    if archives is None:
        _check_downloads(builder, name)
        marker.unlink(missing_ok=True)
    else:
        manual_dir = _find_archives(builder, name, pathlib.Path(archives).expanduser())
        overrides, unregistered = _check_archives(builder, name, manual_dir)
        marker.unlink(missing_ok=True)
        if unregistered:
            _mark(marker, name, manual_dir, unregistered)

    # TensorFlow encodes a few images; it must not take the accelerators' memory for that.
    with contextlib.suppress(RuntimeError):  # It is already running: then that is the caller's.
        importlib.import_module("tensorflow").config.set_visible_devices([], "GPU")
    root = pathlib.Path(builder.data_dir_root)
    root.mkdir(parents=True, exist_ok=True)
    # tensorflow-datasets takes an archive extracted earlier by its file name alone, which is the
    # same for MNIST and Fashion-MNIST and for a replaced archive: hence a new folder every time.
    with (
        tempfile.TemporaryDirectory(dir=root, prefix="extract-") as extract_dir,
        contextlib.ExitStack() as stack,
    ):
        infos = builder.url_infos or {}
        stack.callback(infos.update, {url: infos[url] for url in overrides})
        infos.update(overrides)
        config = tfds.download.DownloadConfig(manual_dir=manual_dir, extract_dir=extract_dir)
        builder.download_and_prepare(download_config=config)


def _check_downloads(builder: Any, name: str) -> None:
    """Raises ConnectionError where no server answers: tensorflow-datasets would try for minutes."""
    requests = importlib.import_module("requests")  # with which it downloads
    resource = importlib.import_module("tensorflow_datasets.core.download.resource")
    there = pathlib.Path(builder.data_dir_root) / "downloads"
    first_of_host: dict[str, str] = {}
    for url, info in (builder.url_infos or {}).items():
        file = resource.get_dl_fname(url, info.checksum)
        if url.startswith("http") and not any(there.rglob(file)):
            first_of_host.setdefault(urllib.parse.urlsplit(url).netloc, url)
    for host, url in first_of_host.items():
        try:
            requests.head(url, timeout=_REACH_SECONDS)
        except requests.RequestException as error:
            raise ConnectionError(
                f"{name} would have to be downloaded from {host}, which does not answer "
                f"({type(error).__name__}). Without a network, --archives DIR prepares it from its "
                "original archives."
            ) from None


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
    """The changes to make to ``builder.url_infos`` for tensorflow-datasets to take the files, and
    the checksums of those that are not the registered ones, by file name.

    Raises ValueError for the file of another URL, most likely of a set with equal file names.
    """
    checksums = importlib.import_module("tensorflow_datasets.core.download.checksums")
    by_file = collections.defaultdict(dict)
    for url, info in (builder.url_infos or {}).items():
        by_file[_file_name(url, info)][url] = info

    overrides, unregistered = {}, {}
    for file, infos in by_file.items():
        with open(directory / file, "rb") as opened:
            sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
        for url, info in infos.items():
            if info.filename is None:  # Without it the file would be looked for on the network.
                overrides[url] = dataclasses.replace(info, filename=file)
        if any(info.checksum == sha256 for info in infos.values()):
            continue
        for url, info in checksums.get_all_url_infos().items():
            if info.checksum == sha256 and url not in infos:
                raise ValueError(
                    f"Expected {directory / file} to be an archive of {name}, but it is that of "
                    f"{url}; keep each data set's archives in a folder of its own name."
                )
        if len(infos) == 1:  # Of several, which one it stands for is anyone's guess: tfds fails.
            ((url, info),) = infos.items()
            size = type(info.size)((directory / file).stat().st_size)
            overrides[url] = dataclasses.replace(info, size=size, checksum=sha256, filename=file)
            unregistered[file] = {"sha256": sha256, "registered_sha256": info.checksum}
    return overrides, unregistered


def _mark(
    marker: pathlib.Path, name: str, directory: pathlib.Path, unregistered: Mapping[str, Any]
) -> None:
    """Leaves a note of what the results of such archives are to be labelled with."""
    _log.warning(
        "Preparing %s from files in %s whose sha256 is not the registered one: %s.",
        name,
        directory,
        ", ".join(unregistered),
    )
    path = directory / "label.txt"
    text = path.read_text() if path.exists() else ""
    label = text.partition("\n")[0].strip() or "unregistered archive"
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps({"label": label, "files": unregistered}, indent=2) + "\n")
