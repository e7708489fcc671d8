"""Data sets by name.

# N images
"""

from dataclasses import dataclass, replace

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
        """A copy on a device, with images of the given dtype and int64 labels."""
        return replace(
            self,
            train_images=self.train_images.to(device, dtype),
            train_labels=self.train_labels.to(device),
            test_images=self.test_images.to(device, dtype),
            test_labels=self.test_labels.to(device),
        )


DATASETS: Registry[Dataset] = Registry("data set")
"""The table of data sets. A factory takes `root`, the folder of files, and its own options."""


@DATASETS.register("digits")
def digits(root: str = "data") -> Dataset:
    """The 8x8 digits of scikit-learn, scaled to 28x28: 1437 training and 360 test images.

    It needs no files and no network. The split is fixed and does not depend on the run's seed.

    Args:
        root: Unused.
    """
    del root
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
