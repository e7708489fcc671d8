"""Descent on smooth functions of blocks of points, inside a convex open set: L-BFGS.

Rows are independent problems. They are solved together, each with a step of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from consensus.core.flat import column

Smooth = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Points (..., n) -> values (...) and gradients (..., n)."""

MEMORY = 10
ARMIJO = 1e-4
SHORTEST = 1e-12  # a step below this part of the first is no step
TO_BOUNDARY = 0.9  # of the way to the boundary, at most
VECTORS = 2 * MEMORY + 16
"""How many tensors (..., n) a descent and its function hold at once, at most."""


@dataclass(frozen=True)
class Descent:
    """Where the rows came.

    Attributes:
        point: (..., n)
        value: Of the function, at most that at the start, but for rounding. (...)
        residual: |gradient|. (...)
        converged: Whether that is enough. bool (...)
        evaluations: Of the function, each for all rows.
    """

    point: Tensor
    value: Tensor
    residual: Tensor
    converged: Tensor
    evaluations: int


def descend(
    function: Smooth,
    start: Tensor,
    enough: Callable[[Tensor, Tensor], Tensor],
    *,
    max_step: Callable[[Tensor, Tensor], Tensor],
    budget: int,
) -> Descent:
    """Minimize from a start, row by row, until residuals are small.

    Args:
        function: Is finite where it is asked.
        start: Inside the set. (..., n)
        enough: Points and the residuals at the start -> residuals that are small enough. (...)
        max_step: A point inside and a direction -> the step that leads to the boundary. (...)
        budget: Evaluations, at most.
    """
    z = start.clone()
    value, gradient = function(z)
    evaluations = 1
    history = _History(MEMORY)
    residual = first_residual = gradient.norm(dim=-1)
    stuck = torch.zeros_like(residual, dtype=torch.bool)
    while evaluations < budget:
        going = (residual > enough(z, first_residual)) & ~stuck
        if not bool(going.any()):
            break
        d = -history.apply(gradient)
        slope = (d * gradient).sum(-1)
        downhill = slope < 0
        d = torch.where(column(downhill), d, -gradient)
        slope = torch.where(downhill, slope, -gradient.square().sum(-1))
        first = 1.0 if len(history) else (1.0 / residual.clamp(min=1.0))
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
            # Within rounding of the minimum values no longer tell, but gradients do.
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
        history.add(new_z - z, new_gradient - gradient)
        z, value, gradient = new_z, new_value, new_gradient
        residual = gradient.norm(dim=-1)
    converged = residual <= enough(z, first_residual)
    return Descent(z, value, residual, converged, evaluations)


def _minimum_of_parabola(step: Tensor, rise: Tensor, slope: Tensor) -> Tensor:
    """A shorter step: the minimum of the parabola through both values with that slope at 0.

    Between a tenth and a half of the step, and a tenth where the trial was not finite.
    """
    shorter = -0.5 * slope * step.square() / (rise - slope * step)
    return torch.where(rise.isfinite(), shorter.clamp(0.1 * step, 0.5 * step), 0.1 * step)


class _History:
    """The last steps and changes of the gradient, row by row: the inverse Hessian of L-BFGS."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._pairs: list[tuple[Tensor, Tensor, Tensor]] = []  # s, y, 1 / s y or 0

    def __len__(self) -> int:
        return len(self._pairs)

    def add(self, s: Tensor, y: Tensor) -> None:
        """A row without curvature along its step has no part in it."""
        sy = (s * y).sum(-1)
        eps = torch.finfo(s.dtype).eps
        good = sy > eps * y.square().sum(-1).clamp(min=eps)
        self._pairs.append((s, y, torch.where(good, 1.0 / sy, 0.0)))
        del self._pairs[: -self._most]

    def apply(self, g: Tensor) -> Tensor:
        """The two loops. (..., n) -> (..., n)."""
        alphas = []
        for s, y, rho in reversed(self._pairs):
            alpha = rho * (s * g).sum(-1)
            alphas.append(alpha)
            g = g - column(alpha) * y
        scale = torch.ones_like(g[..., 0])
        for _, y, rho in self._pairs:  # the newest pair of each row that has one
            yy = y.square().sum(-1)
            scale = torch.where(rho > 0, 1.0 / (rho * yy), scale)
        g = column(scale) * g
        for (s, y, rho), alpha in zip(self._pairs, reversed(alphas), strict=True):
            beta = rho * (y * g).sum(-1)
            g = g + column(alpha - beta) * s
        return g
