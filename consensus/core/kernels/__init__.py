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


@dataclass(frozen=True)
class LineSearch:
    """Results of a line search, and the agreement of the ranks on a step.

    Attributes:
        step: Gets the smallest step of all workers. (), with configurations (S,)
        cuts: Incremented where a step is below 1. int64, like the steps of the line.
        agree: The minimum over ranks of a step, in place.
    """

    step: Tensor
    cuts: Tensor
    agree: Callable[[Tensor], Tensor] = lambda step: step


@dataclass(frozen=True)
class TotalForce:
    """sum_j grad phi(u - z_j) over all ranks.

    Attributes:
        force: (n,)
        reach: The largest `phi.reach(u - z_j)` over all workers, (G,), where it is known.
    """

    force: Tensor
    reach: Tensor | None = None


@dataclass(frozen=True)
class Block:
    """K workers of a process.

    Attributes:
        z: (K, n)
        v: The velocities. (K, n)
        delta: The minibatch gradients, overwritten by line 6. (K, n)
        scratch: Memory that line 6 may overwrite; may be `delta`. (K, n)
    """

    z: Tensor
    v: Tensor
    delta: Tensor
    scratch: Tensor | None = None


class ConsensusKernel(Protocol):
    """Line 3 in place, for u (n,) and z (K, n); with configurations each has a leading axis S.

    Attributes:
        force_size: Numbers of the sum over ranks: n, or 0 where `move_consensus` forms its own.
        reach_size: Numbers that describe the reach of a rank, 0 where the line search needs none.
        closed_form: Whether no equation is solved by iterations that the host controls.
    """

    force_size: int
    reach_size: int
    closed_form: bool

    def forces(self, u: Tensor, z: Tensor, out: Tensor, scratch: Tensor | None) -> Tensor | None:
        """sum_k grad phi(u - z_k) of this rank, to `out`, like u.

        Args:
            u: The consensus variable.
            z: The workers.
            out: Gets the sum.
            scratch: Memory like z that may be overwritten.

        Returns:
            `phi.reach(u - z)`, (K, reach_size), where reach_size > 0.
        """

    def move_consensus(
        self, u: Tensor, z: Tensor, total: TotalForce, t_u: Scalar, search: LineSearch, out: Tensor
    ) -> None:
        """U -= s_u t_u force in place, with the largest s_u that is feasible for all workers.

        Args:
            u: The consensus variable.
            z: The workers of this rank.
            total: The sum over ranks; not written to unless it is `out`.
            t_u: Step size.
            search: The line search, with a step () and cuts ().
            out: Memory like u for the direction; may be `total.force`.
        """


class WorkerKernel(Protocol):
    """Line 6 in place, for blocks (K, n) and u (n,); with configurations with a leading axis S.

    Attributes:
        closed_form: As in `ConsensusKernel`.
    """

    closed_form: bool

    def move_workers(
        self, block: Block, u: Tensor, anchor: Tensor, numbers: Hyperparameters, search: LineSearch
    ) -> None:
        """Line 6 of every worker, with its line search where phi is bounded.

        Args:
            block: The workers.
            u: u+, against which every u - z_j stays feasible.
            anchor: The center of the coupling: u+ (Gauss-Seidel) or u (Jacobi).
            numbers: The hyperparameters.
            search: The line search, with a step () and cuts (K,).
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
