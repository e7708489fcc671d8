"""Line 3 by an optimizer of torch over u, such as Nesterov SGD (DiLoCo, Douillard et al. 2023).

Its gradient is the step of line 3 backwards: t_u sum_j grad phi(u - z_j), or the weighted mean of
the proximal steps. With t_u = eta^2 / (2 M) that is u minus the mean of the z_j for the quadratic
potential. With SGD and momentum it is SlowMo (Wang et al. 2020). Every rank has an optimizer of its
own, and all do the same.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from consensus.core.flat import Scalar, scaled
from consensus.core.kernels import ConsensusKernel, LineSearch, TotalForce
from consensus.core.kernels.optimizers import MakeOptimizer, StateTensors, named, scale_momentum


class OptimizerStep:
    """`ConsensusKernel` that moves u as an optimizer does.

    Where steps are cut, the displacement of the optimizer is shortened to the feasible step s_u,
    and its `momentum_buffer`, if it has one, is scaled by s_u too.

    Args:
        kernel: The sums of forces, the step without an optimizer, and the line search.
        make: Makes the optimizer for parameters that are u, in some shapes.
        like: A vector with the size, type and device of u. (n,)
        views_of: The pieces of a vector (n,) that become the parameters; None: the vector.
        cut: Whether `kernel` has a line search.

    Attributes:
        optimizer: For instance for a schedule of its learning rate.

    Raises:
        ValueError: If `make` does not return an optimizer of all parameters.
    """

    closed_form = False  # an optimizer may read numbers on the host

    def __init__(
        self,
        kernel: ConsensusKernel,
        make: MakeOptimizer,
        like: Tensor,
        views_of: Callable[[Tensor], Sequence[Tensor]] | None = None,
        *,
        cut: bool,
    ) -> None:
        self.kernel, self._cut = kernel, cut
        self.force_size, self.reach_size = kernel.force_size, kernel.reach_size
        self._views_of = views_of or (lambda vector: [vector])
        self._moved: Tensor | None = None  # the u whose memory the parameters have
        self._gradient = torch.zeros_like(like)
        gradients = self._views_of(self._gradient)
        self._parameters = [nn.Parameter(torch.empty_like(view)) for view in gradients]
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer = make(list(self._parameters))
        if not isinstance(self.optimizer, Optimizer):
            raise ValueError(f"`outer` returned {self.optimizer!r}; allowed: a torch optimizer")
        own = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        if own != {id(parameter) for parameter in self._parameters}:
            raise ValueError("`outer` left out parameters; allowed: an optimizer of all it gets")

    def forces(self, u: Tensor, z: Tensor, out: Tensor, scratch: Tensor | None) -> Tensor | None:
        """As in `ConsensusKernel`."""
        return self.kernel.forces(u, z, out, scratch)

    def move_consensus(
        self, u: Tensor, z: Tensor, total: TotalForce, t_u: Scalar, search: LineSearch, out: Tensor
    ) -> None:
        """As in `ConsensusKernel`, with the displacement of the optimizer."""
        if self._cut:
            scaled(t_u, total.force, self._gradient)
        else:  # the step that the kernel would take from 0
            self.kernel.move_consensus(self._gradient.zero_(), z, total, t_u, search, out)
            self._gradient.neg_()
        before = u.clone() if self._cut else None
        if self._moved is not u:  # the optimizer moves u itself
            self._moved = u
            for parameter, view in zip(self._parameters, self._views_of(u), strict=True):
                parameter.data = view
        with torch.enable_grad():  # as in a training loop: torch's optimizers switch it off
            self.optimizer.step()
        if before is None:
            return
        d = torch.sub(u, before, out=out)
        u.copy_(before)
        self.kernel.move_consensus(u, z, TotalForce(d, total.reach), -1.0, search, out)
        scale_momentum(self.optimizer.state.values(), search.step)

    def restart(self) -> None:
        """Forget momentum and the like."""
        self.optimizer.state.clear()


class FlatOptimizerStep(OptimizerStep):
    """`OptimizerStep` over u as one vector, by the name of an optimizer in torch.optim.

    Its state is a dict of tensors, for checkpoints.

    Args:
        kernel: As in `OptimizerStep`, as are `like` and `cut`.
        name: Of an optimizer in torch.optim.
        options: Its options.

    Raises:
        ValueError: If there is no such optimizer for one flat vector, or it refuses the options.
    """

    def __init__(
        self,
        kernel: ConsensusKernel,
        like: Tensor,
        name: str,
        options: Mapping[str, Any],
        *,
        cut: bool,
    ) -> None:
        make = named(name, options)
        self._state = StateTensors(name, make, like)
        super().__init__(kernel, make, like, cut=cut)

    def state_dict(self) -> dict[str, Tensor]:
        """The state of the optimizer, equal on all ranks; `started` is 0 before its first step."""
        return self._state.read(self.optimizer, self._parameters[0])

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from copies of a `state_dict`."""
        self._state.write(self.optimizer, self._parameters[0], state)
