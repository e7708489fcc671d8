"""Increasing scalar equations, solved elementwise, and the error of every inner solver."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Elementwise = Callable[[Tensor], Tensor]


class NotConvergedError(ArithmeticError):
    """An inner solver ended above its tolerance; the message has the residual."""


def solve_increasing(
    g: Elementwise, dg: Elementwise, r: Tensor, high: Tensor, reachable: Tensor
) -> Tensor:
    """Solve g(rho) = r for 0 <= rho <= high where that is possible; nan elsewhere.

    Newton acts on log g = log r as an equation in log rho, nearly linear near 0, and converges fast
    next to a pole; a step that leaves the bracket is replaced by bisection. Not for hot paths: the
    stopping test looks at the values.
    """
    low = torch.zeros_like(r)
    rho = 0.5 * high
    for _ in range(200):
        value = g(rho)
        below = value < r
        low, high = torch.where(below, rho, low), torch.where(below, high, rho)
        step = value * (torch.log(value) - torch.log(r)) / dg(rho)
        newton = rho * torch.exp(-step / rho)
        inside = (newton > low) & (newton < high)
        proposal = torch.where(inside, newton, 0.5 * (low + high))
        done = (step.abs() <= torch.finfo(r.dtype).eps * rho) | (proposal == rho) | (r == 0)
        rho = torch.where(done, rho, proposal)
        if bool((done | ~reachable).all()):
            break
    return torch.where(reachable, torch.where(r == 0, 0.0, rho), math.nan)
