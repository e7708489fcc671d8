"""Sums over the processes of one host, in shared memory.

Gloo sends through sockets even on one host, and its threads compete for the cores that compute
gradients. Here a rank writes its summand where the others read it: no thread, no copy, and no
system call unless a rank has to wait.

# P ranks, n numbers; sum number t = 1, 2, ...

    start   rank r has written its summand into its slot                           posted[r] = t
    wait    once all have posted t, the slots are added up, along the tree of tree_sum.py

*Small* sums are computed by every rank on its own. A rank has two slots, which it uses in turn. A
rank that has posted t no longer reads the slots of t - 1, so those are free once all have posted t.
Nobody waits for a rank that has posted and computes: ranks may be apart by nearly an iteration.

*Large* sums are computed in parts, as in an all-reduce:

    wait    once all have posted t, rank r adds up part r of the slots              added[r] = t
            once all have added t, the total is complete

There one slot suffices. It is written again after all have added t. The total is written again
after all have posted t + 1, which each rank does when it no longer reads the total of t.

Every number is a sum of the same numbers in the same order on all ranks, so all get the same bits.

Counters are read and written without locks. That requires that stores become visible in program
order and that an aligned store of 8 bytes is atomic, as on x86-64. `available` is False elsewhere.
"""

import fcntl
import os
import platform
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from consensus.comm.group import Adder
from consensus.tree_sum import adding

FOLDER = Path("/dev/shm")
SMALL = 4 << 20  # bytes of all slots of a small sum: they stay in a core's cache
PAGE = 4096  # bytes
LINE = 8  # int64 in a cache line: no two ranks write into the same one

CHECK_EVERY_S = 0.1  # interval of the checks whether peers are alive
SPIN_S = 1e-4
SHORTEST_NAP_S, LONGEST_NAP_S = 2e-5, 5e-4
LONGEST_NAP = 0.02  # of a long wait so far: hundreds of naps would take milliseconds of a core


class PeersGoneError(RuntimeError):
    """Processes of peers have ended, have left the sum, or are late."""


def available() -> bool:
    """Whether this platform supports the sums."""
    here = sys.platform == "linux" and platform.machine() == "x86_64"
    return here and os.access(FOLDER, os.W_OK)


def identity() -> str:
    """A text that is equal for processes that share FOLDER, thus a host; "" if not `available`."""
    if not available():
        return ""
    try:
        host = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        host = socket.gethostname()
    return f"{host} {FOLDER.stat().st_dev}"


