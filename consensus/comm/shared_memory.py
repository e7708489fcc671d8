"""Sums over the processes of one machine, in memory that all of them see.

Gloo sends through sockets, to a process on the same machine as well, and its threads take their
time from cores that compute gradients. Here a rank writes its summand where the others read it: no
thread, no copy, and no system call unless a rank has to wait.

# P ranks, n numbers; sum number t = 1, 2, ...

    start   rank r has written its summand into its slot                           posted[r] = t
    wait    once all have posted t, the slots are added up, in the order of ranks

*Small* sums are formed by every rank on its own. A rank has two slots, which it uses in turn: who
has posted t is done with reading t - 1, so slots of t - 1 are free once all have posted t. Nobody
waits for a rank that has posted and computes: ranks may be apart by nearly an iteration.

*Large* ones are formed in parts, as an all-reduce does it:

    wait    once all have posted t, rank r adds up part r of the slots              added[r] = t
            once all have added t, the total is whole

There one slot suffices: it is written again after all have added t, and the total after all have
posted t + 1, which each does when it is done with the total of t.

Every number is a sum of the same numbers in the same order on all ranks, so they get the same bits.

Counters are read and written without locks. That is sound where stores become visible in the order
in which they were made, and an aligned store of 8 bytes is whole: on x86-64. Elsewhere `available`
says no.
"""

import fcntl
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER = Path("/dev/shm")
SMALL = 4 << 20  # bytes in all slots together: they stay in a core's cache
CHUNK = 1 << 17  # numbers that are added up at once, likewise
PAGE = 4096
LINE = 8  # int64 in a cache line: no two ranks write into the same one

LOOK_EVERY_S = 0.1  # whether peers are alive, while one waits
SPIN_S = 1e-4
SHORTEST_NAP_S, LONGEST_NAP_S = 2e-5, 5e-4


class PeersGoneError(RuntimeError):
    """Ranks whose processes have ended, or have left the sum; or that did not come in time."""


def available() -> bool:
    """Whether this machine has what the sums need."""
    return (
        sys.platform == "linux"
        and platform.machine() in ("x86_64", "AMD64")
        and os.access(FOLDER, os.W_OK)
    )


