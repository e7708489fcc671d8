"""A plugin: 60 digits in memory, and the same in a map-style dataset, with faults to order."""

import multiprocessing
import os
import random
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import get_worker_info

from consensus import DATASETS, Dataset, Samples

# The ranks of tests are daemons, which may not start processes; those of torchrun are none.
multiprocessing.current_process()._config["daemon"] = False


class Stored:
    """(image, class) of some samples.

    `noise`: random numbers of torch, NumPy and Python are added to an image. `bad`: this sample
    cannot be read by rank 1, or the only rank. `pids`: a folder, with a file for each loader
    process.
    """

    def __init__(self, samples, noise=False, bad=None, pids=None, slow_s=0.0):
        self.samples, self.noise, self.bad = samples, noise, bad
        self.targets, self.pids, self.slow_s = samples.targets.tolist(), pids, slow_s

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        if self.pids is not None and get_worker_info() is not None:
            (Path(self.pids) / str(os.getpid())).touch()
        if index == self.bad and os.environ.get("RANK", "1") == "1":
            raise OSError(f"image {index}\nis truncated")
        time.sleep(self.slow_s)
        image = self.samples.inputs[index]
        if self.noise:
            image = image + torch.randn(1, 28, 28) + np.random.standard_normal() + random.random()  # noqa: NPY002
        return image, self.targets[index]


def parts():
    digits = DATASETS["digits"]
    return digits.train[:40], digits.test[:20]


@DATASETS.register("some_digits")
def some_digits():
    train, test = parts()
    return Dataset(Samples(train.inputs, train.targets), test, num_classes=10)


@DATASETS.register("stored_digits")
def stored_digits(
    noise: bool = False, bad: int | None = None, pids: str | None = None, slow_s: float = 0.0
):
    train, test = (Stored(samples, noise, bad, pids, slow_s) for samples in parts())
    return Dataset(train, test, num_classes=10)
