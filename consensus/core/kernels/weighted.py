"""Lines 3 and 6 with proximal pulls and a mean of the copies that is weighted by them.

    c_j(w)   the fraction of w that the proximal step of phi removes, `Potential.fraction`, for each
             group of coordinates, in [0, 1]
    line 3   u+  = u - t_u (sum_j c_j w_j) / (sum_j c_j)        w_j = u - z_j, c_j = c(w_j)
    line 6   z_j+ = z_j + v_j+ + c(u+ - z_j) (u+ - z_j)

For t_u in (0, 1] no point leaves the convex hull of the others, but for the displacement v_j+, so
there is no domain and no line search, and any strength is stable. For the quadratic potential all c
are equal: the mean of the copies, and a linear interpolation towards it.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from consensus.core.flat import Scalar
from consensus.core.kernels import Block, Hyperparameters, LineSearch, TotalForce
from consensus.core.kernels.plain import velocity
from consensus.core.layerwise import Layerwise
from consensus.core.parameters import Tile
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
        self._parts = [self._n, groups]  # of a message
        tile = CHUNK if like.device.type == "cpu" else max(1, self._n)
        places = [  # the layers, in tiles
            (layer, min(tile, stop - at))
            for layer, (start, stop) in enumerate(phi.layers)
            for at in range(start, stop, tile)
        ]
        self._layers, self._lengths = [p[0] for p in places], [p[1] for p in places]
        phi.fraction_of(like.new_zeros(groups), 1.0)  # its ValueError, without a norm

    def forces(self, u: Tensor, z: Tensor, out: Tensor, scratch: Tensor | None) -> None:
        """sum_k c_k w_k and sum_k c_k of this rank, to `out` (n + G,)."""
        forces, weights = out.split_with_sizes(self._parts)
        if len(z) == 1 and z.device.type == "cpu":
            return self._force_of_one(u, z[0], forces, weights)
        if len(z) == 1:
            scratch = forces.unsqueeze(0)
        w = torch.sub(u, z, out=scratch)
        for part, weight in self._pieces(w, weights.expand(len(z), -1)):
            c = self.phi.fraction(part, self.strength)
            self.phi.size.scale_(c, part)
            torch.sum(c, 0, out=weight[0])
        if len(z) > 1:
            torch.sum(w, 0, out=forces)
        return None

    def _force_of_one(self, u: Tensor, z: Tensor, force: Tensor, weights: Tensor) -> None:
        """`forces` for one worker on a CPU, without temporaries of n numbers."""
        size = self.phi.size
        if isinstance(size, Separable):
            for center, own, part, weight in self._pieces(u, z, force, weights):
                c = self._fraction(torch.sub(center, own, out=part), self.strength)
                weight.fill_(c) if isinstance(c, float) else weight.copy_(c)
                part.mul_(c)
            return
        large = self._n > CHUNK
        r = size.apart(u, z) if large else size.norm(torch.sub(u, z, out=force))
        c_of = self.phi.fraction_numbers(self._in_units_of_x(r), self.strength)
        weights.copy_(weights.new_tensor(c_of))
        vectors = (force, u, z) if large else (force,)
        for layer, part, *others in self._tiles(*vectors):
            if large:  # w again, so that it is still in the cache
                torch.sub(*others, out=part)
            part.mul_(c_of[layer])

    def _tiles(self, *vectors: Tensor) -> Iterator[tuple[Any, ...]]:
        """The layer of each tile, and the vectors there."""
        pieces = (x.split_with_sizes(self._lengths) for x in vectors)
        return zip(self._layers, *pieces, strict=True)

    def _fraction(self, w: Tensor, strength: float) -> Tensor | float:
        """`Potential.fraction`, by one number where possible."""
        common = self.phi.common_fraction(w, strength)
        return self.phi.fraction(w, strength) if common is None else common

    def move_consensus(
        self, u: Tensor, z: Tensor, total: TotalForce, t_u: Scalar, search: LineSearch, out: Tensor
    ) -> None:
        """As in `ConsensusKernel`; `out` is like `total.force`."""
        del z
        search.step.fill_(1.0)
        (force, weights), factors = total.force.split_with_sizes(self._parts), out[self._n :]
        if isinstance(self.phi.size, Separable):
            for own, part, weight, factor in self._pieces(u, force, weights, factors):
                own.addcmul_(part, _negative_ratio(t_u, weight, factor))
            return
        _negative_ratio(t_u, weights, factors)
        on_host = factors.tolist() if u.device.type == "cpu" else None
        for layer, own, part in self._tiles(u, force):
            if on_host is None:
                own.addcmul_(part, factors[layer])
            else:
                own.add_(part, alpha=on_host[layer])

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

    def interpolation(
        self, z: Tensor, anchor: Tensor, strength: float
    ) -> Callable[[Tile, Tile], None]:
        """`pull` of z (n,) without d, for its tiles and those of `anchor`; c is taken now."""
        if isinstance(self.phi.size, Separable):
            return lambda own, center: self._interpolate(own.flat, center.flat, strength)
        r = self._in_units_of_x(self.phi.size.apart(anchor, z))
        c_of: Sequence[float | Tensor]
        if z.device.type == "cpu":
            c_of = self.phi.fraction_numbers(r, strength)
        else:
            c_of = self.phi.fraction_of(r, strength).unbind()

        def interpolate(own: Tile, center: Tile) -> None:
            for layer, part in own.layers.items():
                part.lerp_(center.layers[layer], c_of[layer])

        return interpolate

    def _interpolate(self, z: Tensor, anchor: Tensor, strength: float) -> None:
        size = self.phi.size
        if isinstance(size, Separable):
            z.lerp_(anchor, self._fraction(anchor - z, strength))
            return
        c = self.phi.fraction_of(self._in_units_of_x(size.apart(anchor, z)), strength)
        lengths = [stop - start for start, stop in self.phi.layers]
        pieces = zip(z.split(lengths, -1), anchor.split(lengths, -1), c.split(1, -1), strict=True)
        for own, center, weight in pieces:
            own.lerp_(center, weight)

    def _in_units_of_x(self, r: Tensor) -> Tensor:
        """|x| of radial groups from r = |w|."""
        scale = self.phi.scale
        return r if isinstance(scale, float) and scale == 1.0 else r * scale

    def _pieces(self, *vectors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The vectors in pieces whose temporaries stay in the cache of a CPU."""
        whole = isinstance(self.phi.size, Radial) or isinstance(self.phi.scale, Tensor)
        if whole or vectors[0].device.type != "cpu" or self._n <= CHUNK:
            return iter([vectors])
        return zip(*(torch.split(x, CHUNK, -1) for x in vectors), strict=True)


def _negative_ratio(t_u: Scalar, weights: Tensor, out: Tensor) -> Tensor:
    """-t_u / weights, to `out`."""
    # A sum of c may be 0, as (|x|^2)' underflows near 0; then the sum of c w is 0 as well.
    torch.clamp(weights, min=torch.finfo(weights.dtype).tiny, out=out)
    return out.reciprocal_().mul_(-t_u)
