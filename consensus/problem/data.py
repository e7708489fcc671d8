"""Data sets by name: samples to train, to validate and to test on."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from consensus.problem.samples import Samples, class_out_of_range, described, is_whole, leaves
from consensus.problem.streams import stream
from consensus.registry import Registry

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Dataset:
    """Samples to train, to test and, if there are any, to validate on.

        Dataset(Samples(x, y), Samples(x_test, y_test))

    Pairs in place of `Samples` do as well.

    Attributes:
        train: N samples.
        test: Samples that no decision may depend on.
        num_classes: The number of classes; by default found in targets (N,) of integers, and None
            for other targets.
        validation: Samples held out of training, on which the best evaluation is chosen.
        remarks: Lines for the user.

    Raises:
        ValueError: If there are no samples, inputs and targets do not fit each other, or a class is
            out of range. On a GPU that would be a device-side assertion, raised far from its cause.
    """

    train: Samples
    test: Samples
    num_classes: int | None = None
    validation: Samples | None = None
    remarks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in SPLITS:
            given = getattr(self, name)
            if given is not None or name != "validation":
                object.__setattr__(self, name, _samples(name, given))
        if self.num_classes is None and self.labels is not None:
            found = 1 + max(int(s.targets.max()) for s in self.splits.values())
            object.__setattr__(self, "num_classes", found)
        self._require_classes()

    def _require_classes(self) -> None:
        """Refuse integer targets that are not in [0, num_classes), but for `IGNORED`."""
        if self.num_classes is None:
            return
        for name, samples in self.splits.items():
            if wrong := class_out_of_range(samples.targets, self.num_classes):
                raise ValueError(f"the classes of `{name}` {wrong}")

    @property
    def splits(self) -> dict[str, Samples]:
        """The samples that are there, by "train", "validation" and "test"."""
        found = {name: getattr(self, name) for name in SPLITS}
        return {name: samples for name, samples in found.items() if samples is not None}

    @property
    def labels(self) -> Tensor | None:
        """The classes of the training samples, (N,) integers; None for other targets."""
        targets = self.train.targets
        whole = isinstance(targets, Tensor) and targets.ndim == 1
        return targets if whole and is_whole(targets) else None

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Dataset":
        """A copy on a device, in the types of `Samples.to`."""
        pixels = any(x.dtype == torch.uint8 for x in leaves(self.train.inputs))
        said = "inputs of uint8 are scaled to [0, 1]; other integers stay as they are"
        return replace(
            self,
            train=self.train.to(device, dtype),
            test=self.test.to(device, dtype),
            validation=self.validation and self.validation.to(device, dtype),
            remarks=(*self.remarks, said) if pixels else self.remarks,
        )

    def hold_out(self, share: float) -> "Dataset":
        """A share of the training samples, drawn at random, becomes the validation samples.

        The draw depends on the number of samples only, so that all runs validate on the same ones.
        """
        order = torch.randperm(len(self.train), generator=stream(0, "validation"))
        number = round(share * len(order))
        if not 0 < number < len(order):
            allowed = f"a share of the {len(order)} training samples that leaves some of both"
            raise ValueError(f"`data.validation` is {share:g}; allowed: {allowed}")
        order = order.to(next(self.train.tensors()).device)
        held, kept = order[:number].sort().values, order[number:].sort().values
        return replace(self, train=self.train.select(kept), validation=self.train.select(held))


def _samples(name: str, given: Samples | Sequence[object]) -> Samples:
    try:
        if not isinstance(given, Samples):
            if not isinstance(given, tuple | list) or len(given) != 2:
                raise ValueError(f"{described(given)}; allowed: Samples, or a pair of both")
            given = Samples(*given)
        if not len(given):
            raise ValueError("no samples; allowed: one or more")
    except ValueError as error:
        raise ValueError(f"`{name}` of the data set has {error}") from error
    return given


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
    of_train, of_test = (Samples(images[index], labels[index]) for index in (train, test))
    return Dataset(of_train, of_test, num_classes=10)