class SharedSum:
    """One sum of n numbers, formed again and again.

    One rank calls `reserve`; each opens what that made, and calls `start` and `wait` in turn.

    Args:
        path: What `reserve` returned.
        rank: Of this process, among `size` of this machine.
        size: P, at least 2.
        numel: n.
        dtype: Of the numbers.
        timeout_s: After which `wait` gives up.

    Raises:
        OSError: If the file cannot be opened here.
    """

    def __init__(
        self, path: str, rank: int, size: int, numel: int, dtype: torch.dtype, timeout_s: float
    ) -> None:
        self._rank, self._size, self._timeout = rank, size, timeout_s
        self._t = 0
        slot, slots = _layout(size, numel, dtype)
        self._file = os.open(path, os.O_RDWR)  # `from_file` would make what it does not find
        try:
            length = num_bytes(size, numel, dtype)
            memory = torch.from_file(path, shared=True, size=length, dtype=torch.uint8)
            # A lock on byte r shows that rank r lives: the kernel takes it back at its end. After
            # the mapping, since a process that closes any handle of a file loses its locks on it.
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
        except (OSError, RuntimeError) as error:
            os.close(self._file)
            raise OSError(f"{path}: {error}") from error

        head: Any = memory[: 2 * size * LINE * 8].numpy()
        counters = memoryview(head).cast("q")
        self._posted, self._added = counters[: size * LINE], counters[size * LINE :]
        body = memory[_head(size) :].view(slots, slot)[:, : numel * dtype.itemsize].view(dtype)
        self._two = slots == 2 * size
        self._slots = body[: slots if self._two else size]
        self._total = body[-1]  # of large sums
        bounds = torch.linspace(0, numel, size + 1, dtype=torch.float64).long().tolist()
        self._part = slice(bounds[rank], bounds[rank + 1])

    @staticmethod
    def reserve(size: int, numel: int, dtype: torch.dtype) -> str:
        """Make the file, for the other ranks to open; whoever made it removes it by `forget`.

        Raises:
            OSError: If there is no room for it. (A full memory would otherwise end the process
                that touches it, by a signal.)
        """
        handle, path = tempfile.mkstemp(prefix="consensus-", dir=FOLDER)
        try:
            os.posix_fallocate(handle, 0, num_bytes(size, numel, dtype))
        except OSError:
            os.unlink(path)
            raise
        finally:
            os.close(handle)
        return path

    @staticmethod
    def forget(path: str) -> None:
        """Remove the name; the memory stays until the last process that has it open ends."""
        os.unlink(path)

    @property
    def message(self) -> Tensor:
        """Where the next summand is to be written; free from `wait` to `start`. (n,)."""
        return self._slots[self._own(self._t + 1)]

    def _own(self, t: int) -> int:
        return self._rank + self._size * (t % 2 if self._two else 0)

    def start(self) -> None:
        """Show the others what `message` holds."""
        self._t += 1
        self._posted[self._rank * LINE] = self._t

    def wait(self) -> Tensor:
        """The sum, to be read until the next `start`. (n,).

        Raises:
            PeersGoneError: If a rank is gone, or late.
        """
        self._await(self._posted)
        if self._two:
            first = self._size * (self._t % 2)
            return _add_up(self._slots[first : first + self._size], self.message)
        _add_up(self._slots[:, self._part], self._total[self._part])
        self._added[self._rank * LINE] = self._t
        self._await(self._added)
        return self._total

    def _await(self, counters: memoryview) -> None:
        """Return when all counters have reached t."""
        missing = list(range(self._size))
        started = time.monotonic()
        look, nap = started + LOOK_EVERY_S, SHORTEST_NAP_S
        while missing := [rank for rank in missing if counters[rank * LINE] < self._t]:
            now = time.monotonic()
            if now < started + SPIN_S:
                os.sched_yield()  # whom this rank waits for may need its core
                continue
            time.sleep(nap)
            nap = min(1.5 * nap, LONGEST_NAP_S)
            if now > look:
                look = now + LOOK_EVERY_S
                gone = [rank for rank in missing if not self._lives(rank)]
                # One that has come since the last count may rightly have left.
                gone = [rank for rank in gone if counters[rank * LINE] < self._t]
                if gone:
                    raise PeersGoneError(f"rank {', '.join(map(str, gone))} is gone")
                if now > started + self._timeout:
                    raise PeersGoneError(f"timed out after {self._timeout:g} s")

    def _lives(self, rank: int) -> bool:
        """Whether another rank holds its lock."""
        if rank == self._rank:
            return True
        try:  # shared, so that several who look do not take each other for the one who lives
            fcntl.lockf(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, rank)
        except OSError:
            return True
        return False

    def close(self) -> None:
        """Leave: peers that wait for this rank learn it."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _layout(size: int, numel: int, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of a slot, and the number of slots (the total of a large sum is the last one)."""
    slot = -(-numel * dtype.itemsize // PAGE) * PAGE
    return slot, 2 * size if size * numel * dtype.itemsize <= SMALL else size + 1


def _head(size: int) -> int:
    return -(-2 * size * LINE * 8 // PAGE) * PAGE


def num_bytes(size: int, numel: int, dtype: torch.dtype) -> int:
    """What a sum of so many numbers over so many ranks takes in FOLDER."""
    slot, slots = _layout(size, numel, dtype)
    return _head(size) + slot * slots


def _add_up(summands: Tensor, out: Tensor) -> Tensor:
    """The sum over the first axis, row after row. (P, n) -> (n,)."""
    pieces = zip(torch.split(summands, CHUNK, 1), torch.split(out, CHUNK), strict=True)
    for rows, piece in pieces:
        torch.add(rows[0], rows[1], out=piece)
        for row in rows[2:]:
            piece += row
    return out
