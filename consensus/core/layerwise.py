"""The layer-wise potential phi(w) = sum_l p(w_l / eta), equation (18)."""

from collections.abc import Sequence
from copy import copy
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from consensus.core.flat import column
from consensus.core.potentials import Potential
from consensus.core.sizes import Radial


class Layerwise(Potential):
    """phi(w) = sum_l p(w_l / eta), equation (18), on blocks (..., n) of w = u - z.

    The methods are those of `Potential`; radial sizes are taken layer by layer.

    Args:
        potential: p, one for all layers.
        layers: (start, stop) slices of the last axis, in order, that cover it without gaps.
        eta: Width of the potential: a number, or a tensor that broadcasts over the leading axes.

    Raises:
        ValueError: If eta is not positive, the layers do not partition the axis, or the weights of
            a scaled potential fit neither the layers nor the coordinates.
    """

    sharded = False  # whether a process holds a part of each vector, see sharded.py

    def __init__(
        self, potential: Potential, layers: Sequence[tuple[int, int]], eta: float | Tensor = 1.0
    ) -> None:
        self.layers = tuple((int(start), int(stop)) for start, stop in layers)
        ends = [0, *(stop for _, stop in self.layers)]
        partition = tuple(pairwise(ends)) == self.layers and ends == sorted(set(ends))
        if not self.layers or not partition:
            raise ValueError(
                f"`layers` is {list(self.layers)}; allowed: slices (start, stop) from 0, "
                "each starting where the one before it stops"
            )
        # float64: a number that float32 lacks is finite.
        widths = eta if isinstance(eta, Tensor) else torch.as_tensor(eta, dtype=torch.float64)
        if not bool(((widths > 0) & widths.isfinite()).all()):
            raise ValueError(f"`eta` is {eta}; allowed: a finite number > 0")
        self.eta = eta
        scale: float | Tensor = _over_layers(potential.scale, self.layers)
        if isinstance(eta, Tensor) or eta != 1.0:
            if isinstance(scale, Tensor) and isinstance(eta, Tensor):
                scale = scale.to(eta.device)
            scale = scale / column(eta)
        super().__init__(potential.profile, potential.size.over(self.layers), scale)
        self.name = potential.name
        self._by_layer: Radial = Radial(self.layers)

    @property
    def label(self) -> str:
        """The potential and its width in a message."""
        return f"{super().label}, eta {self.eta}"

    def to(self, like: Tensor) -> "Layerwise":
        """The same potential with its tensors in the place and dtype of `like`, to save copies."""
        moved = copy(self)
        moved.scale = self._scale_for(like)
        return moved

    def select(self, layers: Sequence[int]) -> "Layerwise":
        """The sum over some of the layers only, by their indices, in the given order."""
        lengths = [self.layers[layer][1] - self.layers[layer][0] for layer in layers]
        chosen = copy(self)
        chosen.layers = tuple(pairwise(accumulate(lengths, initial=0)))
        if isinstance(self.scale, Tensor) and self.scale.ndim and self.scale.shape[-1] > 1:
            pieces = [self.scale[..., slice(*self.layers[layer])] for layer in layers]
            chosen.scale = torch.cat(pieces, -1)
        chosen.size = self.size.over(chosen.layers)
        chosen._by_layer = Radial(chosen.layers)
        return chosen

    def part(self, index: Tensor) -> Potential:
        """The terms of some coordinates (m,), of a separable potential, on blocks (..., m)."""
        scale = self.scale
        if isinstance(scale, Tensor) and scale.ndim and scale.shape[-1] > 1:
            scale = scale[..., index]
        return Potential(self.profile, self.size, scale)

    def distance(self, w: Tensor) -> Tensor:
        """|w_l| of each layer, in the units of the parameters. (..., n) -> (..., L)."""
        return self._by_layer.norm(w)


def _over_layers(scale: float | Tensor, layers: tuple[tuple[int, int], ...]) -> float | Tensor:
    """The scale of each coordinate, from one number, one per layer or one per coordinate."""
    if not isinstance(scale, Tensor) or scale.ndim == 0:
        return scale
    size = layers[-1][1]
    if scale.shape == (size,):
        return scale
    if scale.shape == (len(layers),):
        lengths = torch.tensor([stop - start for start, stop in layers], device=scale.device)
        return scale.repeat_interleave(lengths)
    raise ValueError(
        f"`weight` has {scale.numel()} entries; allowed: 1, {len(layers)} (one a layer) "
        f"or {size} (one a coordinate)"
    )
