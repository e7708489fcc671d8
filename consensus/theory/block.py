"""Updates of one block, u or z, of model (4): a proximal gradient step, or an exact minimization.

Both blocks minimize a function plus a coupling of the same form (`Coupling`).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from consensus.core.potentials import Potential
from consensus.theory.composite import Function, LinearMap, noise
from consensus.theory.descent import descend

SUFFICIENT = 0.95  # of |d|^2 / (2 step): a factor below 1 gives sufficient decrease of F
TRIED = 0.9  # of 1 / L: below SUFFICIENT, so that rounding does not halve the steps of a quadratic
GROWTH = 1.5  # the largest growth of a step size per iteration
SHORTEST = 1e-20  # backtracking fails below this fraction of the first step size
ROUNDING = 1e-12  # relative size below which a difference of values is rounding


@dataclass(frozen=True)
class Coupling:
    """The smooth part of a subproblem, as a function of one block.

        c(x) = (1 / lam) phi(L x + offset) + (weight / 2) |x - centre|^2

    For u, L = A and offset = -z; for z, L = -1 and offset = A u. The second term belongs to the
    proximally regularized scheme.
    """

    phi: Potential
    lam: float
    linear: LinearMap
    offset: Tensor
    other: Tensor  # the argument of `Function.coupled`
    centre: Tensor
    weight: float

    def gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Value and gradient of c."""
        w = self.linear.apply(x) + self.offset
        value, away = self.phi.value(w).sum() / self.lam, x - self.centre
        grad = self.linear.adjoint(self.phi.grad(w)) / self.lam + self.weight * away
        return value + 0.5 * self.weight * away.square().sum(), grad

    def max_step(self, x: Tensor, d: Tensor) -> float:
        """The t at which x + t d leaves the domain."""
        w = self.linear.apply(x) + self.offset
        return float(self.phi.max_step(w, self.linear.apply(d)).min())

    def contains(self, x: Tensor) -> bool:
        """Whether L x + offset is inside dom phi in every row."""
        return bool(self.phi.contains(self.linear.apply(x) + self.offset).all())

    def curvature(self, x: Tensor, norm: float) -> float:
        """A local Lipschitz constant of the gradient: |L|^2 times the Hessian of phi, estimated."""
        w = self.linear.apply(x) + self.offset
        v = noise(w)
        for _ in range(5):  # power iteration, as `LinearMap.norm`
            v = self.phi.hvp(w, v / v.norm().clamp(min=torch.finfo(v.dtype).tiny))
        return norm * norm * float(v.norm()) / self.lam + self.weight


@dataclass
class Block:
    """A block u or z."""

    function: Function
    x: Tensor  # its value
    subgradient: Tensor  # of the function at x
    step: float  # step size
    unsolved: int = 0  # the subproblems that `minimize` left above their tolerance

    def forward_backward(self, coupling: Coupling) -> bool:
        """One proximal gradient step. Returns whether x has moved.

        A function without a prox is linearized together with the coupling. The step size is halved
        until the smooth part c is below its quadratic model,

            c(x+) <= c(x) + <grad c(x), d> + (0.95 / 2 step) |d|^2,   d = x+ - x.

        x+ minimizes the model with 1 in place of 0.95: F falls by (0.05 / 2 step) |d|^2 or more.
        """
        prox, x = self.function.prox, self.x
        value, grad, size, _ = self._smooth_part(coupling, x)
        step, shortest = self.step, SHORTEST * self.step
        while step > shortest:
            new = x - step * grad if prox is None else prox(x - step * grad, step)
            d = new - x
            if not coupling.contains(new):
                # max_step is exact for a gradient step; with a prox it is an estimate.
                step *= min(max(0.9 * coupling.max_step(x, d), 0.05), 0.5)
                continue
            new_value, new_grad, new_size, own = self._smooth_part(coupling, new)
            model = 0.5 * SUFFICIENT * float(d.square().sum()) / step
            if model > ROUNDING * max(size, new_size):
                gap = new_value - value - float((grad * d).sum())
            else:  # the values differ by rounding: the trapezoidal rule for the gradients
                gap = 0.5 * float(((new_grad - grad) * d).sum())
            if gap <= model:
                break
            step *= 0.5
        else:
            return False
        # The next step size grows by GROWTH at most, and is limited by the curvature along d.
        bend, length = float(((new_grad - grad) * d).sum()), float(d.square().sum())
        allowed = TRIED * length / bend if bend > 0.0 else math.inf
        self.step = min(GROWTH * step, max(step, allowed))
        # Optimality of the prox: (x - step grad - x+) / step is a subgradient at x+.
        self.subgradient = own if own is not None else -d / step - grad
        self.x = new
        return length > 0.0

    def _smooth_part(
        self, coupling: Coupling, x: Tensor
    ) -> tuple[float, Tensor, float, Tensor | None]:
        """Value, gradient and size of the linearized terms; the gradient of the function alone."""
        value, grad = coupling.gradient(x)
        if self.function.prox is not None:
            return float(value), grad, float(value), None
        assert self.function.gradient is not None  # ensured by `require_valid`
        own_value, own = self.function.gradient(x)
        return float(value + own_value), grad + own, float(value + own_value.abs()), own

    def minimize(self, coupling: Coupling, reduction: float, enough: float, budget: int) -> bool:
        """Solve (14a) or (14b) in at most `budget` steps. Returns whether x has moved.

        The solver is the closed form if there is one, else L-BFGS for a smooth function, else
        proximal gradient steps. The tolerance of the residual is `reduction` times the first one,
        or `enough` if that is larger; `unsolved` counts where it was not reached.
        """
        function, start = self.function, self.x
        if function.coupled is not None and coupling.weight == 0.0:
            self.x = function.coupled(coupling.other)
            if not coupling.contains(self.x):
                raise ValueError("`coupled` gave a point outside the domain of phi")
            self.subgradient = -coupling.gradient(self.x)[1]
            if function.gradient is not None:
                self.subgradient = function.gradient(self.x)[1]
        elif function.gradient is not None:
            gradient = function.gradient

            def total(flat: Tensor) -> tuple[Tensor, Tensor]:
                x = flat.view_as(start)
                value, grad = gradient(x)
                others, force = coupling.gradient(x)
                return value + others, (grad + force).flatten()

            def max_step(flat: Tensor, d: Tensor) -> Tensor:
                return d.new_tensor(coupling.max_step(flat.view_as(start), d.view_as(start)))

            def tolerance(_: Tensor, first: Tensor) -> Tensor:
                return (reduction * first).clamp(min=enough)

            found = descend(total, start.flatten(), tolerance, max_step=max_step, budget=budget)
            self.x = found.point.view_as(start)
            self.subgradient = gradient(self.x)[1]
            self.unsolved += not bool(found.converged)
        else:
            target, solved = math.nan, False
            for _ in range(budget):
                moved = self.forward_backward(coupling)
                residual = float((self.subgradient + coupling.gradient(self.x)[1]).norm())
                target = max(reduction * residual, enough) if math.isnan(target) else target
                solved = residual <= target
                if solved or not moved:
                    break
            self.unsolved += not solved
        return not torch.equal(self.x, start)
