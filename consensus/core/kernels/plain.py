"""Lines 3 and 6 of Algorithm 1 as formulas, one operation of torch after another.

    line 3   u+  = u - s_u t_u sum_j grad phi(u - z_j)
    line 6   v_j+ = kappa v_j - sigma (delta_j + nu z_j)
             z_j+ = z_j + s_j (v_j+ + (sigma / lam) grad phi(u+ - z_j)),   v_j+ scaled by s_j

The steps s_u and s_j are `Potential.feasible_step`. Vectors are written in place, since a model may
be as large as the memory. Hyperparameters are numbers, or tensors over the leading axes of a block.
`ExactUpdate` and `ProximalStep` solve an equation in place of a step of line 3 or 6.
"""

import math

import torch
from torch import Tensor

from consensus.core.flat import Scalar, add_scaled, column, scaled
from consensus.core.kernels import Block, Hyperparameters, LineSearch, TotalForce, WorkerKernel
from consensus.core.layerwise import Layerwise
from consensus.core.mean import Reduce, phi_mean
from consensus.core.scalar_equation import NotConvergedError
from consensus.core.sizes import Separable


class Plain:
    """`Kernel` for any potential on any device.

    With S configurations the scale of phi broadcasts over (S, K, n).
    """

    closed_form = True

    def __init__(self, phi: Layerwise, like: Tensor) -> None:
        self.phi = phi
        self.force_size = like.shape[-1]
        # The line search may branch on the CPU, where reading a number is free. On a GPU that would
        # wait for the device, and for shards for each other: the boundary step is computed instead.
        branches = phi.bounded and like.device.type == "cpu" and not phi.sharded
        groups = 1 if isinstance(phi.size, Separable) else len(phi.layers)
        self.reach_size = groups if branches else 0

    def forces(self, u: Tensor, z: Tensor, out: Tensor, scratch: Tensor | None) -> Tensor | None:
        """As in `ConsensusKernel`."""
        if z.shape[-2] == 1:  # the sum is its only summand
            return self._force(u, z, out.unsqueeze(-2))[1]
        force, reach = self._force(u, z, scratch)
        torch.sum(force, -2, out=out)
        return reach

    def move_consensus(
        self, u: Tensor, z: Tensor, total: TotalForce, t_u: Scalar, search: LineSearch, out: Tensor
    ) -> None:
        """As in `ConsensusKernel`."""
        d = scaled(-t_u, total.force, out)
        if not self.phi.bounded:
            u += d
            return
        row, center = d.unsqueeze(-2), u.unsqueeze(-2)  # (1, n) beside z (K, n)
        reach = None if total.reach is None else total.reach.unsqueeze(-2)
        if reach is not None and self.phi.surely_feasible(reach, row, center):
            search.step.fill_(1.0)
        elif self.phi.bounded:
            # dom phi is convex: the smallest step of all workers is feasible for each of them.
            s = self.phi.feasible_step(center - z, row, center).amin(-1)
            search.step.copy_(search.agree(s))
            search.cuts.add_(search.step < 1)
            d *= column(search.step)
        u += d

    def move_workers(
        self, block: Block, u: Tensor, anchor: Tensor, numbers: Hyperparameters, search: LineSearch
    ) -> None:
        """As in `WorkerKernel`."""
        z, v, delta = block.z, block.v, block.delta
        kappa, sigma, nu = column(numbers.kappa), column(numbers.sigma), column(numbers.nu)
        d, reach = velocity(v, delta, z, kappa, sigma, nu, out=v), None
        if numbers.pull is not None:
            force, reach = self._force(anchor, z, block.scratch)
            d = add_scaled(v, column(numbers.pull), force, out=delta)
            if numbers.through:
                v.copy_(d)
        center = u.unsqueeze(-2)
        if anchor is not u:
            reach = None  # the line search is around u
        if reach is not None and self.phi.surely_feasible(reach, d, center):
            search.step.fill_(1.0)
        elif self.phi.bounded:
            # z moves by d, so z - u moves by d; dom phi is symmetric.
            s = self.phi.feasible_step(z - center, d, center, reach)
            search.step.copy_(s.amin(-1))
            search.cuts.add_(s < 1)
            v *= column(s)
            if d is not v:
                d *= column(s)
        z += d

    def _force(self, u: Tensor, z: Tensor, scratch: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Grad phi(u - z_k) of every worker, and the reach where the line search needs it."""
        w = torch.sub(u.unsqueeze(-2), z, out=scratch)
        return self.phi.grad_and_reach_(w) if self.reach_size else (self.phi.grad_(w), None)


def velocity(
    v: Tensor,
    delta: Tensor,
    z: Tensor,
    kappa: Scalar,
    sigma: Scalar,
    nu: Scalar,
    out: Tensor | None = None,
) -> Tensor:
    """Line 6: kappa v - sigma (delta + nu z). (..., n) -> (..., n).

    The regularizer is taken at z and only the loss at the look-ahead point, as (16) prints it. With
    `out`, delta holds delta + nu z afterwards.
    """
    gradient = add_scaled(delta, nu, z, None if out is None else delta)
    return add_scaled(scaled(kappa, v, out), -sigma, gradient, out)


_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}  # of the sum of forces, relative


class ExactUpdate:
    """`ConsensusKernel` that moves u to the phi-mean of the z_j. It needs no tau.

    Its sums over ranks, `total`, are formed one after another and hidden by nothing.
    """

    force_size = 0
    reach_size = 0
    closed_form = False

    def __init__(self, phi: Layerwise, total: Reduce) -> None:
        self.phi = phi
        self.total = total

    def forces(self, u: Tensor, z: Tensor, out: Tensor, scratch: Tensor | None) -> None:
        """Nothing to sum in advance."""
        del u, z, out, scratch

    def move_consensus(
        self, u: Tensor, z: Tensor, total: TotalForce, t_u: Scalar, search: LineSearch, out: Tensor
    ) -> None:
        """As in `ConsensusKernel`, with the phi-mean in place of the step.

        A NotConvergedError on all ranks if its residual is above the tolerance.
        """
        del total, t_u, out
        found = phi_mean(
            self.phi, z, u, total=self.total, smallest=search.agree, tolerance=_TOLERANCE[u.dtype]
        )
        if not found.converged and not math.isnan(found.residual):
            raise NotConvergedError(
                f"the exact update of u did not converge in {found.iterations} iterations "
                f"({self.phi.label}): relative residual {found.residual:.1e}, "
                f"tolerance {_TOLERANCE[u.dtype]:.0e}; algorithm.u_update=gradient needs no solver"
            )
        # A z_j or a force that is not finite: u is not finite either, which the run reports.
        u.copy_(found.u if found.converged else torch.full_like(u, math.nan))
        search.step.fill_(1.0)


class ProximalStep:
    """`WorkerKernel` with the coupling force at z_j+ in place of z_j.

        z_j+ minimizes |z - y|^2 / (2 sigma) + (1 / lam) phi(u - z),   y = z_j + v_j+

    The minimizer is inside the domain for every y, so no step is cut. Stable for any lam.
    `uncoupled` serves the iterations without coupling.
    """

    closed_form = False

    def __init__(self, phi: Layerwise, uncoupled: WorkerKernel) -> None:
        self.phi = phi
        self.uncoupled = uncoupled

    def move_workers(
        self, block: Block, u: Tensor, anchor: Tensor, numbers: Hyperparameters, search: LineSearch
    ) -> None:
        """As in `WorkerKernel`; the coupling is centered at `anchor`."""
        if numbers.pull is None:
            return self.uncoupled.move_workers(block, u, anchor, numbers, search)
        z, v, delta = block.z, block.v, block.delta
        velocity(v, delta, z, numbers.kappa, numbers.sigma, numbers.nu, out=v)
        b = torch.sub(anchor, z, out=block.scratch).sub_(v)
        moved = anchor - self.phi.prox(b, numbers.pull, anchor)
        if numbers.through:
            torch.sub(moved, z, out=v)
        z.copy_(moved)
        search.step.fill_(1.0)
        return None
