"""Lines 3 and 6 one worker after another: the bits do not depend on the layout.

Operations on a block (K, n) may round the last coordinates of a row in another way than those of a
single worker, and the forces of K workers are summed in some order. Here each worker is a block of
its own, and forces are summed along the tree of tree_sum.py, which the sum over processes goes on
with. Layouts with other K then have the same bits.
"""

import torch
from torch import Tensor

from consensus.core.flat import Scalar
from consensus.core.kernels import (
    Block,
    ConsensusKernel,
    Hyperparameters,
    LineSearch,
    TotalForce,
    WorkerKernel,
)
from consensus.tree_sum import tree_sum


class ForceOfEach:
    """`ConsensusKernel` that sums the forces of workers along a tree, from `scratch`."""

    def __init__(self, kernel: ConsensusKernel) -> None:
        self._kernel = kernel
        self.force_size, self.reach_size = kernel.force_size, kernel.reach_size
        self.closed_form = kernel.closed_form

    def forces(self, u: Tensor, z: Tensor, out: Tensor, scratch: Tensor | None) -> Tensor | None:
        """As in `ConsensusKernel`."""
        rows = torch.empty_like(z) if scratch is None else scratch
        forces = [out] if len(z) == 1 else list(rows)
        reaches = [
            self._kernel.forces(u, z[k : k + 1], force, None) for k, force in enumerate(forces)
        ]
        if len(z) > 1 and self.force_size:
            tree_sum(forces, out)
        return torch.cat([x for x in reaches if x is not None]) if self.reach_size else None

    def move_consensus(
        self, u: Tensor, z: Tensor, total: TotalForce, t_u: Scalar, search: LineSearch, out: Tensor
    ) -> None:
        """As in `ConsensusKernel`."""
        self._kernel.move_consensus(u, z, total, t_u, search, out)


class StepOfEach:
    """`WorkerKernel` that moves the workers one after another.

    Those at rest keep their velocity, and are moved by `pull_at_rest` alone.
    """

    def __init__(self, kernel: WorkerKernel) -> None:
        self._kernel = kernel
        self.closed_form = kernel.closed_form

    def move_workers(
        self, block: Block, u: Tensor, anchor: Tensor, numbers: Hyperparameters, search: LineSearch
    ) -> None:
        """As in `WorkerKernel`."""
        steps = torch.ones_like(search.step).repeat(len(block.z))
        for k, step in enumerate(steps.unbind()):
            own = LineSearch(step, search.cuts[k : k + 1])
            row, of_row = block.row(k), numbers
            if k in block.resting:
                if numbers.pull_at_rest is None:
                    continue
                row = Block(row.z, torch.zeros_like(row.v), row.delta.zero_(), row.scratch)
                of_row = Hyperparameters(0.0, 0.0, 0.0, numbers.pull_at_rest)
            self._kernel.move_workers(row, u, anchor, of_row, own)
        search.step.copy_(steps.amin())
