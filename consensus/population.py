"""Many configurations of Algorithm 1 that advance together in one process, as one block.

Configurations that share the model, the data and the potential differ in numbers only: lam, eta,
tau, sigma, kappa, nu and the seed. S of them with M workers each are one block z of shape
(S, M, n), and every statement of Algorithm 1 is one operation on it, with a tensor (S, 1) where a
single run has a number. No configuration feels another: the sums of line 3 and the line searches
are along the axis of workers.

Data flow of an iteration: the host says which samples come next and, where they follow a schedule,
which step sizes; everything else happens on the device: one gradient call for all S M look-ahead
points, with the minibatches that separate runs would draw, then lines 3 and 6 on the block, in
place; on a GPU by the kernels of core/fused.py. That part can be recorded as a CUDA graph. A
configuration that has become non-finite is frozen: its rows leave the block, so that nothing is
computed for it.

# S configurations, M workers each, n parameters, A configurations that are active
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from consensus.algorithm import ORDERS, U_STEP_ON, StepSize, value_at
from consensus.core.layerwise import Layerwise
from consensus.core.lines import lines_for
from consensus.core.updates import consensus_direction, look_ahead, velocity, worker_direction
from consensus.replay import Kinds, Record
from consensus.worker import MOMENTUM_ON


class PopulationOracle(Protocol):
    """Where the minibatches and gradients of all configurations come from."""

    def select(self, active: Tensor) -> None:
        """Draw for these configurations from now on. (A,) int64, CPU."""

    def draw(self) -> None:
        """Line 4: the next minibatch of every worker of theirs, to memory that stays."""

    def gradient(self, points: Tensor) -> Tensor:
        """Line 5 with these minibatches: (A M, n) -> (A M, n), which may be the same memory."""


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
        record: Records what happens on the device, such as `cuda_graph`; None: it is run as it is.
        refused: Gets a line if it cannot be recorded.

    Attributes:
        active: The configurations that are in the block, in order. (A,) int64, CPU.
        u: The consensus variable of each active configuration. (A, n)
        z: Their workers. (A, M, n)
        v: The velocities. (A, M, n)
        cuts_u: How often s_u was below 1. (A,) int64, on the device.
        cuts_z: How often the s_j were, likewise. (A, M)
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
        record: Record | None = None,
        refused: Callable[[str], None] = print,
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
        self.cuts_u = torch.zeros(len(u), dtype=torch.int64, device=u.device)
        self.cuts_z = torch.zeros(len(u), workers, dtype=torch.int64, device=u.device)
        self._record, self._refused = record, refused
        self._choose()

    def _choose(self) -> None:
        """What belongs to the active configurations: numbers as columns (A, 1), and memory."""
        place = self.active.to(self.u.device)
        chosen = {name: column[place].unsqueeze(-1) for name, column in self._numbers.items()}
        self.phi = self._phi_of(chosen["eta"].to(self.u.dtype))
        self._kappa, self._nu = chosen["kappa"], chosen["nu"]
        schedules = {
            name: [sizes[i] for i in self.active.tolist()]
            for name, sizes in self._schedules.items()
        }
        self._sizes = {
            name: self._column(sizes, 0).to(self.u.device) for name, sizes in schedules.items()
        }
        self._scheduled = {
            name: sizes for name, sizes in schedules.items() if any(map(callable, sizes))
        }
        self.oracle.select(self.active)
        self._points = torch.empty_like(self.z)
        self._force = torch.empty_like(self.u)
        self._step = self.u.new_ones(len(self.u))
        self._lines = lines_for(self.phi, self.u, len(self.u))
        self._kinds = Kinds(self._record, self._say_once)

    def _say_once(self, line: str) -> None:
        self._record = None  # and is not tried again when configurations leave
        self._refused(line)

    def _column(self, sizes: Sequence[StepSize], t: int) -> Tensor:
        """Line 2: tau, sigma or lam at iteration t, on the host. (A, 1) float64."""
        values = [float(value_at(size, t)) for size in sizes]
        pinned = self.u.device.type == "cuda"  # a copy from there does not wait for the device
        return torch.tensor(values, dtype=torch.float64, pin_memory=pinned).unsqueeze(-1)

    @property
    def cuts(self) -> Tensor:
        """How often s_u and the s_j were below 1. -> int64 (A, 2)."""
        return torch.stack([self.cuts_u, self.cuts_z.sum(1)], 1)

    def step(self, t: int) -> None:
        """Iteration t of all active configurations."""
        if not len(self.active):
            return
        for name, sizes in self._scheduled.items():
            self._sizes[name].copy_(self._column(sizes, t), non_blocking=True)
        self.oracle.draw()
        coupled = t % self.period == 0
        self._kinds(coupled, self._coupled if coupled else self._uncoupled)

    def _coupled(self) -> None:
        tau, sigma, lam = (self._sizes[name] for name in ("tau", "sigma", "lam"))
        before = self.u.clone() if self.order == "jacobi" else self.u
        delta = self._gradient()  # at the z_j, which line 3 leaves alone
        self._move_consensus(tau / lam if self.u_step_on == "objective" else tau)
        self._move_workers(delta, sigma, sigma / lam, before)

    def _uncoupled(self) -> None:
        self._move_workers(self._gradient(), self._sizes["sigma"], None, self.u)

    def _gradient(self) -> Tensor:
        """Line 5. (A, M, n), in the memory of the points unless the oracle has its own."""
        points = look_ahead(self.z, self.v, self._kappa, out=self._points)
        return self.oracle.gradient(points.flatten(0, 1)).view_as(self.z)

    def _move_consensus(self, t_u: Tensor) -> None:
        """Line 3, with t_u (A, 1)."""
        if self._lines is not None:
            z = self.z.flatten(0, 1)
            self._lines.forces(self.u, z, out=self._force)
            if self.phi.bounded:
                self._lines.consensus_step(self.u, z, self._force, t_u, self._step, None)
            self._lines.move_consensus(self.u, self._force, t_u, self._step, self.cuts_u)
            return
        w = self.u.unsqueeze(1) - self.z
        d = consensus_direction(self.phi.grad(w).sum(1), t_u.squeeze(-1))
        if self.phi.bounded:
            s = self.phi.feasible_step(w, d.unsqueeze(1), self.u.unsqueeze(1)).amin(1)
            self.cuts_u += s < 1
            d *= s.unsqueeze(-1)
        self.u += d

    def _move_workers(
        self, delta: Tensor, sigma: Tensor, pull: Tensor | None, anchor: Tensor
    ) -> None:
        """Line 6, with sigma and pull (A, 1). Overwrites delta."""
        if self._lines is not None and (anchor is self.u or not self.phi.bounded):
            self._lines.move_workers(
                self.z.flatten(0, 1),
                self.v.flatten(0, 1),
                delta.flatten(0, 1),
                anchor,
                kappa=self._kappa,
                sigma=sigma,
                nu=self._nu,
                pull=pull,
                through=self.momentum_on == "objective",
                step=self._step,
                cuts=self.cuts_z.view(-1),
            )
            return
        u = self.u.unsqueeze(1)
        d = velocity(self.v, delta, self.z, self._kappa, sigma, self._nu, out=self.v)
        if pull is not None:
            force = self.phi.grad(anchor.unsqueeze(1) - self.z)
            d = worker_direction(self.v, force, pull, out=delta)
            if self.momentum_on == "objective":
                self.v.copy_(d)
        if self.phi.bounded:
            s = self.phi.feasible_step(self.z - u, d, u)
            self.cuts_z += s < 1
            self.v *= s.unsqueeze(-1)
            if d is not self.v:
                d *= s.unsqueeze(-1)
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
            for name in _ROWS:
                setattr(self, name, getattr(self, name)[here])
            self._choose()
        return frozen

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that survives an iteration, but what the oracle has drawn."""
        return {"active": self.active} | {name: getattr(self, name) for name in _ROWS}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from copies of what `state_dict` returned, on any device."""
        self.active = state["active"].cpu().clone()
        for name in _ROWS:
            setattr(self, name, state[name].to(self.u.device, copy=True))
        self._choose()


_ROWS = ("u", "z", "v", "cuts_u", "cuts_z")
"""The state, with a row for each active configuration."""
