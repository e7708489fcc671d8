"""The general model: inf-convolution regularized composite problems, solved by splitting.

    min over u     g(u) + e_lam f (A u)                                                          (1)
    min over u, z  F(u, z) = g(u) + f(z) + (1 / lam) phi(A u - z)                                (4)

e_lam f is the phi-envelope of stationarity.py: minimizing (4) over z gives (1). Two methods, for
small problems (composite.py) in float64 on any device:

    alternating minimization   u+ = argmin g(u) + (1 / lam) phi(A u - z)                       (14a)
                               z+ = argmin f(z) + (1 / lam) phi(A u+ - z)                      (14b)
        where `prox_weight` is c > 0, with (c / 2) |u - u^t|^2 and (c / 2) |z - z^t|^2 added
    PALM (Bolte, Sabach, Teboulle 2014)
                               u+ = prox_{tau g}(u - (tau / lam) A^T grad phi(A u - z))
                               z+ = prox_{sigma f}(z + (sigma / lam) grad phi(A u+ - z))

Both stop when 0 is near both subdifferentials, in the Euclidean norm:

    (5a)   | a + (1 / lam) A^T grad phi(A u - z) |,   a in dg(u)
    (5b)   | b - (1 / lam) grad phi(A u - z) |,       b in df(z)

a and b are gradients, or what the last proximal step proves to be a subgradient. So these numbers
are upper bounds of the distances, and the distances themselves where g and f are smooth.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from consensus.core.potentials import Potential
from consensus.theory.composite import Function, LinearMap, Model, noise
from consensus.theory.descent import descend

SUFFICIENT = 0.95  # of |d|^2 / (2 step): the margin below 1 makes F fall, and not only not rise
TRIED = 0.9  # of 1 / L: less than SUFFICIENT, lest rounding halve the steps of a quadratic
GROWTH = 1.5  # of a step size from one iteration to the next, at most
SHORTEST = 1e-20  # a step size below this part of the one that was tried first is no step
ROUNDING = 1e-12  # differences below this part of what is subtracted say nothing
PATIENCE = 50  # iterations without progress that can be told from rounding: stuck


class Status(Enum):
    """How a run ended."""

    CONVERGED = "(5a) and (5b) are below the tolerance"
    BUDGET = "the iterations are spent"
    STUCK = "u and z cannot move, or neither F nor a residual has become smaller for long"


@dataclass(frozen=True)
class Result:
    """What was found.

    Attributes:
        u: The minimizer of (1) that was sought.
        z: The other block of (4).
        dg: The element of dg(u) that (5a) was measured with; nan where none is known yet.
        df: The element of df(z) that (5b) was measured with.
        objective: F at the start and after each iteration.
        residuals: (5a) and (5b) after each iteration.
        status: How the run ended.
        evaluations: Of g and f: values, gradients and proximal steps.
    """

    u: Tensor
    z: Tensor
    dg: Tensor
    df: Tensor
    objective: list[float]
    residuals: list[tuple[float, float]]
    status: Status
    evaluations: int

    @property
    def iterations(self) -> int:
        """How many there were."""
        return len(self.residuals)


# ------------------------------------------------------------------------------------- one block


@dataclass(frozen=True)
class _Coupling:
    """The coupling as a function of one block, c(x) = (1 / lam) phi(L x + offset) + the pull.

    Both blocks are of this form: L = A, offset = -z for u, and L = -1, offset = A u for z. The pull
    (weight / 2) |x - centre|^2 is that of the proximally regularized scheme.
    """

    phi: Potential
    lam: float
    linear: LinearMap
    offset: Tensor
    other: Tensor  # the other block, as `Function.coupled` wants it
    centre: Tensor
    weight: float

    def gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Value and gradient."""
        w = self.linear.apply(x) + self.offset
        value, away = self.phi.value(w).sum() / self.lam, x - self.centre
        grad = self.linear.adjoint(self.phi.grad(w)) / self.lam + self.weight * away
        return value + 0.5 * self.weight * away.square().sum(), grad

    def max_step(self, x: Tensor, d: Tensor) -> float:
        """Where x + t d leaves the domain."""
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
class _Block:
    """One of u and z: where it is, a subgradient of its function there, and its step size."""

    function: Function
    x: Tensor
    subgradient: Tensor
    step: float

    def forward_backward(self, coupling: _Coupling) -> bool:
        """One proximal gradient step. False where no step size decreases F; x is then as it was.

        What is smooth and has no prox is linearized with the coupling. The step size is halved
        until the smooth part c is below its quadratic model,

            c(x+) <= c(x) + <grad c(x), d> + (0.95 / 2 step) |d|^2,   d = x+ - x,

        which makes F fall by (0.05 / 2 step) |d|^2 or more: x+ minimizes the model with 1 for 0.95.
        """
        prox, x = self.function.prox, self.x
        value, grad, size, _ = self._smooth_part(coupling, x)
        step, shortest = self.step, SHORTEST * self.step
        while step > shortest:
            new = x - step * grad if prox is None else prox(x - step * grad, step)
            d = new - x
            if not coupling.contains(new):
                # For a linear step the boundary is at t; a prox may bend, so that it is a guess.
                step *= min(max(0.9 * coupling.max_step(x, d), 0.05), 0.5)
                continue
            new_value, new_grad, new_size, own = self._smooth_part(coupling, new)
            model = 0.5 * SUFFICIENT * float(d.square().sum()) / step
            if model > ROUNDING * max(size, new_size):
                gap = new_value - value - float((grad * d).sum())
            else:  # values no longer tell, but gradients do: the trapezoidal rule
                gap = 0.5 * float(((new_grad - grad) * d).sum())
            if gap <= model:
                break
            step *= 0.5
        else:
            return False
        # Cautiously: longer by half, and only as far as the curvature along d allows.
        bend, length = float(((new_grad - grad) * d).sum()), float(d.square().sum())
        allowed = TRIED * length / bend if bend > 0.0 else math.inf
        self.step = min(GROWTH * step, max(step, allowed))
        # The condition of optimality of the prox: (x - step grad - x+) / step is in dg(x+).
        self.subgradient = own if own is not None else -d / step - grad
        self.x = new
        return length > 0.0

    def _smooth_part(
        self, coupling: _Coupling, x: Tensor
    ) -> tuple[float, Tensor, float, Tensor | None]:
        """Value and gradient of what is linearized, the size of its terms, and its own gradient."""
        value, grad = coupling.gradient(x)
        if self.function.prox is not None:
            return float(value), grad, float(value), None
        assert self.function.gradient is not None  # `_check` has seen to it
        own_value, own = self.function.gradient(x)
        return float(value + own_value), grad + own, float(value + own_value.abs()), own

    def minimize(self, coupling: _Coupling, reduction: float, enough: float, budget: int) -> bool:
        """(14a) or (14b), by the solver that fits. False where x stays as it was.

        Args:
            coupling: The rest of the subproblem.
            reduction: It is solved to this part of the residual that it starts with ...
            enough: ... or down to this residual.
            budget: Steps, at most.
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

            found = descend(
                total,
                start.flatten(),
                lambda _, first: (reduction * first).clamp(min=enough),
                max_step=max_step,
                budget=budget,
            )
            self.x = found.point.view_as(start)
            self.subgradient = gradient(self.x)[1]
        else:
            target = math.nan
            for _ in range(budget):
                if not self.forward_backward(coupling):
                    break
                residual = float((self.subgradient + coupling.gradient(self.x)[1]).norm())
                target = max(reduction * residual, enough) if math.isnan(target) else target
                if residual <= target:
                    break
        return not torch.equal(self.x, start)


# ---------------------------------------------------------------------------------- the two methods

Callback = Callable[[Tensor, Tensor], None]


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
    """(14a) and (14b) in turn, exact or proximally regularized.

    A subproblem is solved in closed form where `Function.coupled` is given, else by L-BFGS where
    the function is smooth, else by proximal gradient steps; always from where the block is, so that
    F does not rise, and always to a part of the residual it starts with, so that precision grows
    as the run converges.

    Args:
        model: What to minimize.
        u: The start; float64.
        z: The start; None: A u.
        prox_weight: c of the regularized form; 0: the exact form.
        relative: (5a) has converged below this part of |a| + |A| |y|, and (5b) below this part of
            |b| + |y|: of the forces that balance. y = (1 / lam) grad phi(A u - z).
        absolute: Is added to both tolerances.
        budget: Iterations, at most.
        inner_reduction: To which part of its first residual a subproblem is solved.
        inner_budget: Steps of one subproblem, at most.
        callback: Is called with (u, z) after every iteration.

    Raises:
        ValueError: If the start is not feasible, shapes, types or tolerances are wrong, `adjoint`
            is not that of `apply`, a function lacks what the method needs, or F rises, which means
            that a `prox` or `coupled` is not what it says.
    """
    if not 0.0 <= prox_weight < math.inf:
        raise ValueError(f"`prox_weight` is {prox_weight}; allowed: a finite number >= 0")
    if not 0.0 < inner_reduction < 1.0:
        raise ValueError(f"`inner_reduction` is {inner_reduction}; allowed: 0 < number < 1")
    ways = "gradient, prox" if prox_weight > 0.0 else "gradient, prox, coupled"
    run = _Run(model, u, z, ways, prox_weight, relative, absolute, callback)

    def update(block: _Block, coupling: _Coupling) -> bool:
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
    """PALM: one proximal gradient step for u, one for z, and so on.

    A function that has a gradient and no prox is linearized with the coupling. Step sizes begin at
    an estimate of the local Lipschitz constant of the gradient of the coupling, are halved until
    the coupling is below its quadratic model and A u - z inside dom phi, and grow slowly.

    Arguments and errors are those of `alternating_minimization`.
    """
    run = _Run(model, u, z, "gradient, prox", 0.0, relative, absolute, callback)
    return run.iterate(_Block.forward_backward, budget)


class _Run:
    """What both methods share: checks, the order of the blocks, residuals, the end."""

    def __init__(
        self,
        model: Model,
        u: Tensor,
        z: Tensor | None,
        ways: str,
        weight: float,
        relative: float,
        absolute: float,
        callback: Callback | None,
    ) -> None:
        if not (relative >= 0.0 and absolute >= 0.0):
            raise ValueError(f"tolerances are {relative} and {absolute}; allowed: numbers >= 0")
        for name, x in (("u", u), ("z", u if z is None else z)):
            if x.dtype != torch.float64:
                raise ValueError(f"`{name}` is {x.dtype}; allowed: float64")
        u = u.detach().clone()
        z = model.linear.apply(u).clone() if z is None else z.detach().clone()
        _check(model, u, z, ways)
        self.evaluations = 0
        self.model = replace(model, g=self._counted(model.g), f=self._counted(model.f))
        self.weight, self.relative, self.absolute = weight, relative, absolute
        self.callback = callback
        self.norm = model.linear.norm(u)
        self.enough = absolute
        unknown = (torch.full_like(x, math.nan) for x in (u, z))
        self.u, self.z = (
            _Block(f, x, a, 1.0)
            for f, x, a in zip((self.model.g, self.model.f), (u, z), unknown, strict=True)
        )
        for block, coupling, norm in (
            (self.u, self._coupling_of_u(), self.norm),
            (self.z, self._coupling_of_z(), 1.0),
        ):
            curvature = coupling.curvature(block.x, norm)
            block.step = TRIED / curvature if curvature > 0.0 else 1.0

    def iterate(self, update: Callable[[_Block, _Coupling], bool], budget: int) -> Result:
        """Update u and z in turn until one of `Status` is so."""
        u, z, model = self.u, self.z, self.model
        terms = model.terms(u.x, z.x)
        objective, residuals = [sum(terms)], []
        status, idle, lowest = Status.BUDGET, 0, [math.inf, math.inf]
        for _ in range(budget):
            moved = update(u, self._coupling_of_u())
            moved = update(z, self._coupling_of_z()) or moved
            terms = model.terms(u.x, z.x)
            objective.append(sum(terms))
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
            if all(r <= a for r, a in zip(residuals[-1], allowed, strict=True)):
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
            u.x, z.x, u.subgradient, z.subgradient, objective, residuals, status, self.evaluations
        )

    def _coupling_of_u(self) -> _Coupling:
        model, u, z = self.model, self.u.x, self.z.x
        return _Coupling(model.phi, model.lam, model.linear, -z, z, u, self.weight)

    def _coupling_of_z(self) -> _Coupling:
        model, z = self.model, self.z.x
        target = model.linear.apply(self.u.x)
        return _Coupling(model.phi, model.lam, MINUS, target, target, z, self.weight)

    def _counted(self, function: Function) -> Function:
        def counted(call: Any) -> Any:
            def counting(*args: Any) -> Any:
                self.evaluations += 1
                return call(*args)

            return call and counting

        return Function(**{name: counted(call) for name, call in vars(function).items()})


MINUS = LinearMap(torch.neg, torch.neg)


def _check(model: Model, u: Tensor, z: Tensor, ways: str) -> None:
    for name, function in (("g", model.g), ("f", model.f)):
        if all(getattr(function, way) is None for way in ways.split(", ")):
            raise ValueError(f"`{name}` has none of what this method can use: {ways}")
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
        raise ValueError(f"<A u, z> is {products[0]}, <u, A^T z> {products[1]}: not one map A")
    if not bool(model.phi.contains(model.linear.apply(u) - z).all()):
        raise ValueError("the start is outside the domain; allowed: A u - z strictly inside")
    if not math.isfinite(model.objective(u, z)):
        raise ValueError(f"F is {model.objective(u, z)} at the start; allowed: a finite number")
