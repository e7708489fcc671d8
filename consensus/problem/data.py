"""Data sets by name: samples to train, to validate and to test on."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from consensus.problem.samples import (
    Samples,
    Tree,
    class_out_of_range,
    described,
    is_whole,
    leaves,
)
from consensus.problem.stored import AnySamples, StoredSamples, is_stored, listed_classes
from consensus.problem.streams import stream
from consensus.registry import Registry

SPLITS = ("train", "validation", "test")
HASHED = 1000  # samples of a set, at most


@dataclass(frozen=True)
class Dataset:
    """Samples to train, to test and, if there are any, to validate on.

        Dataset(Samples(x, y), Samples(x_test, y_test))

    Pairs in place of `Samples` do as well. So does a map-style dataset of torch: any object with
    `__len__`, and a `__getitem__` that gives (input, target). Its samples stay in storage.

        Dataset(ImageFolder("train", transform), ImageFolder("test", transform))

    Attributes:
        train: N samples.
        test: Samples that no decision may depend on.
        num_classes: The number of classes; by default found in targets (N,) of integers, or in the
            attributes `classes` or `targets` of a map-style dataset, and None for other targets.
        validation: Samples held out of training, on which the best evaluation is chosen.
        remarks: Lines for the user.

    Raises:
        ValueError: If there are no samples, inputs and targets do not fit each other, or a class is
            out of range. On a GPU that would be a device-side assertion, raised far from its cause.
    """

    train: AnySamples
    test: AnySamples
    num_classes: int | None = None
    validation: AnySamples | None = None
    remarks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in SPLITS:
            given = getattr(self, name)
            if given is not None or name != "validation":
                object.__setattr__(self, name, _samples(name, given))
        if self.num_classes is None:
            object.__setattr__(self, "num_classes", self._count_classes())
        self._require_classes()

    def _count_classes(self) -> int | None:
        """The number of classes that the samples, or the datasets in storage, list."""
        if _classes(self.train[:1].targets) is None:
            return None
        stored = [s for s in self.splits.values() if isinstance(s, StoredSamples)]
        if listed := [n for s in stored if (n := listed_classes(s.source)) is not None]:
            return max(listed)
        found = [s.targets for s in self.splits.values() if s.targets is not None]
        if len(found) < len(self.splits):
            allowed = "a number, or datasets with an attribute `classes` or `targets`"
            raise ValueError(f"`num_classes` of the data set is None; allowed: {allowed}")
        return 1 + max(int(targets.max()) for targets in found)

    def _require_classes(self) -> None:
        """Refuse integer targets that are not in [0, num_classes), but for `IGNORED`."""
        if self.num_classes is None:
            return
        for name, samples in self.splits.items():
            if isinstance(samples, StoredSamples):  # checked when they are read
                own = replace(samples, num_classes=self.num_classes)
                object.__setattr__(self, name, own)
            elif wrong := class_out_of_range(samples.targets, self.num_classes):
                raise ValueError(f"the classes of `{name}` {wrong}")

    @property
    def splits(self) -> dict[str, AnySamples]:
        """The samples that are there, by "train", "validation" and "test"."""
        found = {name: getattr(self, name) for name in SPLITS}
        return {name: samples for name, samples in found.items() if samples is not None}

    @property
    def labels(self) -> Tensor | None:
        """The classes of the training samples, (N,) integers; None for other targets.

        None as well if a map-style dataset has no attribute `targets`.
        """
        return _classes(self.train.targets)

    @property
    def in_memory(self) -> bool:
        """Whether all samples are in memory, and none is read by a loader."""
        return all(isinstance(samples, Samples) for samples in self.splits.values())

    def loaded_by(self, processes: int) -> "Dataset":
        """The data set with a number of loader processes for samples in storage; 0: none."""

        def loaded(samples: AnySamples) -> AnySamples:
            if isinstance(samples, StoredSamples):
                return replace(samples, loader_workers=processes)
            return samples

        return self._map(loaded)

    def fingerprint(self) -> dict[str, str]:
        """By set: its number of samples, and a hash of some; of those in storage, of their targets.

        It tells data apart that processes have read for themselves.
        """
        found = {}
        for name, samples in self.splits.items():
            hashed = hashlib.blake2b(digest_size=8)
            for x in _hashed(samples):
                hashed.update(x.numpy(force=True).tobytes())
            found[name] = f"{len(samples)} samples, {hashed.hexdigest()}"
        return found

    def _map(self, function: Callable[[AnySamples], AnySamples]) -> "Dataset":
        """The data set with the function's value in place of each set of samples."""
        return replace(
            self,
            train=function(self.train),
            test=function(self.test),
            validation=self.validation and function(self.validation),
        )

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Dataset":
        """A copy on a device, in the types of `Samples.to`."""
        said = list(self.remarks)
        if any(x.dtype == torch.uint8 for x in leaves(self.train.inputs)):
            said.append("inputs of uint8 are scaled to [0, 1]; other integers stay as they are")
        moved = self._map(lambda samples: samples.to(device, dtype))
        for name, samples in moved.splits.items():
            if isinstance(samples, Samples) and (number := samples.count_nonfinite()):
                said.append(f"{number} of {len(samples)} samples of `{name}` are not finite")
        return replace(moved, remarks=tuple(said))

    def hold_out(self, share: float) -> "Dataset":
        """A share of the training samples, drawn at random, becomes the validation samples.

        The draw depends on the number of samples only, so that all runs validate on the same ones.
        """
        order = torch.randperm(len(self.train), generator=stream(0, "validation"))
        number = round(share * len(order))
        if not 0 < number < len(order):
            allowed = f"a share of the {len(order)} training samples that leaves some of both"
            raise ValueError(f"`data.validation` is {share:g}; allowed: {allowed}")
        held, kept = order[:number].sort().values, order[number:].sort().values
        return replace(self, train=self.train.subset(kept), validation=self.train.subset(held))


def _hashed(samples: AnySamples) -> Iterable[Tensor]:
    if isinstance(samples, Samples):
        index = torch.linspace(0, len(samples) - 1, min(HASHED, len(samples))).long()
        return samples.select(index).tensors()
    return [] if samples.targets is None else [samples.targets]


def _classes(targets: Tree) -> Tensor | None:
    """Targets (N,) of integers; None for others."""
    whole = isinstance(targets, Tensor) and targets.ndim == 1 and is_whole(targets)
    return targets if whole else None


def _samples(name: str, given: Any) -> AnySamples:
    found = given
    try:
        if not isinstance(given, Samples | StoredSamples) and is_stored(given):
            found = StoredSamples(given, torch.arange(len(given)), name)
        elif isinstance(given, tuple | list) and len(given) == 2:
            found = Samples(*given)
        if not isinstance(found, Samples | StoredSamples):
            allowed = "Samples, or a pair of both, or a map-style dataset of torch"
            raise ValueError(f"{described(found)}; allowed: {allowed}")
        if not len(found):
            raise ValueError("no samples; allowed: one or more")
    except ValueError as error:
        raise ValueError(f"`{name}` of the data set has {error}") from error
    return found


DATASETS: Registry[Dataset] = Registry("data set", Dataset)
"""The table of data sets. A factory takes `root`, the folder of files, and its own options."""
