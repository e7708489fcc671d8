"""Legendre potentials phi: one scalar profile psi and one notion of size (Table 2).

With x = w / eta, a *radial* potential takes s = |x|^2 and gives psi(s); a *separable* one takes
s_i = x_i^2 and gives sum_i psi(s_i). Everything else follows from psi, psi' and psi'' alone:

    grad phi(w)    = (2 / eta) psi'(s) x                                 finite at 0
    Hess phi(w) v  = (2 / eta^2) (psi'(s) v + 2 psi''(s) x <x, v>)
    grad phi*(y)   = eta rho y' / |y'|,  2 psi'(rho^2) rho = |y'|,  y' = eta y      (Lemma 3.2)
    dom phi        = {s < bound}, see feasibility.py

The formulas are written once, in `Potential`; `Radial` and `Separable` (sizes.py) define the inner
product. Equation (18) is the same potential with one inner product per layer (layerwise.py).

To add a potential, register a function that makes it; its keyword arguments become options:

    import torch
    from consensus import POTENTIALS, Potential, Profile, Radial
    @POTENTIALS.register("quartic")
    def quartic() -> Potential:
        return Potential(Profile(lambda s: s**2, lambda s: 2 * s, lambda s: 2 * torch.ones_like(s),
                                 assumptions=frozenset({"A1", "A2", "A4", "A5"})), Radial())
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from consensus.core import linear_growth, profiles, sizes
from consensus.core.feasibility import Domain
from consensus.core.flat import Scalar, column
from consensus.core.profiles import Profile, power_profile
from consensus.core.scalar_equation import Elementwise
from consensus.core.sizes import Radial, Separable, Size
from consensus.registry import Registry

_FEW = 64  # numbers for which Python takes less time than operations on tensors


class Potential(Domain):
    """phi(w) = sum over groups of psi(s), s = |scale * w|^2, on blocks (..., n).

    A function of `w`, whose last axis holds the coordinates; leading axes are independent points.
    float32 and float64, any device. The domain and its line search are `Domain`.

    Args:
        profile: psi.
        size: The groups of coordinates.
        scale: Multiplies w: a number, or a tensor that broadcasts against (..., n). 1 / eta of
            equation (18), and the root of the diagonal of Q in a scaled potential.
    """

    name = ""  # that in POTENTIALS, for messages

    def __init__(self, profile: Profile, size: Size, scale: float | Tensor = 1.0) -> None:
        if isinstance(size, type):
            raise ValueError(f"size is the class {size.__name__}; allowed: {size.__name__}()")
        self.profile, self.bound = profile, profile.bound
        self.size, self.scale = size, scale

    @property
    def label(self) -> str:
        """The potential in a message."""
        return f"potential {self.name or repr(self)}"

    @property
    def assumptions(self) -> frozenset[str]:
        """The subset of (A1) to (A5) that phi satisfies."""
        return self.profile.assumptions

    def value(self, w: Tensor) -> Tensor:
        """phi(w), inf outside the domain. (..., n) -> (...)."""
        return self.values(w).sum(-1)

    def values(self, w: Tensor) -> Tensor:
        """The terms of phi(w), one a group, inf outside the domain. (..., n) -> (..., G)."""
        s = self._sizes(self._scaled(w))
        return self._inside(s, self.profile.psi(s), math.inf)

    def grad(self, w: Tensor) -> Tensor:
        """Grad phi(w), nan outside the domain. (..., n) -> (..., n)."""
        x = self._scaled(w)
        if self.profile.slope is not None:
            return self._scaled(2.0 * self.profile.slope * x)
        factor = self._factor(self._sizes(x), self.profile.dpsi)
        return self._scaled(self.size.scale(factor, x))

    def grad_(self, w: Tensor, reach: Tensor | None = None) -> Tensor:
        """`grad` in place of w, on a CPU without another vector of n; `reach`: of w, if known."""
        dpsi = self.profile.dpsi if self.profile.slope is None else self.profile.slope
        if isinstance(self.size, Separable) and w.device.type == "cpu":
            if w.shape[-1] > sizes.CHUNK:
                return self._grad_by_chunks_(w)
            if self.profile.near_zero:
                # All of w is near 0 in the usual case: that saves an elementary function.
                dpsi = self.dpsi_within(self.reach(w) if reach is None else reach)
        x = self._scaled_(w)
        if not callable(dpsi):
            return self._scaled_(x.mul_(2.0 * dpsi))
        return self._scaled_(self.size.scale_(self._factor(self._sizes(x), dpsi), x))

    def _factor(self, s: Tensor, dpsi: Elementwise) -> Tensor:
        """2 psi'(s), nan outside the domain."""
        return self._inside(s, 2.0 * dpsi(s), math.nan)

    def _grad_by_chunks_(self, w: Tensor) -> Tensor:
        scale = self._scale_for(w)
        for start in range(0, w.shape[-1], sizes.CHUNK):
            own = scale
            if isinstance(scale, Tensor) and scale.ndim and scale.shape[-1] > 1:
                own = scale[..., start : start + sizes.CHUNK]
            part = Potential(self.profile, self.size, own)
            part.grad_(w[..., start : start + sizes.CHUNK])
        return w

    def grad_and_reach_(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """`grad_` and `reach`, with shared computations. (..., n) -> (..., n), (..., G or 1)."""
        if isinstance(self.size, Separable) or self.profile.slope is not None:
            reach = self.reach(w)
            return self.grad_(w, reach), reach
        x = self._scaled_(w)
        s = self._sizes(x)
        factor = self._factor(s, self.profile.dpsi)
        return self._scaled_(self.size.scale_(factor, x)), s.sqrt()

    def hvp(self, w: Tensor, v: Tensor) -> Tensor:
        """The Hessian of phi at w times v. (..., n), (..., n) -> (..., n)."""
        x, v = self._scaled(w), self._scaled(v)
        s = self._sizes(x)
        isotropic = self._factor(s, self.profile.dpsi)
        along_x = 4.0 * self.profile.d2psi(s) * self.size.inner(x, v)
        return self._scaled(self.size.scale(isotropic, v) + self.size.scale(along_x, x))

    def weights(self, w: Tensor) -> Tensor:
        """2 psi'(s) of each group: grad phi(w) = scale^2 weight w. (..., n) -> (..., G)."""
        return 2.0 * self.profile.dpsi(self._sizes(self._scaled(w)))

    def stiffness(self, w: Tensor) -> Tensor:
        """The largest curvature of each group at w, the norm of its Hessian. -> (..., G).

        Curvature along w that overflows, as that of |x|^1.2 next to 0, does not count.
        """
        s = self._sizes(self._scaled(w))
        across = 2.0 * self.profile.dpsi(s)
        along = across + 4.0 * self.profile.d2psi(s) * s
        along = torch.where(along.isfinite(), along, 0.0)
        scale = self._scale_for(w)
        if isinstance(self.size, Separable):
            return along * scale * scale
        if isinstance(scale, Tensor):
            scale = scale.amax()
        return torch.maximum(across, along) * scale * scale

    def conjugate_grad(self, y: Tensor) -> Tensor:
        """Grad phi*(y), the inverse of `grad` (Lemma 3.2). (..., n) -> (..., n).

        nan where y is not a gradient of phi, which happens only where (A4) fails.
        """
        y = y / self._scale_for(y)
        r = self.size.norm(y)
        ratio = torch.where(r > 0, self.profile.invert(r) / r, 0.0)
        return self.size.scale(ratio, y) / self._scale_for(y)

    def prox(self, b: Tensor, step: Scalar, u: Tensor | None = None) -> Tensor:
        """The proximal step: the minimizer of |w - b|^2 / 2 + step phi(w). (..., n) -> (..., n).

        Any b is allowed, and the result is inside dom phi. Each group moves along its own ray, so
        there is one scalar equation per group.

        `step` > 0 may be a tensor over the leading axes. `u`, which broadcasts against b, is given
        where z = u - w will be stored: w is kept as far inside as by `feasible_step`, so that
        rounding does not move u - z outside. A ValueError if phi is radial, not quadratic, and has
        a weight for each coordinate.
        """
        scale = self._scale_for(b)
        c = column(step) * scale * scale  # in units of x: x + 2 c psi'(s) x = scale b
        if self.profile.slope is not None:
            return b / (1.0 + 2.0 * self.profile.slope * c)
        if isinstance(self.size, Radial) and isinstance(c, Tensor) and c.ndim and c.shape[-1] > 1:
            raise ValueError("`prox` of a radial potential with a weight for each coordinate")
        r = self.size.norm(self._scaled(b))
        rho = self.profile.shrink(r, c)
        if self.bounded and u is not None:
            rho = torch.minimum(rho, self._safe_radius(self.reach(u)).clamp(min=0.0))
        return self.size.scale(torch.where(r > 0, rho / r, 0.0), b)

    def fraction(self, w: Tensor, step: float) -> Tensor:
        """1 - |p| / |w| of each group, p = `prox(w, step)`: the part of w that the step removes.

        At w = 0 it is the limit; for step = inf it is 1. Never reads a value on the host unless w
        is on a CPU. A ValueError as for `prox`, also for quadratic potentials.
        (..., n) -> (..., G), in the dtype of w.
        """
        return self.fraction_of(self.size.norm(self._scaled(w)), step)

    def fraction_of(self, r: Tensor, step: float) -> Tensor:
        """`fraction` from r = |scale w| of each group. (..., G) -> (..., G)."""
        if math.isinf(step):
            return torch.ones_like(r)
        scale = self._scale_for(r)
        c = step * scale * scale
        if isinstance(self.size, Radial) and isinstance(c, Tensor) and c.ndim and c.shape[-1] > 1:
            raise ValueError("a proximal step of a radial potential with several weights")
        if self._takes_numbers(r):
            found = self.profile.fractions(r.flatten().tolist(), float(c), r.dtype)
            return r.new_tensor(found).view_as(r)
        slope = self._slope_within(r)
        if slope is not None:
            pull = 2.0 * slope * c
            return torch.ones_like(r) * (pull / (1.0 + pull))
        return self.profile.fraction(r, c).to(r.dtype)

    def _takes_numbers(self, r: Tensor) -> bool:
        """Whether Python computes the fractions in less time than operations on tensors."""
        few = r.device.type == "cpu" and r.numel() <= _FEW
        return few and self.profile.numbers is not None and not isinstance(self.scale, Tensor)

    def common_fraction(self, w: Tensor, step: float) -> float | None:
        """`fraction` if it is known to be one number for all groups, otherwise None."""
        reach, found = self.common_within(w.dtype, step)
        if math.isfinite(reach):
            if w.device.type != "cpu" or not isinstance(self.size, Separable):
                return None
            return found if self.size.furthest(w) <= reach else None
        return found

    def common_within(self, dtype: torch.dtype, step: float) -> tuple[float, float | None]:
        """The sizes |w| up to which `fraction` is one number for all groups, and this number.

        (inf, None) if there is none.
        """
        if math.isinf(step):
            return math.inf, 1.0
        if isinstance(self.scale, Tensor):
            return math.inf, None
        reach, slope = math.inf, self.profile.slope
        if slope is None and dtype == torch.float32 and self.profile.near_zero:
            end, form = self.profile.near_zero[0]
            if not callable(form):
                reach, slope = math.sqrt(end) / self.scale, form
        if slope is None:
            return math.inf, None
        pull = 2.0 * slope * step * self.scale * self.scale
        return reach, pull / (1.0 + pull)

    def _slope_within(self, reach: Tensor) -> float | None:
        """Psi' if it is known to be one number for all s <= reach^2, otherwise None."""
        slope: Elementwise | float | None = self.profile.slope
        if slope is None and self.profile.near_zero and reach.device.type == "cpu":
            slope = self.dpsi_within(reach)
        return None if callable(slope) else slope

    def dpsi_within(self, reach: Tensor) -> Elementwise | float:
        """The cheapest form of psi' for all s <= reach^2. Brings one number to the host."""
        return self.profile.dpsi_up_to(float(reach.amax()) ** 2, reach.dtype)

    def __repr__(self) -> str:
        scale = "tensor" if isinstance(self.scale, Tensor) else self.scale
        name = f"{self.name!r}, " if self.name else ""
        return f"{type(self).__name__}({name}size={self.size!r}, scale={scale})"


class Potentials(Registry[Potential]):
    """A table of potentials, which gives each its name."""

    def make(self, name: str, /, **options: Any) -> Potential:
        """The potential with the given options; ValueError as for every table."""
        potential = super().make(name, **options)
        potential.name = name
        return potential


POTENTIALS = Potentials("potential", Potential)


@POTENTIALS.register("quad")
def quad() -> Potential:
    """phi(x) = |x|^2: synchronous EASGD."""
    return Potential(profiles.QUAD, Radial())


@POTENTIALS.register("cubic")
def cubic(eps: float = 0.0) -> Potential:
    """phi(x) = |x|^3 + eps |x|^2; (A3) fails at 0 unless eps > 0."""
    return Potential(power_profile(3.0, eps), Radial())


@POTENTIALS.register("tan")
def tan() -> Potential:
    """phi(x) = tan |x|^2 on |x|^2 < pi/2."""
    return Potential(profiles.TAN, Radial())


@POTENTIALS.register("tan_sep")
def tan_sep() -> Potential:
    """phi(x) = sum_i tan x_i^2 on x_i^2 < pi/2."""
    return Potential(profiles.TAN, Separable())


@POTENTIALS.register("log")
def log() -> Potential:
    """phi(x) = -log(1 - |x|^2) on |x| < 1."""
    return Potential(profiles.LOG, Radial())


@POTENTIALS.register("log_sep")
def log_sep() -> Potential:
    """phi(x) = -sum_i log(1 - x_i^2) on |x_i| < 1."""
    return Potential(profiles.LOG, Separable())


@POTENTIALS.register("scaled_quad")
def scaled_quad(weight: float | Sequence[float] | Tensor = 1.0) -> Potential:
    """phi(x) = x^T Q x, Q diagonal and positive.

    `weight` is the diagonal of Q: one number, or one for each coordinate, or, inside `Layerwise`,
    one for each layer; a ValueError unless all are positive and finite.
    """
    q = torch.as_tensor(weight, dtype=torch.float64)
    if not bool(((q > 0) & (q < math.inf)).all()):
        raise ValueError(f"`weight` is {weight}; allowed: finite numbers > 0")
    scale = math.sqrt(q.item()) if q.numel() == 1 else q.sqrt()
    return Potential(profiles.QUAD, Radial(), scale)


@POTENTIALS.register("pseudo_huber")
def pseudo_huber(separable: bool = True) -> Potential:
    """phi(x) = sum_i sqrt(1 + x_i^2) - 1, a smooth |x|_1: its consensus is nearly the median."""
    return Potential(linear_growth.PSEUDO_HUBER, Separable() if separable else Radial())


@POTENTIALS.register("huber")
def huber(separable: bool = False) -> Potential:
    """phi(x) = |x|^2 / 2 up to |x| = 1, |x| - 1/2 beyond: the force is x clipped to length 1."""
    return Potential(linear_growth.HUBER, Separable() if separable else Radial())


@POTENTIALS.register("log_cosh")
def log_cosh(separable: bool = True) -> Potential:
    """phi(x) = sum_i log cosh x_i, another smooth |x|_1."""
    return Potential(linear_growth.LOG_COSH, Separable() if separable else Radial())


@POTENTIALS.register("power")
def power(p: float = 4.0, eps: float = 0.0, separable: bool = False) -> Potential:
    """phi(x) = |x|^p + eps |x|^2, p > 1."""
    return Potential(power_profile(p, eps), Separable() if separable else Radial())
