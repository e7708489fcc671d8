"""Data sets by name.

MNIST is read from its four files; if they are absent, one process of each node downloads them.

# N images
"""

import fcntl
import gzip
import hashlib
import http.client
import math
import os
import struct
import tempfile
import urllib.request
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from consensus.registry import Registry


@dataclass(frozen=True)
class Dataset:
    """Images with labels, for training and for testing.

    Attributes:
        train_images: (N, 1, 28, 28), floating point.
        train_labels: (N,) int64, in [0, num_classes).
        test_images: (N', 1, 28, 28)
        test_labels: (N',)
        num_classes: The number of classes.

    Raises:
        ValueError: If images and labels do not fit each other. On a GPU a label out of range would
            be a device-side assertion, raised far from its cause.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int

    def __post_init__(self) -> None:
        train, test = (self.train_images, self.train_labels), (self.test_images, self.test_labels)
        for name, (images, labels) in (("train", train), ("test", test)):
            if labels.ndim != 1 or len(images) != len(labels) or len(labels) == 0:
                raise ValueError(
                    f"`{name}_images` and `{name}_labels` have shapes {tuple(images.shape)} and"
                    f" {tuple(labels.shape)}; allowed: (N, ...) and (N,) with N > 0"
                )
            if labels.dtype != torch.int64:
                raise ValueError(f"`{name}_labels` is {labels.dtype}; allowed: torch.int64")
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= self.num_classes:
                raise ValueError(
                    f"`{name}_labels` go from {low} to {high}; allowed: 0 to {self.num_classes - 1}"
                )

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Dataset":
        """A copy on a device, with images of the given dtype and int64 labels."""
        return replace(
            self,
            train_images=self.train_images.to(device, dtype),
            train_labels=self.train_labels.to(device),
            test_images=self.test_images.to(device, dtype),
            test_labels=self.test_labels.to(device),
        )


DATASETS: Registry[Dataset] = Registry("data set", Dataset)
"""The table of data sets. A factory takes `root`, the folder of files, and its own options."""


@DATASETS.register("digits")
def digits(root: str = "data") -> Dataset:
    """The 8x8 digits of scikit-learn, scaled to 28x28: 1437 training and 360 test images.

    It needs no files, no network and no `root`. The split does not depend on the run's seed.
    """
    # A local import: it takes 1 s, which runs on other data save.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    small = torch.tensor(bunch.images / 16.0, dtype=torch.float32).unsqueeze(1)  # (1797, 1, 8, 8)
    images = interpolate(small, size=(28, 28), mode="bilinear", align_corners=False).clamp(0, 1)
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.2, stratify=bunch.target, random_state=0
    )
    return Dataset(images[train], labels[train], images[test], labels[test], num_classes=10)


# ---- MNIST


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
LOCK = ".mnist.lock"
LARGEST = 2**26  # bytes of an unpacked file; the training images have 47 million
TIMEOUT_S = 5.0  # of the connection and of each read
_REMEDY = "use data=digits, which needs no files"


@DATASETS.register("mnist")
def mnist(root: str = "data") -> Dataset:
    """MNIST: 60,000 training and 10,000 test images, pixels in [0, 1], no other normalization.

    The four files are in `root`/MNIST/raw, as torchvision keeps them, or in `root`; raw or as .gz.
    If they are absent, the process of each node that gets a file lock downloads them, and the
    others wait. No process group is needed.

    Raises:
        DataUnavailableError: If the files are absent and cannot be downloaded, or are damaged.
    """
    base = Path(os.path.abspath(os.path.expanduser(root)))
    raw = base / "MNIST" / "raw"
    if _absent(base):
        try:
            _download_once(base, raw)
        except OSError as error:
            raise DataUnavailableError(
                f"`data.root` is {root!r}: MNIST is not in {raw} ({_seen(base)}) and cannot be"
                f" downloaded ({_short(error)}); put its four files there, raw or as .gz, or"
                f" {_REMEDY}"
            ) from error
    found = _find(base)
    return Dataset(*_read(root, found, "train"), *_read(root, found, "t10k"), num_classes=10)


def _find(base: Path) -> dict[str, Path]:
    """The files of MNIST that are there, by the names of `FILES`.

    In `base`/MNIST/raw, or in `base` itself; with a dot before `idx`, as some archives name them;
    raw or as .gz, which is unpacked in memory.
    """
    return {
        name: path
        for folder in (base, base / "MNIST" / "raw")  # the second counts, if both have a file
        for ending in (".gz", "")
        for name in FILES
        for shape in (name.replace("-idx", ".idx"), name)
        if os.path.isfile(path := folder / f"{shape}{ending}")
    }


def _absent(base: Path) -> list[str]:
    found = _find(base)
    return [name for name in FILES if name not in found]


def _seen(base: Path) -> str:
    """The files of MNIST that are there, or whatever else is."""
    if found := _find(base):
        return f"only {', '.join(path.name for path in found.values())}"
    for folder in (base / "MNIST" / "raw", base / "MNIST", base):
        with suppress(OSError):
            names = sorted(path.name for path in folder.iterdir() if path.name != LOCK)
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            return f"{folder} has {', '.join(names[:5]) or 'nothing'}{more}"
    return "nothing is there"


def _download_once(base: Path, raw: Path) -> None:
    """Download the absent files under a file lock, unless another process already has.

    The kernel releases the lock of a process that dies. A process whose download fails writes the
    cause to the lock file. The processes that waited for the lock raise that cause; they do not
    retry, which would take one timeout each.
    """
    base.mkdir(parents=True, exist_ok=True)
    with open(base / LOCK, "a+", encoding="utf-8") as lock:
        waited = False
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waited = True
            fcntl.flock(lock, fcntl.LOCK_EX)
        absent = _absent(base)
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


def _download(base: Path, raw: Path, names: list[str]) -> None:
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
    and leaves a damaged file in place. If all mirrors fail, the error has the cause of each.
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


def _read(root: str, found: Mapping[str, Path], split: str) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 28, 28) float32 in [0, 1] and labels (N,) int64 of "train" or "t10k"."""
    images_file, labels_file = (found[name] for name in FILES if name.startswith(split))
    pixels = _read_idx(root, images_file, (28, 28))
    labels = _read_idx(root, labels_file, ()).long()
    if len(pixels) != len(labels) or len(labels) == 0 or int(labels.max()) > 9:
        most = int(labels.max()) if len(labels) else "none"
        counts = f"`{split}` has {len(pixels)} images and {len(labels)} labels, at most {most}"
        raise _damaged(root, images_file.parent, f"{counts}; expected as many, from 0 to 9")
    return pixels.unsqueeze(1).float() / 255, labels


