"""Algorithm 1 on one screen, and the baselines that share its parts.

Data flow: `Consensus.step` begins the all-reduce of line 3, draws minibatches and computes their
gradients meanwhile, then moves u and the z_j. The sum of forces and the minibatch gradients depend
on z^t only, so hiding the communication changes no iterate.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from consensus.comm import Group
from consensus.core.flat import Scalar, part_of
from consensus.core.layerwise import Layerwise
from consensus.server import Server, digest
from consensus.worker import Worker

ORDERS = ("gauss_seidel", "jacobi")
U_STEP_ON = ("coupling", "objective")

StepSize = Scalar | Callable[[int], Scalar]
"""A constant, or a schedule: a function of the iteration t = 0, 1, ..."""


class Algorithm(ABC):
    """Interface of the trainer: a step, the consensus variable, and the state behind it.

    Attributes:
        worker: The K workers of this process.
        phi: The layer-wise potential.
        lam: The coupling parameter of (15).
    """

    worker: Worker
    phi: Layerwise
    lam: StepSize

    @abstractmethod
    def step(self, t: int) -> None:
        """Iteration t = 0, 1, ... on every rank."""

    @property
    def closed_form(self) -> bool:
        """Whether no line solves an equation by iterations that the host controls."""
        return self.worker.kernel.closed_form

    @property
    @abstractmethod
    def u(self) -> Tensor:
        """The consensus variable. (n,)."""

    @property
    def cuts(self) -> Tensor:
        """The numbers of cuts of s_u and of the s_j of this process. -> int64 (2,)."""
        cuts = self.worker.cuts.sum()
        return torch.stack([torch.zeros_like(cuts), cuts])

    def state_dict(self) -> dict[str, Tensor]:
        """The state that survives an iteration; all else is a function of t, seed and config.

        Keys `worker/...` have a row for each worker of this process, (K, ...); all others are equal
        on all ranks. The tensors are not copies: the next step may change them.
        """
        return {f"worker/{key}": rows for key, rows in self.worker.state_dict().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from copies of a `state_dict`, on any device."""
        self.worker.load_state_dict(part_of(state, "worker"))

    @abstractmethod
    def verify(self) -> int:
        """Check the invariants of all ranks; return the digest of u.

        Raises:
            GroupError: On every rank, if one is violated.
        """


