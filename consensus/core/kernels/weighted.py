"""Lines 3 and 6 with proximal pulls and a mean of the copies that is weighted by them.

    c_j(w)   the fraction of w that the proximal step of phi removes, `Potential.fraction`, for each
             group of coordinates, in [0, 1]
    line 3   u+  = u - t_u (sum_j c_j w_j) / (sum_j c_j)        w_j = u - z_j, c_j = c(w_j)
    line 6   z_j+ = z_j + d_j + c(u+ - z_j) (u+ - z_j)

For t_u in (0, 1] no point leaves the convex hull of the others, but for the displacement d_j, so
there is no domain and no line search, and any strength is stable. For the quadratic potential all c
are equal: the mean of the copies, and a linear interpolation towards it.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from consensus.core.flat import Scalar, ViewsOf
from consensus.core.kernels import LineSearch, TotalForce
from consensus.core.layerwise import Layerwise
from consensus.core.sizes import CHUNK, Separable


class Message(NamedTuple):
    """The parts of a message."""

    force: Tensor  # the sum of c w, (n,)
    row: Tensor  # the same, (1, n)
    weights: Tensor  # the sum of c, (G,)
    numbers: Any  # a memoryview, the same on the host, if they are in its memory


class WeightedProximal:
    """`ConsensusKernel` of the weighted proximal steps, for one worker.

    Vectors that are passed are kept, as views.

    Args:
        phi: The layer-wise potential; a ValueError if it is radial with a weight per coordinate.
        like: A vector (n,) of the device and dtype.
        strength: The step of the proximal operator in c of line 3; inf: c = 1.
    """

    reach_size = 0
    closed_form = False

    def __init__(self, phi: Layerwise, like: Tensor, strength: float) -> None:
        self.phi, self.strength = phi, strength
        self._n = n = like.shape[-1]
        self._separable = isinstance(phi.size, Separable)
        on_cpu = like.device.type == "cpu"
        groups = n if self._separable else len(phi.layers)
        # One number more if separable: the weight of all coordinates, or nan if they differ.
        self.force_size = n + groups + self._separable
        tile = CHUNK if on_cpu else max(1, n)
        layers = [(0, n)] if self._separable else phi.layers
        self._tiles = [  # the layer and the length of each
            (layer, min(tile, stop - at))
            for layer, (start, stop) in enumerate(layers)
            for at in range(start, stop, tile)
        ]
        lengths = [length for _, length in self._tiles]
        self._along = ViewsOf(lambda x: x.view(-1).split_with_sizes(lengths))  # in tiles
        # On a CPU norms and fractions of radial layers are numbers, which take less time there.
        radial = not self._separable and not phi.sharded
        self._by_numbers = on_cpu and radial and isinstance(phi.scale, float)
        self._message = ViewsOf(self._cut)
        squares = like.new_empty(len(self._tiles))  # |w|^2 of each tile
        self._slots, self._squares = squares.unbind(), _numbers(squares)
        self._tiny = torch.finfo(like.dtype).tiny
        phi.fraction_of(like.new_zeros(groups), 1.0)  # its ValueError, without a norm

    def _cut(self, message: Tensor) -> Message:
        """The parts of a message (n + G,)."""
        force, weights = message[: self._n], message[self._n :]
        if self._separable:
            weights = weights[: self._n]
        return Message(force, force.unsqueeze(0), weights, _numbers(weights))

    def forces(self, u: Tensor, z: Tensor, out: Tensor, scratch: Tensor | None) -> None:
        """C w and c of the worker z (1, n), to `out` (n + G,)."""
        del scratch
        message = self._message(out)
        if self._separable:
            out[-1] = math.nan
        if not self._by_numbers or math.isinf(self.strength):
            return self._weigh(u, z, message.row, self.strength, message.weights)
        c_of = self._fractions(u, z, message.row, self.strength)
        for (layer, _), part in zip(self._tiles, self._along(message.force), strict=True):
            part.mul_(c_of[layer])
        for layer, c in enumerate(c_of):
            message.numbers[layer] = c
        return None

    def factors(self, u: Tensor, z: Tensor, out: Tensor, strength: float) -> float | list[float]:
        """c(w) of each layer, and w = u - z to `out`; or 1, and c w to `out`. (n,), (n,)."""
        if self._by_numbers and not math.isinf(strength):
            return self._fractions(u, z, out, strength)
        self._weigh(u, z, out, strength, None)
        return 1.0

    def _weigh(
        self, u: Tensor, z: Tensor, out: Tensor, strength: float, weights: Tensor | None
    ) -> None:
        """C(w) w to `out`, and c(w) to `weights` (G,), with w = u - z."""
        if self._separable and not math.isinf(strength):
            return self._weigh_coordinates(u, z, out, strength, weights)
        w, c = torch.sub(u, z, out=out), u.new_ones(())
        if not math.isinf(strength):
            c = self.phi.fraction_of(self.phi.size.norm(w) * self.phi.scale, strength)
            self.phi.size.scale_(c, w)
        if weights is not None:
            weights.copy_(c.view(-1))
        return None

    def _weigh_coordinates(
        self, u: Tensor, z: Tensor, out: Tensor, strength: float, weights: Tensor | None
    ) -> None:
        """`_weigh` of a separable potential; no weight is 0, as (x^2)' may be near 0."""
        others = [None] * len(self._tiles) if weights is None else self._along(weights)
        for own, own_z, part, weight in zip(*map(self._along, (u, z, out)), others, strict=True):
            torch.sub(own, own_z, out=part)
            common = self.phi.common_fraction(part, strength)
            if common is not None:
                part.mul_(common)
                if weight is not None:
                    weight.fill_(max(common, self._tiny))
            else:
                c = self.phi.fraction(part, strength)
                part.mul_(c)
                if weight is not None:
                    torch.clamp(c, min=self._tiny, out=weight)

    def _fractions(self, u: Tensor, z: Tensor, out: Tensor, strength: float) -> list[float]:
        """c(w) of each radial layer, by numbers, and w = u - z to `out`."""
        if self._n <= CHUNK:
            torch.sub(u, z, out=out)
            for slot, part in zip(self._slots, self._along(out), strict=True):
                torch.dot(part, part, out=slot)
        else:  # so that a tile is still in the cache
            tiles = zip(*map(self._along, (u, z, out)), self._slots, strict=True)
            for own, own_z, part, slot in tiles:
                torch.sub(own, own_z, out=part)
                torch.dot(part, part, out=slot)
        squares = [0.0] * len(self.phi.layers)
        for (layer, _), square in zip(self._tiles, self._squares, strict=True):
            squares[layer] += square
        scale, profile = float(self.phi.scale), self.phi.profile
        r = [scale * math.sqrt(square) for square in squares]
        if profile.numbers is not None:
            return profile.fractions(r, strength * scale * scale, u.dtype)
        found: list[float] = self.phi.fraction_of(torch.tensor(r, dtype=u.dtype), strength).tolist()
        return found

    def move_consensus(
        self, u: Tensor, z: Tensor, total: TotalForce, t_u: Scalar, search: LineSearch, out: Tensor
    ) -> None:
        """As in `ConsensusKernel`, without a line search; t_u is a number."""
        del z, search, out
        message, t_u = self._message(total.force), float(t_u)
        if self._separable:
            u.addcdiv_(message.force, message.weights, value=-t_u)
            return
        tiles = zip(self._tiles, self._along(u), self._along(message.force), strict=True)
        # A sum of c may be 0, as (|x|^2)' underflows near 0; then the sum of c w is 0 as well.
        if u.device.type == "cpu":
            factors = [-t_u / max(c, self._tiny) for c in message.numbers]
            for (layer, _), own, part in tiles:
                own.add_(part, alpha=factors[layer])
        else:
            ratios = message.weights.clamp(min=self._tiny).reciprocal_().mul_(-t_u)
            for (layer, _), own, part in tiles:
                own.addcmul_(part, ratios[layer])


def _numbers(x: Tensor) -> Any:
    """A memoryview of a vector on a CPU: access from Python without operations of torch."""
    array: Any = x.numpy() if x.device.type == "cpu" else b""
    return memoryview(array)
