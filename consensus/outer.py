"""Outer optimizers: an optimizer of torch moves u in place of a step of line 3.

Its gradient is the mean displacement of u from the copies, mean_j q(u - z_j), with q(w) = w for the
quadratic potential: the negative of the step that the mean of the copies would be. With the copies
set to u in each communication this is DiLoCo (Douillard et al. 2023), with SGD and momentum SlowMo
(Wang et al. 2020).
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from consensus.server import PendingForce, Server

MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]
"""Makes an optimizer for parameters that are u, in the shapes of the model's."""


class OuterOptimizer:
    """Line 3 by an optimizer over u. All ranks take the same step on the same bits.

    For potentials without a domain, or proximal steps: no step is cut.

    Args:
        make: Makes the optimizer; a ValueError if it does not return one with the given parameters.
        server: Its u is moved in place.
        t_u: Step of line 3 by which u would reach the mean of the copies.
        views_of: The pieces of a vector (n,) in the shapes of the parameters.

    Attributes:
        optimizer: For instance for a schedule of its learning rate.
    """

    def __init__(
        self,
        make: MakeOptimizer,
        server: Server,
        t_u: float,
        views_of: Callable[[Tensor], Sequence[Tensor]],
    ) -> None:
        self._server, self._t_u = server, t_u
        self._gradient = torch.zeros_like(server.u)
        parameters = [nn.Parameter(view) for view in views_of(server.u)]
        for parameter, gradient in zip(parameters, views_of(self._gradient), strict=True):
            parameter.grad = gradient
        self.optimizer = make(list(parameters))
        if not isinstance(self.optimizer, Optimizer):
            raise ValueError(f"`outer` returned {self.optimizer!r}; allowed: a torch optimizer")
        own = [p for group in self.optimizer.param_groups for p in group["params"]]
        if {id(p) for p in own} != {id(p) for p in parameters}:
            raise ValueError("`outer` left out parameters; allowed: an optimizer of all it gets")

    def step(self, pending: PendingForce) -> None:
        """Finish the sum of line 3 and move u."""
        self._server.finish(pending, self._t_u, self._gradient.zero_())
        self._gradient.neg_()
        with torch.enable_grad():  # as in a training loop: torch's optimizers switch it off
            self.optimizer.step()

    def restart(self) -> None:
        """Forget momentum and the like."""
        self.optimizer.state.clear()

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's, as copies."""
        return deepcopy(self.optimizer.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.optimizer.load_state_dict(deepcopy(state))
