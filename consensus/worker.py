"""A block of K workers on one process: lines 4 to 6 of Algorithm 1.

A worker knows no model and no data. It takes an oracle, anything that draws minibatches and
returns gradients, so the algorithm runs on quadratics with known answers as well as on MNIST.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from consensus.core.flat import Scalar, column, part_of
from consensus.core.layerwise import Layerwise
from consensus.core.lines import lines_for, shared_by_all
from consensus.core.updates import look_ahead, velocity, worker_direction

MOMENTUM_ON = ("loss", "objective")
COUPLING = ("explicit", "implicit")


class Oracle(Protocol):
    """Where minibatches and gradients come from."""

    def draw(self) -> Any:
        """Line 4: one minibatch for each of the K workers."""

    def gradient(self, points: Tensor, batch: Any) -> Tensor:
        """Line 5: the gradient of each worker's minibatch loss at its point. (K, n) -> (K, n).

        The caller overwrites both the points and the result, which may be the same memory: a
        vector less, where models are large.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """What the next `draw` depends on, each (K, ...). Asked for at checkpoints only."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from what `state_dict` returned."""


class Worker:
    """K copies z_j of the model with their velocities.

    Args:
        z: The start; a copy is taken. (K, n)
        oracle: Minibatches and gradients.
        phi: The layer-wise potential (18).
        kappa: Momentum, in [0, 1).
        nu: Weight of R(z) = (nu / 2) |z|^2.
        momentum_on: "loss": the velocity carries loss and R, the coupling acts outside it, which is
            mEASGD; "objective": the coupling passes through the velocity as well.
        coupling: "explicit": line 6 adds the force at z_j; "implicit": the proximal step of
            (1 / lam) phi(u - .), the force at z_j+, feasible and stable for any lam.
        fused: Whether large vectors, and those on a GPU, go the ways of core/lines.py, equal up to
            rounding.

    Attributes:
        z: (K, n).
        v: The velocities, 0 at the start. (K, n)
        scratch: (K, n), for the look-ahead points, and for what lies between two statements; every
            method may overwrite it.
        cuts: How often each s_j was below 1. int64 (K,), on the device.
        step: The smallest s_j of the last iteration, a tensor () on the device.
    """

    def __init__(
        self,
        z: Tensor,
        oracle: Oracle,
        phi: Layerwise,
        *,
        kappa: Scalar = 0.9,
        nu: Scalar = 0.0,
        momentum_on: str = "loss",
        coupling: str = "explicit",
        fused: bool = True,
    ) -> None:
        assert momentum_on in MOMENTUM_ON, momentum_on
        assert coupling in COUPLING, coupling
        self.z = z.clone()
        self.v = torch.zeros_like(z)
        self.scratch = torch.empty_like(z)
        self.oracle = oracle
        self.phi = phi
        self.kappa = kappa
        self.nu = nu
        self.momentum_on = momentum_on
        self.coupling = coupling
        self.step = z.new_ones(())
        self.cuts = torch.zeros(len(z), dtype=torch.int64, device=z.device)
        self._lines = lines_for(phi, z) if fused else None

    def state_dict(self) -> dict[str, Tensor]:
        """What survives an iteration, a row for each worker: `z`, `v`, `cuts` and `oracle/...`."""
        own = {"z": self.z, "v": self.v, "cuts": self.cuts}
        return own | {f"oracle/{key}": rows for key, rows in self.oracle.state_dict().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from copies of what `state_dict` returned, on any device."""
        self.z.copy_(state["z"])
        self.v.copy_(state["v"])
        self.cuts.copy_(state["cuts"])
        self.oracle.load_state_dict(part_of(state, "oracle"))

    def draw(self) -> Any:
        """Line 4: the next minibatch of every worker."""
        return self.oracle.draw()

    def gradient(self, batch: Any) -> Tensor:
        """Line 5: delta_j at the look-ahead points z_j + kappa v_j (16). -> (K, n).

        These points need not be feasible: only the loss is evaluated there.
        """
        point = look_ahead(self.z, self.v, self.kappa, out=self.scratch)
        return self.oracle.gradient(point, batch)

    def update(
        self, delta: Tensor, sigma: Scalar, pull: Scalar | None, u: Tensor, anchor: Tensor
    ) -> None:
        """Line 6: move z and v.

        Args:
            delta: Minibatch gradients; overwritten. (K, n)
            sigma: Step size.
            pull: sigma / lam; None in an iteration without coupling.
            u: u+, which u - z_j must stay feasible against. (n,)
            anchor: Where the coupling pulls to: u+ (Gauss-Seidel) or u (Jacobi). (n,)
        """
        if self.coupling == "implicit" and pull is not None:
            return self._update_implicitly(delta, sigma, pull, anchor)
        if (
            self._lines is not None
            and shared_by_all(self.kappa, sigma, self.nu, pull)
            and (anchor is u or not self.phi.bounded)
        ):
            self._lines.move_workers(
                self.z,
                self.v,
                delta,
                anchor,
                kappa=self.kappa,
                sigma=sigma,
                nu=self.nu,
                pull=pull,
                through=self.momentum_on == "objective",
                step=self.step,
                cuts=self.cuts,
            )
            return None
        v = velocity(self.v, delta, self.z, self.kappa, sigma, self.nu, out=self.v)
        d, reach = v, None
        if pull is not None:
            w = torch.sub(anchor, self.z, out=self.scratch)
            if self.phi.bounded and anchor is u:
                force, reach = self.phi.grad_and_reach_(w)
            else:
                force = self.phi.grad_(w)
            d = worker_direction(v, force, pull, out=delta)
            if self.momentum_on == "objective":
                v.copy_(d)
        branches = u.device.type == "cpu"  # on a GPU, asking would wait for it
        if branches and reach is not None and self.phi.surely_feasible(reach, d, u):
            self.step.fill_(1.0)
        elif self.phi.bounded:
            # z moves by d, so z - u moves by d; dom phi is symmetric.
            s = self.phi.feasible_step(self.z - u, d, u, reach)
            self.step.copy_(s.amin())
            self.cuts += s < 1
            v *= column(s)
            if d is not v:
                d *= column(s)
        self.z += d
        return None

    def _update_implicitly(self, delta: Tensor, sigma: Scalar, pull: Scalar, u: Tensor) -> None:
        """Line 6 with the coupling at z_j+ in place of z_j.

        z_j+ minimizes |z - y|^2 / (2 sigma) + (1 / lam) phi(u - z), y = z_j + v_j+. The minimizer
        is inside the domain for every y, so that nothing is to be cut.
        """
        v = velocity(self.v, delta, self.z, self.kappa, sigma, self.nu, out=self.v)
        b = torch.sub(u, self.z, out=self.scratch).sub_(v)
        moved = u - self.phi.prox(b, pull, u)
        if self.momentum_on == "objective":
            torch.sub(moved, self.z, out=v)
        self.z.copy_(moved)
        self.step.fill_(1.0)
