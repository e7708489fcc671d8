"""Repeated sums: compressed to bfloat16, in a fixed order, or in shared memory."""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from consensus.comm import shared_memory
from consensus.comm.group import Adder, Group, PeerLostError, Pending, RepeatedSum, SentSum
from consensus.comm.shared_memory import PeersGoneError, SharedSum
from consensus.tree_sum import tree_sum


class Bfloat16Sum(RepeatedSum):
    """A sum in bfloat16: half the bytes of float32.

    Every summand is rounded to 8 significant bits, and so is each addition. The error of a sum of P
    summands x_r is at most P u / (1 - P u) sum_r |x_r| in each coordinate, u = 2^-8. The total is
    written to `message`.

    Args:
        sent: The sum of the rounded messages, in bfloat16.
        message: The summand.
    """

    def __init__(self, sent: RepeatedSum, message: Tensor) -> None:
        self._sent, self.message = sent, message

    @property
    def num_bytes(self) -> int:
        """Two bytes a number."""
        return self._sent.num_bytes

    def start(self) -> Pending:
        """Begin the sum of the rounded message."""
        self._sent.message.copy_(self.message)
        pending = self._sent.start()
        return Pending(lambda: self.message.copy_(pending.wait()))


def sent_sum(
    group: Group,
    message: Tensor,
    compress: str | None = None,
    send: Callable[[Tensor], RepeatedSum] | None = None,
) -> RepeatedSum:
    """A repeated sum of the messages as they are (None) or in bfloat16 ("bf16").

    `send` makes the sum of what is sent; None: by all-reduce.
    """
    send = send or partial(SentSum, group)
    if compress is None:
        return send(message)
    return Bfloat16Sum(send(torch.empty_like(message, dtype=torch.bfloat16)), message)


class TreeSum(RepeatedSum):
    """A sum along the tree of tree_sum.py: every rank gathers the messages and adds them up.

    A rank receives the P - 1 messages of the others, where a ring moves 2 (P - 1) / P of one, and
    the bits do not depend on the backend. The total is written to `message`.

    Args:
        group: The P processes.
        message: The summand.
    """

    def __init__(self, group: Group, message: Tensor) -> None:
        self._group, self.message = group, message
        self._gathered = message.new_empty(group.size, *message.shape)

    def start(self) -> Pending:
        """Begin the all-gather."""
        pending = self._group.start_gather(self.message, self._gathered)
        return Pending(lambda: tree_sum(pending.wait().unbind(), self.message))


class SumInSharedMemory(RepeatedSum):
    """A repeated sum in memory of all ranks; `reporting` turns its errors into `PeerLostError`."""

    in_shared_memory = True

    def __init__(
        self, shared: SharedSum, reporting: Callable[[str], AbstractContextManager[None]]
    ) -> None:
        self._shared, self._reporting = shared, reporting
        self.message, self._pending = shared.message, Pending(self._wait)

    def add_by(self, adder: Adder) -> bool:
        """As in `RepeatedSum`, for large sums."""
        return self._shared.add_by(adder)

    def start(self) -> Pending:
        """Publish the message."""
        self.message = self._shared.start()
        return self._pending

    def _wait(self) -> Tensor:
        try:
            return self._shared.wait()
        except PeersGoneError:
            with self._reporting("sum"):  # here, since to enter it takes longer than a small sum
                raise


def open_shared_sum(
    group: Group,
    numel: int,
    dtype: torch.dtype,
    timeout_s: float,
    enabled: bool,
    lost: Callable[[], str] = lambda: "",
) -> SharedSum | None:
    """A sum in memory of all ranks; None on all of them if one cannot take part. A collective.

    The ranks may be on several hosts; `enabled`: this one may use shared memory. `lost` is that of
    `SharedSum`.
    """
    memories = group.gather_objects(shared_memory.identity() if enabled else "")
    if "" in memories or len(set(memories)) > 1:
        return None
    path = place = problem = ""
    shared = None
    if group.rank == 0:
        try:
            path = SharedSum.reserve(group.size, numel, dtype)
        except OSError as error:
            problem = str(error)
    try:
        if place := group.share(path):
            try:
                shared = SharedSum(place, group.rank, group.size, numel, dtype, timeout_s, lost)
            except OSError as error:
                problem = str(error)
        complete = all(group.gather_objects(shared is not None))
    except PeerLostError:
        path = path or place  # rank 0, which else removes the name, may be the lost one
        raise
    finally:
        if path:  # either all ranks have opened it, or none will use it
            Path(path).unlink(missing_ok=True)
    if problem:
        line = f"rank {group.rank}: no shared memory, sums go through Gloo: {problem}"
        warnings.warn(line, stacklevel=3)
    if shared is not None and not complete:
        shared.close()
        return None
    return shared
