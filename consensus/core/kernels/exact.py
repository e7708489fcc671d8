"""The exact u-update: the minimizer (14a) of sum_j phi(u - z_j) in place of line 3."""

import torch
from torch import Tensor

from consensus.core.flat import Scalar
from consensus.core.kernels import LineSearch, TotalForce
from consensus.core.layerwise import Layerwise
from consensus.core.mean import Reduce, phi_mean

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
"""Relative residual of the sum of forces."""


class ExactUpdate:
    """`ConsensusKernel` that moves u to the phi-mean of the z_j.

    It needs no tau. Its sums over ranks are formed one after another and hidden by nothing.

    Args:
        phi: The potential.
        total: The sum over ranks of a tensor; may work in place.
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
        """As in `ConsensusKernel`, with the phi-mean in place of the step."""
        del total, t_u, out
        found = phi_mean(
            self.phi, z, u, total=self.total, smallest=search.agree, tolerance=TOLERANCE[u.dtype]
        )
        u.copy_(found.u)
        search.step.fill_(1.0)
