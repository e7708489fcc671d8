"""Equation (18) where each process holds a shard of every vector, and a part of every layer.

The shards of a radial layer add up its inner products, one small sum for all layers and all points
of a block. A separable potential needs the others only for what is one number: a value, or a step.

No branch here or above depends on values of one shard before such a sum, so that all shards form
the same sums in the same order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from consensus.core.feasibility import largest_halving_below
from consensus.core.layerwise import Layerwise
from consensus.core.potentials import Potential
from consensus.core.scalar_equation import Elementwise
from consensus.core.sizes import Radial, Separable, larger_root


@dataclass(frozen=True)
class Shards:
    """Elementwise sum and minimum over the processes that hold the shards of a vector.

    Both may work in place. All these processes call them in the same order and get the same bits.
    """

    total: Callable[[Tensor], Tensor]
    smallest: Callable[[Tensor], Tensor]


class ShardedRadial(Radial):
    """`Radial` of the whole vectors; arguments are shards. A layer may be empty on a shard.

    Every method but `scale` is a collective of the shards: one sum.
    """

    def __init__(self, layers: Sequence[tuple[int, int]], shards: Shards) -> None:
        super().__init__(layers)
        self._shards = shards

    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        """<x_l, y_l>."""
        return self._shards.total(super().inner(x, y))

    def inners(self, *pairs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """`inner` of several pairs, with one sum over the shards."""
        own = torch.broadcast_tensors(*(super(ShardedRadial, self).inner(x, y) for x, y in pairs))
        return self._shards.total(torch.stack(own)).unbind()

    def length(self, x: Tensor) -> Tensor:
        """|x|, of all layers together."""
        return self.inner(x, x).sum(-1, keepdim=True).sqrt()

    def exit(self, x: Tensor, d: Tensor, bound: float | Tensor) -> Tensor:
        """The larger root of a quadratic."""
        a, b, c = self.inners((d, d), (x, d), (x, x))
        return larger_root(a, b, c - bound)

    def over(self, layers: Sequence[tuple[int, int]]) -> "ShardedRadial":
        """One size for each of the given layers."""
        return ShardedRadial(layers, self._shards)


class ShardedLayerwise(Layerwise):
    """`Layerwise` of the whole vectors; arguments are shards (..., n) with n >= 0.

    Numbers for each point, and for each radial layer, are those of the whole vectors. Collectives
    of the shards are all methods of a radial potential, unless psi' is a constant and the answer a
    vector; and `value`, `contains`, `max_step`, `feasible_step` and `distance` of a separable one,
    whose `reach`, and what follows from it, is that of the shard.

    Args:
        phi: The potential of the whole vectors.
        layers: The (start, stop) slices of its layers in this shard, where a layer may be empty.
        shards: The processes that hold the shards.

    Raises:
        ValueError: If phi has several weights in a layer.
    """

    sharded = True

    def __init__(self, phi: Layerwise, layers: Sequence[tuple[int, int]], shards: Shards) -> None:
        self.layers, self.eta, self._shards = tuple(layers), phi.eta, shards
        self._by_layer = self._radial = ShardedRadial(layers, shards)
        self._separable = isinstance(phi.size, Separable)
        scale = _of_shard(phi, layers)
        if self._separable and layers[-1][1] == 0:
            scale = 1.0  # of no coordinate, or of `_nonempty`
        size = phi.size if self._separable else self._radial
        Potential.__init__(self, phi.profile, size, scale)

    def value(self, w: Tensor) -> Tensor:
        """As in `Potential`."""
        value = super().value(self._nonempty(w))
        return self._shards.total(value) if self._separable else value

    def contains(self, w: Tensor) -> Tensor:
        """As in `Domain`."""
        inside = super().contains(w)
        return self._shards.smallest(inside.byte()).bool() if self._separable else inside

    def max_step(self, w: Tensor, d: Tensor) -> Tensor:
        """As in `Domain`."""
        step = super().max_step(self._nonempty(w), self._nonempty(d))
        return self._shards.smallest(step) if self._separable and self.bounded else step

    def feasible_step(self, w: Tensor, d: Tensor, u: Tensor, reach: Tensor | None = None) -> Tensor:
        """As in `Domain`; by the closed form alone where the size is radial."""
        w, d, u = (self._nonempty(vector) for vector in (w, d, u))
        if not self.bounded or self._separable:
            step = super().feasible_step(w, d, u, reach)
            return self._shards.smallest(step) if self.bounded else step
        x, d, u = (self._scaled(vector) for vector in (w, d, u))
        a, b, c, of_u = self._radial.inners((d, d), (x, d), (x, x), (u, u))
        shrunk = self._safe_radius(of_u.sqrt()).clamp(min=0.0).square()
        return largest_halving_below(self._first(larger_root(a, b, c - shrunk)))

    def reach(self, w: Tensor) -> Tensor:
        """As in `Domain`."""
        return self.size.largest(self._scaled(self._nonempty(w)))

    def surely_inside(self, s: Tensor) -> bool:
        """As in `Domain`."""
        return s.numel() == 0 or super().surely_inside(s)

    def dpsi_within(self, reach: Tensor) -> Elementwise | float:
        """As in `Potential`."""
        return super().dpsi_within(reach) if reach.numel() else self.profile.dpsi

    def _nonempty(self, x: Tensor) -> Tensor:
        """`x`, or one coordinate at 0 in place of none where phi is separable."""
        return x if x.shape[-1] or not self._separable else x.new_zeros((*x.shape[:-1], 1))


def _of_shard(phi: Layerwise, layers: Sequence[tuple[int, int]]) -> float | Tensor:
    """The scale of the coordinates of a shard."""
    scale = phi.scale
    if not isinstance(scale, Tensor) or scale.ndim == 0 or scale.shape[-1] == 1:
        return scale
    by_layer = torch.stack([scale[..., start] for start, _ in phi.layers], -1)
    if not torch.equal(by_layer.repeat_interleave(_lengths(phi.layers, scale), -1), scale):
        raise ValueError(
            "`weight` has an entry for each coordinate; allowed for sharded parameters: 1, or "
            f"{len(layers)} (one a layer)"
        )
    return by_layer.repeat_interleave(_lengths(layers, scale), -1)


def _lengths(layers: Sequence[tuple[int, int]], like: Tensor) -> Tensor:
    return torch.tensor([stop - start for start, stop in layers], device=like.device)
