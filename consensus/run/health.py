"""Periodic cross-rank check for non-finite values, stop signals and write errors.

One small gather carries the state of each rank, so that all ranks draw the same conclusion from it.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from consensus.comm import Group, GroupError, Pending

ADVICE = "smaller algorithm.sigma and algorithm.tau, or a larger algorithm.lam, may help"


@dataclass(frozen=True)
class _Begun:
    """An exchange after `done` iterations, and the problem of this rank in it."""

    done: int
    states: Pending
    problem: str | None


class HealthCheck:
    """Checks at iterations that all ranks choose alike, about once a second.

    `numbers` are the j of all workers, as many on each process; `log_every` limits the iterations
    between checks. `dropped` is `Worker.dropped`; None: no worker is ever dropped. `late` is the
    number of iterations that an exchange which nobody waits for may take.
    """

    CHECK_EVERY_S = 1.0

    def __init__(
        self,
        group: Group,
        numbers: Sequence[int],
        log_every: int,
        dropped: Tensor | None = None,
        late: int = 0,
    ) -> None:
        self.group, self.numbers, self.log_every = group, numbers, log_every
        self._late = late
        self._begun: _Begun | None = None  # the exchange that nobody waits for
        self._dropped = dropped
        self._counts = [0] * len(numbers)  # of the drops, at the last check
        self._told = list(self._counts)  # at the last line about each worker
        self._never = torch.iinfo(torch.int64).max
        # 2 t if a z_j of this rank became non-finite first, 2 t + 1 if u did.
        self._first = torch.full((), self._never, dtype=torch.int64, device=group.device)
        self._last: int | None = None  # the iteration of the last check
        self._checked = 0  # that of the last one with results
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
        """Whether a check is due after `done` iterations, or one ends; the same on all ranks."""
        if self._begun is not None:
            return done >= self._begun.done + self._late
        return self._last is None or done - self._last >= self._stride

    def check(
        self, done: int, signal: int = 0, problem: str | None = None, wait: bool = True
    ) -> int:
        """Exchange the state of all ranks, stop signals and write errors included. A collective.

        Returns a stop signal that some rank received, the same on all; 0 if none. GroupError on
        every rank, with the first iteration and rank that became non-finite or a rank's problem,
        or where all workers have been dropped since the last check. Without `wait` the exchange may
        take `late` iterations: one call begins it, and that at its end has the results.
        """
        earlier = 0
        if self._begun is not None:
            earlier = self._conclude(self._begun)
            if not wait:
                return earlier
        begun = self._begin(done, signal, problem)
        if wait or not self._late:
            return max(earlier, self._conclude(begun))
        self._begun = begun
        return earlier

    def _begin(self, done: int, signal: int, problem: str | None) -> "_Begun":
        now = time.perf_counter()
        passed = max(1, done - (self._last or 0))
        microseconds = int(1e6 * (now - self._clock) / passed)
        mine = torch.tensor(
            [signal, microseconds, int(problem is not None)], device=self._first.device
        )
        parts = [self._first.unsqueeze(0), mine]
        if self._dropped is not None:
            parts.append(self._dropped)
        state = torch.cat(parts)
        states = state.new_empty(self.group.size, len(state))
        self._last, self._clock = done, now
        return _Begun(done, self.group.start_gather(state, states), problem)

    def _conclude(self, begun: "_Begun") -> int:
        self._begun = None
        first, signals, durations, problems, *drops = begun.states.wait().T.tolist()
        if max(problems):
            self.group.raise_together(begun.problem)
        if min(first) < self._never:
            raise GroupError(self._non_finite(first))
        if drops:
            self._require_some_left([count for rank in zip(*drops, strict=True) for count in rank])
        slowest_s = max(1e-6, max(durations) / 1e6)
        self._stride = max(1, min(int(self.CHECK_EVERY_S / slowest_s), self.log_every))
        self._checked = begun.done
        return int(max(signals))

    def _require_some_left(self, counts: list[int]) -> None:
        """Raise on all ranks if all workers have been dropped since the last check."""
        before, self._counts = self._counts, counts
        if all(now > old for now, old in zip(counts, before, strict=True)):
            since = f"iterations {self._checked + 1} to {self._last}"
            raise GroupError(f"{since}: each of the {len(counts)} workers was non-finite; {ADVICE}")

    def remark(self) -> str | None:
        """A line about dropped workers after a check, the same on all ranks; None: nothing new.

        It names a worker the first time, and then when its count has doubled.
        """
        named = [i for i, n in enumerate(self._counts) if n > 0 and n >= 2 * self._told[i]]
        if not named:
            return None
        for i in named:
            self._told[i] = self._counts[i]
        who = ", ".join(f"worker {self.numbers[i]} ({self._counts[i]} so far)" for i in named)
        return f"iteration {self._checked}: non-finite, left out of u and begun again at u: {who}"

    def _non_finite(self, first: list[int]) -> str:
        """The message about the earliest non-finite value, from `_first` of each rank."""
        t, u_alone = divmod(min(first), 2)
        what = "u became non-finite"
        if not u_alone:
            rank = first.index(min(first))
            each = len(self.numbers) // self.group.size
            j = self.numbers[rank * each : (rank + 1) * each]
            who = f"worker {j[0]}" if each == 1 else f"one of the workers {j[0]} to {j[-1]}"
            what = f"{who} on rank {rank} became non-finite, and u with it"
        return f"iteration {t + 1}: {what}; {ADVICE}"
