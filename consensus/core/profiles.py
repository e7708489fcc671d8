"""Scalar profiles psi: one function of the squared size s for each potential (Table 2).

With x = w / eta, a profile makes a potential by being applied to s = |x|^2, or to each s_i = x_i^2
(potentials.py). It needs no square root of s, so gradients are finite at 0.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from consensus.core.scalar_equation import Elementwise, NotConvergedError, solve_increasing

OfNumber = Callable[[float], float]

_SMALLEST = 1e-30  # of `Profile.fraction`
_STEPS = 16  # likewise; enough for any r and c, by tests/core/test_scalar_equation.py
_FAR = 1e8  # from here on tau is at the pole, and 1 / (1 + tau^2 / bound) must not underflow
_CONVERGED = 1e-8  # convergence is quadratic: the next step would be below rounding
_LAST = 1e-4  # the effect of a last step, so that the next one's would be its square

ALL_ASSUMPTIONS = frozenset({"A1", "A2", "A3", "A4", "A5"})
"""Assumptions of the theory on phi (the paper, section 3):

(A1) proper, lower semicontinuous and strictly convex; (A2) essentially smooth: differentiable
inside its domain, with a gradient that blows up at the boundary, so that with (A1) phi is Legendre;
(A3) twice continuously differentiable with a positive definite Hessian inside the domain;
(A4) super-coercive: phi(w) / |w| grows without bound; (A5) phi(0) = 0 and grad phi(0) = 0.
"""


@dataclass(frozen=True)
class Profile:
    """A scalar profile psi on [0, bound), as an elementwise function of the *squared* size s.

    `near_zero` has cheaper forms of psi', cheapest first: up to which s, and the function of s, or
    the number, that is psi' up to there within a unit in the last place of float32. `kernel` is a
    name in kernels/triton_kernels.py, which repeats psi' for a GPU; None: the operations of torch.
    """

    psi: Elementwise  # psi(0) = 0
    dpsi: Elementwise  # psi'; 0 at s = 0 where psi' is infinite, since grad phi(0) = 0
    d2psi: Elementwise  # psi''; likewise 0 at 0 where it is infinite
    bound: float = math.inf  # the domain is s < bound
    radius: Elementwise | None = None  # `invert` in closed form; None: by Newton's method
    slope: float | None = None  # psi' where it is a constant: the size need not be computed
    near_zero: tuple[tuple[float, Elementwise | float], ...] = ()
    assumptions: frozenset[str] = ALL_ASSUMPTIONS  # those of (A1) to (A5) that hold
    numbers: tuple[OfNumber, OfNumber] | None = None  # psi' and psi'' of a number, if at hand
    shrunk: Callable[[float, float], float] | None = None  # `shrink` of numbers in closed form
    removed: Callable[[Tensor, float | Tensor], Tensor] | None = None  # likewise, `fraction`
    kernel: Literal["quad", "cube", "tan", "log"] | None = None

    def invert(self, r: Tensor) -> Tensor:
        """The rho >= 0 with 2 psi'(rho^2) rho = r, elementwise; nan where there is none."""
        if self.radius is not None:
            return self.radius(r)
        if math.isfinite(self.bound):
            high = torch.full_like(r, math.sqrt(self.bound))
        else:
            high = torch.ones_like(r)
            for _ in range(math.ceil(math.log2(torch.finfo(r.dtype).max)) // 2):
                short = self._d_rho(high) < r
                if not bool(short.any()):
                    break
                high = torch.where(short, 2.0 * high, high)
        reachable = (r < math.inf) & ((self.bound < math.inf) | (self._d_rho(high) >= r))
        return solve_increasing(self._d_rho, self._d2_rho, r, high, reachable)

    def shrink(self, r: Tensor, c: float | Tensor) -> Tensor:
        """The rho >= 0 with rho + 2 c psi'(rho^2) rho = r; always one, inside the domain."""
        high = r * (1.0 + 4.0 * torch.finfo(r.dtype).eps)  # for small c, rho is r up to rounding
        high = high if math.isinf(self.bound) else high.clamp(max=math.sqrt(self.bound))
        return solve_increasing(
            lambda rho: rho + c * self._d_rho(rho),
            lambda rho: 1.0 + c * self._d2_rho(rho),
            r,
            high,
            r < math.inf,
        )

    def fraction(self, r: Tensor, c: float | Tensor) -> Tensor:
        """1 - rho / r with rho = `shrink(r, c)`, elementwise in float64; its limit at r = 0.

        For hot paths, which `shrink` is not for, and accurate where 1 - rho / r would cancel.
        Newton's method for log(rho + 2 c psi'(rho^2) rho) = log r as an equation in log tau, with
        tau = rho / sqrt(1 - rho^2 / bound): nearly linear near 0 and near a pole, so it takes 3 to
        7 steps. On a CPU it stops when it has converged; a NotConvergedError if it does not, which
        a psi' that is not increasing may cause. Elsewhere it takes a fixed number of steps, so no
        value is read on the host, and the result is nan where they are not enough. The result is
        nan as well where psi'(r^2) overflows.
        """
        r = r.double().clamp(min=_SMALLEST)
        if self.removed is not None:
            return self.removed(r, c)
        tau = r if math.isinf(self.bound) else r.clamp(max=_FAR * math.sqrt(self.bound))
        for _ in range(_STEPS):
            # At a pole tau and rho are far apart: d log rho / d log tau = 1 / (1 + tau^2 / bound).
            stretch = 1.0 + tau.square() / self.bound
            rho = self._below_bound(tau / stretch.sqrt())
            s = rho * rho
            factor = 1.0 + 2.0 * c * self.dpsi(s)
            slope = (factor + 4.0 * c * self.d2psi(s) * s) / (factor * stretch)
            step = (torch.log(rho / r * factor) / slope).clamp(-8.0, 8.0)
            tau = tau * torch.exp(-step)
            converged = r.device.type == "cpu" and not bool((step.abs() > _CONVERGED).any())
            if converged:
                break
        rho = self._below_bound(tau / (1.0 + tau.square() / self.bound).sqrt())
        pull = 2.0 * c * self.dpsi(rho * rho)
        # Outside the domain the boundary decides, whatever psi' is at the last number before it.
        far = (rho < 0.5 * r) | (r > self._below_bound(r))
        found = torch.where(far, 1.0 - rho / r, pull / (1.0 + pull))
        if converged:
            return found
        effect = step.abs() * torch.where(far, rho / (r * stretch), found)
        if r.device.type == "cpu" and bool((effect > _LAST).any()):
            raise _no_fraction(float(effect.amax()))
        return torch.where(effect > _LAST, math.nan, found)

    def fractions(self, r: Sequence[float], c: float, dtype: torch.dtype) -> list[float]:
        """`fraction` of a few numbers of this type; needs `numbers`.

        For each number it takes less time than one operation on a tensor.
        """
        if self.near_zero or self.slope is not None:
            slope = self.slope or self.dpsi_up_to(max(r, default=0.0) ** 2, dtype)
            if not callable(slope):
                pull = 2.0 * slope * c
                return [pull / (1.0 + pull)] * len(r)
        if self.shrunk is not None:
            assert self.numbers is not None
            found, (dpsi, _), shrunk = [], self.numbers, self.shrunk
            for x in r:
                pull = 2.0 * c * dpsi(shrunk(x, c) ** 2) if x < math.inf else math.nan
                found.append(pull / (1.0 + pull))
            return found
        # The step after one of this size would be below rounding.
        converged = _CONVERGED if dtype == torch.float64 else _CONVERGED**0.5
        return [self._fraction_of_number(x, c, converged) for x in r]

    def _fraction_of_number(self, r: float, c: float, converged: float) -> float:
        assert self.numbers is not None
        if not r < math.inf:
            return math.nan
        dpsi, d2psi = self.numbers
        r = max(r, _SMALLEST)
        tau = min(r, _FAR * math.sqrt(self.bound))
        end = math.sqrt(self.bound) * (1.0 - 1e-15)
        for _ in range(_STEPS):
            stretch = 1.0 + tau * tau / self.bound
            rho = min(tau / math.sqrt(stretch), end)
            s = rho * rho
            factor = 1.0 + 2.0 * c * dpsi(s)
            slope = (factor + 4.0 * c * d2psi(s) * s) / (factor * stretch)
            step = min(max(math.log(rho / r * factor) / slope, -8.0), 8.0)
            tau *= math.exp(-step)
            if abs(step) <= converged:
                break
        rho = min(tau / math.sqrt(1.0 + tau * tau / self.bound), end)
        pull = 2.0 * c * dpsi(rho * rho)
        far = rho < 0.5 * r or r > end
        found = 1.0 - rho / r if far else pull / (1.0 + pull)
        effect = abs(step) * (rho / (r * stretch) if far else found)
        if effect > _LAST:
            raise _no_fraction(effect)
        return found

    def _below_bound(self, rho: Tensor) -> Tensor:
        return rho.clamp(max=math.sqrt(self.bound) * (1.0 - 1e-15))

    def _d_rho(self, rho: Tensor) -> Tensor:
        """The derivative of psi(rho^2) by rho."""
        return 2.0 * self.dpsi(rho * rho) * rho

    def _d2_rho(self, rho: Tensor) -> Tensor:
        s = rho * rho
        return 2.0 * self.dpsi(s) + 4.0 * self.d2psi(s) * s

    def dpsi_up_to(self, largest: float, dtype: torch.dtype) -> Elementwise | float:
        """The cheapest form of psi' for sizes s <= `largest` of this type."""
        if dtype == torch.float32:
            for end, form in self.near_zero:
                if largest <= end:
                    return form
        return self.dpsi


def _no_fraction(effect: float) -> NotConvergedError:
    return NotConvergedError(
        f"a proximal step did not converge in {_STEPS} steps: the last one changed it by "
        f"{effect:.1e}; allowed: a psi' with psi'(s) s increasing"
    )


# -------------------------------------------------------------------------------- Table 2

QUAD = Profile(  # psi = s, so phi(w) = |x|^2 as in Table 2, not half of it
    psi=lambda s: s,
    dpsi=torch.ones_like,
    d2psi=torch.zeros_like,
    radius=lambda r: 0.5 * r,
    slope=1.0,
    numbers=(lambda s: 1.0, lambda s: 0.0),
    kernel="quad",
)


def _tan_near_zero(s: Tensor) -> Tensor:
    """The first terms of 1 / cos^2 s = 1 + s^2 + (2/3) s^4 + (17/45) s^6 + ..."""
    s2 = s * s
    return s2.addcmul_(s2, s2, value=2.0 / 3.0).add_(1.0)


TAN = Profile(  # psi = tan s on s < pi / 2
    psi=torch.tan,
    dpsi=lambda s: torch.cos(s).square().reciprocal(),
    d2psi=lambda s: 2.0 * torch.tan(s) / torch.cos(s).square(),
    bound=0.5 * math.pi,
    near_zero=((2.0**-12, 1.0), (0.05, _tan_near_zero)),
    numbers=(lambda s: math.cos(s) ** -2, lambda s: 2.0 * math.tan(s) * math.cos(s) ** -2),
    kernel="tan",
)

LOG = Profile(  # psi = -log(1 - s) on s < 1
    psi=lambda s: -torch.log1p(-s),
    dpsi=lambda s: (1.0 - s).reciprocal(),
    d2psi=lambda s: (1.0 - s).square().reciprocal(),
    bound=1.0,
    numbers=(lambda s: 1.0 / (1.0 - s), lambda s: (1.0 - s) ** -2),
    radius=lambda r: r / (1.0 + torch.hypot(torch.ones_like(r), r)),
    kernel="log",
)


def _power_of(s: Tensor, exponent: float) -> Tensor:
    """s^exponent with 0 at s = 0 also where the exponent is negative."""
    power = s.sqrt() if exponent == 0.5 else s**exponent
    return power if exponent >= 0 else torch.where(s > 0, power, 0.0)


def _power_of_number(s: float, exponent: float) -> float:
    """`_power_of` a number; inf on overflow, as of tensors."""
    if s == 0.0 and exponent < 0.0:
        return 0.0
    try:
        return math.pow(s, exponent)
    except OverflowError:
        return math.inf


def _power_radius(p: float, eps: float) -> Elementwise | None:
    if eps == 0.0:
        return lambda r: (r / p) ** (1.0 / (p - 1.0))
    if p == 3.0:  # 3 rho^2 + 2 eps rho = r
        return lambda r: r / (eps + torch.sqrt(eps * eps + 3.0 * r))
    return None


def _cubic_shrunk(eps: float) -> Callable[[float, float], float]:
    """The root rho of 3 c rho^2 + (1 + 2 c eps) rho = r, without cancellation."""

    def shrunk(r: float, c: float) -> float:
        b = 1.0 + 2.0 * c * eps
        return 2.0 * r / (b + math.sqrt(b * b + 12.0 * c * r))

    return shrunk


def power_profile(p: float, eps: float = 0.0) -> Profile:
    """psi(s) = s^(p/2) + eps s. (A3) fails at 0 unless p = 2, or p > 2 and eps > 0.

    A ValueError if p <= 1 (not differentiable at 0) or eps < 0 (not convex).
    """
    if not (1.0 < p < math.inf):
        raise ValueError(f"`p` is {p}; |x|^p is a smooth convex potential for finite p > 1")
    if not (0.0 <= eps < math.inf):
        raise ValueError(f"`eps` is {eps}; allowed: a finite number >= 0")
    smooth = p == 2.0 or (p > 2.0 and eps > 0.0)
    return Profile(
        psi=lambda s: s ** (0.5 * p) + eps * s,
        dpsi=lambda s: (0.5 * p) * _power_of(s, 0.5 * p - 1.0) + eps,
        d2psi=(
            torch.zeros_like  # 0 times an overflowing 1 / s would be nan
            if p == 2.0
            else lambda s: (0.5 * p) * (0.5 * p - 1.0) * _power_of(s, 0.5 * p - 2.0)
        ),
        radius=_power_radius(p, eps),
        assumptions=ALL_ASSUMPTIONS if smooth else ALL_ASSUMPTIONS - {"A3"},
        numbers=(
            lambda s: (0.5 * p) * _power_of_number(s, 0.5 * p - 1.0) + eps,
            lambda s: (0.5 * p) * (0.5 * p - 1.0) * _power_of_number(s, 0.5 * p - 2.0),
        ),
        shrunk=_cubic_shrunk(eps) if p == 3.0 else None,
        kernel="cube" if p == 3.0 and eps == 0.0 else None,
    )
