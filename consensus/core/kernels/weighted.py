"""Lines 3 and 6 with proximal pulls and a mean of the copies that is weighted by them.

    c_j(w)   the fraction of w that the proximal step of phi removes, `Potential.fraction`, for each
             group of coordinates, in [0, 1]
    line 3   u+  = u - t_u (sum_j c_j w_j) / (sum_j c_j)        w_j = u - z_j, c_j = c(w_j)
    line 6   z_j+ = z_j + v_j+ + c(u+ - z_j) (u+ - z_j)

For t_u in (0, 1] no point leaves the convex hull of the others, but for the displacement v_j+, so
there is no domain and no line search, and any strength is stable. For the quadratic potential all c
are equal: the mean of the copies, and a linear interpolation towards it.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from consensus.core.flat import Scalar
from consensus.core.kernels import Block, Hyperparameters, LineSearch, TotalForce
from consensus.core.kernels.plain import velocity
from consensus.core.layerwise import Layerwise
from consensus.core.sizes import CHUNK, Radial, Separable


class WeightedProximal:
    """`Kernel` of the weighted proximal steps, for one configuration.

    Args:
        phi: The layer-wise potential; a ValueError if it is radial with a weight per coordinate.
        like: A vector (n,) of the device and dtype.
        strength: The step of the proximal operator in c of line 3; inf: c = 1. In line 6 it is
            `Hyperparameters.pull`.
    """

    reach_size = 0
    closed_form = False

    def __init__(self, phi: Layerwise, like: Tensor, strength: float) -> None:
        self.phi = phi
        self.strength = strength
        self._n = like.shape[-1]
        groups = self._n if isinstance(phi.size, Separable) else len(phi.layers)
        self.force_size = self._n + groups
        phi.fraction(torch.zeros_like(like), 1.0)  # its ValueError

    def forces(self, u: Tensor, z: Tensor, out: Tensor, scratch: Tensor | None) -> None:
        """sum_k c_k w_k and sum_k c_k of this rank, to `out` (n + G,)."""
        forces, weights = out.tensor_split([self._n])
        if len(z) == 1:
            scratch = forces.unsqueeze(0)
        w = torch.sub(u, z, out=scratch)
        for part, weight in self._pieces(w, weights.expand(len(z), -1)):
            c = self.phi.fraction(part, self.strength)
            self.phi.size.scale_(c, part)
            torch.sum(c, 0, out=weight[0])
        if len(z) > 1:
            torch.sum(w, 0, out=forces)

    def move_consensus(
        self, u: Tensor, z: Tensor, total: TotalForce, t_u: Scalar, search: LineSearch, out: Tensor
    ) -> None:
        """As in `ConsensusKernel`; `out` is like `total.force`."""
        del z
        d, factor = out.tensor_split([self._n])
        # A sum of c may be 0, as (|x|^2)' underflows near 0; then the sum of c w is 0 as well.
        torch.clamp(total.force[self._n :], min=torch.finfo(u.dtype).tiny, out=factor)
        factor.reciprocal_().mul_(-t_u)
        d.copy_(total.force[: self._n])
        u.add_(self.phi.size.scale_(factor, d))
        search.step.fill_(1.0)

    def move_workers(
        self, block: Block, u: Tensor, anchor: Tensor, numbers: Hyperparameters, search: LineSearch
    ) -> None:
        """As in `WorkerKernel`; `numbers.pull` is one number."""
        z, v, delta = block.z, block.v, block.delta
        before = z.clone() if numbers.through else z
        velocity(v, delta, z, numbers.kappa, numbers.sigma, numbers.nu, out=v)
        self.pull(z, v, anchor, 0.0 if numbers.pull is None else float(numbers.pull))
        if numbers.through:
            torch.sub(z, before, out=v)
        search.step.fill_(1.0)

    def pull(self, z: Tensor, d: Tensor, anchor: Tensor, strength: float) -> None:
        """Z += d + c(anchor - z) (anchor - z) in place. (K, n), (K, n), (n,)."""
        if strength > 0.0:
            for own, center in self._pieces(z, anchor.expand_as(z)):
                self._interpolate(own, center, strength)
        z += d

    def _interpolate(self, z: Tensor, anchor: Tensor, strength: float) -> None:
        size = self.phi.size
        if isinstance(size, Separable):
            z.lerp_(anchor, self.phi.fraction(anchor - z, strength))
            return
        c = self.phi.fraction_of(size.apart(anchor, z) * self.phi.scale, strength)
        lengths = [stop - start for start, stop in self.phi.layers]
        pieces = zip(z.split(lengths, -1), anchor.split(lengths, -1), c.split(1, -1), strict=True)
        for own, center, weight in pieces:
            own.lerp_(center, weight)

    def _pieces(self, *vectors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The vectors in pieces whose temporaries stay in the cache of a CPU."""
        whole = isinstance(self.phi.size, Radial) or isinstance(self.phi.scale, Tensor)
        if whole or vectors[0].device.type != "cpu":
            return iter([vectors])
        return zip(*(torch.split(x, CHUNK, -1) for x in vectors), strict=True)
