"""Lines 3 and 6 of Algorithm 1 by the functions of native.c, for most potentials on a CPU.

Vectors of n coordinates that are read from memory or written to it, for one worker:

    line 3   quad      u, z -> force; force, u -> u                   6
             bounded   u, z; u, z -> force; force, u; force, u -> u  10
    line 6   quad      u, z, v, delta -> v, z                         6
             bounded   u, z, v, delta; u, z, v, delta -> v, z        10
             alone     delta; z, v, delta -> v, z                     6

The first ones, and force, u, are for norms. Each half of line 3, and line 6, is one call of C.
Without a coupling line 6 knows upper bounds of |u - z_k| and |v_k| from the step before, and
measures the norms where these do not suffice.
Where the norms do not show that a step is feasible, the kernel of operations of torch takes the
line, for this worker or for u. It also moves u unless all ranks have native.c, so that the replicas
of u have the same bits.
"""

import ctypes
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from consensus.core.flat import Scalar
from consensus.core.kernels import Block, Hyperparameters, LineSearch, TotalForce
from consensus.core.kernels.native import Library, Plan, PotentialOfC, Run
from consensus.core.kernels.plain import Plain
from consensus.core.layerwise import Layerwise
from consensus.core.sizes import Separable
from consensus.private_api import changes_of

GIVEN, CONSTANT, CUBE, TAN, LOG = range(5)
"""psi' in native_rows.h; GIVEN: computed here."""
_PSI = {"cube": CUBE, "tan": TAN, "log": LOG}


@dataclass(frozen=True)
class _State:
    """A vector, and its address, shape and number of changes, which are compared."""

    vector: Tensor = field(compare=False)
    key: tuple[object, ...]


