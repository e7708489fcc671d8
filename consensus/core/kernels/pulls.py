"""Line 6 with a displacement d_j that an optimizer has made, and strengths as rates in [0, 1].

    q(w)   = (eta^2 / 2) grad phi(w), which is w near 0 where psi'(0) = 1
    line 3   u+   = u - s_u outer mean_j q(u - z_j)
    line 6   z_j+ = z_j + s_j (d_j + pull q(u+ - z_j))

`Explicit` is that, for any potential; `Linear` is the same for q(w) = w. `Proximal` takes the
weighted proximal steps of weighted.py instead. A full pull of both, pull = 1, is exactly u+ + d_j.

Without a line search z_j+ = p_j + c (u+ - z_j), where p_j are the parameters: their displacement is
not computed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from consensus.core.flat import Scalar, ViewsOf
from consensus.core.kernels import (
    Block,
    ConsensusKernel,
    Hyperparameters,
    Kernel,
    LineSearch,
    TotalForce,
    choose_kernel,
)
from consensus.core.kernels.native import agreed
from consensus.core.kernels.native_together import NativeLinear, NativeRadial, NativeSeparable
from consensus.core.kernels.together import (
    LinearTogether,
    RadialTogether,
    SeparableTogether,
    Together,
)
from consensus.core.kernels.weighted import WeightedProximal
from consensus.core.layerwise import Layerwise
from consensus.core.parameters import FlatParameters
from consensus.core.sizes import Separable

Smallest = Callable[[Tensor], Tensor]
"""The elementwise minimum over processes, in place."""


@dataclass(frozen=True)
class Copy:
    """z of one worker, and the parameters that have its values but for their displacement."""

    parameters: FlatParameters
    z: Tensor  # (n,)
    memory: Callable[[], Tensor]  # (n,), may be overwritten

    def operands(self, anchor: Tensor, displaced: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Two vectors whose difference is anchor - z, and memory for it; `add` must follow.

        `displaced`: whether an optimizer has displaced the parameters from z.
        """
        z = self.z
        if self.parameters.exact:
            return anchor, z, z  # z is kept by the parameters
        if not displaced:
            return anchor, z, self.memory()
        d = self.parameters.displacement(z, self.memory())
        z += d
        return d.add_(anchor), z, d

    def add(self, step: Tensor, factors: float | Sequence[float]) -> None:
        """Move z by its displacement and by a step times factors, and write it.

        The step is in the memory of `operands`. One factor, or one for each layer.
        """
        if self.parameters.exact:
            self.parameters.add(step, factors)
            return
        if isinstance(factors, float):
            self.z.add_(step, alpha=factors)
        else:
            for (start, stop), factor in zip(self.parameters.layout.layers, factors, strict=True):
                self.z[start:stop].add_(step[start:stop], alpha=factor)
        self.parameters.write(self.z)

    def replace(self, anchor: Tensor, displaced: bool) -> None:
        """Set z to `anchor` and its displacement, and write it: a full pull, exactly."""
        if displaced:
            d = self.parameters.displacement(self.z, self.memory())
            torch.add(anchor, d, out=self.z)
        else:
            self.z.copy_(anchor)
        self.parameters.write(self.z)


class Pull(Protocol):
    """Line 6 for one worker in place, and the kernel of its line 3."""

    search: LineSearch  # step () and cuts (1,) of line 6
    cuts_steps: bool  # whether a displacement alone may be cut, so that `move` is always needed

    @property
    def kernel(self) -> ConsensusKernel:
        """Line 3."""

    def t_u(self, outer: float, num_workers: int) -> float:
        """The step t_u of `kernel` for a rate `outer`."""

    def move(self, copy: Copy, u: Tensor, anchor: Tensor, pull: float, displaced: bool) -> None:
        """Move z by its displacement and towards `anchor`, and write it to the parameters.

        `anchor` is u (n,) (Gauss-Seidel), or the u before line 3 (Jacobi).
        """

    def force(self, w: Tensor) -> Tensor:
        """q(w), or c(w) w of the proximal steps of a communication. (n,) -> (n,)."""

    def together(
        self, parameters: FlatParameters, u: Tensor, z: Tensor, smallest: Smallest
    ) -> Together | None:
        """Both lines together, where that takes less time. (n,), (n,). A collective.

        `smallest` is the minimum over the processes that hold u, in place.
        """

    def strength(self, pull: float) -> float:
        """The strength of `Together.move` for a pull."""


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

    def move(self, copy: Copy, u: Tensor, anchor: Tensor, pull: float, displaced: bool) -> None:
        """As in `Pull`."""
        z, memory = copy.z.unsqueeze(0), copy.memory()
        d = copy.parameters.displacement(copy.z, memory) if displaced else memory.zero_()
        zero = torch.zeros_like(z) if self._gradient is None else self._gradient.zero_()
        self._gradient = zero
        numbers = Hyperparameters(1.0, 0.0, 0.0, self._half_eta2 * pull if pull else None)
        block = Block(z, d.view_as(z), zero, zero)
        self.kernel.move_workers(block, u, anchor, numbers, self.search)
        copy.parameters.write(copy.z)

    def together(
        self, parameters: FlatParameters, u: Tensor, z: Tensor, smallest: Smallest
    ) -> None:
        """None, for the kernels of Algorithm 1 have tiles."""
        del parameters, u, z, smallest

    def strength(self, pull: float) -> float:
        """As in `Pull`."""
        return pull


