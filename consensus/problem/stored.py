"""Samples that stay in storage, such as images in files, and are read when they are needed.

`StoredSamples` wraps a map-style dataset of torch. Its samples are read ahead, the minibatches of
`ReadAhead` and the parts of `split`, in this process or in several. What is read is a function of
the numbers of samples and of seeds. There is no state: after a resume, reading starts anew at the
positions of the minibatches.

# N samples, K workers in this process, B samples in a minibatch
"""

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, Subset

from consensus.problem.minibatches import Minibatches
from consensus.problem.reader import Batch, Failure, Request, SampleError, read, read_now
from consensus.problem.samples import Samples, Tree, class_out_of_range
from consensus.problem.streams import stream_seed


def is_stored(given: Any) -> bool:
    """Whether an object has samples by number and their number, as a map-style dataset."""
    if isinstance(given, Tensor | np.ndarray | tuple | list | str | Mapping | IterableDataset):
        return False
    return hasattr(given, "__getitem__") and hasattr(given, "__len__")


@dataclass(frozen=True, eq=False)
class StoredSamples:
    """N samples of a map-style dataset. Their inputs and targets are as those of `Samples`.

    An image of PIL becomes pixels (C, H, W); numbers and arrays become tensors, as in torch's
    `default_collate`.

    Attributes:
        source: The dataset.
        index: The numbers of the samples in the dataset, int64 on the CPU. (N,)
        name: Of the samples in messages.
        device: Of the samples that are read.
        dtype: Of floating point, as in `Samples.to`; None: that of the dataset.
        num_classes: Classes of integer targets are below it.
        loader_workers: Processes that read ahead; 0: this process reads.
    """

    source: Any
    index: Tensor
    name: str = "data"
    device: torch.device | str = "cpu"
    dtype: torch.dtype | None = None
    num_classes: int | None = None
    loader_workers: int = 0

    @cached_property
    def targets(self) -> Tensor | None:
        """The targets (N, ...), if the dataset lists them in an attribute `targets`; else None.

        Those of torchvision do, such as ImageFolder.
        """
        listed = _targets(self.source)
        return None if listed is None else listed[self.index]

    @property
    def inputs(self) -> Tree:
        """The inputs are not in memory: those of the first sample, (1, ...)."""
        return self[:1].inputs

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: slice) -> Samples:
        return self._read_here(self.index[index])

    def select(self, index: Tensor) -> Samples:
        """Read the samples at `index` (N',), int64."""
        return self._read_here(self.index[index.cpu()])

    def subset(self, index: Tensor) -> "StoredSamples":
        """The samples at `index` (N',), int64; none is read."""
        return replace(self, index=self.index[index.cpu()])

    def share(self, rank: int, size: int) -> "StoredSamples":
        """The share of one of `size` processes, which may be empty; none is read."""
        return replace(self, index=torch.tensor_split(self.index, size)[rank])

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "StoredSamples":
        """The samples as they will be read, on a device and in the types of `Samples.to`."""
        return replace(self, device=device, dtype=dtype)

    def split(self, size: int, index: Tensor | None = None) -> Iterator[Samples]:
        """The samples, or those at `index`, in parts of `size`; the last may be smaller."""
        chosen = self.index if index is None else self.index[index.cpu()]
        parts = chosen.split(size) if len(chosen) else ()
        return self.read(map(self._evaluated, parts), min(self.loader_workers, len(parts)))

    def _evaluated(self, index: Tensor) -> Request:
        """The request of an evaluation, which draws the same numbers for a sample every time."""
        numbers = index.tolist()
        return numbers, [stream_seed(0, "evaluated sample", i) for i in numbers]

    def _read_here(self, index: Tensor) -> Samples:
        return self._checked(read_now(self.source, self._evaluated(index)))

    def read(self, requests: Iterable[Request], processes: int) -> Generator[Samples, None, None]:
        """The samples of each request, in order, read ahead in some processes.

        Raises:
            SampleError: If a sample cannot be read.
        """
        pin = torch.device(self.device).type == "cuda"
        with closing(read(self.source, requests, processes, pin)) as batches:
            for batch in batches:
                yield self._checked(batch)

    def _checked(self, batch: Batch | Failure) -> Samples:
        """A batch of the reader on the device; SampleError if it is a failure."""
        if isinstance(batch, Failure):
            text = f"sample {batch.index} of `{self.name}`: {batch.text}"
            raise SampleError(text, batch.number)
        try:
            samples = Samples(*batch)
        except ValueError as error:
            raise SampleError(f"the samples of `{self.name}` are no tensors: {error}") from error
        count = self.num_classes
        if count is not None and (wrong := class_out_of_range(samples.targets, count)):
            raise SampleError(f"the classes of some samples of `{self.name}` {wrong}")
        if self.dtype is None:
            return samples
        moved = samples.map(lambda x: x.to(self.device, non_blocking=True))
        return moved.to(self.device, self.dtype)


AnySamples = Samples | StoredSamples


class ReadAhead:
    """The next minibatches of K workers, read ahead by the loader processes of the samples.

    The positions of the minibatches are the complete state and may be set at any time.
    """

    def __init__(self, samples: StoredSamples, minibatches: Sequence[Minibatches]) -> None:
        self.samples, self.minibatches = samples, minibatches
        self._read: Generator[Samples, None, None] | None = None
        self._next: list[int] = []  # the positions of what `_read` gives next

    def draw(self) -> Samples:
        """The next minibatch of every worker, (K B, ...)."""
        if self._read is None or self._next != [m.position for m in self.minibatches]:
            self.close()
            self._read = self.samples.read(self._requests(), self.samples.loader_workers)
        try:
            found = next(self._read)
        except BaseException:
            self.close()
            raise
        for source in self.minibatches:
            source.position += 1
        self._next = [source.position for source in self.minibatches]
        return found

    def _requests(self) -> Iterator[Request]:
        """The minibatches from the current positions on, drawn from copies of the sources."""
        copies = []
        for own in self.minibatches:
            own_draws = own.batch_size, own.seed, own.worker, own.every
            copies.append(Minibatches(own.indices.cpu(), *own_draws))
            copies[-1].position = own.position
        while True:
            index = torch.cat([source.draw() for source in copies])
            seeds = [
                stream_seed(source.seed, "sample", source.worker, source.position, i)
                for source in copies
                for i in range(source.batch_size)
            ]
            yield self.samples.index[index].tolist(), seeds

    def close(self) -> None:
        """End the loader processes; the next draw starts others."""
        if self._read is not None:
            self._read.close()
        self._read = None


def _targets(source: Any) -> Tensor | None:
    """The attribute `targets` of a dataset, or of that which a Subset is of; None without one."""
    if isinstance(source, Subset):
        found = _targets(source.dataset)
        return None if found is None else found[torch.as_tensor(source.indices)]
    listed = getattr(source, "targets", None)
    if listed is None:
        return None
    try:
        found = torch.as_tensor(listed)
    except (TypeError, ValueError, RuntimeError):  # no numbers
        return None
    return found if found.ndim and len(found) == len(source) else None


def listed_classes(source: Any) -> int | None:
    """The length of the attribute `classes` of a dataset, or of that which a Subset is of."""
    if isinstance(source, Subset):
        return listed_classes(source.dataset)
    classes = getattr(source, "classes", None)
    return len(classes) if isinstance(classes, Sequence | Mapping) else None
