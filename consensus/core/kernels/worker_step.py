"""Line 6 with the displacement of any optimizer of torch in place of the velocity.

    z_j+ = z_j + s_j (d_j + (sigma / lam) grad phi(u+ - z_j))

d_j is the step of the optimizer of worker j from z_j, with its minibatch gradient there. That is
`Coupling` with this optimizer (coupling.py), for K workers of a process.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from consensus.core.kernels import Block, Hyperparameters, LineSearch, WorkerKernel
from consensus.core.kernels.optimizers import StateTensors, named, scale_momentum


class WorkerOptimizerStep:
    """`WorkerKernel` that moves every z_j as an optimizer of its own does, and by the coupling.

    The optimizer has the learning rate `sigma` of each call. Momentum and R are its own: `kappa`
    and `nu` have no effect. `v` receives s_j d_j. Where a step is cut, a `momentum_buffer` of this
    worker is scaled by s_j too.

    Args:
        kernel: The coupling of line 6, and its line search.
        z: The workers, of which type, size and device matter. (K, n)
        name: Of an optimizer in torch.optim.
        options: Its options.
        cut: Whether `kernel` has a line search.

    Raises:
        ValueError: If there is no such optimizer, it refuses the options, or it does not act on
            each coordinate by itself.
    """

    closed_form = False  # an optimizer may read numbers on the host

    def __init__(
        self, kernel: WorkerKernel, z: Tensor, name: str, options: Mapping[str, Any], *, cut: bool
    ) -> None:
        self.kernel, self._cut = kernel, cut
        make = named(name, options)
        self._state = StateTensors(name, make, z[0])
        _require_elementwise(name, options)
        # One optimizer: torch keeps the state of each parameter, here a worker, by itself.
        self._parameters = [nn.Parameter(torch.empty_like(row)) for row in z]
        self.optimizer = make(list(self._parameters))

    def move_workers(
        self, block: Block, u: Tensor, anchor: Tensor, numbers: Hyperparameters, search: LineSearch
    ) -> None:
        """As in `WorkerKernel`."""
        z, d, delta = block.z, block.v, block.delta
        d.copy_(z)
        for k, parameter in enumerate(self._parameters):  # torch skips one without a gradient
            parameter.data, parameter.grad = d[k], None if k in block.resting else delta[k]
        for group in self.optimizer.param_groups:
            group["lr"] = numbers.sigma
        with torch.enable_grad():  # as in a training loop: torch's optimizers switch it off
            self.optimizer.step()
        d -= z
        moved = Block(z, d, delta.zero_(), block.scratch, block.resting)
        displaced = replace(numbers, kappa=1.0, sigma=0.0, nu=0.0)
        if not self._cut:
            return self.kernel.move_workers(moved, u, anchor, displaced, search)
        steps = []
        for k, parameter in enumerate(self._parameters):  # one by one, for the step of each
            own = LineSearch(torch.ones_like(search.step), search.cuts[k : k + 1])
            self.kernel.move_workers(moved.row(k), u, anchor, displaced, own)
            known = own.step.device.type == "cpu"
            if k not in block.resting and not (known and own.step == 1):  # it is 1 nearly always
                scale_momentum([self.optimizer.state[parameter]], own.step)
            steps.append(own.step)
        search.step.copy_(torch.stack(steps).amin())
        return None

    def state_dict(self) -> dict[str, Tensor]:
        """The state of the optimizer, a row for each worker (K, ...)."""
        rows = [self._state.read(self.optimizer, parameter) for parameter in self._parameters]
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    def forget(self, k: int) -> None:
        """Begin anew with worker k: its optimizer has no state."""
        self.optimizer.state.pop(self._parameters[k], None)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from copies of a `state_dict`."""
        for k, parameter in enumerate(self._parameters):
            row = {key: rows[k] for key, rows in state.items()}
            self._state.write(self.optimizer, parameter, row)


def _require_elementwise(name: str, options: Mapping[str, Any]) -> None:
    """Refuse an optimizer that uses the shapes of parameters: a worker is one flat vector."""
    found = []
    for shape in (4,), (2, 2):
        parameter = nn.Parameter(torch.tensor([0.5, -1.0, 2.0, 0.25]).view(shape))
        parameter.grad = torch.tensor([1.0, -2.0, 3.0, 4.0]).view(shape)
        optimizer = named(name, options)([parameter])
        optimizer.step()
        found.append(parameter.detach().flatten())
    if not torch.equal(*found):
        raise ValueError(
            f"{name} uses the shapes of parameters, but the model of a worker is one flat vector; "
            "allowed: optimizers that act on each coordinate by itself, such as SGD and AdamW"
        )


def clip_norms(gradients: Tensor, most: float) -> None:
    """Scale the rows of a block whose norm is above `most` to that norm, in place. (K, n).

    As torch.nn.utils.clip_grad_norm_ over a whole model, and without reading a number on the host.
    """
    # Row by row: the same operations, and so the same bits, for any number of rows.
    norms = torch.stack([torch.linalg.vector_norm(row) for row in gradients])
    gradients *= (most / (norms + 1e-6)).clamp_(max=1.0).unsqueeze(-1)