def _read_idx(root: str, path: Path, shape: tuple[int, ...]) -> Tensor:
    """The content of a file in IDX format, (N, *shape) uint8.

    The header consists of big-endian 32-bit numbers: 0x0800 + number of axes, then the length of
    each axis. The data follow. Unlike torchvision's reader, this one checks the length of the file.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as file:
            content = file.read(LARGEST)
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(root, path, _short(error)) from error
    header = struct.Struct(f">{2 + len(shape)}I")
    magic, count, *rest = header.unpack(content[: header.size].ljust(header.size, b"\0"))
    if (magic, *rest) != (0x0801 + len(shape), *shape):
        raise _damaged(root, path, "its header is not that of an MNIST file")
    expected = header.size + count * math.prod(shape)
    if len(content) != expected:
        raise _damaged(root, path, f"it has {len(content)} bytes, its header says {expected}")
    data = torch.frombuffer(bytearray(content), dtype=torch.uint8)[header.size :]
    return data.view(count, *shape)


def _damaged(root: str, path: Path, cause: str) -> DataUnavailableError:
    return DataUnavailableError(
        f"`data.root` is {root!r}: {path} is damaged ({cause}); delete it to have it downloaded"
        f" again, or {_REMEDY}"
    )


def _short(error: BaseException) -> str:
    """The cause of an error on one line."""
    cause = getattr(error, "reason", None) or error  # urllib wraps the cause
    return " ".join(str(cause).split()) or type(error).__name__
