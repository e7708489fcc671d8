"""A block of K workers on one process: lines 4 to 6 of Algorithm 1.

A worker contains no model and no data. It takes an oracle, any object that draws minibatches and
returns gradients, so the algorithm runs on quadratics with known answers as well as on MNIST.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from consensus.core.flat import Scalar, part_of
from consensus.core.kernels import Block, Hyperparameters, LineSearch, WorkerKernel, choose_kernel
from consensus.core.kernels.worker_step import WorkerOptimizerStep, clip_norms
from consensus.core.layerwise import Layerwise
from consensus.core.updates import look_ahead

MOMENTUM_ON = ("loss", "objective")
ON_NONFINITE = ("stop", "drop")


class Oracle(Protocol):
    """Source of minibatches and gradients."""

    def draw(self) -> Any:
        """Line 4: one minibatch for each of the K workers."""

    def gradient(self, points: Tensor, batch: Any) -> Tensor:
        """Line 5: the gradient of each worker's minibatch loss at its point. (K, n) -> (K, n).

        The caller overwrites both the points and the result, which may be the same memory.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """The state of the next `draw`, each (K, ...). Called at checkpoints only."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from a `state_dict`."""


class Worker:
    """K copies z_j of the model with their velocities.

    Args:
        z: The start; a copy is taken. (K, n)
        oracle: Minibatches and gradients.
        phi: The layer-wise potential (18).
        kappa: Momentum, in [0, 1).
        nu: Weight of R(z) = (nu / 2) |z|^2.
        momentum_on: "loss": the velocity carries loss and R, the coupling acts outside it, which is
            mEASGD; "objective": the coupling passes through the velocity as well.
        kernel: Line 6; None: the fastest implementation of the explicit step.
        clip: The largest norm of a worker's minibatch gradient; above it the gradient is scaled to
            this norm. None: no limit.
        resting: The workers k that rest in this iteration: their v stays, and z_j moves by the
            coupling of a communication alone. They need a kernel for it, such as `StepOfEach`.
        on_nonfinite: "drop": a z_j that is not finite begins again at u, with velocity 0, and thus
            has no part in the next sum of line 3; "stop": it stays, and a check ends the run.

    Attributes:
        z: (K, n).
        v: The velocities, 0 at the start; the last displacements by an optimizer of torch. (K, n)
        scratch: Memory (K, n) for look-ahead points and temporaries; every method may overwrite it.
        cuts: The number of iterations with s_j < 1. int64 (K,), on the device.
        step: The smallest s_j of the last iteration, a tensor () on the device.
        dropped: How often each worker was dropped; no part of the state. int64 (K,), likewise.
    """

    def __init__(
        self,
        z: Tensor,
        oracle: Oracle,
        phi: Layerwise,
        *,
        kappa: Scalar = 0.9,
        nu: Scalar = 0.0,
        momentum_on: str = "loss",
        kernel: WorkerKernel | None = None,
        clip: float | None = None,
        on_nonfinite: str = "stop",
        resting: Callable[[], frozenset[int]] = frozenset,
    ) -> None:
        assert momentum_on in MOMENTUM_ON, momentum_on
        assert on_nonfinite in ON_NONFINITE, on_nonfinite
        self.z = z.clone()
        self.v = torch.zeros_like(z)
        self.scratch = torch.empty_like(z)
        self.oracle, self.phi, self.resting = oracle, phi, resting
        self.kappa, self.nu = kappa, nu
        self.momentum_on, self.clip, self.on_nonfinite = momentum_on, clip, on_nonfinite
        self.kernel = choose_kernel(phi, z) if kernel is None else kernel
        self.step = z.new_ones(())
        self.cuts = torch.zeros(len(z), dtype=torch.int64, device=z.device)
        self.dropped = torch.zeros_like(self.cuts)

    def state_dict(self) -> dict[str, Tensor]:
        """The state that survives an iteration, a row per worker: `z`, `v`, `cuts`, `oracle/*`.

        And `optimizer/*`, the state of an optimizer of torch.
        """
        own = {"z": self.z, "v": self.v, "cuts": self.cuts}
        if isinstance(self.kernel, WorkerOptimizerStep):
            own |= {f"optimizer/{key}": rows for key, rows in self.kernel.state_dict().items()}
        return own | {f"oracle/{key}": rows for key, rows in self.oracle.state_dict().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from copies of a `state_dict`, on any device."""
        self.z.copy_(state["z"])
        self.v.copy_(state["v"])
        self.cuts.copy_(state["cuts"])
        self.oracle.load_state_dict(part_of(state, "oracle"))
        if isinstance(self.kernel, WorkerOptimizerStep):
            self.kernel.load_state_dict(part_of(state, "optimizer"))

    def draw(self) -> Any:
        """Line 4: the next minibatch of every worker."""
        return self.oracle.draw()

    def gradient(self, batch: Any) -> Tensor:
        """Line 5: delta_j at the look-ahead points z_j + kappa v_j (16). -> (K, n).

        These points need not be feasible: only the loss is evaluated there.
        """
        point = look_ahead(self.z, self.v, self.kappa, out=self.scratch)
        return self.oracle.gradient(point, batch)

    def update(
        self,
        delta: Tensor,
        sigma: Scalar,
        pull: Scalar | None,
        u: Tensor,
        anchor: Tensor,
        *,
        alone: bool = False,
    ) -> None:
        """Line 6: move z and v.

        Args:
            delta: Minibatch gradients; overwritten. (K, n)
            sigma: Step size.
            pull: sigma / lam; None in an iteration without coupling.
            u: u+, against which u - z_j stays feasible. (n,)
            anchor: The center of the coupling: u+ (Gauss-Seidel) or u (Jacobi). (n,)
            alone: Whether this is an iteration between two communications.
        """
        if self.clip is not None:
            clip_norms(delta, self.clip)
        through = self.momentum_on == "objective"
        at_rest = None if alone else pull  # `local_pull` is a part of a worker's own step
        numbers = Hyperparameters(self.kappa, sigma, self.nu, pull, through, at_rest)
        block = Block(self.z, self.v, delta, self.scratch, self.resting())
        search = LineSearch(self.step, self.cuts)
        self.kernel.move_workers(block, u, anchor, numbers, search)
        if self.on_nonfinite == "drop":
            self._drop(u)

    def _drop(self, u: Tensor) -> None:
        """Put every z_j that is not finite at u (n,). One pass over z, as in run/health.py."""
        wild = ~self.z.sum(1).isfinite()
        self.dropped += wild
        if isinstance(self.kernel, WorkerOptimizerStep):
            for k in wild.nonzero().flatten().tolist():
                self.kernel.forget(k)
        if self.z.device.type == "cpu" and not bool(wild.any()):
            return
        rows = wild.unsqueeze(1)
        torch.where(rows, u, self.z, out=self.z)
        self.v.masked_fill_(rows, 0.0)
