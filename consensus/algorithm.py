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
from consensus.server import Server, digest, verify_replicas
from consensus.tree_sum import tree_sum
from consensus.worker import Worker

ORDERS = ("gauss_seidel", "jacobi")
U_STEP_ON = ("coupling", "objective")

StepSize = Scalar | Callable[[int], Scalar]
"""A constant, or a schedule: a function of the iteration t = 0, 1, ..."""


class Algorithm(ABC):
    """Interface of the trainer: a step, the consensus variable, and the state behind it.

    Attributes:
        worker: The K workers of this process.
        server: The replica of u; None where the one worker is u.
        phi: The layer-wise potential.
        sigma: The step size of the z_j.
        lam: The coupling parameter of (15).
        local: sigma / lam between communications; None: no coupling there.
    """

    worker: Worker
    server: Server | None = None
    phi: Layerwise
    sigma: StepSize
    lam: StepSize
    local: float | None = None

    @abstractmethod
    def step(self, t: int) -> None:
        """Iteration t = 0, 1, ... on every rank."""

    def step_alone(self, t: int) -> None:
        """Lines 4 to 6 between two communications: coupled to the unchanged u by `local` only.

        The line search keeps every z_j inside the domain around it.
        """
        delta = self.worker.gradient(self.worker.draw())
        sigma = value_at(self.sigma, t)
        self.worker.update(delta, sigma, self.local, self.u, self.u, alone=True)

    @property
    @abstractmethod
    def u(self) -> Tensor:
        """The consensus variable. (n,)."""

    @property
    def parts(self) -> dict[str, Worker | Server]:
        """The worker and the server, by the owner in the keys of `state_dict`."""
        server = {} if self.server is None else {"server": self.server}
        return {"worker": self.worker, **server}

    @property
    def residual(self) -> Tensor | None:
        """Residual of the rounding of sums on this process; None: they are not rounded. (n,)."""
        return None if self.server is None else self.server.sum.residual

    @property
    def closed_form(self) -> bool:
        """Whether no line is a solver or an optimizer of torch, which read numbers on the host."""
        return all(part.kernel.closed_form for part in self.parts.values())

    @property
    def cuts(self) -> Tensor:
        """The numbers of cuts of s_u and of the s_j of this process. -> int64 (2,)."""
        of_z = self.worker.cuts.sum()
        return torch.stack([self.server.cuts if self.server else torch.zeros_like(of_z), of_z])

    def state_dict(self) -> dict[str, Tensor]:
        """The state that survives an iteration; all else is a function of t, seed and config.

        Keys `worker/...` have a row for each worker of this process, (K, ...); those of the server,
        `server/...`, are equal on all ranks. The tensors are not copies: the next step may change
        them. `worker/residual` is that of the process in its first row, and 0 in the others.
        """
        state = {
            f"{owner}/{key}": value
            for owner, part in self.parts.items()
            for key, value in part.state_dict().items()
        }
        if self.residual is not None:
            state["worker/residual"] = torch.zeros_like(self.worker.z)
            state["worker/residual"][0] = self.residual
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from copies of a `state_dict`, on any device."""
        for owner, part in self.parts.items():
            part.load_state_dict(part_of(state, owner))
        if self.residual is not None:  # of other processes, if they had these workers
            self.residual.copy_(state["worker/residual"].sum(0))

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
        local_pull: In the other iterations the z_j are pulled to the unchanged u, with
            (eta^2 / 2) local_pull in place of sigma / lam. It needs no communication.

    Raises:
        GroupError: If a u - z_j is not strictly inside dom phi at the start, on every rank.
    """

    server: Server

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
        local_pull: float = 0.0,
    ) -> None:
        assert order in ORDERS, order
        assert u_step_on in U_STEP_ON, u_step_on
        self.server = server
        self.worker = worker
        self.phi = server.phi
        self.tau, self.sigma, self.lam = tau, sigma, lam
        self.order, self.u_step_on, self.period = order, u_step_on, period
        if local_pull and period > 1:
            self.local = local_pull * half_square(float(server.phi.eta))
        self.require_feasible()

    def step(self, t: int) -> None:
        """Iteration t of Algorithm 1."""
        if t % self.period:
            return self.step_alone(t)
        tau, sigma, lam = (value_at(size, t) for size in (self.tau, self.sigma, self.lam))  # line 2
        t_u = tau / lam if self.u_step_on == "objective" else tau
        before = self.server.u.clone() if self.order == "jacobi" else None
        pending = self.server.start(self.worker.z, self.worker.scratch)  # line 3, the sum begins
        delta = self.worker.gradient(self.worker.draw())  # lines 4 and 5, meanwhile
        u = self.server.finish(pending, t_u)  # line 3
        anchor = u if before is None else before
        self.worker.update(delta, sigma, sigma / lam, u, anchor)  # line 6
        return None

    def lam_at_rest(self, t: int) -> Scalar:
        """The lam for which (15) is stationary where the z_j and u no longer move.

        Momentum accumulates the loss 1 / (1 - kappa) times. A coupling outside the velocity is
        added once: at rest (1 - kappa) v = -sigma grad f_j and v = -(sigma / lam) grad phi, so
        grad f_j = ((1 - kappa) / lam) grad phi(u - z_j). The coupling acts in every `period`-th
        iteration only and the loss in all of them; for small sigma the ratio is the period. With
        `local` it acts in all of them, on average with (sigma / lam + (period - 1) local) / period
        in place of sigma / lam.
        """
        lam = value_at(self.lam, t) * self.period
        if self.local is not None:
            sigma = value_at(self.sigma, t)
            between = (self.period - 1) * self.local
            lam = sigma * self.period / (sigma / value_at(self.lam, t) + between)
        return lam / (1.0 - self.worker.kappa) if self.worker.momentum_on == "loss" else lam

    @property
    def u(self) -> Tensor:
        """The consensus variable. (n,)."""
        return self.server.u

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
        inside, rank = self.phi.contains(w).tolist(), self.server.group.rank
        outside = [j for j, ok in enumerate(inside, start=rank * len(inside)) if not ok]
        problem = f"u - z_j is outside the domain of the potential for worker {outside}"
        self.server.group.raise_together(problem if outside else None)


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

    step = Algorithm.step_alone

    @property
    def u(self) -> Tensor:
        """The one copy of the model. (n,)."""
        return self.worker.z[0]

    def verify(self) -> int:
        """The digest of u; one process holds the only copy."""
        return int(digest(self.u))


