"""Lines 3 and 6 of Algorithm 1 on a CPU, for vectors that are larger than its cache.

The operations of plain.py, tile by tile: the temporaries of one operation are still in the cache
for the next one, and memory is read and written once for several of them. A tile lies in one layer.
Tiles are processed in order, and sums over tiles are taken in float64: the same bits on all ranks.

Vectors of n coordinates that are read from or written to memory, for one worker, here and by
plain.py:

    line 3   quad       u, z -> force; force, u -> u                     6    plain 12
             bounded    u, z; u, z -> force; force, u; force, u -> u    10          18
    line 6   quad       u, z, v, delta -> v, z                           6          19
             bounded    u, z; u, z, v, delta -> v, d; d, z -> z         11          30

The first u, z is for the norms of a radial potential. The line search first asks as
`Potential.surely_feasible` does; only if that fails, the formulas give the boundary step.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from consensus.core.flat import Scalar, column
from consensus.core.kernels import Block, Hyperparameters, LineSearch, TotalForce
from consensus.core.kernels.plain import Plain
from consensus.core.layerwise import Layerwise
from consensus.core.sizes import CHUNK, Separable

Pulls = list[list[float]] | float | None  # per layer and worker if radial


class Tiled(Plain):
    """`Kernel` for large vectors on a CPU, one configuration and one scale for all coordinates.

    A tile has `tile` coordinates at most. Half a dozen tiles of CHUNK fit into the last cache;
    smaller ones fit into nearer caches, but take as long in Python as in arithmetic.
    """

    def __init__(self, phi: Layerwise, like: Tensor, tile: int = CHUNK) -> None:
        super().__init__(phi, like)
        assert isinstance(phi.scale, float)
        self._scale = phi.scale
        self._separable = isinstance(phi.size, Separable)
        layers = [(0, like.shape[-1])] if self._separable else phi.layers
        self._lengths, self._layers = [], []
        for layer, (begin, stop) in enumerate(layers):
            for start in range(begin, stop, tile):
                self._lengths.append(min(tile, stop - start))
                self._layers.append(layer)
        self._layer_of = torch.tensor(self._layers)
        self._num_layers = len(layers)

    def forces(
        self, u: Tensor, z: Tensor, out: Tensor, scratch: Tensor | None = None
    ) -> Tensor | None:
        """As in `ConsensusKernel`."""
        del scratch
        memory, tiles = self._memory(z), zip(*self._tiles(u, z, out), strict=True)
        if self._separable:
            found = self._table(z)
            for i, (own, own_z, total) in enumerate(tiles):
                w = torch.sub(own, own_z, out=memory[own.numel()])
                if self.phi.bounded:
                    force, found[i] = self.phi.grad_and_reach_(w)
                else:
                    force = self.phi.grad_(w)
                torch.sum(force, 0, out=total)
            return found.amax(0) if self.phi.bounded else None
        reach, factors = self._reach_and_factors(u, z, memory)
        for layer, (own, own_z, total) in zip(self._layers, tiles, strict=True):
            w = torch.sub(own, own_z, out=memory[own.numel()])
            torch.mul(w[0], factors[layer][0], out=total)
            for row, factor in zip(w[1:], factors[layer][1:], strict=True):
                total.add_(row, alpha=factor)
        return reach if self.phi.bounded else None

    def move_consensus(
        self, u: Tensor, z: Tensor, total: TotalForce, t_u: Scalar, search: LineSearch, out: Tensor
    ) -> None:
        """As in `ConsensusKernel`. The reach is the same on all ranks, so all branch alike."""
        del out
        force, t_u = total.force, float(t_u)
        if self.phi.bounded:
            assert total.reach is not None
            of_force, of_u = (self._reach_of(x, self._tiles(x)[0]) for x in (force, u))
            if self.phi.far_inside(total.reach, abs(t_u) * of_force, of_u):
                search.step.fill_(1.0)
            else:
                s = self.phi.feasible_step(u - z, force * -t_u, u).amin()
                search.step.copy_(search.agree(s))
                search.cuts.add_(search.step < 1)
                t_u *= float(search.step)
        u.add_(force, alpha=-t_u)

    def move_workers(
        self, block: Block, u: Tensor, anchor: Tensor, numbers: Hyperparameters, search: LineSearch
    ) -> None:
        """As in `WorkerKernel`."""
        if anchor is not u and self.phi.bounded:  # Jacobi order: two differences of each z_j
            return super().move_workers(block, u, anchor, numbers, search)
        z, v, delta = block.z, block.v, block.delta
        kappa, sigma, nu = float(numbers.kappa), float(numbers.sigma), float(numbers.nu)
        memory, bounded = self._memory(z), self.phi.bounded
        through = numbers.through and numbers.pull is not None
        pull = None if numbers.pull is None else float(numbers.pull)
        reach: Tensor | None = None
        pulls: Pulls = pull
        if pull is not None and not self._separable:
            reach, factors = self._reach_and_factors(anchor, z, memory)
            pulls = [[pull * factor for factor in row] for row in factors]
        of_w, of_d, of_u = self._table(z), self._table(z), self._table(u)
        for i, (layer, own, own_z, new, own_delta) in enumerate(
            zip(self._layers, *self._tiles(anchor, z, v, delta), strict=True)
        ):
            part = torch.add(own_delta, own_z, alpha=nu, out=memory[own.numel()])
            new.mul_(kappa).add_(part, alpha=-sigma)
            w = torch.sub(own, own_z, out=part)
            if not bounded:
                d = self._direction(w, new, layer, pulls, part)
                if through:
                    new.copy_(d)
                own_z += d
                continue
            if reach is None:
                of_w[i] = self._length(w)
            of_u[i] = self._length(own)
            of_d[i] = self._length(self._direction(w, new, layer, pulls, own_delta))
        if not bounded:
            return None
        reach = self._reach(of_w) if reach is None else reach
        if self.phi.far_inside(reach, self._reach(of_d), self._reach(of_u)):
            search.step.fill_(1.0)
        else:
            s = self.phi.feasible_step(z - u, delta, u)
            search.step.copy_(s.amin())
            search.cuts.add_(s < 1)
            v *= column(s)
            delta *= column(s)
        if through:
            v.copy_(delta)
        z += delta
        return None

    def _direction(self, w: Tensor, v: Tensor, layer: int, pulls: Pulls, out: Tensor) -> Tensor:
        """Line 6: v+ + (sigma / lam) grad phi(w) of a tile; w is overwritten. (K, tile)."""
        if pulls is None:
            return out.copy_(v)
        if isinstance(pulls, float):
            return torch.add(v, self.phi.grad_(w), alpha=pulls, out=out)
        for k, factor in enumerate(pulls[layer]):
            torch.add(v[k], w[k], alpha=factor, out=out[k])
        return out

    def _reach_and_factors(
        self, u: Tensor, z: Tensor, memory: dict[int, Tensor]
    ) -> tuple[Tensor | None, list[list[float]]]:
        """The reach of w = u - z (K, L), if computed, and 2 psi'(s) scale^2 by layer and worker."""
        profile, scale2 = self.phi.profile, self._scale * self._scale
        if profile.slope is not None:
            return None, [[2.0 * profile.slope * scale2] * len(z)] * self._num_layers
        tiles = zip(*self._tiles(u, z), strict=True)
        w = (torch.sub(own, own_z, out=memory[own.numel()]) for own, own_z in tiles)
        reach = self._reach_of(z, w)
        s = reach.square()
        inside = 2.0 * profile.dpsi(s) * scale2
        return reach, torch.where(s < profile.bound, inside, math.nan).T.tolist()

    def _reach_of(self, like: Tensor, tiles: Iterable[Tensor]) -> Tensor:
        """`Potential.reach` of a block (..., n) from its tiles. (..., L or 1)."""
        table = self._table(like)
        for i, part in enumerate(tiles):
            table[i] = self._length(part)
        return self._reach(table)

    def _table(self, x: Tensor) -> Tensor:
        """Memory for a `_length` of each tile of x (..., n); (T, ...) or (T, ..., 1)."""
        # Allocated one by one between the temporaries of the tiles, the lengths would keep the
        # allocator from reusing their memory: the process would grow by several n-vectors.
        return x.new_empty((len(self._lengths), *x.shape[:-1], *([1] if self._separable else [])))

    def _length(self, part: Tensor) -> Tensor:
        """The length of one tile (..., tile), or its largest entry. (...) or (..., 1)."""
        if self._separable:
            return self.phi.size.largest(part)
        length: Tensor = torch.linalg.vector_norm(part, dim=-1)
        return length

    def _reach(self, table: Tensor) -> Tensor:
        """`Potential.reach` from a `_table` of its tiles. (..., L or 1), in units of x."""
        if self._separable:
            return table.amax(0) * self._scale
        squares = table.new_zeros((self._num_layers, *table.shape[1:]), dtype=torch.float64)
        squares.index_add_(0, self._layer_of, table.double().square())
        reach = (squares.sqrt() * self._scale).movedim(0, -1)
        return reach.to(table.dtype)  # its rounding is covered by the margin of the line search

    def _tiles(self, *vectors: Tensor) -> list[tuple[Tensor, ...]]:
        """The tiles of each block (..., n), as views."""
        return [torch.split(x, self._lengths, -1) for x in vectors]

    def _memory(self, z: Tensor) -> dict[int, Tensor]:
        """Memory for a tile of all workers, (K, length) for each length of a tile."""
        lengths = set(self._lengths)
        memory = z.new_empty(len(z) * max(lengths))
        return {length: memory[: len(z) * length].view(len(z), length) for length in lengths}
