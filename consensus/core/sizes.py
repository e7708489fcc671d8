"""Notions of size: groups of coordinates that share one s = |x|^2 (Table 2).

`Radial` groups are layers, or the whole vector; `Separable` groups are single coordinates. Blocks
are (..., n) and have sizes (..., G), G groups.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 1 << 17
"""Coordinates processed at once on a CPU. Temporaries of this size stay in the cache, and no
n-vector has to be allocated for them."""


class Size(ABC):
    """Inner products and lengths of the groups of a block (..., n)."""

    @abstractmethod
    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        """Inner product of each group. (..., n), (..., n) -> (..., G)."""

    @abstractmethod
    def scale(self, factor: Tensor, x: Tensor) -> Tensor:
        """Each coordinate times the factor of its group. (..., G), (..., n) -> (..., n)."""

    @abstractmethod
    def scale_(self, factor: Tensor, x: Tensor) -> Tensor:
        """`scale` in place of x."""

    @abstractmethod
    def norm(self, x: Tensor) -> Tensor:
        """Length of each group. (..., n) -> (..., G)."""

    @abstractmethod
    def largest(self, x: Tensor) -> Tensor:
        """A cheap upper bound of `norm(x)` that broadcasts against (..., G)."""

    @abstractmethod
    def length(self, x: Tensor) -> Tensor:
        """A coarser and cheaper upper bound of `norm(x)`. (..., n) -> (..., 1)."""

    @abstractmethod
    def exit(self, x: Tensor, d: Tensor, bound: float | Tensor) -> Tensor:
        """The larger root t of |x + t d|^2 = bound, inf where d = 0. (..., n) -> (..., G)."""

    @abstractmethod
    def over(self, layers: Sequence[tuple[int, int]]) -> "Size":
        """The same notion of size, layer by layer."""


class Separable(Size):
    """Every coordinate is a group of its own, G = n."""

    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        """x_i y_i."""
        return x * y

    def scale(self, factor: Tensor, x: Tensor) -> Tensor:
        """factor_i x_i."""
        return factor * x

    def scale_(self, factor: Tensor, x: Tensor) -> Tensor:
        """factor_i x_i in place of x_i."""
        return x.mul_(factor)

    def norm(self, x: Tensor) -> Tensor:
        """|x_i|."""
        return x.abs()

    def largest(self, x: Tensor) -> Tensor:
        """max_i |x_i|: one number instead of n."""
        # No vector of the |x_i|; torch.aminmax along an axis is ten times as slow.
        return torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True))

    def length(self, x: Tensor) -> Tensor:
        """max_i |x_i|."""
        return self.largest(x)

    def exit(self, x: Tensor, d: Tensor, bound: float | Tensor) -> Tensor:
        """(R - x_i sign d_i) / |d_i|, R = sqrt(bound): a linear equation for each coordinate."""
        radius = bound.sqrt() if isinstance(bound, Tensor) else math.sqrt(bound)
        return (radius - x * d.sign()) / d.abs()

    def over(self, layers: Sequence[tuple[int, int]]) -> "Separable":
        """Itself: a sum over coordinates is a sum over layers already."""
        del layers
        return self

    def __repr__(self) -> str:
        return "Separable()"


class Radial(Size):
    """One group: the whole last axis, or each of the given layers, G = L.

    Args:
        layers: (start, stop) slices that partition the last axis; None: one layer.
    """

    def __init__(self, layers: Sequence[tuple[int, int]] | None = None) -> None:
        self.layers = None if layers is None else tuple(layers)
        self._lengths = None if layers is None else [stop - start for start, stop in layers]

    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        """<x_l, y_l>."""
        if self._lengths is None:
            return _inner(x, y).unsqueeze(-1)
        if x.device.type != "cpu" or x.shape[-1] <= CHUNK:
            products = torch.split(x * y, self._lengths, -1)
            return torch.stack([product.sum(-1) for product in products], -1)
        pieces = zip(
            torch.split(x, self._lengths, -1), torch.split(y, self._lengths, -1), strict=True
        )
        return torch.stack([_inner(a, b) for a, b in pieces], -1)

    def scale(self, factor: Tensor, x: Tensor) -> Tensor:
        """factor_l x_l."""
        if self._lengths is None:
            return factor * x
        pieces = zip(torch.split(factor, 1, -1), torch.split(x, self._lengths, -1), strict=True)
        return torch.cat([f * piece for f, piece in pieces], -1)

    def scale_(self, factor: Tensor, x: Tensor) -> Tensor:
        """factor_l x_l in place of x_l."""
        if self._lengths is None:
            return x.mul_(factor)
        pieces = torch.split(x, self._lengths, -1)
        for f, piece in zip(torch.split(factor, 1, -1), pieces, strict=True):
            piece.mul_(f)
        return x

    def norm(self, x: Tensor) -> Tensor:
        """|x_l|."""
        return self.inner(x, x).sqrt()

    def largest(self, x: Tensor) -> Tensor:
        """|x_l| itself."""
        return self.norm(x)

    def length(self, x: Tensor) -> Tensor:
        """|x|, of all layers together."""
        length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return length

    def exit(self, x: Tensor, d: Tensor, bound: float | Tensor) -> Tensor:
        """The larger root of a quadratic, in the form without cancellation."""
        a, b, c = self.inner(d, d), self.inner(x, d), self.inner(x, x) - bound
        root = (b * b - a * c).sqrt()
        t = torch.where(b > 0, -c / (b + root), (root - b) / a)
        return torch.where(a > 0, t, math.inf)

    def over(self, layers: Sequence[tuple[int, int]]) -> "Radial":
        """One size for each of the given layers."""
        return Radial(layers)

    def __repr__(self) -> str:
        return f"Radial(layers={self.layers})"


def _inner(x: Tensor, y: Tensor) -> Tensor:
    """<x, y> along the last axis. (..., n), (..., n) -> (...)."""
    if x.device.type != "cpu" or x.shape[-1] <= CHUNK:
        return (x * y).sum(-1)
    pairs = zip(torch.split(x, CHUNK, -1), torch.split(y, CHUNK, -1), strict=True)
    return torch.stack([(a * b).sum(-1) for a, b in pairs], -1).sum(-1)
