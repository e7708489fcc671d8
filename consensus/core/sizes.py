"""Notions of size: groups of coordinates that share one s = |x|^2 (Table 2).

`Radial` groups are layers, or the whole vector; `Separable` groups are single coordinates. On
blocks (..., n), with G groups, both have

    inner(x, y)        the inner product of each group                              -> (..., G)
    scale(factor, x)   each coordinate times the factor (..., G) of its group       -> (..., n)
    scale_(factor, x)  the same in place of x
    norm(x)            the length of each group                                     -> (..., G)
    largest(x)         a cheap upper bound of `norm(x)`                             -> (..., G or 1)
    length(x)          a coarser and cheaper one                                    -> (..., 1)
    exit(x, d, bound)  the larger root t of |x + t d|^2 = bound, inf where d = 0    -> (..., G)
    over(layers)       the same notion of size, layer by layer
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 1 << 17  # coordinates processed at once on a CPU, so that temporaries stay in the cache


class Separable:
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

    length = largest

    def furthest(self, x: Tensor) -> float:
        """max_i |x_i| on the host. (n,)."""
        low, high = torch.aminmax(x)
        return max(-low.item(), high.item())

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


class Radial:
    """One group, the whole last axis, or G = L: (start, stop) slices `layers` that partition it."""

    def __init__(self, layers: Sequence[tuple[int, int]] | None = None) -> None:
        self.layers = None if layers is None else tuple(layers)
        self._lengths = None if layers is None else [stop - start for start, stop in layers]

    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        """<x_l, y_l>."""
        if self._lengths is None:
            return _inner(x, y).unsqueeze(-1)
        if x.device.type != "cpu" or x.shape[-1] <= CHUNK:
            products = (x * y).split_with_sizes(self._lengths, -1)
            return torch.stack([product.sum(-1) for product in products], -1)
        pieces = zip(x.split(self._lengths, -1), y.split(self._lengths, -1), strict=True)
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
        pieces = x.split_with_sizes(self._lengths, -1)
        for f, piece in zip(torch.split(factor, 1, -1), pieces, strict=True):
            piece.mul_(f)
        return x

    def norm(self, x: Tensor) -> Tensor:
        """|x_l|."""
        return self.inner(x, x).sqrt()

    largest = norm

    def length(self, x: Tensor) -> Tensor:
        """|x|, of all layers together."""
        length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return length

    def exit(self, x: Tensor, d: Tensor, bound: float | Tensor) -> Tensor:
        """The larger root of a quadratic."""
        return larger_root(self.inner(d, d), self.inner(x, d), self.inner(x, x) - bound)

    def over(self, layers: Sequence[tuple[int, int]]) -> "Radial":
        """One size for each of the given layers."""
        return Radial(layers)

    def __repr__(self) -> str:
        return f"Radial(layers={self.layers})"


Size = Radial | Separable


def larger_root(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The larger t with a t^2 + 2 b t + c = 0, without cancellation; inf where a = 0."""
    root = (b * b - a * c).sqrt()
    t = torch.where(b > 0, -c / (b + root), (root - b) / a)
    return torch.where(a > 0, t, math.inf)


def _inner(x: Tensor, y: Tensor) -> Tensor:
    """<x, y> along the last axis. (..., n), (..., n) -> (...)."""
    if x.device.type != "cpu" or x.shape[-1] <= CHUNK:
        return (x * y).sum(-1)
    pairs = zip(torch.split(x, CHUNK, -1), torch.split(y, CHUNK, -1), strict=True)
    # Of two vectors without a product in memory.
    inner = torch.dot if x.ndim == y.ndim == 1 else lambda a, b: (a * b).sum(-1)
    return torch.stack([inner(a, b) for a, b in pairs], -1).sum(-1)
