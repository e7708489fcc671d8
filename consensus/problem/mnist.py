"""MNIST: validated reading of its four files, and one download per node if they are absent."""

import fcntl
import gzip
import hashlib
import http.client
import math
import os
import tempfile
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from consensus.problem.data import DATASETS, Dataset


class DataUnavailableError(ValueError):
    """A data set is neither in `data.root` nor available for download, or its files are damaged.

    The message is one line with the folder, the cause and the remedy.
    """


FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
TIMEOUT_S = 5.0  # of the connection and of each read
_REMEDY = "use data=digits, which needs no files"


@DATASETS.register("mnist")
def mnist(root: str = "data") -> Dataset:
    """MNIST: 60,000 training and 10,000 test images, pixels in [0, 1], no other normalization.

    The four files are in `root`/MNIST/raw, as torchvision keeps them. If they are absent, the
    process of each node that gets a file lock downloads them, and the others wait. No process group
    is needed.

    Args:
        root: The folder of MNIST/raw.

    Raises:
        DataUnavailableError: If the files are absent and cannot be downloaded, or are damaged.
    """
    base = Path(os.path.abspath(os.path.expanduser(root)))
    raw = base / "MNIST" / "raw"
    if _absent(raw):
        try:
            _download_once(base, raw)
        except OSError as error:
            raise DataUnavailableError(
                f"`data.root` is {root!r}: MNIST is not in {raw} and cannot be downloaded"
                f" ({_short(error)}); put its four raw files there, or {_REMEDY}"
            ) from error
    train_images, train_labels = _read(root, raw, "train")
    test_images, test_labels = _read(root, raw, "t10k")
    return Dataset(train_images, train_labels, test_images, test_labels, num_classes=10)


def _absent(raw: Path) -> list[str]:
    """The names of the MNIST files that are not in the folder."""
    return [name for name in FILES if not os.path.isfile(raw / name)]


def _download_once(base: Path, raw: Path) -> None:
    """Download the absent files under a file lock, unless another process already has.

    The kernel releases the lock of a process that dies. A process whose download fails writes the
    cause to the lock file. The processes that waited for the lock raise that cause; they do not
    retry, which would take one timeout each.

    Raises:
        OSError: If the files cannot be downloaded, written or locked.
    """
    base.mkdir(parents=True, exist_ok=True)
    with open(base / ".mnist.lock", "a+", encoding="utf-8") as lock:
        waited = False
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waited = True
            fcntl.flock(lock, fcntl.LOCK_EX)
        absent = _absent(raw)
        if not absent:
            return
        lock.seek(0)
        failure = lock.read()
        if waited and failure:
            raise ConnectionError(failure)
        lock.truncate(0)
        try:
            _download(base, raw, absent)
        except OSError as error:
            lock.write(_short(error))
            raise


def _download(base: Path, raw: Path, names: Sequence[str]) -> None:
    """Download into a temporary folder, then move the files: an existing file is complete."""
    contents = {name: _fetch(f"{name}.gz") for name in names}
    with tempfile.TemporaryDirectory(dir=base, prefix=".mnist-") as aside:
        for name, content in contents.items():
            Path(aside, name).write_bytes(content)
        raw.mkdir(parents=True, exist_ok=True)
        for name in names:
            os.replace(Path(aside, name), raw / name)


def _fetch(archive: str) -> bytes:
    """The decompressed content of an archive, from the first mirror with a matching checksum.

    Mirrors and checksums are those of torchvision. Its own MNIST.download() prints, has no timeout,
    and leaves a damaged file in place.

    Raises:
        ConnectionError: If all mirrors fail, with the cause of each.
    """
    from torchvision.datasets import MNIST  # a local import: it takes 1 s

    md5 = dict(MNIST.resources)[archive]
    failures = []
    for mirror in MNIST.mirrors:
        try:
            with urllib.request.urlopen(f"{mirror}{archive}", timeout=TIMEOUT_S) as response:
                packed: bytes = response.read()
        except (OSError, http.client.HTTPException) as error:
            failures.append(f"{mirror}: {_short(error)}")
            continue
        if hashlib.md5(packed, usedforsecurity=False).hexdigest() == md5:
            return gzip.decompress(packed)
        failures.append(f"{mirror}: wrong checksum of {archive}")
    raise ConnectionError("; ".join(failures))


def _read(root: str, raw: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 28, 28) float32 in [0, 1] and labels (N,) int64 of "train" or "t10k".

    Raises:
        DataUnavailableError: If a file cannot be read, or its content is invalid.
    """
    pixels = _read_idx(root, raw / f"{split}-images-idx3-ubyte", (28, 28))
    labels = _read_idx(root, raw / f"{split}-labels-idx1-ubyte", ()).long()
    if len(pixels) != len(labels) or len(labels) == 0 or int(labels.max()) > 9:
        raise _damaged(
            root,
            raw,
            f"`{split}` has {len(pixels)} images and {len(labels)} labels, at most"
            f" {int(labels.max()) if len(labels) else 'none'}; expected as many, from 0 to 9",
        )
    return pixels.unsqueeze(1).float() / 255, labels


def _read_idx(root: str, path: Path, shape: tuple[int, ...]) -> Tensor:
    """The content of a file in IDX format, (N, *shape) uint8.

    The header consists of big-endian 32-bit numbers: 0x0800 + number of axes, then the length of
    each axis. The data follow. Unlike torchvision's reader, this one checks the length of the file.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _damaged(root, path, _short(error)) from error
    axes = 1 + len(shape)
    header = np.frombuffer(content[: 4 * (1 + axes)].ljust(4 * (1 + axes), b"\0"), dtype=">u4")
    magic, (count, *rest) = int(header[0]), [int(length) for length in header[1:]]
    if magic != 0x0800 + axes or tuple(rest) != shape:
        raise _damaged(root, path, "its header is not that of an MNIST file")
    expected = 4 * (1 + axes) + count * math.prod(shape)
    if len(content) != expected:
        raise _damaged(root, path, f"it has {len(content)} bytes, its header says {expected}")
    data = np.frombuffer(content, dtype=np.uint8, offset=4 * (1 + axes))
    return torch.from_numpy(data.reshape(count, *shape).copy())  # bytes are read-only


def _damaged(root: str, path: Path, cause: str) -> DataUnavailableError:
    return DataUnavailableError(
        f"`data.root` is {root!r}: {path} is damaged ({cause}); delete it to have it downloaded"
        f" again, or {_REMEDY}"
    )


def _short(error: BaseException) -> str:
    """The cause of an error on one line."""
    cause = getattr(error, "reason", None) or error  # urllib wraps the cause
    return " ".join(str(cause).split()) or type(error).__name__
