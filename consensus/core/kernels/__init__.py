"""Implementations of lines 3 and 6 of Algorithm 1 behind one protocol, chosen at construction.

    plain.py           the formulas, one operation of torch after another; any potential and device;
                       also the minimizer (14a) in place of line 3, the proximal step of line 6
    tiled.py           on a CPU, for large vectors: tile by tile, with temporaries in the cache
    native_kernel.py   on a CPU where a C compiler is, for most potentials: native.c
    triton.py          on a GPU: kernels that read each vector as seldom as possible

They agree up to rounding. Plain and Triton kernels also take S configurations in one
block (population.py), each with M workers and hyperparameters of its own. n parameters, K workers
in a block, G groups of a size.

outer_step.py is line 3 by an optimizer of torch (optimizers.py), worker_step.py is line 6 by one.
weighted.py is another pair of lines: proximal steps and a weighted mean. pulls.py is line 6 after
the optimizer of a user has displaced the parameters of a module.
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
    """Numbers of line 6: a number each, a tensor (), or with configurations a tensor (S,)."""

    kappa: Scalar  # momentum
    sigma: Scalar  # step size
    nu: Scalar  # weight of R
    pull: Scalar | None  # sigma / lam; None in an iteration without coupling
    through: bool = False  # whether the coupling passes through the velocity
    pull_at_rest: Scalar | None = None  # `pull` of workers at rest


@dataclass(frozen=True)
class LineSearch:
    """Results of a line search, and the agreement of the ranks on a step."""

    step: Tensor  # gets the smallest step of all workers; (), with configurations (S,)
    cuts: Tensor  # incremented where a step is below 1; int64, like the steps of the line
    agree: Callable[[Tensor], Tensor] = lambda step: step  # the minimum over ranks, in place


@dataclass(frozen=True)
class TotalForce:
    """sum_j grad phi(u - z_j) over all ranks."""

    force: Tensor  # (n,)
    reach: Tensor | None = None  # the largest `phi.reach(u - z_j)` where it is known; (G,)


@dataclass(frozen=True)
class Block:
    """K workers of a process. Each tensor is (K, n)."""

    z: Tensor
    v: Tensor  # the velocities
    delta: Tensor  # the minibatch gradients, overwritten by line 6
    scratch: Tensor | None = None  # memory that line 6 may overwrite; may be `delta`
    resting: frozenset[int] = frozenset()  # workers k moved by the coupling alone; see StepOfEach

    def row(self, k: int) -> "Block":
        """Worker k as a block of its own, (1, n)."""
        own = slice(k, k + 1)
        scratch = None if self.scratch is None else self.scratch[own]
        resting = frozenset({0}) if k in self.resting else frozenset()
        return Block(self.z[own], self.v[own], self.delta[own], scratch, resting)


class ConsensusKernel(Protocol):
    """Line 3 in place, for u (n,) and z (K, n); with configurations each has a leading axis S."""

    force_size: int  # numbers of the sum over ranks: n; 0 where `move_consensus` forms its own
    reach_size: int  # numbers of the reach of a rank; 0 where the line search needs none
    closed_form: bool  # no equation is solved by iterations that the host controls

    def forces(self, u: Tensor, z: Tensor, out: Tensor, scratch: Tensor | None) -> Tensor | None:
        """sum_k grad phi(u - z_k) of this rank, to `out`, like u.

        `scratch` is memory like z that may be overwritten. Returns `phi.reach(u - z)`,
        (K, reach_size), where reach_size > 0.
        """

    def move_consensus(
        self, u: Tensor, z: Tensor, total: TotalForce, t_u: Scalar, search: LineSearch, out: Tensor
    ) -> None:
        """U -= s_u t_u force in place, with the largest s_u that is feasible for all workers.

        `search` has a step () and cuts (). `out` is memory like u for the direction and may be
        `total.force`, which is not written to otherwise.
        """


class WorkerKernel(Protocol):
    """Line 6 in place, for blocks (K, n) and u (n,); with configurations with a leading axis S."""

    closed_form: bool  # as in `ConsensusKernel`

    def move_workers(
        self, block: Block, u: Tensor, anchor: Tensor, numbers: Hyperparameters, search: LineSearch
    ) -> None:
        """Line 6 of every worker, with its line search where phi is bounded.

        Every u - z_j stays feasible for this u, which is u+. The coupling is centered at `anchor`:
        u+ (Gauss-Seidel) or u (Jacobi). `search` has a step () and cuts (K,).
        """


class Kernel(ConsensusKernel, WorkerKernel, Protocol):
    """Lines 3 and 6 for one potential."""


def choose_kernel(
    phi: Layerwise,
    like: Tensor,
    configurations: int | None = None,
    smallest: Callable[[Tensor], Tensor] | None = None,
) -> Kernel:
    """The fastest implementation for vectors (..., n) of the device and dtype of `like`.

    Args:
        phi: The layer-wise potential.
        like: (..., n).
        configurations: S, where the block holds several, each with an eta of its own in phi.
        smallest: The minimum over the ranks that will move u, in place; then this is a collective.
            None: they do not choose at the same time, and move u by operations of torch.
    """
    from consensus.core.kernels.plain import Plain

    if isinstance(phi.scale, Tensor):
        fits = phi.scale.numel() == configurations and phi.scale.shape[-1] == 1
    else:
        fits = configurations is None
    fits = fits and not phi.sharded  # the others take norms tile by tile, and branch on them
    if fits and like.device.type == "cuda" and phi.profile.kernel is not None:
        if importlib.util.find_spec("triton") is not None:
            from consensus.core.kernels.triton import Triton

            return Triton(phi, like)
    elif fits and like.device.type == "cpu" and configurations is None:
        return _choose_on_cpu(phi, like, smallest)
    return Plain(phi, like)


def _choose_on_cpu(
    phi: Layerwise, like: Tensor, smallest: Callable[[Tensor], Tensor] | None
) -> Kernel:
    from consensus.core.kernels.native import agreed, library_for
    from consensus.core.kernels.native_kernel import Native
    from consensus.core.kernels.plain import Plain
    from consensus.core.kernels.tiled import Tiled

    own = (Tiled if like.shape[-1] > CHUNK else Plain)(phi, like)
    if not Native.takes(phi, like.dtype):
        return own
    library, joint = library_for(like), smallest is not None and agreed(smallest, like) is not None
    return own if library is None else Native(library, own, phi, like, joint)


def consensus_kernel(
    update: str,
    phi: Layerwise,
    like: Tensor,
    total: Callable[[Tensor], Tensor],
    smallest: Callable[[Tensor], Tensor] | None = None,
) -> ConsensusKernel:
    """Line 3 by name: "gradient", or "exact", the minimizer (14a).

    `total` sums over ranks; `smallest` as in `choose_kernel`.
    """
    if update == "exact":
        from consensus.core.kernels.plain import ExactUpdate

        return ExactUpdate(phi, total)
    return choose_kernel(phi, like, smallest=smallest)


def worker_kernel(coupling: str, phi: Layerwise, like: Tensor) -> WorkerKernel:
    """Line 6 by name: "explicit", the force at z_j, or "implicit", at z_j+: the proximal step."""
    explicit = choose_kernel(phi, like)
    if coupling == "implicit":
        from consensus.core.kernels.plain import ProximalStep

        return ProximalStep(phi, explicit)
    return explicit
