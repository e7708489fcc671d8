"""Partitions of the training set, and the minibatches of each worker.

# N images, M workers, B samples in a minibatch
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from consensus.problem.streams import stream, stream_seed


def _full(labels: Tensor, num_workers: int, seed: int, alpha: float) -> list[Tensor]:
    """All indices for every worker, as in the experiments of the paper."""
    return [torch.arange(len(labels))] * num_workers


def _sharded(labels: Tensor, num_workers: int, seed: int, alpha: float) -> list[Tensor]:
    """Disjoint random shards of floor(N / M) indices each."""
    size = len(labels) // num_workers
    if size == 0:
        raise ValueError(
            f"`data.partition` is 'sharded' with {num_workers} workers and {len(labels)} samples;"
            " allowed: at most as many workers as samples"
        )
    order = torch.randperm(len(labels), generator=stream(seed, "partition"))
    return list(order[: size * num_workers].view(num_workers, size).unbind())


def _label_skew(labels: Tensor, num_workers: int, seed: int, alpha: float) -> list[Tensor]:
    """Disjoint shards that use every index; the shares of each class are Dirichlet(alpha).

    A small alpha concentrates a class on few workers. Shards differ in size and may be empty.
    """
    if not 0 < alpha <= 1e9:  # larger values overflow in numpy
        raise ValueError(f"`data.alpha` is {alpha}; allowed: a number in (0, 1e9]")
    order = torch.randperm(len(labels), generator=stream(seed, "partition"))
    proportions = np.random.default_rng(stream_seed(seed, "partition"))
    pieces: list[list[Tensor]] = [[] for _ in range(num_workers)]
    for label in sorted(set(labels.tolist())):
        members = order[labels[order] == label]
        share = proportions.dirichlet(np.full(num_workers, alpha))
        # Rounding the cumulative sums and not the shares uses every sample exactly once.
        cuts = np.rint(np.cumsum(share)[:-1] * len(members)).astype(int)
        for piece, part in zip(pieces, members.tensor_split(cuts.tolist()), strict=True):
            piece.append(part)
    return [torch.cat(piece) for piece in pieces]


def _by_label(labels: Tensor, num_workers: int, seed: int, alpha: float) -> list[Tensor]:
    """Disjoint shards that use every index; worker j has the classes j, j + M, ..., counted from 0.

    With C < M classes, the workers j, j + C, ... share class j in about equal parts.
    """
    order = torch.randperm(len(labels), generator=stream(seed, "partition"))
    members = [order[labels[order] == label] for label in sorted(set(labels.tolist()))]
    count = min(num_workers, len(members))
    own = [torch.cat(members[i::count]) for i in range(count)]
    sharing = [len(range(i, num_workers, count)) for i in range(count)]
    parts = [some.tensor_split(number) for some, number in zip(own, sharing, strict=True)]
    return [parts[j % count][j // count] for j in range(num_workers)]


PARTITIONS: dict[str, Callable[[Tensor, int, int, float], list[Tensor]]] = {
    "full": _full,
    "sharded": _sharded,
    "label_skew": _label_skew,
    "by_label": _by_label,
}
"""The kinds of partition: (labels, num_workers, seed, alpha) -> one index tensor per worker."""


def partition(labels: Tensor, kind: str, num_workers: int, seed: int, alpha: float) -> list[Tensor]:
    """The training samples of each of M workers: int64 indices of the labels (N,), on the CPU.

    The kind is a name in PARTITIONS; alpha is the concentration of "label_skew". ValueError if the
    kind is unknown, there are fewer samples than shards, or alpha is out of range.
    """
    if kind not in PARTITIONS:
        raise ValueError(f"`data.partition` is {kind!r}; allowed: {', '.join(PARTITIONS)}")
    return PARTITIONS[kind](labels.cpu(), num_workers, seed, alpha)


class Minibatches:
    """The minibatches of one worker: indices as a function of (seed, worker, position).

    An epoch is a new permutation of the worker's samples, `indices` (size,) on the device of the
    data, cut into floor(size / B) minibatches. An incomplete last minibatch is dropped. `position`,
    the number of draws so far, is the complete state and may be set. The next minibatch comes in
    every `every`-th draw, and again in the draws between, in which the worker rests.
    """

    def __init__(
        self, indices: Tensor, batch_size: int, seed: int, worker: int, every: int = 1
    ) -> None:
        if not 1 <= batch_size <= len(indices):
            raise ValueError(
                f"`algorithm.batch_size` is {batch_size}, and worker {worker} has {len(indices)}"
                " samples; allowed: at least 1 and at most the samples of each worker"
            )
        self.indices, self.batch_size = indices, batch_size
        self.seed, self.worker, self.every = seed, worker, every
        self.batches_per_epoch = len(indices) // batch_size
        self.position = 0
        self._epoch = -1
        self._shuffled = indices  # the permuted indices of self._epoch

    def draw(self) -> Tensor:
        """The indices of the next minibatch. (B,) int64, a view that must not be written to."""
        epoch, batch = divmod(self.position // self.every, self.batches_per_epoch)
        if epoch != self._epoch:
            generator = stream(self.seed, "minibatch", self.worker, epoch)
            order = torch.randperm(len(self.indices), generator=generator)
            self._shuffled = self.indices[order.to(self.indices.device)]
            self._epoch = epoch
        self.position += 1
        return self._shuffled[batch * self.batch_size : (batch + 1) * self.batch_size]

    @property
    def rests(self) -> bool:
        """Whether the last draw gave the minibatch of the draw before."""
        return (self.position - 1) % self.every != 0

    def assign(self, worker: int) -> None:
        """Draw the minibatches of another worker."""
        self.worker, self._epoch = worker, -1

    @property
    def model_seed(self) -> int:
        """The seed of the model's random numbers in the last draw: in every layout, on resume."""
        return stream_seed(self.seed, "model", self.worker, self.position)