class Consensus(Algorithm):
    """Algorithm 1.

    With the quadratic potential, `order="jacobi"` and `u_step_on="objective"` it is synchronous
    EASGD, and with momentum mEASGD (Zhang, Choromanska, LeCun 2015).

    Args:
        server: u.
        worker: The z_j of this process.
        tau: Step size of u.
        sigma: Step size of the z_j.
        lam: Coupling parameter; inf uncouples the workers.
        order: "gauss_seidel" uses u+ in line 6 as Algorithm 1 prints, "jacobi" uses u as (17) does.
        u_step_on: "coupling": t_u = tau, line 3 to the letter; "objective": t_u = tau / lam, which
            makes line 3 a gradient step on F.
        period: Lines 3 and the coupling of line 6 happen when t is a multiple of it (EASGD's
            communication period).

    Raises:
        GroupError: If a u - z_j is not strictly inside dom phi at the start, on every rank.
    """

    def __init__(
        self,
        server: Server,
        worker: Worker,
        *,
        tau: StepSize,
        sigma: StepSize,
        lam: StepSize,
        order: str = "gauss_seidel",
        u_step_on: str = "coupling",
        period: int = 1,
    ) -> None:
        assert order in ORDERS, order
        assert u_step_on in U_STEP_ON, u_step_on
        self.server = server
        self.worker = worker
        self.phi = server.phi
        self.tau, self.sigma, self.lam = tau, sigma, lam
        self.order = order
        self.u_step_on = u_step_on
        self.period = period
        self.require_feasible()

    def step(self, t: int) -> None:
        """Iteration t of Algorithm 1."""
        if t % self.period:
            return self.step_alone(t)
        t_u, sigma, pull = self.step_sizes(t)  # line 2
        before = self.server.u.clone() if self.order == "jacobi" else None
        pending = self.server.start(self.worker.z, self.worker.scratch)  # line 3, the sum begins
        delta = self.worker.gradient(self.worker.draw())  # lines 4 and 5, meanwhile
        u = self.server.finish(pending, t_u)  # line 3
        anchor = u if before is None else before
        self.worker.update(delta, sigma, pull, u, anchor)  # line 6
        return None

    def step_alone(self, t: int) -> None:
        """An iteration between two communications: lines 4 to 6 without the coupling.

        The line search keeps every z_j inside the domain around the unchanged u.
        """
        sigma = value_at(self.sigma, t)
        delta = self.worker.gradient(self.worker.draw())
        self.worker.update(delta, sigma, None, self.u, self.u)

    def step_sizes(self, t: int) -> tuple[Scalar, Scalar, Scalar]:
        """Line 2: t_u, sigma and sigma / lam at iteration t."""
        tau, sigma, lam = (value_at(size, t) for size in (self.tau, self.sigma, self.lam))
        t_u = tau / lam if self.u_step_on == "objective" else tau
        return t_u, sigma, sigma / lam

    def lam_at_rest(self, t: int) -> Scalar:
        """The lam for which (15) is stationary where the z_j and u no longer move.

        Momentum accumulates the loss 1 / (1 - kappa) times. A coupling outside the velocity is
        added once: at rest (1 - kappa) v = -sigma grad f_j and v = -(sigma / lam) grad phi, so
        grad f_j = ((1 - kappa) / lam) grad phi(u - z_j). The coupling acts in every `period`-th
        iteration only and the loss in all of them; for small sigma the ratio is the period.
        """
        lam = value_at(self.lam, t) * self.period
        return lam / (1.0 - self.worker.kappa) if self.worker.momentum_on == "loss" else lam

    @property
    def closed_form(self) -> bool:
        """Whether no line solves an equation by iterations that the host controls."""
        return super().closed_form and self.server.kernel.closed_form

    @property
    def u(self) -> Tensor:
        """The consensus variable. (n,)."""
        return self.server.u

    @property
    def cuts(self) -> Tensor:
        """The numbers of cuts of s_u and of the s_j of this process. -> int64 (2,)."""
        return torch.stack([self.server.cuts, self.worker.cuts.sum()])

    def state_dict(self) -> dict[str, Tensor]:
        """The state that survives an iteration: the workers, and `server/...`."""
        server = {f"server/{key}": value for key, value in self.server.state_dict().items()}
        return super().state_dict() | server

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from copies of a `state_dict`, on any device."""
        super().load_state_dict(state)
        self.server.load_state_dict(part_of(state, "server"))

    def verify(self) -> int:
        """Check that replicas of u agree bit for bit and that every u - z_j is feasible."""
        self.require_feasible()
        return self.server.verify_replicas()

    def require_feasible(self) -> None:
        """Raise on all ranks if a u - z_j is not strictly inside dom phi.

        No collective where the domain is unbounded.
        """
        if not self.phi.bounded:
            return
        w = torch.sub(self.u, self.worker.z, out=self.worker.scratch)
        inside = self.phi.contains(w).tolist()
        first = self.server.group.rank * len(inside)
        outside = [first + k for k, ok in enumerate(inside) if not ok]
        self.server.group.raise_together(
            f"u - z_j is outside the domain of the potential for worker {outside}"
            if outside
            else None
        )


class Msgd(Algorithm):
    """Momentum SGD in Nesterov's form, one worker, no coupling: the baseline of Figure 1."""

    def __init__(self, worker: Worker, group: Group, *, sigma: StepSize) -> None:
        assert worker.z.shape[0] == 1, "mSGD is one worker"
        assert group.size == 1, "mSGD is one process"
        assert not worker.phi.bounded
        self.worker = worker
        self.phi = worker.phi
        self.sigma = sigma
        self.lam = float("inf")

    def step(self, t: int) -> None:
        """Lines 4 to 6 without the coupling."""
        delta = self.worker.gradient(self.worker.draw())
        self.worker.update(delta, value_at(self.sigma, t), None, self.u, self.u)

    @property
    def u(self) -> Tensor:
        """The one copy of the model. (n,)."""
        return self.worker.z[0]

    def verify(self) -> int:
        """The digest of u; one process holds the only copy."""
        return int(digest(self.u))


def value_at(size: StepSize, t: int) -> Scalar:
    """A constant, or the schedule's value at iteration t."""
    return size(t) if callable(size) else size
