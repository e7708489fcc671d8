"""Sums of two processes over Gloo that take one latency.

Gloo sends the data of a message when the receiver has announced memory for it. An all-reduce is a
ring of two steps, each an announcement and then its data: four latencies. Here each process sends
its message to the other, and has announced memory for two messages ahead, so that the data leave at
once. A process sends as many bytes as in a ring.

Both add the two messages in the order of ranks, and get the bits of an all-reduce.
"""

import itertools
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from consensus.comm.group import Pending, RepeatedSum

if TYPE_CHECKING:
    from consensus.comm.process_group import ProcessGroup

LARGEST = 4 << 20  # bytes; for more an all-reduce takes less time unless the network is slow
AHEAD = 2  # announced messages: while one is awaited, the announcement of the next travels
_FIRST_TAG = 1 << 24  # those of a user of the same handle are small

_tags: "weakref.WeakKeyDictionary[dist.ProcessGroup, Iterator[int]]" = weakref.WeakKeyDictionary()


class Exchange:
    """Messages from this process to others and back, again and again, in the same memory.

    Args:
        group: The processes. They construct their exchanges in the same order.
        outgoing: What is sent to each rank.
    """

    def __init__(self, group: "ProcessGroup", outgoing: Mapping[int, Tensor]) -> None:
        self._group, self._outgoing = group, outgoing
        self._tag = next(_tags.setdefault(group.handle, itertools.count(_FIRST_TAG)))
        self._announced: deque[tuple[Mapping[int, Tensor], list[Callable[[], Any]]]] = deque()
        self._leaving: deque[dist.Work] = deque()
        # The operations keep the connections, and the group must not refer to itself through them.
        group._owned.callback(self._announced.clear)
        group._owned.callback(self._leaving.clear)

    def expect(self, memory: Mapping[int, Tensor]) -> None:
        """Announce memory for the next messages from each rank, after those announced before.

        A rank that has left is an error of the `wait` for these messages. It may have left after it
        has sent all that anybody waits for.
        """
        arriving = [self._receive(x, rank) for rank, x in memory.items() if x.numel()]
        self._announced.append((memory, arriving))

    def _receive(self, x: Tensor, rank: int) -> Callable[[], Any]:
        """Begin to receive; the result waits for the message."""
        try:
            work: dist.Work = self._group.handle.recv([x], rank, self._tag)
        except RuntimeError as error:
            return partial(_fail, error)
        return work.wait

    def send(self) -> None:
        """Begin to send. `outgoing` must not change until `wait` has returned."""
        handle = self._group.handle
        for rank, x in self._outgoing.items():
            if x.numel():
                self._leaving.append(handle.send([x], rank, self._tag))

    def wait(self) -> Mapping[int, Tensor]:
        """Wait for one message from and to each rank; return the memory of those that came."""
        memory, arriving = self._announced.popleft()
        for wait in arriving:
            wait()
        while self._leaving:
            self._leaving.popleft().wait()
        return memory


def _fail(error: RuntimeError) -> NoReturn:
    raise error


class ExchangedSum(RepeatedSum):
    """A repeated sum of the messages of two processes. The total is written to `message`.

    Args:
        group: The processes, connected by Gloo.
        message: The summand, on the CPU.
    """

    def __init__(self, group: "ProcessGroup", message: Tensor) -> None:
        self._group, self.message = group, message
        self._other = 1 - group.rank
        self._exchange = Exchange(group, {self._other: message})
        for _ in range(AHEAD):
            self._exchange.expect({self._other: torch.empty_like(message)})

    def start(self) -> Pending:
        """Begin to send the message."""
        with self._group.reporting("sum"):
            self._exchange.send()
        return Pending(self._finish)

    def _finish(self) -> Tensor:
        with self._group.reporting("sum"):
            memory = self._exchange.wait()
            terms = self.message, memory[self._other]
            torch.add(*(terms if self._other else reversed(terms)), out=self.message)
            self._exchange.expect(memory)
        return self.message
