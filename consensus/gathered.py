"""Line 3 from the copies of all workers in place of a sum of forces: `group.sum=gather`.

In an all-reduce a process that is wrong about its force moves u as far as it likes. Here a process
sends its z_j, and every process computes the forces of all workers itself. Whatever a worker sends,
its force is then at most the largest slope of phi; if it is not finite, it is 0.
"""

import torch
from torch import Tensor

from consensus.comm import Group, Solo
from consensus.core.flat import Scalar
from consensus.core.kernels import ConsensusKernel
from consensus.core.layerwise import Layerwise
from consensus.server import PendingForce, Server


class GatheringServer(Server):
    """`Server` that gathers the z_j. It holds M vectors and receives M - K of them.

    Its processes need equal arithmetic for their replicas of u to agree, which `verify` checks.

    Args:
        u: As in `Server`, as are phi and group.
        workers: K, the same on every process.
        kernel: Line 3 of all M workers, with the identity as sum over ranks.
    """

    def __init__(
        self, u: Tensor, phi: Layerwise, group: Group, workers: int, kernel: ConsensusKernel
    ) -> None:
        super().__init__(u, phi, group, kernel, summed_by=Solo(u.device))
        self._gathered = u.new_empty(group.size, workers, len(u))

    def start(self, z: Tensor, scratch: Tensor | None = None) -> PendingForce:
        """Line 3, first half: begin the all-gather of the z_j (K, n), which must not change."""
        del scratch
        return self.group.start_gather(z, self._gathered), z

    def finish(self, pending: PendingForce, t_u: Scalar) -> Tensor:
        """Line 3, second half: wait, then all forces and the step. Returns u+ (n,)."""
        z = pending[0].wait().flatten(0, 1)
        finite = z.sum(1, keepdim=True).isfinite()
        return super().finish(super().start(torch.where(finite, z, self.u)), t_u)
