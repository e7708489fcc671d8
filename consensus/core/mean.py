"""The phi-mean of some points: the u that minimizes sum_j phi(u - z_j), equation (14a) of (15).

For `quad` it is the mean; for `pseudo_huber` with a small eta it is nearly the median of each
coordinate. Newton's method from a feasible u, with steps that stay inside dom phi and decrease the
sum, which is convex: so it converges from anywhere.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from consensus.core.layerwise import Layerwise
from consensus.core.sizes import Separable

Reduce = Callable[[Tensor], Tensor]  # a sum or minimum over ranks; may work in place

MOST_NEWTON, MOST_CG, MOST_HALVINGS = 50, 30, 40
ARMIJO = 1e-4


@dataclass(frozen=True)
class Mean:
    """The phi-mean u (n,)."""

    u: Tensor
    residual: float  # |sum_j grad phi(u - z_j)| over the sum of the |grad phi(u - z_j)|
    iterations: int  # of Newton's method


def phi_mean(
    phi: Layerwise,
    z: Tensor,
    u: Tensor,
    *,
    total: Reduce = lambda x: x,
    smallest: Reduce = lambda x: x,
    tolerance: float = 1e-6,
) -> Mean:
    """The minimizer over u of sum_j phi(u - z_j), for the points z (K, n) of each rank.

    The start u (n,) is the same on all ranks, with every u - z_j inside dom phi. `total` and
    `smallest` are the sum and the minimum over ranks, which branch on the same totals. `tolerance`
    is that of the residual, and at least a few units of rounding of the dtype.
    """
    if phi.profile.slope is not None:  # weights, the same for all points, cancel
        summed = total(torch.cat([z.sum(0), z.new_tensor([float(len(z))])]))
        return Mean(summed[:-1] / summed[-1], 0.0, 0)
    tolerance = max(tolerance, 8.0 * torch.finfo(z.dtype).eps)
    residual = float("inf")
    for iteration in range(MOST_NEWTON):
        w = u - z
        forces = phi.grad(w)
        numbers = torch.stack([forces.norm(dim=-1).sum(), phi.value(w).sum()])
        summed = total(torch.cat([forces.sum(0), numbers]))
        force, (strength, value) = summed[:-2], summed[-2:].tolist()
        residual = float(force.norm()) / strength if strength > 0 else 0.0
        if residual <= tolerance:
            return Mean(u, residual, iteration)
        d = _newton(phi, w, force, total)
        slope = float(d @ force)
        step = 1.0
        if phi.bounded:  # convex: the smallest step of all points is feasible for each
            step = float(smallest(phi.feasible_step(w, d, u).amin()))
        for _ in range(MOST_HALVINGS):
            if step * d.abs().max() <= torch.finfo(u.dtype).eps * u.abs().max():
                return Mean(u, residual, iteration)  # no nearer point can be stored
            trial = float(total(phi.value(u + step * d - z).sum()))
            if trial <= value + ARMIJO * step * slope + 4.0 * torch.finfo(u.dtype).eps * value:
                break
            step *= 0.5
        u = u + step * d
    return Mean(u, residual, MOST_NEWTON)


def _newton(phi: Layerwise, w: Tensor, force: Tensor, total: Reduce) -> Tensor:
    """The direction -H^-1 force, H the Hessian of the sum; a descent direction. (n,)."""
    if isinstance(phi.size, Separable):
        diagonal = total(phi.hvp(w, torch.ones_like(w)).sum(0))
        # The force vanishes with the curvature, as that of |x|^3 at 0.
        return torch.where(diagonal > 0, -force / diagonal, 0.0)
    # Per layer H is a multiple of the identity and one direction for each point: conjugate
    # gradients need as many steps as there are points. Solved as accurately as Newton needs it.
    d, r = torch.zeros_like(force), -force
    p, rr = r, float(r @ r)
    enough = 1e-2 * rr
    for _ in range(MOST_CG):
        hp = total(phi.hvp(w, p).sum(0))
        curvature = float(p @ hp)
        if curvature <= 0:
            break
        alpha = rr / curvature
        d, r = d + alpha * p, r - alpha * hp
        new = float(r @ r)
        if new <= enough:
            break
        p, rr = r + (new / rr) * p, new
    return d if bool((d != 0).any()) else -force
