"""Data sets by name, their partition among the workers, and the minibatches of one worker.

# N images, M workers, B samples in a minibatch
"""

import fcntl
import gzip
import hashlib
import http.client
import math
import os
import tempfile
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from consensus.problem.streams import stream, stream_seed
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
        ValueError: If images and labels do not belong together. Found here, because on a GPU a
            label out of range is an assertion of the device, far away from its cause.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int

    def __post_init__(self) -> None:
        self._check("train", self.train_images, self.train_labels)
        self._check("test", self.test_images, self.test_labels)

    def _check(self, name: str, images: Tensor, labels: Tensor) -> None:
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
        """The same data on a device, with images of the given type; labels stay int64."""
        return replace(
            self,
            train_images=self.train_images.to(device, dtype),
            train_labels=self.train_labels.to(device),
            test_images=self.test_images.to(device, dtype),
            test_labels=self.test_labels.to(device),
        )


DATASETS: Registry[Dataset] = Registry("data set")
"""The table of data sets; every factory takes `root`, the folder of files, and own options."""


@DATASETS.register("digits")
def digits(root: str = "data") -> Dataset:
    """The 8x8 digits inside scikit-learn, scaled to 28x28: 1437 for training, 360 for testing.

    Needs no files and no network. The split is fixed and does not depend on the run's seed.

    Args:
        root: Unused; every data set takes it.
    """
    del root
    # imported where needed: it takes a second, which runs on other data need not spend
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


# --- MNIST ----------------------------------------------------------------------------------------


class DataUnavailableError(ValueError):
    """A data set that is neither in `data.root` nor can be downloaded, or whose files are damaged.

    The message is one line that says where it was looked for, why it failed, and what to do.
    """


FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
TIMEOUT_S = 5.0  # for a connection, and for each wait for data
_REMEDY = "use data=digits, which needs no files"


@DATASETS.register("mnist")
def mnist(root: str = "data") -> Dataset:
    """MNIST, 60,000 and 10,000 images, pixels in [0, 1] without any other normalization.

    The four files in `root`/MNIST/raw (as torchvision keeps them) are only read when they are
    there. Otherwise they are downloaded, once per node: whoever has the lock downloads, the other
    processes wait for it and read. Nothing of this needs a process group.

    Args:
        root: The folder that holds, or will hold, MNIST/raw.

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
    """The files of MNIST that are not in the folder."""
    return [name for name in FILES if not os.path.isfile(raw / name)]


def _download_once(base: Path, raw: Path) -> None:
    """Downloads what is absent, unless another process of this node does it meanwhile.

    The kernel releases the lock when its holder dies, however that happens, so a killed process
    never blocks the others. A holder that fails leaves the reason in the lock file; those who
    waited for it report that reason rather than trying, and waiting, one after the other.

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
    """Downloads the files aside and moves them into place: a file that is there is complete."""
    contents = {name: _fetch(f"{name}.gz") for name in names}
    with tempfile.TemporaryDirectory(dir=base, prefix=".mnist-") as aside:
        for name, content in contents.items():
            Path(aside, name).write_bytes(content)
        raw.mkdir(parents=True, exist_ok=True)
        for name in names:
            os.replace(Path(aside, name), raw / name)


def _fetch(archive: str) -> bytes:
    """The decompressed content of an archive, from the first mirror that has it intact.

    torchvision knows the mirrors and checksums. Its own MNIST.download() prints, has no time limit,
    and leaves a broken file in place.

    Raises:
        ConnectionError: If no mirror does, with what went wrong at each.
    """
    from torchvision.datasets import MNIST  # only who downloads spends a second on the import

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
        DataUnavailableError: If the files cannot be read or are not what they should be.
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
    """The bytes in a file of the IDX format, (N, *shape) uint8.

    A header of big-endian 32-bit numbers (0x0800 + number of axes, then the length of each), then
    the data. torchvision's reader takes the header's word; here the length must agree with it.
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
    return torch.from_numpy(data.reshape(count, *shape).copy())  # a copy, since bytes are read-only


def _damaged(root: str, path: Path, cause: str) -> DataUnavailableError:
    return DataUnavailableError(
        f"`data.root` is {root!r}: {path} is damaged ({cause}); delete it to have it downloaded"
        f" again, or {_REMEDY}"
    )


def _short(error: BaseException) -> str:
    """What went wrong, on one line."""
    cause = getattr(error, "reason", None) or error  # urllib wraps the cause
    return " ".join(str(cause).split()) or type(error).__name__


# --- Partition ------------------------------------------------------------------------------------


def _full(labels: Tensor, num_workers: int, seed: int, alpha: float) -> list[Tensor]:
    """Every worker has all indices, as in the paper's experiments."""
    del seed, alpha
    return [torch.arange(len(labels))] * num_workers


