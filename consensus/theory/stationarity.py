"""Stationarity: the phi-prox, the phi-envelope and its gradient, residuals (5a) and (5b).

    e_lam f (u) = min over z of f(z) + (1 / lam) phi(u - z)                                    (2)
    P_lam f (u) = argmin over z of the same                                                    (3)
    grad e_lam f (u) = (1 / lam) grad phi(u - p),   p = P_lam f (u)                            (13)

f is any smooth function of blocks of points, whose rows are independent problems. L-BFGS
(descent.py) starts at z = u, where the coupling is 0, and keeps u - z inside dom phi. It finds a
stationary point near u. If f is weakly convex and lam is below the threshold of Theorem 4.3, that
point is the minimizer. At the exact p the gradients of f and of the coupling cancel; what remains,
|grad f(p) - (13)|, is returned as the accuracy.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from consensus.core.potentials import Potential
from consensus.theory.descent import Smooth, descend, require_count


@dataclass(frozen=True)
class Prox:
    """The result of `prox` for each point u."""

    point: Tensor  # p (..., n)
    value: Tensor  # f(p) + (1 / lam) phi(u - p), an upper bound on the envelope (...)
    gradient: Tensor  # (1 / lam) grad phi(u - p), equation (13) (..., n)
    accuracy: Tensor  # |grad f(p) - gradient| (...)
    converged: Tensor  # whether the accuracy is within the tolerance; bool (...)
    evaluations: int  # calls of f, each for all rows


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
        u: The points. (..., n)
        lam: Coupling parameter; a ValueError unless it is > 0.
        start: The start of the descent; None: u. A ValueError unless u - start is inside dom phi.
        tolerance: A row has converged when its accuracy is below this fraction of |(13)| ...
        absolute: ... or below this number.
        budget: The largest number of calls of f.
    """
    if not (least := float(torch.as_tensor(lam).min())) > 0.0:
        raise ValueError(f"`lam` is {least}; allowed: numbers > 0")
    require_count("budget", budget, 1)
    z = u if start is None else start
    if not bool(phi.contains(u - z).all()):
        raise ValueError("`start` is outside the domain; allowed: u - start strictly inside")

    def total(z: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = f(z)
        w = u - z
        return value + phi.value(w) / lam, gradient - phi.grad(w) / lam

    def enough(z: Tensor, first: Tensor) -> Tensor:
        force: Tensor = phi.grad(u - z).norm(dim=-1) / lam
        return (tolerance * force).clamp(min=absolute)

    found = descend(total, z, enough, budget=budget, max_step=lambda z, d: phi.max_step(u - z, -d))
    gradient = phi.grad(u - found.point) / lam
    return Prox(
        found.point, found.value, gradient, found.residual, found.converged, found.evaluations
    )


def consensus_residual(phi: Potential, u: Tensor, z: Tensor, lam: float | Tensor) -> Tensor:
    """(1 / lam) sum_j grad phi(u - z_j) of (5a), for u (..., n) and any workers z (..., K, n)."""
    return phi.grad(u.unsqueeze(-2) - z).sum(-2) / lam


def worker_residual(
    gradient: Tensor, phi: Potential, u: Tensor, z: Tensor, lam: float | Tensor
) -> Tensor:
    """Grad f_j(z_j) - (1 / lam) grad phi(u - z_j) of (5b), for `gradient` and z (..., M, n)."""
    return gradient - phi.grad(u.unsqueeze(-2) - z) / lam
