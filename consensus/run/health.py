"""Periodic cross-rank check for non-finite values, stop signals and write errors.

One small gather carries the state of each rank, so that all ranks draw the same conclusion from it.
"""

import time

import torch
from torch import Tensor

from consensus.comm import Group, GroupError


class HealthCheck:
    """Checks at iterations that all ranks choose alike, about once a second.

    `workers` is their number on each process; `log_every` limits the iterations between checks.
    """

    CHECK_EVERY_S = 1.0

    def __init__(self, group: Group, workers: int, log_every: int) -> None:
        self.group, self.workers, self.log_every = group, workers, log_every
        self._never = torch.iinfo(torch.int64).max
        # 2 t if a z_j of this rank became non-finite first, 2 t + 1 if u did.
        self._first = torch.full((), self._never, dtype=torch.int64, device=group.device)
        self._last: int | None = None  # the iteration of the last check
        self._clock = time.perf_counter()
        self._stride = 1

    def observe(self, t: int | Tensor, u: Tensor, z: Tensor) -> None:
        """Record after iteration t whether a z_j or u is non-finite, without a synchronization.

        A non-finite z_j spoils u on all ranks one iteration later; u can also overflow by itself.
        One pass over each, (n,) and (K, n): a sum is finite only if its terms are. Terms whose sum
        overflows count as non-finite too; they have diverged.
        """
        u_at = torch.where(torch.isfinite(u.sum()), self._never, 2 * t + 1)
        z_or_u_at = torch.where(torch.isfinite(z.sum()), u_at, 2 * t)
        torch.minimum(self._first, z_or_u_at, out=self._first)

    def due(self, done: int) -> bool:
        """Whether a check is due after `done` iterations; the same on all ranks."""
        return self._last is None or done - self._last >= self._stride

    def check(self, done: int, signal: int = 0, problem: str | None = None) -> int:
        """Exchange the state of all ranks, stop signals and write errors included. A collective.

        Returns a stop signal that some rank received, the same on all; 0 if none. GroupError on
        every rank, with the first iteration and rank that became non-finite or a rank's problem.
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
        if min(first) < self._never:
            raise GroupError(self._non_finite(first))
        slowest_s = max(1e-6, max(durations) / 1e6)
        self._stride = max(1, min(int(self.CHECK_EVERY_S / slowest_s), self.log_every))
        self._last, self._clock = done, now
        return int(max(signals))

    def _non_finite(self, first: list[int]) -> str:
        """The message about the earliest non-finite value, from `_first` of each rank."""
        t, u_alone = divmod(min(first), 2)
        what = "u became non-finite"
        if not u_alone:
            rank = first.index(min(first))
            j = [rank * self.workers, (rank + 1) * self.workers - 1]
            who = f"worker {j[0]}" if j[0] == j[1] else f"one of the workers {j[0]} to {j[1]}"
            what = f"{who} on rank {rank} became non-finite, and u with it"
        advice = "smaller algorithm.sigma and algorithm.tau, or a larger algorithm.lam, may help"
        return f"iteration {t + 1}: {what}; {advice}"
