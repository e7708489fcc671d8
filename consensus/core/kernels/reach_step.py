"""Line 3 with a step that the sum decides: no minimum over ranks follows, for a bounded domain."""

from torch import Tensor

from consensus.core.flat import Scalar, column, scaled
from consensus.core.kernels import ConsensusKernel, LineSearch, TotalForce
from consensus.core.layerwise import Layerwise
from consensus.core.sizes import Separable


class ReachStep:
    """`ConsensusKernel` with s_u from the triangle inequality, `Layerwise.step_within`.

    The largest distances |u - z_j| of all workers come with the sum, so every rank finds the same
    step by itself. It is at most that of the line search, which looks at directions too.

    Args:
        kernel: The sums of forces.
        phi: The layer-wise potential; its domain is bounded.
    """

    def __init__(self, kernel: ConsensusKernel, phi: Layerwise) -> None:
        assert phi.bounded
        self._kernel, self._phi = kernel, phi
        self.force_size, self.closed_form = kernel.force_size, kernel.closed_form
        self.reach_size = 1 if isinstance(phi.size, Separable) else len(phi.layers)

    def forces(self, u: Tensor, z: Tensor, out: Tensor, scratch: Tensor | None) -> Tensor:
        """As in `ConsensusKernel`."""
        reach = self._kernel.forces(u, z, out, scratch)
        return self._phi.reach(u - z) if reach is None else reach

    def move_consensus(
        self, u: Tensor, z: Tensor, total: TotalForce, t_u: Scalar, search: LineSearch, out: Tensor
    ) -> None:
        """As in `ConsensusKernel`, without `search.agree`."""
        del z
        assert total.reach is not None
        d = scaled(-t_u, total.force, out)
        search.step.copy_(self._phi.step_within(total.reach, d, u))
        search.cuts.add_(search.step < 1)
        u.add_(d.mul_(column(search.step)))
