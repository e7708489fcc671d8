"""Many configurations of Algorithm 1 that advance together in one process, as one block.

Configurations that share the model, the data and the potential differ in numbers only: lam, eta,
tau, sigma, kappa, nu and the seed. S of them with M workers each are one block z of shape
(S, M, n), and every statement of Algorithm 1 is one operation on it, with a tensor (S, 1) where a
single run has a number. No configuration feels another: the sums of line 3 and the line searches
are along the axis of workers.

Data flow of an iteration: one gradient call for all S M look-ahead points, with the minibatches
that separate runs would draw; lines 3 and 6 on the block. A configuration that has become
non-finite is frozen: its rows leave the block, so that nothing is computed for it.

# S configurations, M workers each, n parameters
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from consensus.algorithm import ORDERS, U_STEP_ON, StepSize, value_at
from consensus.core.layerwise import Layerwise
from consensus.core.updates import consensus_direction, look_ahead, velocity, worker_direction
from consensus.worker import MOMENTUM_ON


class PopulationOracle(Protocol):
    """Where the minibatches and gradients of all configurations come from."""

    def draw(self, active: Tensor) -> Any:
        """Line 4: the next minibatch of every worker of the configurations `active` (A,) int64."""

    def gradient(self, points: Tensor, batch: Any) -> Tensor:
        """Line 5 for them: (A M, n) -> (A M, n), which may be the memory of the points."""


class Population:
    """S configurations of Algorithm 1.

    Args:
        u: Their starts. (S, n)
        workers: M.
        oracle: Minibatches and gradients.
        phi: The potential for given eta: `phi(eta)` with a tensor (A, 1) that broadcasts over the
            configurations and workers of the block.
        eta: Width of the potential, one for each configuration.
        tau: Step size of u, one for each: a number or a schedule.
        sigma: Step size of the z_j, likewise.
        lam: Coupling parameter, likewise.
        kappa: Momentum, one for each.
        nu: Weight of R, one for each.
        order: As in `Consensus`, as are the following.
        u_step_on: "coupling" or "objective".
        momentum_on: "loss" or "objective", see `Worker`.
        period: Of the coupling.

    Attributes:
        active: The configurations that are in the block, in order. (A,) int64, CPU.
        u: The consensus variable of each active configuration. (A, n)
        z: Their workers. (A, M, n)
        v: The velocities. (A, M, n)
        cuts: How often s_u and the s_j were below 1. (A, 2) int64, on the device.
    """

    def __init__(
        self,
        u: Tensor,
        workers: int,
        oracle: PopulationOracle,
        phi: Callable[[Tensor], Layerwise],
        *,
        eta: Sequence[float],
        tau: Sequence[StepSize],
        sigma: Sequence[StepSize],
        lam: Sequence[StepSize],
        kappa: Sequence[float],
        nu: Sequence[float],
        order: str = "gauss_seidel",
        u_step_on: str = "coupling",
        momentum_on: str = "loss",
        period: int = 1,
    ) -> None:
        assert order in ORDERS, order
        assert u_step_on in U_STEP_ON, u_step_on
        assert momentum_on in MOMENTUM_ON, momentum_on
        assert {len(eta), len(tau), len(sigma), len(lam), len(kappa), len(nu)} == {len(u)}
        self.oracle = oracle
        self.order, self.u_step_on, self.momentum_on = order, u_step_on, momentum_on
        self.period = period
        self._phi_of = phi
        self._schedules = {"tau": list(tau), "sigma": list(sigma), "lam": list(lam)}
        self._numbers = {
            name: torch.tensor(list(values), dtype=torch.float64, device=u.device)
            for name, values in (("eta", eta), ("kappa", kappa), ("nu", nu))
        }
        self.active = torch.arange(len(u))
        self.u = u.clone()
        self.z = u.unsqueeze(1).repeat(1, workers, 1)
        self.v = torch.zeros_like(self.z)
        self.cuts = torch.zeros(len(u), 2, dtype=torch.int64, device=u.device)
        self._choose()

    def _choose(self) -> None:
        """The numbers of the active configurations, as columns (A, 1) of the block."""
        place = self.active.to(self.u.device)
        chosen = {name: column[place].unsqueeze(-1) for name, column in self._numbers.items()}
        self.phi = self._phi_of(chosen["eta"].to(self.u.dtype))
        self._kappa, self._nu = chosen["kappa"], chosen["nu"]
        self._constant = {
            name: self._column([sizes[i] for i in self.active.tolist()])
            for name, sizes in self._schedules.items()
            if not any(callable(sizes[i]) for i in self.active.tolist())
        }

    def _column(self, sizes: Sequence[StepSize], t: int = 0) -> Tensor:
        values = [float(value_at(size, t)) for size in sizes]
        return torch.tensor(values, dtype=torch.float64, device=self.u.device).unsqueeze(-1)

    def size_at(self, name: str, t: int) -> Tensor:
        """Line 2: tau, sigma or lam of the active configurations at iteration t. (A, 1) float64."""
        if name in self._constant:
            return self._constant[name]
        return self._column([self._schedules[name][i] for i in self.active.tolist()], t)

    def step(self, t: int) -> None:
        """Iteration t of all active configurations."""
        if not len(self.active):
            return
        tau, sigma, lam = (self.size_at(name, t) for name in ("tau", "sigma", "lam"))
        coupled = t % self.period == 0
        before = self.u.clone() if self.order == "jacobi" else self.u
        delta = self._gradient()  # at the z_j, which line 3 leaves alone
        if coupled:
            t_u = tau / lam if self.u_step_on == "objective" else tau
            self._move_consensus(t_u.squeeze(-1))
        self._move_workers(delta, sigma, sigma / lam if coupled else None, before)

    def _gradient(self) -> Tensor:
        """Lines 4 and 5. (A, M, n)."""
        points = look_ahead(self.z, self.v, self._kappa)
        batch = self.oracle.draw(self.active)
        return self.oracle.gradient(points.flatten(0, 1), batch).view_as(self.z)

    def _move_consensus(self, t_u: Tensor) -> None:
        """Line 3."""
        w = self.u.unsqueeze(1) - self.z
        d = consensus_direction(self.phi.grad(w).sum(1), t_u)
        if self.phi.bounded:
            s = self.phi.feasible_step(w, d.unsqueeze(1), self.u.unsqueeze(1)).amin(1)
            self.cuts[:, 0] += s < 1
            d *= s.unsqueeze(-1)
        self.u += d

    def _move_workers(
        self, delta: Tensor, sigma: Tensor, pull: Tensor | None, anchor: Tensor
    ) -> None:
        """Line 6."""
        u = self.u.unsqueeze(1)
        self.v = velocity(self.v, delta, self.z, self._kappa, sigma, self._nu)
        d = self.v
        if pull is not None:
            d = worker_direction(self.v, self.phi.grad(anchor.unsqueeze(1) - self.z), pull)
            if self.momentum_on == "objective":
                self.v = d
        if self.phi.bounded:
            s = self.phi.feasible_step(self.z - u, d, u)
            self.cuts[:, 1] += (s < 1).sum(1)
            self.v = self.v * s.unsqueeze(-1)
            d = d * s.unsqueeze(-1)
        self.z += d

    def diverged(self) -> Tensor:
        """Which active configurations hold a number that is not finite. -> bool (A,), CPU."""
        finite = self.u.isfinite().all(-1) & self.z.isfinite().flatten(1).all(-1)
        return ~finite.cpu()

    def freeze(self, rows: Tensor) -> Tensor:
        """Take rows out of the block for good.

        Args:
            rows: Which of the active configurations. bool (A,)

        Returns:
            The configurations that they were. int64
        """
        frozen = self.active[rows]
        if len(frozen):
            keep = ~rows
            here = keep.to(self.u.device)
            self.active = self.active[keep]
            self.u, self.z, self.v = self.u[here], self.z[here], self.v[here]
            self.cuts = self.cuts[here]
            self._choose()
        return frozen

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that survives an iteration, but what the oracle has drawn."""
        return {
            "active": self.active,
            "u": self.u,
            "z": self.z,
            "v": self.v,
            "cuts": self.cuts,
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from copies of what `state_dict` returned, on any device."""
        self.active = state["active"].cpu().clone()
        for name in ("u", "z", "v", "cuts"):
            setattr(self, name, state[name].to(self.u.device, copy=True))
        self._choose()