class Native:
    """`Kernel` for one configuration, and a potential that it `takes`.

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
        profile = phi.profile
        separable = isinstance(phi.size, Separable)
        layers = [(0, like.shape[-1])] if separable else phi.layers
        self._groups, self._runs = len(layers), (Run * len(layers))()
        for group, (run, (start, stop)) in enumerate(zip(self._runs, layers, strict=True)):
            run.start, run.count, run.group = start, stop - start, group
        sizes = self._groups, self._groups, like.shape[-1]
        self._table = Plan(ctypes.addressof(self._runs), *sizes, None, None)
        self._given = _psi_of(phi) == GIVEN
        self._potential = PotentialOfC(
            _psi_of(phi),
            separable,
            profile.slope or 0.0,
            float(phi.scale),
            phi.bound,
            _limit(phi, like.dtype),
            torch.finfo(like.dtype).eps,
        )
        self._plan = ctypes.addressof(self._table), ctypes.addressof(self._potential)
        self._sizes_of_rows, self._forces, self._move_u, self._sizes_of_line_6, self._move_rows = (
            library.function(name, like.dtype)
            for name in (
                "sizes_of_rows",
                "forces",
                "move_consensus",
                "sizes_of_line_6",
                "move_rows",
            )
        )
        self._memories: dict[int, tuple[Any, Any, Any, Any]] = {}  # by K
        self._state_of_bounds: list[_State] | None = None

    @staticmethod
    def takes(phi: Layerwise, dtype: torch.dtype) -> bool:
        """Whether native.c has the potential for vectors of this type.

        The factors of a radial one are computed here if need be.
        """
        one = not isinstance(phi.scale, Tensor) and not phi.sharded
        return one and (not isinstance(phi.size, Separable) or _limit(phi, dtype) > 0.0)

    def forces(self, u: Tensor, z: Tensor, out: Tensor, scratch: Tensor | None) -> Tensor | None:
        """As in `ConsensusKernel`."""
        if not _plain_memory(u, z, out):
            return self.fallback.forces(u, z, out, scratch)
        workers, places = len(z), (*self._plan, u.data_ptr(), z.data_ptr())
        sizes, factors, *_ = self._memory(workers)
        if self._given:
            self._sizes_of_rows(*places, workers, sizes)
            self._find_factors(sizes, factors)
        reach = u.new_empty(workers, self.reach_size) if self.reach_size else None
        at = None if reach is None else reach.data_ptr()
        if not self._forces(*places, workers, sizes, factors, out.data_ptr(), at):
            return self.fallback.forces(u, z, out, scratch)
        return reach

    def move_consensus(
        self, u: Tensor, z: Tensor, total: TotalForce, t_u: Scalar, search: LineSearch, out: Tensor
    ) -> None:
        """As in `ConsensusKernel`. All ranks branch alike, on the same numbers."""
        force, reach = total.force, total.reach
        given = (force,) if reach is None else (force, reach)
        if self._joint and _plain_memory(u, *given) and (reach is None) != self.phi.bounded:
            at = None if reach is None else reach.data_ptr()
            memory, step = self._memory(1)[0], -float(t_u)
            if self._move_u(*self._plan, u.data_ptr(), force.data_ptr(), at, step, memory):
                _count_change(u)
                if self.phi.bounded:
                    search.step.fill_(1.0)
                return None
        return self.fallback.move_consensus(u, z, total, t_u, search, out)

    def move_workers(
        self, block: Block, u: Tensor, anchor: Tensor, numbers: Hyperparameters, search: LineSearch
    ) -> None:
        """As in `WorkerKernel`."""
        rows, bounded, coupled = (block.z, block.v, block.delta), self.phi.bounded, numbers.pull
        # In Jacobi order a domain takes two differences of each z_j.
        if not _plain_memory(u, anchor, *rows) or (bounded and anchor is not u):
            return self.fallback.move_workers(block, u, anchor, numbers, search)
        scalars = float(numbers.kappa), float(numbers.sigma), float(numbers.nu)
        pull = 0.0 if numbers.pull is None else float(numbers.pull)
        given = (*self._plan, anchor.data_ptr(), *(x.data_ptr() for x in rows), len(block.z))
        sizes, factors, left, bounds = self._memory(len(block.z))
        if self._given and coupled is not None:
            self._sizes_of_line_6(*given, *scalars, sizes)
            self._find_factors(sizes, factors)
        flags = coupled is not None, numbers.through
        state = _state_of(u, *rows[:2]) if bounded and coupled is None else None
        known = state is not None and state == self._state_of_bounds
        memory = sizes, factors, left, bounds, known
        others = self._move_rows(*given, *scalars, pull, *flags, *memory)
        if bounded:
            search.step.fill_(1.0)
        for k in range(len(block.z)) if others else ():
            if left[k]:
                own = LineSearch(torch.ones_like(search.step), search.cuts[k : k + 1])
                self.fallback.move_workers(block.row(k), u, anchor, numbers, own)
                if bounded:
                    torch.minimum(search.step, own.step, out=search.step)
        if bounded:
            _count_change(*rows[:2])
            self._state_of_bounds = _state_of(u, *rows[:2])
        return None

    def _find_factors(self, sizes: Any, factors: Any) -> None:
        """2 psi'(s) scale^2 for each |w|^2, the first ones of `sizes`; nan outside the domain."""
        profile, scale2 = self.phi.profile, self._potential.scale**2
        found = [square * scale2 for square in sizes[: len(factors)]]
        if profile.numbers is not None and all(s < profile.bound for s in found):
            dpsi = profile.numbers[0]
            factors[:] = [2.0 * dpsi(s) * scale2 for s in found]
            return
        s = torch.tensor(found, dtype=torch.float64)
        inside = 2.0 * profile.dpsi(s) * scale2
        outside = math.nan if self.phi.bounded else inside
        factors[:] = torch.where(s < profile.bound, inside, outside).tolist()

    def _memory(self, workers: int) -> tuple[Any, Any, Any, Any]:
        """Memory for sizes (3, K, G), factors (K, G), marks (K,) and bounds (3, K, G)."""
        if workers not in self._memories:
            count = workers * self._groups
            some, more = ctypes.c_double * count, ctypes.c_double * (3 * count)
            self._memories[workers] = more(), some(), (ctypes.c_uint8 * workers)(), more()
        return self._memories[workers]


def _psi_of(phi: Layerwise) -> int:
    if phi.profile.slope is not None:
        return CONSTANT
    return _PSI.get(phi.profile.kernel or "", GIVEN)


def _limit(phi: Layerwise, dtype: torch.dtype) -> float:
    """The s below which native.c has psi' for each coordinate; 0: nowhere."""
    psi, near = _psi_of(phi), phi.profile.near_zero
    if psi in (CONSTANT, LOG):
        return phi.bound
    return near[-1][0] if psi == TAN and dtype == torch.float32 else 0.0


def _state_of(*vectors: Tensor) -> list[_State] | None:
    """Equal for two calls if the vectors are the same and nothing has changed them in between.

    It holds them, so that no others get their memory. None if that is not known: torch does not
    count the changes of inference tensors.
    """
    if any(x.is_inference() for x in vectors):
        return None
    return [_State(x, (x.data_ptr(), x.shape, changes_of(x))) for x in vectors]


def _count_change(*vectors: Tensor) -> None:
    """Let torch know that C has changed vectors."""
    increment_version([x for x in vectors if not x.is_inference()])


def _plain_memory(*tensors: Tensor) -> bool:
    """Whether all are without gaps."""
    return all(tensor.is_contiguous() for tensor in tensors)
