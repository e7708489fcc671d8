"""Splitting methods for the composite models (1) and (4): alternating minimization and PALM.

Both are for small problems (composite.py) in float64, on any device:

    alternating minimization   u+ = argmin g(u) + (1 / lam) phi(A u - z)                       (14a)
                               z+ = argmin f(z) + (1 / lam) phi(A u+ - z)                      (14b)
        with `prox_weight` c > 0: plus (c / 2) |u - u^t|^2 and (c / 2) |z - z^t|^2
    PALM (Bolte, Sabach, Teboulle 2014)
                               u+ = prox_{tau g}(u - (tau / lam) A^T grad phi(A u - z))
                               z+ = prox_{sigma f}(z + (sigma / lam) grad phi(A u+ - z))

They stop when two residuals are small:

    (5a)   | a + (1 / lam) A^T grad phi(A u - z) |,   a in dg(u)
    (5b)   | b - (1 / lam) grad phi(A u - z) |,       b in df(z)

a and b are gradients, or subgradients from the optimality condition of the last proximal step. The
residuals are upper bounds of the distances of 0 to the subdifferentials of F; for smooth g and f
they are these distances.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from consensus.theory.block import ROUNDING, TRIED, Block, Coupling
from consensus.theory.composite import Function, LinearMap, Model, noise
from consensus.theory.descent import require_count

PATIENCE = 50  # STUCK after this number of iterations without progress beyond rounding
MINUS = LinearMap(torch.neg, torch.neg)

Callback = Callable[[Tensor, Tensor], None]


class Status(Enum):
    """The reason why a method stopped."""

    CONVERGED = "(5a) and (5b) are below the tolerance"
    UNBOUNDED = "F has fallen to -inf"
    BUDGET = "the largest number of iterations is reached"
    STUCK = "u and z did not move in `inner_budget` steps, or F and the residuals do not decrease"


@dataclass(frozen=True)
class Result:
    """The result of a splitting method."""

    u: Tensor  # the minimizer of (1)
    z: Tensor  # the other block of (4)
    dg: Tensor  # the element of dg(u) in (5a); nan before the first update
    df: Tensor  # the element of df(z) in (5b); likewise
    objective: list[float]  # F at the start and after each iteration
    residuals: list[tuple[float, float]]  # (5a) and (5b) after each iteration
    status: Status
    evaluations: int  # calls of g and f: values, gradients and proximal steps
    unsolved: int
    """The subproblems (14a) and (14b) that ended above their tolerance: where there are some, a
    larger `inner_budget` follows the scheme more closely. 0 of PALM, which has none."""

    @property
    def iterations(self) -> int:
        """The number of iterations."""
        return len(self.residuals)


def alternating_minimization(
    model: Model,
    u: Tensor,
    z: Tensor | None = None,
    *,
    prox_weight: float = 0.0,
    relative: float = 1e-6,
    absolute: float = 1e-10,
    budget: int = 1000,
    inner_reduction: float = 0.1,
    inner_budget: int = 200,
    callback: Callback | None = None,
) -> Result:
    """Alternate (14a) and (14b), exact or proximally regularized.

    `Block.minimize` solves the subproblems. It starts at the current value of the block, so that F
    does not rise. Its tolerance is a fraction of the first residual, so that the accuracy grows
    while the method converges.

    Args:
        model: The problem.
        u: The start; float64.
        z: The start; None: A u.
        prox_weight: c of the regularized form; 0: the exact form.
        relative: The tolerance of (5a) is this fraction of |a| + |A| |y|, and that of (5b) of
            |b| + |y|, the forces in balance. y = (1 / lam) grad phi(A u - z).
        absolute: A term added to both tolerances.
        budget: The largest number of iterations.
        inner_reduction: The tolerance of a subproblem, as a fraction of its first residual.
        inner_budget: The largest number of steps of one subproblem.
        callback: Called with (u, z) after every iteration.

    Raises:
        ValueError: If an argument is wrong, the start is not feasible, a function lacks the oracles
            of the method, or F rises: then the oracles of g or f do not belong together.
    """
    if not 0.0 <= prox_weight < math.inf:
        raise ValueError(f"`prox_weight` is {prox_weight}; allowed: a finite number >= 0")
    if not 0.0 < inner_reduction < 1.0:
        raise ValueError(f"`inner_reduction` is {inner_reduction}; allowed: 0 < number < 1")
    require_count("inner_budget", inner_budget, 1)
    oracles = "gradient, prox" if prox_weight > 0.0 else "gradient, prox, coupled"
    run = Iteration(model, u, z, oracles, prox_weight, relative, absolute, callback)

    def update(block: Block, coupling: Coupling) -> bool:
        return block.minimize(coupling, inner_reduction, 0.1 * run.enough, inner_budget)

    return run.iterate(update, budget)


def palm(
    model: Model,
    u: Tensor,
    z: Tensor | None = None,
    *,
    relative: float = 1e-6,
    absolute: float = 1e-10,
    budget: int = 10000,
    callback: Callback | None = None,
) -> Result:
    """PALM: proximal gradient steps for u and for z in turn.

    A function with a gradient and no prox is linearized together with the coupling. Backtracking
    keeps the coupling below its quadratic model and A u - z inside dom phi. See
    `alternating_minimization` for arguments and errors.
    """
    run = Iteration(model, u, z, "gradient, prox", 0.0, relative, absolute, callback)
    return run.iterate(Block.forward_backward, budget)


class Iteration:
    """The outer loop of both methods: validation, block updates, residuals, stopping."""

    def __init__(
        self,
        model: Model,
        u: Tensor,
        z: Tensor | None,
        oracles: str,
        weight: float,
        relative: float,
        absolute: float,
        callback: Callback | None,
    ) -> None:
        if not (relative >= 0.0 and absolute >= 0.0):
            raise ValueError(f"tolerances are {relative} and {absolute}; allowed: numbers >= 0")
        for name, x in (("u", u), ("z", u if z is None else z)):
            if x.dtype != torch.float64 or x.ndim == 0:
                found = f"{x.dtype}" if x.ndim else "a number"
                raise ValueError(f"`{name}` is {found}; allowed: a float64 tensor (..., n)")
        u = u.detach().clone()
        z = model.linear.apply(u).clone() if z is None else z.detach().clone()
        require_valid(model, u, z, oracles)
        self.evaluations = 0
        self.model = replace(model, g=self._counted(model.g), f=self._counted(model.f))
        self.weight, self.relative, self.absolute = weight, relative, absolute
        self.callback = callback
        self.norm = model.linear.norm(u)
        self.enough = absolute
        self.u = Block(self.model.g, u, torch.full_like(u, math.nan), 1.0)
        self.z = Block(self.model.f, z, torch.full_like(z, math.nan), 1.0)
        for block, norm in ((self.u, self.norm), (self.z, 1.0)):
            curvature = self._coupling(block).curvature(block.x, norm)
            block.step = TRIED / curvature if curvature > 0.0 else 1.0

    def iterate(self, update: Callable[[Block, Coupling], bool], budget: int) -> Result:
        """Update u and z in turn until a `Status` is reached."""
        require_count("budget", budget, 0)
        u, z, model = self.u, self.z, self.model
        terms = model.terms(u.x, z.x)
        objective, residuals = [sum(terms)], []
        status, idle, lowest = Status.BUDGET, 0, [math.inf, math.inf]
        for _ in range(budget):
            moved = update(u, self._coupling(u))
            moved = update(z, self._coupling(z)) or moved
            terms = model.terms(u.x, z.x)
            objective.append(sum(terms))
            if objective[-1] == -math.inf:
                status = Status.UNBOUNDED
                break
            rounding = ROUNDING * sum(abs(term) for term in terms)
            if not objective[-1] - objective[-2] <= rounding:
                raise ValueError(
                    f"F rose from {objective[-2]} to {objective[-1]}; `value`, `gradient`, `prox` "
                    "or `coupled` of g or f do not belong together"
                )
            residuals.append(model.residuals(u.x, z.x, u.subgradient, z.subgradient))
            if self.callback is not None:
                self.callback(u.x, z.x)
            y = float(model.force(u.x, z.x).norm())
            scales = float(u.subgradient.norm()) + self.norm * y, float(z.subgradient.norm()) + y
            allowed = [self.absolute + self.relative * scale for scale in scales]
            if all(r <= a < math.inf for r, a in zip(residuals[-1], allowed, strict=True)):
                status = Status.CONVERGED
                break
            falls = objective[-1] < objective[-2] - rounding
            better = [r < 0.999999 * low for r, low in zip(residuals[-1], lowest, strict=True)]
            lowest = [min(pair) for pair in zip(lowest, residuals[-1], strict=True)]
            idle = 0 if falls or any(better) else idle + 1
            if not moved or idle >= PATIENCE:
                status = Status.STUCK
                break
            self.enough = min(allowed)
        return Result(
            u.x,
            z.x,
            u.subgradient,
            z.subgradient,
            objective,
            residuals,
            status,
            self.evaluations,
            u.unsolved + z.unsolved,
        )

    def _coupling(self, block: Block) -> Coupling:
        phi, lam, linear, u, z = self.model.phi, self.model.lam, self.model.linear, self.u, self.z
        if block is u:
            return Coupling(phi, lam, linear, -z.x, z.x, u.x, self.weight)
        target = linear.apply(u.x)
        return Coupling(phi, lam, MINUS, target, target, z.x, self.weight)

    def _counted(self, function: Function) -> Function:
        def counted(call: Any) -> Any:
            def counting(*args: Any) -> Any:
                self.evaluations += 1
                return call(*args)

            return call and counting

        return Function(**{name: counted(call) for name, call in vars(function).items()})


def require_valid(model: Model, u: Tensor, z: Tensor, oracles: str) -> None:
    """Refuse missing oracles, shapes that do not fit, a wrong adjoint and an infeasible start."""
    for name, function in (("g", model.g), ("f", model.f)):
        if all(getattr(function, oracle) is None for oracle in oracles.split(", ")):
            raise ValueError(f"`{name}` has none of the oracles of this method: {oracles}")
    x, v = noise(u), noise(z, seed=1)
    image = model.linear.apply(x)
    back = model.linear.adjoint(v) if image.shape == z.shape else None
    if back is None or back.shape != u.shape:
        raise ValueError(
            f"u is {tuple(u.shape)}, A u {tuple(image.shape)} and z {tuple(z.shape)}; allowed: z "
            "like A u, and A^T z like u"
        )
    products = float((image * v).sum()), float((x * back).sum())
    if abs(products[0] - products[1]) > 1e-8 * float(image.norm() * v.norm()):
        raise ValueError(
            f"<A u, z> is {products[0]}, <u, A^T z> is {products[1]}; allowed: equal products"
        )
    if not bool(model.phi.contains(model.linear.apply(u) - z).all()):
        raise ValueError("the start is outside the domain; allowed: A u - z strictly inside")
    if not math.isfinite(model.objective(u, z)):
        raise ValueError(f"F is {model.objective(u, z)} at the start; allowed: a finite number")
