"""Which way lines 3 and 6 of Algorithm 1 are computed.

updates.py and layerwise.py have the formulas, and what runs them where vectors are small: one
operation of torch after another. Where vectors are large, or lie on a GPU, the same is done with
fewer passes over memory:

    tiled.py   on a CPU, for large vectors: tile by tile, so that what lies between two operations
               stays in the cache
    fused.py   on a GPU: kernels that read each vector as seldom as possible

They know potentials with one scale for all coordinates. Everything agrees up to rounding.

The kernels also take S configurations in one block, each with M workers and numbers of its own.
Then u and the force are (S, n), z, v and delta (S M, n), every number may be a tensor of S, the
step of line 3 and its cuts are (S,), and the cuts of line 6 (S M,).
"""

import importlib.util
from typing import Protocol

from torch import Tensor

from consensus.core.flat import Scalar
from consensus.core.layerwise import Layerwise
from consensus.core.potentials import CHUNK


class Lines(Protocol):
    """Lines 3 and 6 in place, for one potential. n coordinates, K workers, G groups of a size."""

    def forces(self, u: Tensor, z: Tensor, out: Tensor) -> Tensor | None:
        """Line 3: sum_k grad phi(u - z_k). (n,), (K, n) -> out (n,).

        Returns:
            `phi.reach(u - z)`, (K, G or 1), if phi is bounded and the line search will want it.
        """

    def consensus_step(
        self, u: Tensor, z: Tensor, force: Tensor, t_u: Scalar, step: Tensor, reach: Tensor | None
    ) -> bool:
        """Line 3: the smallest s_u over the K workers, to step ().

        Args:
            u: The consensus variable. (n,)
            z: The workers. (K, n)
            force: The sum of forces over all ranks. (n,)
            t_u: The step size.
            step: Where s_u goes. ()
            reach: The largest of all workers of all ranks, (G or 1,), where it is known.

        Returns:
            Whether it is the smallest over all ranks already.
        """

    def move_consensus(
        self, u: Tensor, force: Tensor, t_u: Scalar, step: Tensor, cuts: Tensor
    ) -> None:
        """Line 3: u -= step t_u force in place; counts a step below 1 in cuts ()."""

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
        """Line 6 in place of z and v (K, n), with the line search if phi is bounded.

        Args:
            z: The workers. (K, n)
            v: Their velocities. (K, n)
            delta: The minibatch gradients, which may be overwritten. (K, n)
            u: The consensus variable. (n,)
            kappa: Momentum.
            sigma: Step size.
            nu: Weight of R.
            pull: sigma / lam, or None without coupling.
            through: Whether the coupling passes through the velocity.
            step: Gets the smallest s_k. ()
            cuts: Is raised where s_k is below 1. int64 (K,)
        """


def lines_for(phi: Layerwise, like: Tensor, configurations: int | None = None) -> Lines | None:
    """The way that serves vectors like this (..., n); None: the formulas as they are.

    Args:
        phi: The potential.
        like: A tensor of the kind that the vectors are.
        configurations: S, where the block holds several, each with a scale of its own in phi.
    """
    if isinstance(phi.scale, Tensor) != (configurations is not None):
        return None
    if isinstance(phi.scale, Tensor) and (
        phi.scale.numel() != configurations or phi.scale.shape[-1] != 1
    ):
        return None
    if like.device.type == "cuda" and phi.profile.kernel is not None:
        if importlib.util.find_spec("triton") is None:
            return None
        from consensus.core.fused import Fused

        return Fused(phi, like)
    if like.device.type == "cpu" and like.shape[-1] > CHUNK and configurations is None:
        from consensus.core.tiled import Tiled

        return Tiled(phi, like)
    return None


def shared_by_all(*sizes: Scalar | None) -> bool:
    """Whether no hyperparameter differs between the workers: `Lines` take one number each."""
    return not any(isinstance(size, Tensor) and size.ndim > 0 for size in sizes)
