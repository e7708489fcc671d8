"""Lines 3 and 6 of Algorithm 1 on a GPU, with each vector read as seldom as possible.

The kernels of triton_kernels.py do the same as plain.py in fewer passes.

Bytes, in n-vectors, with K workers and the message of the all-reduce in memory:

    line 3, forces    u, z_k -> message            K + 2    radial but quad: K + 1 before, the norms
            step      u, z_k, message              K + 2    bounded
            move      u, message -> u              3
    line 6, step      u, z_k, v_k, delta_k         3 K + 1  bounded; cubic: K + 1, the norms
            move      u, z_k, v_k, delta_k -> z_k, v_k      5 K + 1

S configurations in one block (population.py): S times the bytes of one with K = M workers, and as
many kernels as for one. For K = 1: quad 6 and 6, cubic 8 and 8, tan and log 11 and 10, tan_sep 9
and 10.

The step of line 6 needs no second pass. With d = v+ + c_l w in layer l, c_l known from |w_l|, the
quadratic of the line search follows from <w,w>, <w,v+> and <v+,v+>, which are taken at once. Where
the two parts of d cancel, the boundary is moved inwards by a bound on their rounding, as in
`Potential.feasible_step`.
"""

import math
from typing import Any

import torch
from torch import Tensor

from consensus.core.flat import Scalar
from consensus.core.kernels import Block, Hyperparameters, LineSearch, TotalForce, triton_kernels
from consensus.core.kernels.plain import Plain
from consensus.core.layerwise import Layerwise
from consensus.core.sizes import Separable


