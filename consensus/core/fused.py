"""Lines 3 and 6 of Algorithm 1 on a GPU, each vector read as seldom as the mathematics allows.

`Layerwise` and updates.py say what is computed, one operation of torch after another, and each of
them reads and writes vectors of n coordinates. Here the same is done by the kernels of kernels.py.
lines.py says where they serve; everywhere else the operations of torch do.

Bytes. With K workers, in vectors of n coordinates, and the message of the all-reduce in memory:

    line 3, forces    u, z_k -> message            K + 2    radial but quad: K + 1 before, the norms
            step      u, z_k, message              K + 2    bounded
            move      u, message -> u              3
    line 6, step      u, z_k, v_k, delta_k         3 K + 1  bounded; cubic: K + 1, the norms
            move      u, z_k, v_k, delta_k -> z_k, v_k      5 K + 1

S configurations in one block (population.py): S times the bytes of one with K = M workers, and as
many kernels as one.

For K = 1: quad 6 and 6, cubic 8 and 8, tan and log 11 and 10, tan_sep 9 and 10.

The step of line 6 needs no second pass. With d = v+ + c_l w in layer l, c_l known from |w_l|, all
that the quadratic of the line search asks for follows from <w,w>, <w,v+> and <v+,v+>, which are
taken at once. Where the two parts of d cancel, what is left of their rounding is bounded and the
boundary moved inwards by it, as `Potential.feasible_step` does for the rounding of u - z.
"""

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from consensus.core.flat import Scalar
from consensus.core.layerwise import Layerwise
from consensus.core.potentials import Separable


