"""Line 3 by an optimizer of torch over u, such as Nesterov SGD (DiLoCo, Douillard et al. 2023).

Its gradient is t_u sum_j grad phi(u - z_j). With t_u = eta^2 / (2 M) that is u minus the mean of
the z_j for the quadratic potential. Every rank has an optimizer of its own, and all do the same.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from consensus.core.flat import Scalar, scaled
from consensus.core.kernels import ConsensusKernel, LineSearch, TotalForce
from consensus.core.layerwise import Layerwise


class OptimizerStep:
    """`ConsensusKernel` that moves u as an optimizer does.

    Where phi is bounded, the displacement of the optimizer is shortened to the feasible step s_u,
    and its `momentum_buffer`, if it has one, is scaled by s_u too.

    Args:
        kernel: The sums of forces, and the line search.
        phi: The potential.
        like: A vector with the size, type and device of u. (n,)
        name: Of an optimizer in torch.optim.
        options: Its options.

    Raises:
        ValueError: If there is no such optimizer for one flat vector, or it refuses the options.
    """

    closed_form = False  # an optimizer may read numbers on the host

    def __init__(
        self,
        kernel: ConsensusKernel,
        phi: Layerwise,
        like: Tensor,
        name: str,
        options: Mapping[str, Any],
    ) -> None:
        self.kernel, self.phi = kernel, phi
        self.force_size, self.reach_size = kernel.force_size, kernel.reach_size
        trial = torch.zeros_like(like, requires_grad=True)
        trial.grad = torch.zeros_like(like)
        optimizer = _optimizer(trial, name, options)
        try:
            optimizer.step()
        except (RuntimeError, TypeError) as error:  # such as LBFGS, which needs a closure
            raise ValueError(f"{name} cannot step over one flat vector ({error})") from error
        # Optimizers make their state in the first step. Its shapes are known from this trial.
        self._shapes = _tensors_of(optimizer.state[trial])
        self._point = torch.zeros_like(like, requires_grad=True)
        self.optimizer = _optimizer(self._point, name, options)

    def forces(self, u: Tensor, z: Tensor, out: Tensor, scratch: Tensor | None) -> Tensor | None:
        """As in `ConsensusKernel`."""
        return self.kernel.forces(u, z, out, scratch)

    def move_consensus(
        self, u: Tensor, z: Tensor, total: TotalForce, t_u: Scalar, search: LineSearch, out: Tensor
    ) -> None:
        """As in `ConsensusKernel`, with the displacement of the optimizer."""
        point = self._point
        point.data.copy_(u)
        point.grad = scaled(t_u, total.force, out)
        self.optimizer.step()
        point.grad = None
        if not self.phi.bounded:
            u.copy_(point.detach())
            return
        d = torch.sub(point.detach(), u, out=out)
        self.kernel.move_consensus(u, z, TotalForce(d, total.reach), -1.0, search, out)
        if (momentum := self.optimizer.state[point].get("momentum_buffer")) is not None:
            momentum *= search.step

    def state_dict(self) -> dict[str, Tensor]:
        """The state of the optimizer, equal on all ranks; `started` is 0 before its first step."""
        own = _tensors_of(self.optimizer.state[self._point])
        return {"started": torch.tensor(int(bool(own))), **self._shapes, **own}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from copies of a `state_dict`."""
        self.optimizer.state[self._point].clear()
        if state["started"]:
            self.optimizer.state[self._point].update(
                {key: state[key].to(own, copy=True) for key, own in self._shapes.items()}
            )


def _optimizer(vector: Tensor, name: str, options: Mapping[str, Any]) -> Optimizer:
    kind = getattr(torch.optim, name, None)
    if not isinstance(kind, type) or not issubclass(kind, Optimizer) or kind is Optimizer:
        raise ValueError(f"`optimizer` is {name}; allowed: the name of a class in torch.optim")
    try:
        made: Optimizer = kind([vector], **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} refuses its options: {error}") from error
    return made


def _tensors_of(state: Mapping[str, Any]) -> dict[str, Tensor]:
    for key, value in state.items():
        if not isinstance(value, Tensor | None):
            raise ValueError(f"`{key}` in the state of the optimizer is no tensor")
    return {key: value for key, value in state.items() if value is not None}
