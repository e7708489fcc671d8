"""Many configurations of Algorithm 1 that advance together in one process, as one block.

Configurations that share the model, the data and the potential differ in numbers only: lam, eta,
tau, sigma, kappa, nu and the seed. S of them with M workers each are one block z of shape
(S, M, n), and every statement of Algorithm 1 is one operation on it, with a tensor (S,) where a
single run has a number. Configurations are independent: the sums of line 3 and the line searches
are along the axis of workers.

Data flow of an iteration: the host selects the next samples and, where they follow a schedule, the
step sizes. Everything else happens on the device: one gradient call for all S M look-ahead points,
with the minibatches that separate runs would draw, and lines 3 and 6 on the block, in place, by
the kernel of core/kernels. That part can be recorded as a CUDA graph. A configuration that becomes
non-finite is frozen: its rows leave the block, and nothing is computed for it.

# S configurations, M workers each, n parameters, A configurations that are active
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from consensus.algorithm import ORDERS, U_STEP_ON, StepSize, half_square, value_at
from consensus.core.flat import column
from consensus.core.kernels import Block, Hyperparameters, LineSearch, TotalForce, choose_kernel
from consensus.core.layerwise import Layerwise
from consensus.core.updates import look_ahead
from consensus.replay import Record, RecordedCalls
from consensus.worker import MOMENTUM_ON


class PopulationOracle(Protocol):
    """Source of the minibatches and gradients of all configurations."""

    def select(self, active: Tensor) -> None:
        """Draw for these configurations from now on. (A,) int64, CPU."""

    def draw(self) -> None:
        """Line 4: the next minibatch of each of their workers, into fixed memory."""

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
        local_pull: As in `Consensus`, one for each, or none at all.
        record: Records the device part of an iteration, such as `cuda_graph`; None: no recording.
        refused: Receives a line if it cannot be recorded.

    Attributes:
        active: The configurations in the block, in order. (A,) int64, CPU.
        u: The consensus variable of each active configuration. (A, n)
        z: Their workers. (A, M, n)
        v: The velocities. (A, M, n)
        cuts_u: The number of iterations with s_u < 1. (A,) int64, on the device.
        cuts_z: The number of iterations with s_j < 1, likewise. (A, M)
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
        local_pull: Sequence[float] = (),
        record: Record | None = None,
        refused: Callable[[str], None] = print,
    ) -> None:
        assert order in ORDERS, order
        assert u_step_on in U_STEP_ON, u_step_on
        assert momentum_on in MOMENTUM_ON, momentum_on
        self.oracle = oracle
        self.order, self.u_step_on, self.momentum_on = order, u_step_on, momentum_on
        self.period = period
        self._phi_of = phi
        given = dict(eta=eta, tau=tau, sigma=sigma, lam=lam, kappa=kappa, nu=nu)
        if any(local_pull):
            given["local"] = [
                pull * half_square(own) for pull, own in zip(local_pull, eta, strict=True)
            ]
        self._given: dict[str, Sequence[StepSize]] = given
        assert {len(sizes) for sizes in self._given.values()} == {len(u)}
        self.active = torch.arange(len(u))
        self.u = u.clone()
        self.z = u.unsqueeze(1).repeat(1, workers, 1)
        self.v = torch.zeros_like(self.z)
        self.cuts_u = torch.zeros(len(u), dtype=torch.int64, device=u.device)
        self.cuts_z = torch.zeros(len(u), workers, dtype=torch.int64, device=u.device)
        self._calls = RecordedCalls(record, refused)
        self._select()

    def _select(self) -> None:
        """Set the numbers (A,), the memory and the kernel of the active configurations."""
        given = {
            name: [sizes[i] for i in self.active.tolist()] for name, sizes in self._given.items()
        }
        self._sizes = {
            name: self._on_host(sizes, 0).to(self.u.device) for name, sizes in given.items()
        }
        self._scheduled = {
            name: sizes for name, sizes in given.items() if any(map(callable, sizes))
        }
        self.phi = self._phi_of(self._sizes["eta"].unsqueeze(-1).to(self.u.dtype))
        self.oracle.select(self.active)
        self._points = torch.empty_like(self.z)
        self._force = torch.empty_like(self.u)
        self._step = self.u.new_ones(len(self.u))
        self._kernel = choose_kernel(self.phi, self.u, len(self.u))
        self._calls.forget()

    def _on_host(self, sizes: Sequence[StepSize], t: int) -> Tensor:
        """Line 2: numbers such as tau at iteration t, on the host. (A,) float64."""
        values = [float(value_at(size, t)) for size in sizes]
        pinned = self.u.device.type == "cuda"  # a copy from there does not wait for the device
        return torch.tensor(values, dtype=torch.float64, pin_memory=pinned)

    @property
    def cuts(self) -> Tensor:
        """The numbers of cuts of s_u and of the s_j. -> int64 (A, 2)."""
        return torch.stack([self.cuts_u, self.cuts_z.sum(1)], 1)

    def step(self, t: int) -> None:
        """Iteration t of all active configurations."""
        if not len(self.active):
            return
        for name, sizes in self._scheduled.items():
            self._sizes[name].copy_(self._on_host(sizes, t), non_blocking=True)
        self.oracle.draw()
        coupled = t % self.period == 0
        self._calls(coupled, lambda: self._iterate(coupled))

    def _iterate(self, coupled: bool) -> None:
        """Lines 3, 5 and 6 on the device; without line 3 if not `coupled`."""
        sizes, anchor = self._sizes, self.u
        pull = sizes.get("local")
        if coupled:
            anchor = self.u.clone() if self.order == "jacobi" else self.u
            reach = self._kernel.forces(self.u, self.z, self._force, self._points)
            total = TotalForce(self._force, None if reach is None else reach.amax(1))
            t_u = sizes["tau"] / sizes["lam"] if self.u_step_on == "objective" else sizes["tau"]
            search = LineSearch(self._step, self.cuts_u)
            self._kernel.move_consensus(self.u, self.z, total, t_u, search, self._force)  # line 3
            pull = sizes["sigma"] / sizes["lam"]
        points = look_ahead(self.z, self.v, column(sizes["kappa"]), out=self._points)
        delta = self.oracle.gradient(points.flatten(0, 1)).view_as(self.z)  # line 5
        through = self.momentum_on == "objective"
        numbers = Hyperparameters(sizes["kappa"], sizes["sigma"], sizes["nu"], pull, through)
        block = Block(self.z, self.v, delta, self._points)
        search = LineSearch(self._step, self.cuts_z)
        self._kernel.move_workers(block, self.u, anchor, numbers, search)  # line 6

    def diverged(self) -> Tensor:
        """Whether an active configuration holds a non-finite number. -> bool (A,), CPU."""
        finite = self.u.isfinite().all(-1) & self.z.isfinite().flatten(1).all(-1)
        return ~finite.cpu()

    def freeze(self, rows: Tensor) -> Tensor:
        """Remove rows, bool (A,), of the block; return their configurations. -> int64 (...)."""
        frozen = self.active[rows]
        if len(frozen):
            self.active = self.active[~rows]
            keep = ~rows.to(self.u.device)
            for name in _ROWS:
                setattr(self, name, getattr(self, name)[keep])
            self._select()
        return frozen

    def state_dict(self) -> dict[str, Tensor]:
        """The state that survives an iteration, without that of the oracle."""
        return {"active": self.active} | {name: getattr(self, name) for name in _ROWS}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from copies of a `state_dict`, on any device."""
        self.active = state["active"].cpu().clone()
        for name in _ROWS:
            setattr(self, name, state[name].to(self.u.device, copy=True))
        self._select()


_ROWS = ("u", "z", "v", "cuts_u", "cuts_z")  # of the state, with a row for each configuration
