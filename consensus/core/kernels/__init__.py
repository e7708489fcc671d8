"""Implementations of lines 3 and 6 of Algorithm 1 behind one protocol, chosen at construction.

    plain.py      the formulas, one operation of torch after another; any potential, any device
    tiled.py      on a CPU, for large vectors: tile by tile, with temporaries that stay in the cache
    triton.py     on a GPU: kernels that read each vector as seldom as possible
    exact.py      the minimizer (14a) in place of line 3
    implicit.py   the proximal step in place of line 6

The first three agree up to rounding. Plain and Triton kernels also take S configurations in one
block (population.py), each with M workers and hyperparameters of its own.

# n parameters, K workers in a block, G groups of a size, S configurations
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from consensus.core.flat import Scalar
from consensus.core.layerwise import Layerwise
from consensus.core.sizes import CHUNK

U_UPDATES = ("gradient", "exact")
COUPLINGS = ("explicit", "implicit")


@dataclass(frozen=True)
class Hyperparameters:
    """Numbers of line 6: a number each, a tensor (), or with configurations a tensor (S,).

    Attributes:
        kappa: Momentum.
        sigma: Step size.
        nu: Weight of R.
        pull: sigma / lam; None in an iteration without coupling.
        through: Whether the coupling passes through the velocity.
    """

    kappa: Scalar
    sigma: Scalar
    nu: Scalar
    pull: Scalar | None
    through: bool = False


class ConsensusKernel(Protocol):
    """Line 3 in place.

    Shapes: u and force (n,), z (K, n), step and cuts (). With configurations each has a leading
    axis S.

    Attributes:
        force_size: Numbers of the sum over ranks: n, or 0 where `move_consensus` forms its own.
        reach_size: Numbers that describe the reach of a rank, 0 where the line search needs none.
        closed_form: Whether no equation is solved by iterations that the host controls.
    """

    force_size: int
    reach_size: int
    closed_form: bool

    def forces(self, u: Tensor, z: Tensor, out: Tensor, scratch: Tensor | None) -> Tensor | None:
        """sum_k grad phi(u - z_k) of this rank, to `out`.

        Args:
            u: The consensus variable.
            z: The workers.
            out: Like u; gets the sum.
            scratch: Memory like z that may be overwritten.

        Returns:
            `phi.reach(u - z)`, (K, reach_size), where reach_size > 0.
        """

    def move_consensus(
        self,
        u: Tensor,
        z: Tensor,
        force: Tensor,
        t_u: Scalar,
        reach: Tensor | None,
        *,
        step: Tensor,
        cuts: Tensor,
        agree: Callable[[Tensor], Tensor],
        out: Tensor,
    ) -> None:
        """U -= s_u t_u force, with the largest s_u that is feasible for all workers.

        Args:
            u: The consensus variable, changed in place.
            z: The workers of this rank.
            force: The sum of forces over all ranks; not written to unless it is `out`.
            t_u: Step size.
            reach: The largest over all workers of all ranks, (reach_size,), where it is known.
            step: Gets s_u.
            cuts: Incremented where s_u < 1. int64
            agree: The minimum over ranks of a step, in place.
            out: Memory like u for the direction; may be `force`.
        """


class WorkerKernel(Protocol):
    """Line 6 in place.

    Shapes: z, v and delta (K, n), u (n,), step (), cuts (K,). With configurations each has a
    leading axis S.

    Attributes:
        closed_form: As in `ConsensusKernel`.
    """

    closed_form: bool

    def move_workers(
        self,
        z: Tensor,
        v: Tensor,
        delta: Tensor,
        u: Tensor,
        anchor: Tensor,
        numbers: Hyperparameters,
        *,
        step: Tensor,
        cuts: Tensor,
        scratch: Tensor | None,
    ) -> None:
        """Line 6 of every worker, with its line search where phi is bounded.

        Args:
            z: The workers, changed in place.
            v: Their velocities, changed in place.
            delta: The minibatch gradients; overwritten.
            u: u+, against which every u - z_j stays feasible.
            anchor: The center of the coupling: u+ (Gauss-Seidel) or u (Jacobi).
            numbers: The hyperparameters.
            step: Gets the smallest s_j.
            cuts: Incremented where s_j < 1. int64
            scratch: Memory like z that may be overwritten; may be `delta`.
        """


class Kernel(ConsensusKernel, WorkerKernel, Protocol):
    """Lines 3 and 6 for one potential."""


def choose_kernel(phi: Layerwise, like: Tensor, configurations: int | None = None) -> Kernel:
    """The fastest implementation for vectors of this kind.

    Args:
        phi: The potential.
        like: A tensor (..., n) of the device and dtype of the vectors.
        configurations: S, where the block holds several, each with an eta of its own in phi.
    """
    from consensus.core.kernels.plain import Plain

    if isinstance(phi.scale, Tensor):
        fits = phi.scale.numel() == configurations and phi.scale.shape[-1] == 1
    else:
        fits = configurations is None
    if fits and like.device.type == "cuda" and phi.profile.kernel is not None:
        if importlib.util.find_spec("triton") is not None:
            from consensus.core.kernels.triton import Triton

            return Triton(phi, like)
    elif fits and like.device.type == "cpu" and like.shape[-1] > CHUNK and configurations is None:
        from consensus.core.kernels.tiled import Tiled

        return Tiled(phi, like)
    return Plain(phi, like)


def consensus_kernel(
    update: str, phi: Layerwise, like: Tensor, total: Callable[[Tensor], Tensor]
) -> ConsensusKernel:
    """Line 3 by name.

    Args:
        update: "gradient": line 3; "exact": the minimizer (14a), which needs several sums over
            ranks that nothing hides, and no tau.
        phi: The potential.
        like: As in `choose_kernel`.
        total: The sum over ranks of a tensor; may work in place.
    """
    if update == "exact":
        from consensus.core.kernels.exact import ExactUpdate

        return ExactUpdate(phi, total)
    return choose_kernel(phi, like)


def worker_kernel(coupling: str, phi: Layerwise, like: Tensor) -> WorkerKernel:
    """Line 6 by name.

    Args:
        coupling: "explicit": the force at z_j; "implicit": the proximal step, with the force at
            z_j+, feasible and stable for any lam.
        phi: The potential.
        like: As in `choose_kernel`.
    """
    explicit = choose_kernel(phi, like)
    if coupling == "implicit":
        from consensus.core.kernels.implicit import ProximalStep

        return ProximalStep(phi, explicit)
    return explicit
