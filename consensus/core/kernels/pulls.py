"""Line 6 with a displacement d_j that an optimizer has made, and strengths as rates in [0, 1].

    q(w)   = (eta^2 / 2) grad phi(w), which is w near 0 where psi'(0) = 1
    line 3   u+   = u - s_u outer mean_j q(u - z_j)
    line 6   z_j+ = z_j + s_j (d_j + pull q(u+ - z_j))

`Explicit` is that, for any potential; `Linear` is the same for q(w) = w, as an interpolation that
is exact for pull = 1. `Proximal` takes the weighted proximal steps of weighted.py instead.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from consensus.core.kernels import Block, Hyperparameters, Kernel, LineSearch, choose_kernel
from consensus.core.kernels.weighted import WeightedProximal
from consensus.core.layerwise import Layerwise
from consensus.core.parameters import FlatParameters, Tile


@dataclass(frozen=True)
class Copy:
    """z of one worker, and the parameters that have its values but for their displacement."""

    parameters: FlatParameters
    z: Tensor  # (1, n)
    memory: Tensor  # (n,), may be overwritten
    displaced: bool  # whether an optimizer has displaced the parameters

    def tiles(self, anchor: Tensor) -> Iterator[tuple[Tile, Tile, Tensor | None]]:
        """`FlatParameters.moves`."""
        memory = self.memory if self.displaced else None
        return self.parameters.moves(self.z[0], anchor, memory)


class Pull(Protocol):
    """Line 6 for one worker in place, and the kernel of its line 3."""

    kernel: Kernel
    search: LineSearch  # step () and cuts (1,) of line 6
    cuts_steps: bool  # whether a displacement alone may be cut, so that `move` is always needed

    def t_u(self, outer: float, num_workers: int) -> float:
        """The step t_u of `kernel` for a rate `outer`."""

    def move(self, copy: Copy, u: Tensor, anchor: Tensor, pull: float) -> None:
        """Move z by its displacement and towards `anchor`, and write it to the parameters.

        `anchor` is u (n,) (Gauss-Seidel), or the u before line 3 (Jacobi).
        """

    def force(self, w: Tensor) -> Tensor:
        """q(w), or c(w) w of the proximal steps of a communication. (n,) -> (n,)."""


class Explicit:
    """`Pull` by the gradient of phi, through the kernels of Algorithm 1."""

    def __init__(self, phi: Layerwise, z: Tensor) -> None:
        self.kernel: Kernel = choose_kernel(phi, z)
        self._phi = phi
        self.search = _search(z)
        self.cuts_steps = phi.bounded
        self._half_eta2 = 0.5 * float(phi.eta) ** 2
        self._gradient: Tensor | None = None  # 0: d is the new velocity

    def t_u(self, outer: float, num_workers: int) -> float:
        """(eta^2 / 2) outer / M."""
        return self._half_eta2 * outer / num_workers

    def force(self, w: Tensor) -> Tensor:
        """As in `Pull`."""
        return self._half_eta2 * self._phi.grad(w)

    def move(self, copy: Copy, u: Tensor, anchor: Tensor, pull: float) -> None:
        """As in `Pull`."""
        z, memory = copy.z, copy.memory
        d = copy.parameters.displacement(z[0], memory) if copy.displaced else memory.zero_()
        zero = torch.zeros_like(z) if self._gradient is None else self._gradient.zero_()
        self._gradient = zero
        numbers = Hyperparameters(1.0, 0.0, 0.0, self._half_eta2 * pull if pull else None)
        block = Block(z, d.view_as(z), zero, zero)
        self.kernel.move_workers(block, u, anchor, numbers, self.search)
        copy.parameters.write(z[0])


class Linear(Explicit):
    """`Pull` for q(w) = w: z+ is z (1 - pull) + u+ pull + d."""

    def move(self, copy: Copy, u: Tensor, anchor: Tensor, pull: float) -> None:
        """As in `Pull`."""
        for own, center, d in copy.tiles(anchor):
            own.flat.lerp_(center.flat, pull)
            if d is not None:
                own.flat.add_(d)


class Proximal:
    """`Pull` by weighted proximal steps; `pull` is their rate in communications, above 0."""

    cuts_steps = False

    def __init__(self, phi: Layerwise, z: Tensor, pull: float) -> None:
        if pull == 0:
            raise ValueError("`pull` is 0; allowed: above 0 if `implicit`")
        self._phi, self._half_eta2 = phi, 0.5 * float(phi.eta) ** 2
        self._weighted = WeightedProximal(phi, z[0], self._strength(pull))
        self.kernel: Kernel = self._weighted
        self.search = _search(z)

    def t_u(self, outer: float, num_workers: int) -> float:
        """`outer` itself: the kernel divides by the sum of the weights."""
        del num_workers
        return outer

    def force(self, w: Tensor) -> Tensor:
        """As in `Pull`."""
        return self._phi.size.scale(self._phi.fraction(w, self._weighted.strength), w)

    def move(self, copy: Copy, u: Tensor, anchor: Tensor, pull: float) -> None:
        """As in `Pull`."""
        interpolate = self._weighted.interpolation(copy.z[0], anchor, self._strength(pull))
        for own, center, d in copy.tiles(anchor):
            interpolate(own, center)
            if d is not None:
                own.flat.add_(d)

    def _strength(self, pull: float) -> float:
        """The step of a proximal operator that removes the part `pull` of w where q(w) = w."""
        return math.inf if pull == 1.0 else self._half_eta2 * pull / (1.0 - pull)


def choose_pull(phi: Layerwise, z: Tensor, pull: float, implicit: bool | None) -> Pull:
    """The pull for a block z (1, n); `implicit` None: proximal unless phi is quadratic."""
    if implicit or (implicit is None and phi.profile.slope is None):
        return Proximal(phi, z, pull)
    scale = phi.scale if isinstance(phi.scale, float) else math.nan
    linear = phi.profile.slope == 1.0 and math.isclose(scale * float(phi.eta), 1.0)
    return Linear(phi, z) if linear else Explicit(phi, z)


def _search(z: Tensor) -> LineSearch:
    cuts = torch.zeros(len(z), dtype=torch.int64, device=z.device)
    return LineSearch(z.new_ones(()), cuts)
