"""The implicit coupling: the proximal step of (1 / lam) phi(u - .) in place of line 6."""

import torch
from torch import Tensor

from consensus.core.kernels import Block, Hyperparameters, LineSearch, WorkerKernel
from consensus.core.kernels.plain import velocity
from consensus.core.layerwise import Layerwise


class ProximalStep:
    """`WorkerKernel` with the coupling force at z_j+ in place of z_j.

        z_j+ minimizes |z - y|^2 / (2 sigma) + (1 / lam) phi(u - z),   y = z_j + v_j+

    The minimizer is inside the domain for every y, so no step is cut. Stable for any lam.

    Args:
        phi: The potential.
        uncoupled: Of the iterations without coupling.
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
