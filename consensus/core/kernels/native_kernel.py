"""Lines 3 and 6 of Algorithm 1 by the functions of native.c, for radial potentials on a CPU.

Vectors of n coordinates that are read from memory or written to it, for one worker:

    line 3   quad      u, z -> force; force, u -> u                 6
             bounded   u, z; u, z -> force; force, u; force, u -> u 10
    line 6   quad      u, z, v, delta -> v, z                       6
             bounded   u, z, v, delta; u, z, v, delta -> v, z      10

The first ones, and force, u, are for norms. Where these do not show that all steps are feasible,
the kernel of operations of torch takes the line, from where it was. It also moves u unless all
ranks have native.c, so that the replicas of u have the same bits.
"""

import ctypes
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from consensus.core.flat import Scalar
from consensus.core.kernels import Block, Hyperparameters, LineSearch, TotalForce
from consensus.core.kernels.native import Library, Plan, Run
from consensus.core.kernels.plain import Plain
from consensus.core.layerwise import Layerwise


class Native:
    """`Kernel` for one configuration, and a radial potential with one scale for all layers.

    Args:
        library: The functions of native.c.
        fallback: The same lines by operations of torch.
        phi: The potential.
        like: (..., n).
        joint: Whether all ranks that hold u have the library.
    """

    closed_form = True

    def __init__(
        self, library: Library, fallback: Plain, phi: Layerwise, like: Tensor, joint: bool
    ) -> None:
        self.phi, self.fallback, self._joint = phi, fallback, joint
        self.force_size, self.reach_size = fallback.force_size, fallback.reach_size
        self._dtype, self._n, self._groups = like.dtype, like.shape[-1], len(phi.layers)
        self._scale = float(phi.scale)
        self._runs = (Run * self._groups)()
        for group, (run, (start, stop)) in enumerate(zip(self._runs, phi.layers, strict=True)):
            run.start, run.count, run.group = start, stop - start, group
        sizes = self._groups, self._groups, self._n
        self._table = Plan(ctypes.addressof(self._runs), *sizes, None, None)
        self._plan = ctypes.addressof(self._table)
        self._squares_of_rows, self._forces, self._squares_before, self._move_row = (
            library.function(name, like.dtype)
            for name in ("squares_of_rows", "forces", "squares_before", "move_row")
        )
        self._squares_of_both = library.function("squares_of_both", like.dtype)
        self._move_u = library.function("move_u", like.dtype)
        self._numbers: dict[int, list[Any]] = {}  # by K

    def forces(self, u: Tensor, z: Tensor, out: Tensor, scratch: Tensor | None) -> Tensor | None:
        """As in `ConsensusKernel`."""
        if not _plain_memory(u, z, out):
            return self.fallback.forces(u, z, out, scratch)
        workers, places = len(z), (self._plan, u.data_ptr(), z.data_ptr())
        squares, factors, *_ = self._memory(workers)
        if self.phi.profile.slope is None or self.reach_size:
            self._squares_of_rows(*places, workers, squares)
        factors[:] = self._factors(squares[:])
        self._forces(*places, workers, factors, out.data_ptr())
        if not self.reach_size:
            return None
        reach = [self._scale * math.sqrt(square) for square in squares]
        # Its rounding is covered by the margin of the line search.
        return torch.tensor(reach, dtype=self._dtype).view(workers, self._groups)

    def move_consensus(
        self, u: Tensor, z: Tensor, total: TotalForce, t_u: Scalar, search: LineSearch, out: Tensor
    ) -> None:
        """As in `ConsensusKernel`. All ranks branch alike, on the same numbers."""
        force, step = total.force, -float(t_u)
        if not self._joint or not _plain_memory(u, force):
            return self.fallback.move_consensus(u, z, total, t_u, search, out)
        if self.phi.bounded:
            assert total.reach is not None
            _, of_u, of_force, _ = self._memory(1)
            places = force.data_ptr(), u.data_ptr()
            self._squares_of_both(self._plan, *places, of_force, of_u)
            reach = total.reach.tolist()
            steps = [abs(step) * self._scale * math.sqrt(square) for square in of_force]
            if not self._far_inside(map(sum, zip(reach, steps, strict=True)), of_u):
                return self.fallback.move_consensus(u, z, total, t_u, search, out)
            search.step.fill_(1.0)
        self._move_u(self._plan, u.data_ptr(), force.data_ptr(), step)
        return None

    def move_workers(
        self, block: Block, u: Tensor, anchor: Tensor, numbers: Hyperparameters, search: LineSearch
    ) -> None:
        """As in `WorkerKernel`."""
        rows, bounded = (block.z, block.v, block.delta), self.phi.bounded
        workers = len(block.z)
        # In Jacobi order a domain takes two differences of each z_j.
        if not _plain_memory(u, anchor, *rows) or (bounded and anchor is not u):
            return self.fallback.move_workers(block, u, anchor, numbers, search)
        stride = self._n * u.element_size()
        starts = [tuple(x.data_ptr() + k * stride for x in rows) for k in range(workers)]
        scalars = float(numbers.kappa), float(numbers.sigma), float(numbers.nu)
        pull = None if numbers.pull is None else float(numbers.pull)
        of_w, factors, of_v, of_u = self._memory(workers)
        groups, center = self._groups, anchor.data_ptr()
        if bounded:
            for k, own in enumerate(starts):
                at = 8 * k * groups
                found = (ctypes.addressof(x) + at for x in (of_w, of_v, of_u))
                self._squares_before(self._plan, center, *own, *scalars, *found)
        elif pull is not None and self.phi.profile.slope is None:
            own = self._plan, center, block.z.data_ptr()
            self._squares_of_rows(*own, workers, of_w)
        if pull is not None:
            factors[:] = [pull * c for c in self._factors(of_w[:])]
        if bounded:
            pulls = [0.0] * len(of_w) if pull is None else factors[:]
            # The triangle inequality: |x + d| <= |x| + |v+| + c |w|.
            lengths = [
                self._scale * ((1.0 + c) * math.sqrt(w) + math.sqrt(v))
                for w, v, c in zip(of_w, of_v, pulls, strict=True)
            ]
            if not self._far_inside(lengths, of_u):
                return self.fallback.move_workers(block, u, anchor, numbers, search)
            search.step.fill_(1.0)
        for k, own in enumerate(starts):
            place = None if pull is None else ctypes.addressof(factors) + 8 * k * groups
            self._move_row(self._plan, center, *own, *scalars, place, numbers.through)
        return None

    def _far_inside(self, reaches: Iterable[float], of_u: Iterable[float]) -> bool:
        """`Potential.far_inside` of the |x| + |d| of each layer, and its |u|^2; for any block."""
        radius, eps, scale = math.sqrt(self.phi.bound), torch.finfo(self._dtype).eps, self._scale
        return all(  # not so where one is nan
            reach <= 0.875 * (radius - eps * (32.0 * radius + 4.0 * scale * math.sqrt(square)))
            for reach, square in zip(reaches, of_u, strict=True)
        )

    def _factors(self, squares: list[float]) -> list[float]:
        """2 psi'(s) scale^2 for each |w|^2, nan outside the domain."""
        slope, scale2 = self.phi.profile.slope, self._scale * self._scale
        if slope is not None:
            return [2.0 * slope * scale2] * len(squares)
        profile, sizes = self.phi.profile, [square * scale2 for square in squares]
        if profile.numbers is not None and all(s < profile.bound for s in sizes):
            dpsi = profile.numbers[0]
            return [2.0 * dpsi(s) * scale2 for s in sizes]
        s = torch.tensor(sizes, dtype=torch.float64)
        inside = 2.0 * profile.dpsi(s) * scale2
        outside = math.nan if self.phi.bounded else inside
        found: list[float] = torch.where(s < profile.bound, inside, outside).tolist()
        return found

    def _memory(self, workers: int) -> list[Any]:
        """Four arrays of a number for each worker and layer."""
        if workers not in self._numbers:
            kind = ctypes.c_double * (workers * self._groups)
            self._numbers[workers] = [kind() for _ in range(4)]
        return self._numbers[workers]


def _plain_memory(*tensors: Tensor) -> bool:
    """Whether all are without gaps."""
    return all(tensor.is_contiguous() for tensor in tensors)
