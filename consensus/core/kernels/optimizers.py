"""Optimizers of torch over flat vectors: made by name, with their state as tensors."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from consensus.core.flat import local

MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]
"""Makes an optimizer for parameters."""


def named(name: str, options: Mapping[str, Any]) -> MakeOptimizer:
    """The maker of an optimizer in torch.optim; a ValueError there if it refuses its options."""
    kind = getattr(torch.optim, name, None)
    if not isinstance(kind, type) or not issubclass(kind, Optimizer) or kind is Optimizer:
        raise ValueError(f"`optimizer` is {name}; allowed: the name of a class in torch.optim")

    def make(parameters: list[nn.Parameter]) -> Optimizer:
        try:
            made: Optimizer = kind(parameters, **options)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{name} refuses its options: {error}") from error
        return made

    return make


class StateTensors:
    """The state of an optimizer for one parameter, a flat vector, as a dict of tensors.

    Args:
        name: Of the optimizer, for messages.
        make: Makes it.
        like: A vector with the size, type and device of the parameter. (n,)

    Raises:
        ValueError: If the optimizer cannot step over one flat vector, or has other state.
    """

    def __init__(self, name: str, make: MakeOptimizer, like: Tensor) -> None:
        trial = nn.Parameter(torch.zeros_like(like))
        trial.grad = torch.zeros_like(like)
        optimizer = make([trial])
        try:
            optimizer.step()
        except (RuntimeError, TypeError, AssertionError) as error:  # LBFGS needs a closure
            raise ValueError(f"{name} cannot step over one flat vector ({error})") from error
        # Optimizers make their state in the first step. Its shapes are known from this trial.
        self._shapes = _tensors_of(optimizer.state[trial])

    def read(self, optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The state; `started` is 0 before the first step. The tensors are not copies."""
        own = _tensors_of(optimizer.state[parameter])
        return {"started": torch.tensor(int(bool(own))), **self._shapes, **own}

    def write(
        self, optimizer: Optimizer, parameter: nn.Parameter, state: Mapping[str, Tensor]
    ) -> None:
        """Replace the state by copies of what `read` returned."""
        optimizer.state.pop(parameter, None)
        if state["started"]:
            optimizer.state[parameter].update(
                {key: state[key].to(own, copy=True) for key, own in self._shapes.items()}
            )


def scale_momentum(states: Iterable[Mapping[str, Any]], step: Tensor) -> None:
    """Scale the velocity of SGD, `momentum_buffer`, by the step () of a line search.

    `states` are those of the parameters of an optimizer. Any other momentum is left alone.
    """
    found = (state.get("momentum_buffer") for state in states)
    if velocities := [local(velocity) for velocity in found if velocity is not None]:
        torch._foreach_mul_(velocities, step)


def _tensors_of(state: Mapping[str, Any]) -> dict[str, Tensor]:
    for key, value in state.items():
        if not isinstance(value, Tensor | None):
            raise ValueError(f"`{key}` in the state of the optimizer is no tensor")
    return {key: value for key, value in state.items() if value is not None}