class Fused:
    """`Lines` for one potential on a GPU: the kernels with their tables and memory.

    Args:
        phi: A potential that has a kernel, with one scale, or one for each of S configurations.
        like: A tensor with the n coordinates of a vector last, on the device, of the dtype.
        block: Coordinates to a tile, a power of two; None: chosen by n.
    """

    def __init__(self, phi: Layerwise, like: Tensor, block: int | None = None) -> None:
        from consensus.core import kernels

        self._kernels: ModuleType = kernels
        self.phi = phi
        n, device = like.shape[-1], like.device
        block = block or (4096 if n >= 1 << 22 else 1024)
        layers = [(0, n)] if isinstance(phi.size, Separable) else list(phi.layers)
        starts = torch.tensor([start for start, _ in layers] + [n])
        begins = torch.arange(0, n, block)
        ends = (begins + block).clamp(max=n)
        first = torch.searchsorted(starts, begins, right=True) - 1
        last = torch.searchsorted(starts, ends) - 1
        spans = [(a // block + i, (b - 1) // block + i + 1) for i, (a, b) in enumerate(layers)]
        self._n, self._num_layers, self._tiles = n, len(layers), len(begins)
        self._num_slots = spans[-1][1]
        self._first, self._last = (x.to(device, torch.int32) for x in (first, last))
        self._starts = starts.to(device)
        self._spans = torch.tensor(spans, device=device, dtype=torch.int32)
        self._configurations = phi.scale.numel() if isinstance(phi.scale, Tensor) else 1
        self._numbers = torch.zeros(self._configurations, 8, dtype=torch.float64, device=device)
        self._known: dict[int, float] = {}
        eps = torch.finfo(like.dtype).eps
        radius = math.sqrt(phi.profile.bound) if phi.bounded else 0.0
        self._set({0: phi.scale * phi.scale, 1: radius, 2: eps})
        self._how: dict[str, Any] = {
            "KIND": phi.profile.kernel,
            "SEPARABLE": isinstance(phi.size, Separable),
        }
        self._block = block
        self._bounded = phi.bounded
        self._needs_norms = not self._how["SEPARABLE"] and phi.profile.slope is None
        self._memory: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    def forces(self, u: Tensor, z: Tensor, out: Tensor) -> None:
        """As in `Lines`; the reach stays on the device, where nothing is decided by it."""
        factors = self._factors(u, z)
        self._kernels.forces[(self._tiles, self._configurations)](
            out,
            u,
            z,
            factors,
            *self._tables,
            self._n,
            self._workers_of_one(z),
            self._num_layers,
            **self._how,
            BLOCK=self._block,
        )

    def consensus_step(
        self, u: Tensor, z: Tensor, force: Tensor, t_u: Scalar, step: Tensor, reach: Tensor | None
    ) -> bool:
        """As in `Lines`: of the workers of this rank alone."""
        del reach
        self._set({3: t_u})
        self._search(3, u, z, z, force, True, step, None)
        return False

    def move_consensus(
        self, u: Tensor, force: Tensor, t_u: Scalar, step: Tensor, cuts: Tensor
    ) -> None:
        """As in `Lines`."""
        self._set({3: t_u})
        self._kernels.move_u[(self._tiles, self._configurations)](
            u,
            force,
            step,
            cuts,
            self._numbers,
            self._n,
            BOUNDED=self._bounded,
            BLOCK=self._block,
        )

    def move_workers(
        self,
        z: Tensor,
        v: Tensor,
        delta: Tensor,
        u: Tensor,
        *,
        kappa: Scalar,
        sigma: Scalar,
        nu: Scalar,
        pull: Scalar | None,
        through: bool,
        step: Tensor,
        cuts: Tensor,
    ) -> None:
        """As in `Lines`."""
        coupled = pull is not None
        self._set({4: sigma, 6: kappa, 7: nu})
        if pull is not None:
            self._set({5: pull})
        _, factors, _, own_steps = self._memory_for(z)
        if self._bounded:
            self._search(6, u, z, v, delta, coupled, step, cuts)
        elif coupled:
            self._factors(u, z)
        self._kernels.move_z[(self._tiles, len(z))](
            z,
            v,
            u,
            delta,
            factors,
            own_steps,
            *self._tables,
            self._n,
            self._workers_of_one(z),
            self._num_layers,
            **self._how,
            BOUNDED=self._bounded,
            COUPLED=coupled,
            THROUGH=through and coupled,
            BLOCK=self._block,
        )

    def _factors(self, u: Tensor, z: Tensor) -> Tensor:
        """2 psi'(s_l) scale^2 of every worker and layer, float64 (K, L), for a radial potential."""
        factors = self._memory_for(z)[1]
        if self._needs_norms:
            self._sums_and_exits(1, u, z, z, z, True)
        return factors

    def _search(
        self,
        line: int,
        u: Tensor,
        z: Tensor,
        v: Tensor,
        direction: Tensor,
        coupled: bool,
        step: Tensor,
        cuts: Tensor | None,
    ) -> None:
        """The line search: the smallest step to `step`, in line 6 the s_k to memory and `cuts`."""
        self._sums_and_exits(line, u, z, v, direction, coupled)
        _, _, exits, own = self._memory_for(z)
        groups = self._num_layers
        self._kernels.steps[(self._configurations,)](
            own,
            step,
            step if cuts is None else cuts,
            exits,
            self._workers_of_one(z),
            groups,
            LINE=line,
            WIDTH=min(1024, 1 << (groups - 1).bit_length()),
        )

    def _sums_and_exits(
        self, line: int, u: Tensor, z: Tensor, v: Tensor, direction: Tensor, coupled: bool
    ) -> None:
        slots, factors, exits, _ = self._memory_for(z)
        self._kernels.sums[(self._tiles, len(z))](
            slots,
            u,
            z,
            v,
            direction,
            *self._tables,
            self._n,
            self._workers_of_one(z),
            self._num_slots,
            LINE=line,
            COUPLED=coupled,
            **self._how,
            BLOCK=self._block,
        )
        self._kernels.finish[(self._num_layers, len(z))](
            factors,
            exits,
            slots,
            self._spans,
            self._numbers,
            self._num_layers,
            self._workers_of_one(z),
            self._num_slots,
            LINE=line,
            COUPLED=coupled,
            BOUNDED=self._bounded,
            **self._how,
            WIDTH=1024,
        )

    @property
    def _tables(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self._first, self._last, self._starts, self._numbers

    def _workers_of_one(self, z: Tensor) -> int:
        return len(z) // self._configurations

    def _memory_for(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Slots (K, 4, slots of one), factors and exits (K, L), steps (K,), for the K of z."""
        k = len(z)
        if k not in self._memory:
            table = torch.zeros(2, k, self._num_layers, dtype=torch.float64, device=z.device)
            slots = z.new_zeros(k, 4, self._num_slots)
            self._memory[k] = (slots, table[0], table[1], z.new_ones(k))
        return self._memory[k]

    def _set(self, values: dict[int, Scalar]) -> None:
        """Bring hyperparameters to where the kernels read them, when they have changed."""
        for i, value in values.items():
            if isinstance(value, Tensor):  # a captured graph repeats this copy, and no comparison
                self._numbers[:, i].copy_(value.reshape(-1))
                self._known.pop(i, None)
            elif self._known.get(i) != value:
                self._numbers[:, i].fill_(value)
                self._known[i] = value
