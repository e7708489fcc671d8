"""Group: the collectives of Algorithm 1, and their implementation for one process."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class GroupError(RuntimeError):
    """A failure that all ranks know and raise alike."""


class PeerLostError(GroupError):
    """A collective failed because a peer is gone or late; every rank detects it on its own.

    With a heartbeat it names the peer. Gloo reports it where the collective is waited for. NCCL's
    `wait` only orders the device's stream: there torch's watchdog ends the process, and reports.
    """


@dataclass
class Pending:
    """A running sum. Its input must not be touched before `wait`, which returns the total; once."""

    wait: Callable[[], Tensor]


class Adder(Protocol):
    """How the messages of a repeated sum are added up, if not number by number."""

    def adding(self, messages: Tensor, total: Tensor, rank: int) -> Callable[[], None]:
        """The function that computes the part of `rank` of the total.

        It is called many times. All messages are complete then, (P, numel), and lie, like the total
        (numel,), always in the memory that is given here.
        """


class RepeatedSum(ABC):
    """A sum of tensors of one shape that is computed many times, in memory allocated once."""

    message: Tensor  # (numel,), the summand of this rank, to be written from `wait` to `start`
    in_shared_memory = False  # True: the ranks add up in shared memory and send nothing
    residual: Tensor | None = None  # what rounding has kept back so far; part of the state

    @property
    def num_bytes(self) -> int:
        """Size of a summand as it is sent, in bytes."""
        return self.message.nbytes

    def add_by(self, adder: Adder) -> bool:
        """Leave the additions to `adder`, where ranks read the messages of others in parts.

        All ranks call this before the first `start`, and get the same answer.
        """
        del adder
        return False

    @abstractmethod
    def start(self) -> Pending:
        """Begin the sum of all messages.

        The result is read-only and valid until the next `start`: it may be shared, or in `message`.
        """


class SentSum(RepeatedSum):
    """A repeated sum by all-reduce of the messages."""

    def __init__(self, group: "Group", message: Tensor) -> None:
        self._group, self.message = group, message

    def start(self) -> Pending:
        """Begin the all-reduce, in place."""
        return self._group.start_sum(self.message)


class Group(ABC):
    """Collectives over the processes of a run. All ranks call them in the same order.

    Methods that end in an underscore work in place and return their argument.
    """

    rank: int
    size: int
    device: torch.device  # of the tensors in collectives

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over ranks."""
        return self.start_sum(tensor).wait()

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Average over ranks of several tensors, each in place; one sum in float64."""
        if tensors and self.size > 1:
            total = self.sum_(torch.cat([tensor.double().reshape(-1) for tensor in tensors]))
            pieces = total.div_(self.size).split([tensor.numel() for tensor in tensors])
            for tensor, piece in zip(tensors, pieces, strict=True):
                tensor.copy_(piece.view_as(tensor))

    @abstractmethod
    def min_(self, tensor: Tensor) -> Tensor:
        """Elementwise minimum over ranks."""

    @abstractmethod
    def broadcast_(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Values of one rank."""

    @abstractmethod
    def start_sum(self, tensor: Tensor) -> Pending:
        """Begin `sum_`, in place, so that it overlaps with a gradient."""

    def repeated_sum(self, numel: int, like: Tensor, exact: int = 0) -> RepeatedSum:
        """The fastest `start_sum` for vectors (numel,) like a tensor. A collective.

        The last `exact` numbers are not rounded to int8.
        """
        del exact
        return SentSum(self, like.new_empty(numel))

    @abstractmethod
    def gather(self, tensor: Tensor) -> Tensor:
        """Tensors of all ranks, on every rank. (...) -> (size, ...)."""

    @abstractmethod
    def start_gather(self, tensor: Tensor, out: Tensor) -> Pending:
        """Begin `gather` to `out` (size, ...), so that it overlaps with a gradient."""

    @abstractmethod
    def share(self, value: Any, source: int = 0) -> Any:
        """Picklable object of one rank, on every rank."""

    @abstractmethod
    def gather_objects(self, value: Any) -> list[Any]:
        """Picklable objects of all ranks, on every rank, in order of ranks."""

    @abstractmethod
    def barrier(self) -> None:
        """Wait for all ranks."""

    @abstractmethod
    def side(self) -> "Group":
        """A second group of the same ranks, for CPU tensors of another thread. A collective."""

    @abstractmethod
    def close(self) -> None:
        """Leave the group; no collective may follow."""

    @contextmanager
    def publish_failure(self) -> Iterator[None]:
        """Publish a local failure so that peers can report its cause."""
        yield

    def raise_together(self, problem: str | None, error: type[Exception] = GroupError) -> None:
        """Raise `error` on all ranks if any has a problem: that of the lowest. A collective.

        A rank that raised alone would leave the others waiting in their next collective.
        """
        if found := self.first_problem(problem):
            raise error(found)

    def first_problem(self, problem: str | None, member: str = "rank") -> str | None:
        """The problem of the lowest rank that has one, after `member` and its number.

        A collective.
        """
        flag = self.min_(torch.tensor([0 if problem else 1], device=self.device))
        if int(flag) == 1:
            return None
        problems = self.gather_objects(problem)
        rank, text = next((rank, text) for rank, text in enumerate(problems) if text)
        return text if text.startswith(("rank ", f"{member} ")) else f"{member} {rank}: {text}"


class Solo(Group):
    """The group of one process: every collective is the identity, without torch.distributed."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.rank, self.size, self.device = 0, 1, torch.device(device)

    def min_(self, tensor: Tensor) -> Tensor:
        """The argument."""
        return tensor

    def broadcast_(self, tensor: Tensor, source: int = 0) -> Tensor:
        """The argument."""
        del source
        return tensor

    def share(self, value: Any, source: int = 0) -> Any:
        """The argument."""
        del source
        return value

    def start_sum(self, tensor: Tensor) -> Pending:
        """The argument, at once."""
        return Pending(lambda: tensor)

    def gather(self, tensor: Tensor) -> Tensor:
        """(...) -> (1, ...)."""
        return tensor.unsqueeze(0)

    def start_gather(self, tensor: Tensor, out: Tensor) -> Pending:
        """(...) -> (1, ...), at once."""
        del out
        return Pending(lambda: tensor.unsqueeze(0))

    def gather_objects(self, value: Any) -> list[Any]:
        """A list of the argument."""
        return [value]

    def barrier(self) -> None:
        """Return at once."""

    close = barrier

    def side(self) -> "Solo":
        """Another group of one process."""
        return Solo("cpu")
