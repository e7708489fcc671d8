"""Increasing scalar equations, solved elementwise, and the error of every inner solver."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Elementwise = Callable[[Tensor], Tensor]


class NotConvergedError(ArithmeticError):
    """An inner solver ended above its tolerance; the message has the residual."""


# A bracket of all numbers closes in log2(log(max / min) / eps) = 63 bisections.
_NEWTON, _BISECTIONS = 30, 70


def solve_increasing(
    g: Elementwise, dg: Elementwise, r: Tensor, high: Tensor, reachable: Tensor
) -> Tensor:
    """Solve g(rho) = r for 0 <= rho <= high where that is possible; nan elsewhere.

    Newton acts on log g = log r as an equation in log rho, nearly linear near 0, and converges fast
    next to a pole; a step that leaves the bracket is replaced by bisection of log rho. It takes 4
    to 12 steps, more next to the end of the bracket. After 30 steps only bisections follow, so that
    it ends for every increasing g. Not for hot paths: the stopping test looks at the values.

    A solution has a residual of one rounding, or is bracketed within four: a small step of Newton
    is no proof, since next to a pole or where dg overflows every step is small.

    Raises:
        NotConvergedError: If g is not a number.
    """
    eps, smallest = torch.finfo(r.dtype).eps, torch.finfo(r.dtype).tiny
    low = torch.zeros_like(r)
    rho = 0.5 * high
    for iteration in range(_NEWTON + _BISECTIONS):
        value, slope = g(rho), dg(rho)
        below = value < r
        low, high = torch.where(below, rho, low), torch.where(below, high, rho)
        step = torch.log(value / r) * value / (slope * rho)  # of log rho
        step = step.sign() * step.abs().clamp(min=2.0 * eps)  # so that it brackets the solution
        newton = rho * torch.exp(-step)
        inside = (newton > low) & (newton < high) & (iteration < _NEWTON)
        middle = low.clamp(min=smallest).sqrt() * high.sqrt()
        middle = torch.minimum(torch.maximum(middle, low), high)
        proposal = torch.where(inside, newton, middle)
        closed = (high - low <= 4.0 * eps * rho) | (proposal == rho)
        number = ~value.isnan() | (low > 0)  # next to a pole 0 / 0 may occur
        done = (closed & number) | ((value - r).abs() <= eps * r) | (r == 0) | ~reachable
        rho = torch.where(done, rho, proposal)
        if bool(done.all()):
            return torch.where(reachable, torch.where(r == 0, 0.0, rho), math.nan)
    where = float(rho[~done][0])
    raise NotConvergedError(f"psi' of a potential is not a number at |x| = {where:.3g}")
