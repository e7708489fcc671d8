"""What every rank must learn of the others between iterations: the one place where a run stops.

A rank that became non-finite, was asked to stop, or cannot write says so in one small gather, and
all ranks draw the same conclusion from it.
"""

import time

import torch
from torch import Tensor

from consensus.comm import Group, GroupError


class Watch:
    """Looks around at moments that all ranks choose alike: about once a second.

    Args:
        group: The processes of the run.
        workers: The number of workers on each process.
        log_every: Look at least that often. Iterations.
    """

    LOOK_EVERY_S = 1.0

    def __init__(self, group: Group, workers: int, log_every: int) -> None:
        self.group = group
        self.workers = workers
        self.log_every = log_every
        self._never = torch.iinfo(torch.int64).max
        # 2 t where a z_j of this rank was the first, 2 t + 1 where u was: z_j goes before u.
        self._first = torch.full((), self._never, dtype=torch.int64, device=group.device)
        self._last: int | None = None  # the iteration at the last look
        self._clock = time.perf_counter()
        self._stride = 1

    def observe(self, t: int | Tensor, u: Tensor, z: Tensor) -> None:
        """After iteration t: remember when a z_j or u stopped being finite, without synchronizing.

        u is spoilt on all ranks at once, one iteration after the z_j of one of them, or by itself.
        One pass over each, (n,) and (K, n): a sum is finite only if its terms are. Terms so large
        that their sum overflows count as non-finite too; they have diverged.
        """
        u_at = torch.where(torch.isfinite(u.sum()), self._never, 2 * t + 1)
        z_or_u_at = torch.where(torch.isfinite(z.sum()), u_at, 2 * t)
        torch.minimum(self._first, z_or_u_at, out=self._first)

    def due(self, done: int) -> bool:
        """Whether it is time to look again, after `done` iterations; the same on all ranks."""
        return self._last is None or done - self._last >= self._stride

    def look(self, done: int, signal: int = 0, problem: str | None = None) -> int:
        """Share what this rank knows. A collective.

        Args:
            done: Iterations done.
            signal: That asked this process to stop; 0 if none did.
            problem: Why this rank cannot go on; None if it can.

        Returns:
            A signal that asked some rank to stop, the same on all; 0 if none did.

        Raises:
            GroupError: On every rank, naming the first iteration and rank that became non-finite,
                or the problem of a rank.
        """
        now = time.perf_counter()
        passed = max(1, done - (self._last or 0))
        microseconds = int(1e6 * (now - self._clock) / passed)
        mine = torch.tensor(
            [signal, microseconds, int(problem is not None)], device=self._first.device
        )
        all_ranks = self.group.gather(torch.cat([self._first.unsqueeze(0), mine]))
        first, signals, durations, problems = all_ranks.T.tolist()
        if max(problems):
            self.group.raise_together(problem)
        self._require_finite(first)
        slowest_s = max(1e-6, max(durations) / 1e6)
        self._stride = max(1, min(int(self.LOOK_EVERY_S / slowest_s), self.log_every))
        self._last, self._clock = done, now
        return int(max(signals))

    def _require_finite(self, first: list[int]) -> None:
        earliest = min(first)
        if earliest == self._never:
            return
        t, u_alone = divmod(earliest, 2)
        rank = first.index(earliest)
        j = [rank * self.workers, (rank + 1) * self.workers - 1]
        who = f"worker {j[0]}" if j[0] == j[1] else f"one of the workers {j[0]} to {j[1]}"
        what = "u" if u_alone else f"{who} on rank {rank}"
        raise GroupError(
            f"iteration {t + 1}: {what} became non-finite{'' if u_alone else ', and u with it'}; "
            "smaller algorithm.sigma and algorithm.tau, or a larger algorithm.lam, may help"
        )
