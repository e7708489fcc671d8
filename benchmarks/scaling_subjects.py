"""The subjects that benchmarks/scaling.py times: algorithms, and a copy of a vector.

# n coordinates, K workers to a process
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from benchmarks.harness import KAPPA, LAM, NU, SIGMA, TAU, Problem
from consensus import POTENTIALS, Layerwise
from consensus.algorithm import Consensus
from consensus.comm import Group, Solo
from consensus.server import Server, digest
from consensus.worker import Worker


class Subject(Protocol):
    """An object that steps: an algorithm or a reference."""

    @property
    def cuts(self) -> Tensor:
        """The number of steps that a line search has cut. int64."""

    def step(self, t: int) -> None:
        """Iteration t on this rank."""

    def verify(self) -> int:
        """Compare the results of all ranks and return their digest."""


class Quadratic:
    """The oracle of f(z) = (c / 2) |z|^2: one pass over memory, little beside the step."""

    CURVATURE = 0.5  # c

    def __init__(self) -> None:
        self._gradient: Tensor | None = None

    def draw(self) -> None:
        """Draw nothing: the loss is not random."""

    def gradient(self, points: Tensor, batch: None) -> Tensor:
        """The gradient c z, in memory that the next call overwrites. (K, n) -> (K, n)."""
        del batch
        if self._gradient is None:
            self._gradient = torch.empty_like(points)
        return torch.mul(points, self.CURVATURE, out=self._gradient)

    def state_dict(self) -> dict[str, Tensor]:
        """No state."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """No state."""


def on_quadratic(potential: str, n: int) -> Consensus:
    """One worker on a quadratic, well inside every domain: |u| = 1 and |u - z| = 0.1.

    The line search then returns 1 after its first comparison, as in nearly all iterations of a
    run. No number is denormal, which would slow the processor down.
    """
    u = torch.rand(n, generator=torch.Generator().manual_seed(0)).sub_(0.5)
    u /= torch.linalg.vector_norm(u)
    phi = Layerwise(POTENTIALS[potential], thirds(n))
    worker = Worker((1.1 * u).unsqueeze(0), Quadratic(), phi, kappa=KAPPA, nu=NU)
    return Consensus(Server(u, phi, Solo()), worker, tau=TAU, sigma=SIGMA, lam=LAM)


def thirds(n: int) -> list[tuple[int, int]]:
    """Three layers of about equal size; LeNet-5 has three as well."""
    ends = [0, n // 3, 2 * n // 3, n]
    return list(pairwise(ends))


def on_lenet5(potential: str, workers: Sequence[int], group: Group, period: int = 1) -> Consensus:
    """LeNet-5 with these workers in this process."""
    return Problem().consensus(potential, workers, group, period=period)


class Alone:
    """The iterations of an algorithm between two communications, without end."""

    def __init__(self, algorithm: Consensus) -> None:
        self._algorithm = algorithm

    @property
    def cuts(self) -> Tensor:
        """Of the algorithm. int64 (2,)."""
        return self._algorithm.cuts

    def step(self, t: int) -> None:
        """Do lines 4 to 6 without the coupling."""
        self._algorithm.step_alone(t)

    def verify(self) -> int:
        """Compare u, which stays constant, on all ranks."""
        return self._algorithm.verify()


class Copy:
    """A pass over memory: n numbers are read and n are written.

    Each step copies one vector onto the next in a ring. The ring has as many vectors as an
    iteration uses, so that it fits into a cache where they do.
    """

    LENGTH = 6  # u, the message, z, v, the scratch and the gradient

    def __init__(self, n: int) -> None:
        self._ring = [torch.full((n,), float(i)) for i in range(self.LENGTH)]

    @property
    def cuts(self) -> Tensor:
        """Always 0. int64 ()."""
        return torch.zeros((), dtype=torch.int64)

    def step(self, t: int) -> None:
        """Copy one vector onto the next."""
        self._ring[(t + 1) % self.LENGTH].copy_(self._ring[t % self.LENGTH])

    def verify(self) -> int:
        """The digest of a vector of the ring."""
        return int(digest(self._ring[0]))
