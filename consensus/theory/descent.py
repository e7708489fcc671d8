"""L-BFGS for blocks of independent smooth problems inside convex open sets.

Each row of a block is a problem with its own step size. All rows are evaluated together.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from consensus.core.flat import column

Smooth = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Points (..., n) -> values (...) and gradients (..., n)."""

Pair = tuple[Tensor, Tensor, Tensor]
"""A step s, the change y of the gradient, and 1 / s^T y, or 0 if s^T y <= 0 up to rounding."""

MEMORY = 10
ARMIJO = 1e-4
SHORTEST = 1e-12  # the line search of a row fails below this fraction of its first step
TO_BOUNDARY = 0.9  # the largest step, as a fraction of the distance to the boundary
VECTORS = 2 * MEMORY + 16  # a descent holds at most as many tensors (..., n) at once


@dataclass(frozen=True)
class Descent:
    """The result of `descend`."""

    point: Tensor  # the last iterate (..., n)
    value: Tensor  # there: at most the value at the start, up to rounding (...)
    residual: Tensor  # |gradient| (...)
    converged: Tensor  # whether the residual is within the tolerance; bool (...)
    evaluations: int  # function calls, each for all rows


def require_count(name: str, value: int, least: int) -> None:
    """Raise a ValueError unless an argument is a whole number of at least `least`."""
    if not isinstance(value, int) or value < least:
        raise ValueError(f"`{name}` is {value}; allowed: a whole number >= {least}")


def descend(
    function: Smooth,
    start: Tensor,
    enough: Callable[[Tensor, Tensor], Tensor],
    *,
    max_step: Callable[[Tensor, Tensor], Tensor],
    budget: int,
) -> Descent:
    """Minimize a smooth function in each row by L-BFGS with Armijo line searches.

    The function is finite inside the set, where the start (..., n) lies. `enough` makes the
    tolerances (...) of the residuals from the points and the residuals at the start; `max_step` the
    steps (...) to the boundary from points inside and directions. `budget` limits function calls.
    """
    z = start.clone()
    value, gradient = function(z)
    evaluations = 1
    pairs: deque[Pair] = deque(maxlen=MEMORY)
    residual = first_residual = gradient.norm(dim=-1)
    stuck = torch.zeros_like(residual, dtype=torch.bool)
    while evaluations < budget:
        going = (residual > enough(z, first_residual)) & ~stuck
        if not bool(going.any()):
            break
        d = -_times_inverse_hessian(pairs, gradient)
        slope = (d * gradient).sum(-1)
        downhill = slope < 0
        d = torch.where(column(downhill), d, -gradient)
        slope = torch.where(downhill, slope, -gradient.square().sum(-1))
        first = 1.0 if pairs else (1.0 / residual.clamp(min=1.0))
        step = torch.minimum(torch.ones_like(residual) * first, TO_BOUNDARY * max_step(z, d))
        step = torch.where(going, step, 0.0)
        shortest = SHORTEST * step
        new_z, new_value, new_gradient = z, value, gradient
        seeking = going
        while bool(seeking.any()) and evaluations < budget:
            trial = z + column(step) * d
            trial_value, trial_gradient = function(trial)
            evaluations += 1
            good = trial_value <= value + ARMIJO * step * slope
            # Near the minimum the values differ by rounding only; compare gradients instead.
            flat = (trial_value - value).abs() <= 8 * torch.finfo(value.dtype).eps * value.abs()
            good |= flat & (trial_gradient.norm(dim=-1) <= residual)
            taken = seeking & good
            new_z = torch.where(column(taken), trial, new_z)
            new_value = torch.where(taken, trial_value, new_value)
            new_gradient = torch.where(column(taken), trial_gradient, new_gradient)
            seeking = seeking & ~good
            shorter = _minimum_of_parabola(step, trial_value - value, slope)
            step = torch.where(seeking, shorter, step)
            stuck = stuck | (seeking & (step <= shortest))
            seeking = seeking & ~stuck
        pairs.append(_pair(new_z - z, new_gradient - gradient))
        z, value, gradient = new_z, new_value, new_gradient
        residual = gradient.norm(dim=-1)
    converged = residual <= enough(z, first_residual)
    return Descent(z, value, residual, converged, evaluations)


def _minimum_of_parabola(step: Tensor, rise: Tensor, slope: Tensor) -> Tensor:
    """A shorter step, 0.1 to 0.5 of it, by the parabola through both values with `slope` at 0."""
    shorter = -0.5 * slope * step.square() / (rise - slope * step)
    return torch.where(rise.isfinite(), shorter.clamp(0.1 * step, 0.5 * step), 0.1 * step)


def _pair(s: Tensor, y: Tensor) -> Pair:
    sy = (s * y).sum(-1)
    eps = torch.finfo(s.dtype).eps
    good = sy > eps * y.square().sum(-1).clamp(min=eps)
    return s, y, torch.where(good, 1.0 / sy, 0.0)


def _times_inverse_hessian(pairs: Sequence[Pair], g: Tensor) -> Tensor:
    """The two-loop recursion of L-BFGS, oldest pair first. (..., n) -> (..., n)."""
    alphas = []
    for s, y, rho in reversed(pairs):
        alpha = rho * (s * g).sum(-1)
        alphas.append(alpha)
        g = g - column(alpha) * y
    scale = torch.ones_like(g[..., 0])
    for _, y, rho in pairs:  # the newest pair of each row that has one
        yy = y.square().sum(-1)
        scale = torch.where(rho > 0, 1.0 / (rho * yy), scale)
    g = column(scale) * g
    for (s, y, rho), alpha in zip(pairs, reversed(alphas), strict=True):
        beta = rho * (y * g).sum(-1)
        g = g + column(alpha - beta) * s
    return g