class SharedSum:
    """A sum of n = numel numbers over P = size ranks, at least 2, that is computed many times.

    One rank calls `reserve`. Each rank opens the file at `path`, which raises OSError if it cannot
    be opened here, then calls `start` and `wait` in turn. `timeout_s` is the longest `wait`, which
    `lost` may end with a reason.

    Attributes:
        message: Slot for the next summand, to be written from `wait` to `start`. (n,).
    """

    def __init__(
        self,
        path: str,
        rank: int,
        size: int,
        numel: int,
        dtype: torch.dtype,
        timeout_s: float,
        lost: Callable[[], str] = lambda: "",
    ) -> None:
        self._lost = lost
        self._rank, self._size, self._timeout, self._t = rank, size, timeout_s, 0
        head, slot, slots = _layout(size, numel, dtype)
        self._file = os.open(path, os.O_RDWR)  # `from_file` would create an absent file
        try:
            memory = torch.from_file(path, shared=True, size=head + slot * slots, dtype=torch.uint8)
            # A lock on byte r marks rank r as alive: the kernel releases it when the process ends.
            # After the mapping: a process that closes any handle of a file loses its locks on it.
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
        except (OSError, RuntimeError) as error:
            os.close(self._file)
            raise OSError(f"{path}: {error}") from error

        array: Any = memory[: 2 * size * LINE * 8].numpy()
        counters = memoryview(array).cast("q")
        self._posted = counters[: size * LINE : LINE]
        self._added = counters[size * LINE :: LINE]
        body = memory[head:].view(slots, slot)[:, : numel * dtype.itemsize].view(dtype)
        self._two = slots == 2 * size
        self._messages = body[rank : slots if self._two else size : size].unbind()
        self.message = self._messages[1 % len(self._messages)]
        if self._two:  # the total is written to the other slot of this rank
            totals = [(body[:size], self._messages[1]), (body[size:], self._messages[0])]
        else:
            self._every, self._total = body[:size], body[-1]
            part = slice(numel * rank // size, numel * (rank + 1) // size)
            totals = [(self._every[:, part], self._total[part])]
        self._additions = [adding(summands, out) for summands, out in totals]

    @staticmethod
    def reserve(size: int, numel: int, dtype: torch.dtype) -> str:
        """Create the file, for all ranks to open; the caller unlinks it once they have.

        The memory stays until the last process that has it open ends. Raises OSError without room:
        a process that touched memory which is not there would be ended by a signal.
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

    def add_by(self, adder: Adder) -> bool:
        """Let `adder` add up large sums from now on; False if they are small."""
        if not self._two:
            self._additions = [adder.adding(self._every, self._total, self._rank)]
        return not self._two

    def start(self) -> Tensor:
        """Publish `message`. Returns the next one."""
        self._t += 1
        self._posted[self._rank] = self._t
        self.message = self._messages[(self._t + 1) % len(self._messages)]
        return self.message

    def wait(self) -> Tensor:
        """The sum, read-only and valid until the next `start`; PeersGoneError if late. (n,)."""
        if min(self._posted) < self._t:  # seldom: the sum had an iteration's time
            self._await(self._posted)
        self._additions[self._t % len(self._additions)]()
        if self._two:
            return self.message
        self._added[self._rank] = self._t
        self._await(self._added)
        return self._total

    def _await(self, counters: memoryview) -> None:
        """Return when all counters have reached t."""
        missing = list(range(self._size))
        started = time.monotonic()
        check, nap = started + CHECK_EVERY_S, SHORTEST_NAP_S
        while missing := [rank for rank in missing if counters[rank] < self._t]:
            now = time.monotonic()
            if now < started + SPIN_S:
                os.sched_yield()  # a missing rank may need this core
                continue
            time.sleep(nap)
            nap = min(1.5 * nap, max(LONGEST_NAP_S, LONGEST_NAP * (now - started)))
            if now > check:
                check = now + CHECK_EVERY_S
                gone = [rank for rank in missing if not self._is_alive(rank)]
                # A rank that has posted since the counters were read may leave.
                gone = [rank for rank in gone if counters[rank] < self._t]
                if gone:
                    raise PeersGoneError(f"rank {', '.join(map(str, gone))} is gone")
                if why := self._lost():
                    raise PeersGoneError(why)
                if now > started + self._timeout:
                    raise PeersGoneError(f"timed out after {self._timeout:g} s")

    def _is_alive(self, rank: int) -> bool:
        """Whether another rank holds its lock."""
        try:  # a shared lock, so that ranks that check at the same time do not see each other's
            fcntl.lockf(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, rank)
        except OSError:
            return True
        return False

    def close(self) -> None:
        """Release the lock, so that waiting peers detect that this rank has left."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _layout(size: int, numel: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Bytes of all counters and of a slot; number of slots (the last: total of a large sum)."""
    head = -(-2 * size * LINE * 8 // PAGE) * PAGE
    slot = -(-numel * dtype.itemsize // PAGE) * PAGE
    return head, slot, 2 * size if size * numel * dtype.itemsize <= SMALL else size + 1


def num_bytes(size: int, numel: int, dtype: torch.dtype) -> int:
    """Bytes that a sum of n = numel numbers over P = size ranks takes in FOLDER."""
    head, slot, slots = _layout(size, numel, dtype)
    return head + slot * slots