def _sharded(labels: Tensor, num_workers: int, seed: int, alpha: float) -> list[Tensor]:
    """Disjoint random shards of floor(N / M) indices each."""
    del alpha
    size = len(labels) // num_workers
    if size == 0:
        raise ValueError(
            f"`data.partition` is 'sharded' with {num_workers} workers and {len(labels)} samples;"
            " allowed: at most as many workers as samples"
        )
    order = torch.randperm(len(labels), generator=stream(seed, "partition"))
    return list(order[: size * num_workers].view(num_workers, size).unbind())


def _label_skew(labels: Tensor, num_workers: int, seed: int, alpha: float) -> list[Tensor]:
    """Disjoint shards that use every index; each class is dealt out in Dirichlet proportions.

    A small alpha gives a class to few workers, a large one to all evenly. Shards differ in size,
    and may be empty.
    """
    if not 0 < alpha <= 1e9:  # far beyond, all proportions are equal and then overflow
        raise ValueError(f"`data.alpha` is {alpha}; allowed: a number in (0, 1e9]")
    order = torch.randperm(len(labels), generator=stream(seed, "partition"))
    proportions = np.random.default_rng(stream_seed(seed, "partition"))
    pieces: list[list[Tensor]] = [[] for _ in range(num_workers)]
    for label in sorted(set(labels.tolist())):
        members = order[labels[order] == label]
        share = proportions.dirichlet(np.full(num_workers, alpha))
        # rounding the running sums, not the shares, leaves no sample over and none used twice
        cuts = np.rint(np.cumsum(share)[:-1] * len(members)).astype(int)
        for piece, part in zip(pieces, members.tensor_split(cuts.tolist()), strict=True):
            piece.append(part)
    return [torch.cat(piece) for piece in pieces]


PARTITIONS: dict[str, Callable[[Tensor, int, int, float], list[Tensor]]] = {
    "full": _full,
    "sharded": _sharded,
    "label_skew": _label_skew,
}
"""The kinds of partition: (labels, num_workers, seed, alpha) -> one index tensor per worker."""


def partition(labels: Tensor, kind: str, num_workers: int, seed: int, alpha: float) -> list[Tensor]:
    """The training samples of each worker, as one int64 index tensor on the CPU per worker.

    Args:
        labels: The labels of the training set. (N,)
        kind: A name in PARTITIONS.
        num_workers: M, in the whole run and not in this process.
        seed: The seed of the run.
        alpha: The concentration of "label_skew"; the other kinds do not use it.

    Raises:
        ValueError: If the kind is unknown, there are fewer samples than shards, or alpha is not a
            positive number.
    """
    if kind not in PARTITIONS:
        raise ValueError(f"`data.partition` is {kind!r}; allowed: {', '.join(PARTITIONS)}")
    return PARTITIONS[kind](labels.cpu(), num_workers, seed, alpha)


# --- Minibatches ----------------------------------------------------------------------------------


class Minibatches:
    """The minibatches of one worker: indices as a function of (seed, worker, number of the draw).

    An epoch is a fresh permutation of the worker's samples, cut into floor(size / B) minibatches;
    the rest of it is dropped.

    Args:
        indices: The samples of the worker, on the device where the data are. (size,) int64
        batch_size: B.
        seed: The seed of the run.
        worker: j, the number of the worker in the whole run and not in this process.

    Attributes:
        position: The number of draws so far, the whole state: setting it continues from there.

    Raises:
        ValueError: If the worker has fewer than B samples.
    """

    def __init__(self, indices: Tensor, batch_size: int, seed: int, worker: int) -> None:
        if not 1 <= batch_size <= len(indices):
            raise ValueError(
                f"`algorithm.batch_size` is {batch_size}, and worker {worker} has {len(indices)}"
                " samples; allowed: at least 1 and at most the samples of each worker"
            )
        self.indices = indices
        self.batch_size = batch_size
        self.seed = seed
        self.worker = worker
        self.batches_per_epoch = len(indices) // batch_size
        self.position = 0
        self._epoch = -1
        self._shuffled = indices  # the permuted indices of self._epoch

    def draw(self) -> Tensor:
        """The indices of the next minibatch. (B,) int64, a view not to be written to."""
        epoch, batch = divmod(self.position, self.batches_per_epoch)
        if epoch != self._epoch:
            generator = stream(self.seed, "minibatch", self.worker, epoch)
            order = torch.randperm(len(self.indices), generator=generator)
            self._shuffled = self.indices[order.to(self.indices.device)]
            self._epoch = epoch
        self.position += 1
        return self._shuffled[batch * self.batch_size : (batch + 1) * self.batch_size]