class Triton(Plain):
    """`Kernel` on a GPU: the Triton kernels with their tables and memory.

    phi has a kernel, and one scale, or one for each of S configurations. A tile has `block`
    coordinates, a power of two; None: chosen by n.
    """

    def __init__(self, phi: Layerwise, like: Tensor, block: int | None = None) -> None:
        super().__init__(phi, like)
        self.reach_size = 0  # the reach stays on the device
        n, device = like.shape[-1], like.device
        block = block or (4096 if n >= 1 << 22 else 1024)
        separable = isinstance(phi.size, Separable)
        layers = [(0, n)] if separable else list(phi.layers)
        starts = torch.tensor([start for start, _ in layers] + [n])
        begins = torch.arange(0, n, block)
        ends = (begins + block).clamp(max=n)
        first = torch.searchsorted(starts, begins, right=True) - 1
        last = torch.searchsorted(starts, ends) - 1
        spans = [(a // block + i, (b - 1) // block + i + 1) for i, (a, b) in enumerate(layers)]
        self._n, self._num_layers, self._tiles = n, len(layers), len(begins)
        self._num_slots = spans[-1][1]
        self._spans = torch.tensor(spans, device=device, dtype=torch.int32)
        self._configurations = phi.scale.numel() if isinstance(phi.scale, Tensor) else 1
        self._numbers = torch.zeros(self._configurations, 8, dtype=torch.float64, device=device)
        first, last = (x.to(device, torch.int32) for x in (first, last))
        self._tables = first, last, starts.to(device), self._numbers
        self._known: dict[int, float] = {}
        eps = torch.finfo(like.dtype).eps
        radius = math.sqrt(phi.bound) if phi.bounded else 0.0
        self._set({0: phi.scale * phi.scale, 1: radius, 2: eps})
        self._how: dict[str, Any] = {"KIND": phi.profile.kernel, "SEPARABLE": separable}
        self._block = block
        self._needs_norms = not separable and phi.profile.slope is None
        self._memory: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    def forces(
        self, u: Tensor, z: Tensor, out: Tensor, scratch: Tensor | None = None
    ) -> Tensor | None:
        """As in `ConsensusKernel`."""
        del scratch
        if self._needs_norms:
            self._norms_and_exits(1, u, z, z, z, True)
        _, factors, _, _ = self._memory_for(z)
        triton_kernels.forces[(self._tiles, self._configurations)](
            out, u, z, factors, *self._tables, self._n, self._workers_of_one(z), self._num_layers,
            **self._how, BLOCK=self._block,
        )  # fmt: skip
        return None

    def move_consensus(
        self, u: Tensor, z: Tensor, total: TotalForce, t_u: Scalar, search: LineSearch, out: Tensor
    ) -> None:
        """As in `ConsensusKernel`."""
        del out
        self._set({3: t_u})
        if self.phi.bounded:
            self._search(3, u, z, z, total.force, True, search)
            search.agree(search.step)
        triton_kernels.move_u[(self._tiles, self._configurations)](
            u, total.force, search.step, search.cuts, self._numbers, self._n,
            BOUNDED=self.phi.bounded, BLOCK=self._block,
        )  # fmt: skip

    def move_workers(
        self, block: Block, u: Tensor, anchor: Tensor, numbers: Hyperparameters, search: LineSearch
    ) -> None:
        """As in `WorkerKernel`."""
        if anchor is not u and self.phi.bounded:  # Jacobi order: two differences of each z_j
            return super().move_workers(block, u, anchor, numbers, search)
        z, v, delta = block.z, block.v, block.delta
        coupled = numbers.pull is not None
        self._set({4: numbers.sigma, 6: numbers.kappa, 7: numbers.nu})
        if numbers.pull is not None:
            self._set({5: numbers.pull})
        _, factors, _, own_steps = self._memory_for(z)
        if self.phi.bounded:
            self._search(6, anchor, z, v, delta, coupled, search)
        elif coupled and self._needs_norms:
            self._norms_and_exits(1, anchor, z, z, z, True)
        triton_kernels.move_z[(self._tiles, self._num_workers(z))](
            z, v, anchor, delta, factors, own_steps, *self._tables, self._n,
            self._workers_of_one(z), self._num_layers, **self._how, BOUNDED=self.phi.bounded,
            COUPLED=coupled, THROUGH=numbers.through and coupled, BLOCK=self._block,
        )  # fmt: skip
        return None

    def _search(
        self, line: int, u: Tensor, z: Tensor, v: Tensor, d: Tensor, coupled: bool, to: LineSearch
    ) -> None:
        """The line search: writes the smallest step, in line 6 also the s_k and the cuts."""
        self._norms_and_exits(line, u, z, v, d, coupled)
        _, _, exits, own = self._memory_for(z)
        groups = self._num_layers
        triton_kernels.steps[(self._configurations,)](
            own, to.step, to.cuts, exits, self._workers_of_one(z), groups, LINE=line,
            WIDTH=min(1024, 1 << (groups - 1).bit_length()),
        )  # fmt: skip

    def _norms_and_exits(
        self, line: int, u: Tensor, z: Tensor, v: Tensor, direction: Tensor, coupled: bool
    ) -> None:
        """The factors and, but for line 1, the exits."""
        slots, factors, exits, _ = self._memory_for(z)
        triton_kernels.sums[(self._tiles, self._num_workers(z))](
            slots, u, z, v, direction, *self._tables, self._n, self._workers_of_one(z),
            self._num_slots, LINE=line, COUPLED=coupled, **self._how, BLOCK=self._block,
        )  # fmt: skip
        triton_kernels.finish[(self._num_layers, self._num_workers(z))](
            factors, exits, slots, self._spans, self._numbers, self._num_layers,
            self._workers_of_one(z), self._num_slots, LINE=line, COUPLED=coupled,
            BOUNDED=self.phi.bounded, **self._how, WIDTH=1024,
        )  # fmt: skip

    def _num_workers(self, z: Tensor) -> int:
        return z.numel() // self._n

    def _workers_of_one(self, z: Tensor) -> int:
        return self._num_workers(z) // self._configurations

    def _memory_for(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Slots (K, 4, slots of one), factors and exits (K, L), steps (K,), for the K of z.

        The factors are 2 psi'(s_l) scale^2, for a radial potential.
        """
        k = self._num_workers(z)
        if k not in self._memory:
            table = torch.zeros(2, k, self._num_layers, dtype=torch.float64, device=z.device)
            slots = z.new_zeros(k, 4, self._num_slots)
            self._memory[k] = (slots, table[0], table[1], z.new_ones(k))
        return self._memory[k]

    def _set(self, values: dict[int, Scalar]) -> None:
        """Write the hyperparameters that have changed to the memory that the kernels read."""
        for i, value in values.items():
            if isinstance(value, Tensor):  # a captured graph repeats the copy, but no comparison
                self._numbers[:, i].copy_(value.reshape(-1))
                self._known.pop(i, None)
            elif self._known.get(i) != value:
                self._numbers[:, i].fill_(value)
                self._known[i] = value
