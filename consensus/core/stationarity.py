"""How near a point is to being stationary: the phi-prox, the phi-envelope and its gradient.

    e_lam f (u) = min over z of f(z) + (1 / lam) phi(u - z)                                    (2)
    P_lam f (u) = the z that attains it                                                        (3)
    grad e_lam f (u) = (1 / lam) grad phi(u - p),   p = P_lam f (u)                            (13)

f is any smooth function of blocks of points; rows are independent problems and are solved together,
each with a step of its own. The minimum is sought by L-BFGS from z = u, where the coupling is 0,
and every step is cut so that u - z stays inside dom phi. What is found is a stationary point near
u; where f is weakly convex and lam below the threshold of Theorem 4.3 that is the minimum.

At the exact p the gradient of f and that of the coupling cancel. How far they are from it is the
accuracy that is returned: it is the error of (13) as a gradient of f, |grad f(p) - (13)|.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from consensus.core.flat import column
from consensus.core.potentials import Potential

Smooth = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Points (..., n) -> values (...) and gradients (..., n)."""

MEMORY = 10
ARMIJO = 1e-4
SHORTEST = 1e-12  # a step below this part of the first is no step
TO_BOUNDARY = 0.9  # of the way to the boundary, at most


@dataclass(frozen=True)
class Prox:
    """What was found for each point u.

    Attributes:
        point: p. (..., n)
        value: f(p) + (1 / lam) phi(u - p), an upper bound on the envelope. (...)
        gradient: (1 / lam) grad phi(u - p), equation (13). (..., n)
        accuracy: |grad f(p) - gradient|. (...)
        converged: Whether that is below the tolerance. bool (...)
        evaluations: Of f, each for all rows.
    """

    point: Tensor
    value: Tensor
    gradient: Tensor
    accuracy: Tensor
    converged: Tensor
    evaluations: int


def prox(
    f: Smooth,
    phi: Potential,
    u: Tensor,
    lam: float | Tensor,
    *,
    start: Tensor | None = None,
    tolerance: float = 1e-6,
    absolute: float = 0.0,
    budget: int = 100,
) -> Prox:
    """The phi-prox of f, (3), with the envelope (2) and its gradient (13).

    Args:
        f: The function.
        phi: The potential.
        u: Where. (..., n)
        lam: Coupling parameter.
        start: Where to begin, with u - start inside dom phi; None: at u.
        tolerance: A row has converged when its accuracy is below this part of |grad f| at its
            start ...
        absolute: ... or below this number.
        budget: Evaluations of f, at most.

    Raises:
        ValueError: If u - start is not inside dom phi.
    """
    z = (u if start is None else start).clone()
    if not bool(phi.contains(u - z).all()):
        raise ValueError("`start` is outside the domain; allowed: u - start strictly inside")

    def total(z: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = f(z)
        w = u - z
        return value + phi.value(w) / lam, gradient - phi.grad(w) / lam

    value, gradient = total(z)
    evaluations = 1
    history = _History(MEMORY)
    accuracy = gradient.norm(dim=-1)
    enough = (tolerance * accuracy).clamp(min=absolute)
    stuck = torch.zeros_like(accuracy, dtype=torch.bool)
    while evaluations < budget:
        going = (accuracy > enough) & ~stuck
        if not bool(going.any()):
            break
        d = -history.apply(gradient)
        slope = (d * gradient).sum(-1)
        downhill = slope < 0
        d = torch.where(column(downhill), d, -gradient)
        slope = torch.where(downhill, slope, -gradient.square().sum(-1))
        first = 1.0 if len(history) else (1.0 / accuracy.clamp(min=1.0))
        step = torch.minimum(
            torch.ones_like(accuracy) * first, TO_BOUNDARY * phi.max_step(u - z, -d)
        )
        step = torch.where(going, step, 0.0)
        shortest = SHORTEST * step
        new_z, new_value, new_gradient = z, value, gradient
        seeking = going
        while bool(seeking.any()) and evaluations < budget:
            trial = z + column(step) * d
            trial_value, trial_gradient = total(trial)
            evaluations += 1
            good = trial_value <= value + ARMIJO * step * slope
            # Within rounding of the minimum values no longer tell, but gradients do.
            flat = (trial_value - value).abs() <= 8 * torch.finfo(value.dtype).eps * value.abs()
            good |= flat & (trial_gradient.norm(dim=-1) <= accuracy)
            taken = seeking & good
            new_z = torch.where(column(taken), trial, new_z)
            new_value = torch.where(taken, trial_value, new_value)
            new_gradient = torch.where(column(taken), trial_gradient, new_gradient)
            seeking = seeking & ~good
            step = torch.where(seeking, 0.5 * step, step)
            stuck = stuck | (seeking & (step <= shortest))
            seeking = seeking & ~stuck
        history.add(new_z - z, new_gradient - gradient)
        z, value, gradient = new_z, new_value, new_gradient
        accuracy = gradient.norm(dim=-1)
    return Prox(z, value, phi.grad(u - z) / lam, accuracy, accuracy <= enough, evaluations)


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


def consensus_residual(phi: Potential, u: Tensor, z: Tensor, lam: float | Tensor) -> Tensor:
    """(5a): |sum_j grad phi(u - z_j)| / lam. u (..., n), z (..., M, n) -> (...)."""
    residual: Tensor = (phi.grad(u.unsqueeze(-2) - z).sum(-2) / lam).norm(dim=-1)
    return residual


def worker_residual(
    gradient: Tensor, phi: Potential, u: Tensor, z: Tensor, lam: float | Tensor
) -> Tensor:
    """(5b): |grad f_j(z_j) - (1 / lam) grad phi(u - z_j)|, for each worker.

    Args:
        gradient: grad f_j(z_j). (..., M, n)
        phi: The potential.
        u: The consensus variable. (..., n)
        z: The workers. (..., M, n)
        lam: Coupling parameter.
    """
    residual: Tensor = (gradient - phi.grad(u.unsqueeze(-2) - z) / lam).norm(dim=-1)
    return residual
