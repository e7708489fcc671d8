"""The 8x8 digits of scikit-learn as a data set, without importing scikit-learn.

The import takes several seconds of a core in every process; the file and the split take
milliseconds. The split is that of

    train_test_split(arange(1797), test_size=0.2, stratify=labels, random_state=0)
"""

import functools
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from consensus.problem.data import DATASETS, Dataset
from consensus.problem.samples import Samples

NUM_TEST = 360  # a fifth of 1797, rounded up


@DATASETS.register("digits")
def digits(root: str = "data") -> Dataset:
    """The 8x8 digits of scikit-learn, scaled to 28x28: 1437 training and 360 test images.

    It needs no network and no `root`. The split does not depend on the run's seed.
    """
    images, targets, indices = _read()
    train, test = (Samples(images[index], targets[index]) for index in indices)
    return Dataset(train, test, num_classes=10)


@functools.cache
def _read() -> tuple[Tensor, Tensor, tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """All images and labels, and the indices of the split; kept, since sweeps ask many times."""
    found = find_spec("sklearn")  # imports nothing
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("data=digits needs the package scikit-learn", name="sklearn")
    file = Path(found.submodule_search_locations[0], "datasets", "data", "digits.csv.gz")
    table = np.loadtxt(file, delimiter=",")  # (1797, 64 + 1)
    labels = table[:, -1].astype(np.int64)
    small = torch.tensor(table[:, :-1] / 16.0, dtype=torch.float32).view(-1, 1, 8, 8)
    images = interpolate(small, size=(28, 28), mode="bilinear", align_corners=False).clamp(0, 1)
    return images, torch.tensor(labels), _split(labels)


def _split(labels: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Shuffled indices of the training and the test samples: the same share of each class."""
    random = np.random.RandomState(0)  # its numbers are the same in every version of NumPy
    counts = np.bincount(labels)
    members = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])
    in_train = _shares(counts, len(labels) - NUM_TEST, random)
    train: list[int] = []
    test: list[int] = []
    for own, first in zip(members, in_train, strict=True):
        shuffled = own[random.permutation(len(own))]
        train += shuffled[:first].tolist()
        test += shuffled[first:].tolist()
    return random.permutation(train), random.permutation(test)


def _shares(
    counts: NDArray[np.int64], total: int, random: np.random.RandomState
) -> NDArray[np.int64]:
    """Numbers of samples of each class that sum to `total`: in proportion, largest rests first."""
    exact = counts / counts.sum() * total
    shares: NDArray[np.int64] = np.floor(exact).astype(np.int64)
    rests = exact - shares
    missing = total - int(shares.sum())
    for rest in sorted(set(rests.tolist()), reverse=True):
        tied = np.flatnonzero(rests == rest)
        chosen = random.choice(tied, size=min(len(tied), missing), replace=False)
        shares[chosen] += 1
        missing -= len(chosen)
        if missing == 0:
            break
    return shares