class Differences:
    """`ConsensusKernel` for one worker and q(w) = w: the mean of the u - z_j, without a domain."""

    reach_size = 0
    closed_form = True

    def __init__(self, like: Tensor) -> None:
        self.force_size = like.shape[-1]
        self._row = ViewsOf(lambda vector: vector.unsqueeze(0))

    def forces(self, u: Tensor, z: Tensor, out: Tensor, scratch: Tensor | None) -> None:
        """U - z, to `out`."""
        del scratch
        torch.sub(u, z, out=self._row(out))

    def move_consensus(
        self, u: Tensor, z: Tensor, total: TotalForce, t_u: Scalar, search: LineSearch, out: Tensor
    ) -> None:
        """As in `ConsensusKernel`; t_u is a number."""
        del z, search, out
        u.add_(total.force, alpha=-float(t_u))


class Linear:
    """`Pull` for q(w) = w: z+ is z (1 - pull) + u+ pull + d."""

    cuts_steps = False

    def __init__(self, z: Tensor) -> None:
        self.kernel: ConsensusKernel = Differences(z)
        self.search = _search(z)

    def t_u(self, outer: float, num_workers: int) -> float:
        """Outer / M."""
        return outer / num_workers

    def force(self, w: Tensor) -> Tensor:
        """As in `Pull`."""
        return w

    def move(self, copy: Copy, u: Tensor, anchor: Tensor, pull: float, displaced: bool) -> None:
        """As in `Pull`."""
        if pull == 1.0:
            copy.replace(anchor, displaced)
        else:
            center, z, w = copy.operands(anchor, displaced)
            copy.add(torch.sub(center, z, out=w), float(pull))

    def together(
        self, parameters: FlatParameters, u: Tensor, z: Tensor, smallest: Smallest
    ) -> Together | None:
        """As in `Pull`."""
        if not parameters.in_tiles:
            return None
        library = agreed(smallest, u)
        if library is not None:
            return NativeLinear(library, parameters, u, z)
        return LinearTogether(parameters, u, z)

    def strength(self, pull: float) -> float:
        """As in `Pull`."""
        return pull


class Proximal:
    """`Pull` by weighted proximal steps; `pull` is their rate in communications, above 0."""

    cuts_steps = False

    def __init__(self, phi: Layerwise, z: Tensor, pull: float) -> None:
        if pull == 0:
            raise ValueError("`pull` is 0; allowed: above 0 if `implicit`")
        self._phi, self._half_eta2 = phi, 0.5 * float(phi.eta) ** 2
        self._weighted = WeightedProximal(phi, z[0], self.strength(pull))
        self.kernel: ConsensusKernel = self._weighted
        self.search = _search(z)

    def t_u(self, outer: float, num_workers: int) -> float:
        """`outer` itself: the kernel divides by the sum of the weights."""
        del num_workers
        return outer

    def force(self, w: Tensor) -> Tensor:
        """As in `Pull`."""
        return self._phi.size.scale(self._phi.fraction(w, self._weighted.strength), w)

    def move(self, copy: Copy, u: Tensor, anchor: Tensor, pull: float, displaced: bool) -> None:
        """As in `Pull`."""
        if pull == 1.0:
            copy.replace(anchor, displaced)
        else:
            center, z, w = copy.operands(anchor, displaced)
            copy.add(w, self._weighted.factors(center, z, w, self.strength(pull)))

    def together(
        self, parameters: FlatParameters, u: Tensor, z: Tensor, smallest: Smallest
    ) -> Together | None:
        """As in `Pull`."""
        if not parameters.in_tiles or not isinstance(self._phi.scale, float):
            return None
        library, own = agreed(smallest, u), (parameters, u, z, self._phi, self._weighted.strength)
        if not isinstance(self._phi.size, Separable):
            return RadialTogether(*own) if library is None else NativeRadial(library, *own)
        if library is None or self._phi.common_within(u.dtype, self._weighted.strength)[1] is None:
            return SeparableTogether(*own)
        return NativeSeparable(library, *own)

    def strength(self, pull: float) -> float:
        """The step of a proximal operator that removes the part `pull` of w where q(w) = w."""
        return math.inf if pull == 1.0 else self._half_eta2 * pull / (1.0 - pull)


def choose_pull(phi: Layerwise, z: Tensor, pull: float, implicit: bool | None) -> Pull:
    """The pull for a block z (1, n); `implicit` None: proximal unless phi is quadratic."""
    if implicit or (implicit is None and phi.profile.slope is None):
        return Proximal(phi, z, pull)
    scale = phi.scale if isinstance(phi.scale, float) else math.nan
    linear = phi.profile.slope == 1.0 and math.isclose(scale * float(phi.eta), 1.0)
    return Linear(z) if linear else Explicit(phi, z)


def _search(z: Tensor) -> LineSearch:
    cuts = torch.zeros(len(z), dtype=torch.int64, device=z.device)
    return LineSearch(z.new_ones(()), cuts)