class Ddp(Algorithm):
    """Synchronous data-parallel training of one model, as torch's DistributedDataParallel.

    The gradient is the mean over all M workers of those of their minibatches, and every worker
    makes the same step: the z_j are replicas of u, and each has the same state.
    """

    def __init__(self, worker: Worker, group: Group, *, sigma: StepSize) -> None:
        assert not worker.phi.bounded
        self.worker, self.group = worker, group
        self.phi = worker.phi
        self.sigma = sigma
        self.lam = float("inf")
        self.num_workers = group.size * len(worker.z)
        self._sum = group.repeated_sum(worker.z.shape[1], worker.z)

    def step(self, t: int) -> None:
        """Iteration t: an all-reduce of the gradients, and one step of the optimizer."""
        delta = self.worker.gradient(self.worker.draw())
        tree_sum(delta.unbind(), self._sum.message)
        delta.copy_(self._sum.start().wait()).div_(self.num_workers)
        self.worker.update(delta, value_at(self.sigma, t), None, self.u, self.u)

    @property
    def residual(self) -> Tensor | None:
        """As in `Algorithm`."""
        return self._sum.residual

    @property
    def u(self) -> Tensor:
        """The model. (n,)."""
        return self.worker.z[0]

    def verify(self) -> int:
        """Check that all replicas agree bit for bit."""
        own = digest(self.u)
        others = [j for j, z in enumerate(self.worker.z) if digest(z) != own]
        problem = f"the model of workers {others} of this process differs from its first"
        self.group.raise_together(problem if others else None)
        return verify_replicas(self.u, self.group)


def half_square(eta: float) -> float:
    """eta^2 / 2, for q(w) = (eta^2 / 2) grad phi(w): the force in the units of w."""
    return 0.5 * eta * eta


def value_at(size: StepSize, t: int) -> Scalar:
    """A constant, or the schedule's value at iteration t."""
    return size(t) if callable(size) else size
