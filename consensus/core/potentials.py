"""Legendre potentials phi: one scalar profile psi and one notion of size (Table 2).

With x = w / eta, a *radial* potential takes s = |x|^2 and gives psi(s); a *separable* one takes
s_i = x_i^2 and gives sum_i psi(s_i). Everything else follows from psi, psi' and psi'' alone:

    grad phi(w)    = (2 / eta) psi'(s) x                                 finite at 0
    Hess phi(w) v  = (2 / eta^2) (psi'(s) v + 2 psi''(s) x <x, v>)
    grad phi*(y)   = eta rho y' / |y'|,  2 psi'(rho^2) rho = |y'|,  y' = eta y      (Lemma 3.2)
    dom phi        = {s < bound}, so a ray leaves it where a quadratic equation says

The formulas are written once, in `Potential`; `Radial` and `Separable` say what an inner product
is, and equation (18) is the same potential with one inner product per layer (layerwise.py).

To add a potential, register a function that makes it; its keyword arguments become options:

    from consensus import POTENTIALS, Potential, Profile, Radial

    @POTENTIALS.register("quartic")
    def quartic() -> Potential:
        return Potential(Profile(psi=lambda s: s**2, dpsi=lambda s: 2 * s,
                                 d2psi=lambda s: 2 * torch.ones_like(s),
                                 assumptions=frozenset({"A1", "A2", "A4", "A5"})), Radial())
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from consensus.core.flat import Scalar, column
from consensus.core.profiles import (
    LOG,
    LOG_COSH,
    PSEUDO_HUBER,
    QUAD,
    TAN,
    Profile,
    power_profile,
)
from consensus.registry import Registry

# ---------------------------------------------------------------------------- two notions of size


class Size(ABC):
    """Groups of coordinates that share one s. A block (..., n) has sizes (..., G)."""

    @abstractmethod
    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        """Inner product of each group. (..., n), (..., n) -> (..., G)."""

    @abstractmethod
    def scale(self, factor: Tensor, x: Tensor) -> Tensor:
        """Each coordinate times the factor of its group. (..., G), (..., n) -> (..., n)."""

    @abstractmethod
    def scale_(self, factor: Tensor, x: Tensor) -> Tensor:
        """`scale` in place of x."""

    @abstractmethod
    def norm(self, x: Tensor) -> Tensor:
        """Length of each group. (..., n) -> (..., G)."""

    @abstractmethod
    def largest(self, x: Tensor) -> Tensor:
        """A bound on `norm(x)` that broadcasts against (..., G) and is cheap to compute."""

    @abstractmethod
    def length(self, x: Tensor) -> Tensor:
        """A coarser bound on `norm(x)`, and cheaper still. (..., n) -> (..., 1)."""

    @abstractmethod
    def exit(self, x: Tensor, d: Tensor, bound: float | Tensor) -> Tensor:
        """The larger root t of |x + t d|^2 = bound, inf where d = 0. (..., n) -> (..., G)."""

    @abstractmethod
    def over(self, layers: Sequence[tuple[int, int]]) -> "Size":
        """The same notion of size, layer by layer."""


class Separable(Size):
    """Every coordinate is a group of its own, G = n."""

    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        """x_i y_i."""
        return x * y

    def scale(self, factor: Tensor, x: Tensor) -> Tensor:
        """factor_i x_i."""
        return factor * x

    def scale_(self, factor: Tensor, x: Tensor) -> Tensor:
        """factor_i x_i in place of x_i."""
        return x.mul_(factor)

    def norm(self, x: Tensor) -> Tensor:
        """|x_i|."""
        return x.abs()

    def largest(self, x: Tensor) -> Tensor:
        """max_i |x_i|: one number instead of n."""
        # Without a vector of the |x_i|; torch.aminmax along an axis is ten times as slow.
        return torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True))

    def length(self, x: Tensor) -> Tensor:
        """max_i |x_i|."""
        return self.largest(x)

    def exit(self, x: Tensor, d: Tensor, bound: float | Tensor) -> Tensor:
        """(R - x_i sign d_i) / |d_i|, R = sqrt(bound): linear, since x_i is one number."""
        radius = bound.sqrt() if isinstance(bound, Tensor) else math.sqrt(bound)
        return (radius - x * d.sign()) / d.abs()

    def over(self, layers: Sequence[tuple[int, int]]) -> "Separable":
        """Itself: a sum over coordinates is a sum over layers already."""
        del layers
        return self

    def __repr__(self) -> str:
        return "Separable()"


class Radial(Size):
    """One group: the whole last axis, or each of the given layers, G = L.

    Args:
        layers: (start, stop) slices that partition the last axis; None: one layer.
    """

    def __init__(self, layers: Sequence[tuple[int, int]] | None = None) -> None:
        self.layers = None if layers is None else tuple(layers)
        self._lengths = None if layers is None else [stop - start for start, stop in layers]

    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        """<x_l, y_l>."""
        if self._lengths is None:
            return _inner(x, y).unsqueeze(-1)
        if x.device.type != "cpu" or x.shape[-1] <= CHUNK:
            products = torch.split(x * y, self._lengths, -1)
            return torch.stack([product.sum(-1) for product in products], -1)
        pieces = zip(
            torch.split(x, self._lengths, -1), torch.split(y, self._lengths, -1), strict=True
        )
        return torch.stack([_inner(a, b) for a, b in pieces], -1)

    def scale(self, factor: Tensor, x: Tensor) -> Tensor:
        """factor_l x_l."""
        if self._lengths is None:
            return factor * x
        pieces = zip(torch.split(factor, 1, -1), torch.split(x, self._lengths, -1), strict=True)
        return torch.cat([f * piece for f, piece in pieces], -1)

    def scale_(self, factor: Tensor, x: Tensor) -> Tensor:
        """factor_l x_l in place of x_l."""
        if self._lengths is None:
            return x.mul_(factor)
        pieces = torch.split(x, self._lengths, -1)
        for f, piece in zip(torch.split(factor, 1, -1), pieces, strict=True):
            piece.mul_(f)
        return x

    def norm(self, x: Tensor) -> Tensor:
        """|x_l|."""
        return self.inner(x, x).sqrt()

    def largest(self, x: Tensor) -> Tensor:
        """|x_l| itself."""
        return self.norm(x)

    def length(self, x: Tensor) -> Tensor:
        """|x|, of all layers together."""
        length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return length

    def exit(self, x: Tensor, d: Tensor, bound: float | Tensor) -> Tensor:
        """The larger root of a quadratic, in the form that subtracts no nearly equal numbers."""
        a, b, c = self.inner(d, d), self.inner(x, d), self.inner(x, x) - bound
        root = (b * b - a * c).sqrt()
        t = torch.where(b > 0, -c / (b + root), (root - b) / a)
        return torch.where(a > 0, t, math.inf)

    def over(self, layers: Sequence[tuple[int, int]]) -> "Radial":
        """One size for each of the given layers."""
        return Radial(layers)

    def __repr__(self) -> str:
        return f"Radial(layers={self.layers})"


CHUNK = 1 << 17
"""Coordinates that are worked on at once on a CPU: what lies between two operations stays in the
cache, and no vector of n coordinates has to be allocated for it."""


def _inner(x: Tensor, y: Tensor) -> Tensor:
    """<x, y> along the last axis. (..., n), (..., n) -> (...)."""
    if x.device.type != "cpu" or x.shape[-1] <= CHUNK:
        return (x * y).sum(-1)
    pairs = zip(torch.split(x, CHUNK, -1), torch.split(y, CHUNK, -1), strict=True)
    return torch.stack([(a * b).sum(-1) for a, b in pairs], -1).sum(-1)


# -------------------------------------------------------------------------------- the potential


class Potential:
    """phi(w) = sum over groups of psi(s), s = |scale * w|^2, on blocks (..., n).

    A function of `w`, whose last axis holds the coordinates; leading axes are independent points.
    float32 and float64, any device.

    Args:
        profile: psi.
        size: What a group is.
        scale: Multiplies w: a number, or a tensor that broadcasts against (..., n). 1 / eta of
            equation (18), and the root of the diagonal of Q in a scaled potential.
    """

    def __init__(self, profile: Profile, size: Size, scale: float | Tensor = 1.0) -> None:
        self.profile = profile
        self.size = size
        self.scale = scale

    @property
    def bounded(self) -> bool:
        """Whether dom phi is not the whole space, so that steps must be cut to stay inside."""
        return math.isfinite(self.profile.bound)

    @property
    def assumptions(self) -> frozenset[str]:
        """Which of (A1) to (A5) phi satisfies."""
        return self.profile.assumptions

    def value(self, w: Tensor) -> Tensor:
        """phi(w), inf outside the domain. (..., n) -> (...)."""
        s = self._sizes(self._scaled(w))
        return self._inside(s, self.profile.psi(s), math.inf).sum(-1)

    def grad(self, w: Tensor) -> Tensor:
        """Grad phi(w), nan outside the domain. (..., n) -> (..., n)."""
        x = self._scaled(w)
        if self.profile.slope is not None:
            return self._scaled(2.0 * self.profile.slope * x)
        s = self._sizes(x)
        factor = self._inside(s, 2.0 * self.profile.dpsi(s), math.nan)
        return self._scaled(self.size.scale(factor, x))

    def grad_(self, w: Tensor) -> Tensor:
        """`grad` in place of w, on a CPU without another vector of n. (..., n) -> (..., n)."""
        if isinstance(self.size, Separable) and w.device.type == "cpu":
            if w.shape[-1] > CHUNK:
                return self._grad_by_chunks_(w)
            if self.profile.near_zero:
                return self._grad_within_(w, self.reach(w))
        x = self._scaled_(w)
        if self.profile.slope is not None:
            return self._scaled_(x.mul_(2.0 * self.profile.slope))
        s = self._sizes(x)
        factor = self._inside(s, 2.0 * self.profile.dpsi(s), math.nan)
        return self._scaled_(self.size.scale_(factor, x))

    def _grad_by_chunks_(self, w: Tensor) -> Tensor:
        scale = self._scale_for(w)
        for start in range(0, w.shape[-1], CHUNK):
            own = scale
            if isinstance(scale, Tensor) and scale.ndim and scale.shape[-1] > 1:
                own = scale[..., start : start + CHUNK]
            part = Potential(self.profile, self.size, own)
            part.grad_(w[..., start : start + CHUNK])
        return w

    def _grad_within_(self, w: Tensor, reach: Tensor) -> Tensor:
        """`grad_` of a separable phi on a CPU, by the form of psi' that serves as far as w reaches.

        Where all of w is near 0, which is nearly always, that saves an elementary function.
        """
        dpsi = self.dpsi_within(reach)
        x = self._scaled_(w)
        if isinstance(dpsi, float):
            return self._scaled_(x.mul_(2.0 * dpsi))
        s = x * x
        return self._scaled_(x.mul_(self._inside(s, 2.0 * dpsi(s), math.nan)))

    def grad_and_reach_(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """`grad_` and `reach`, which share their work. (..., n) -> (..., n), (..., G or 1)."""
        if isinstance(self.size, Separable) or self.profile.slope is not None:
            reach = self.reach(w)
            if w.device.type == "cpu" and w.shape[-1] <= CHUNK and self.profile.near_zero:
                return self._grad_within_(w, reach), reach
            return self.grad_(w), reach
        x = self._scaled_(w)
        s = self._sizes(x)
        factor = self._inside(s, 2.0 * self.profile.dpsi(s), math.nan)
        return self._scaled_(self.size.scale_(factor, x)), s.sqrt()

    def hvp(self, w: Tensor, v: Tensor) -> Tensor:
        """The Hessian of phi at w times v. (..., n), (..., n) -> (..., n)."""
        x, v = self._scaled(w), self._scaled(v)
        s = self._sizes(x)
        isotropic = self._inside(s, 2.0 * self.profile.dpsi(s), math.nan)
        along_x = 4.0 * self.profile.d2psi(s) * self.size.inner(x, v)
        return self._scaled(self.size.scale(isotropic, v) + self.size.scale(along_x, x))

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

        Any b will do, and the result is inside dom phi. Each group moves along its own ray, so that
        there is one scalar equation for it.

        Args:
            b: The point.
            step: A number > 0, or a tensor that broadcasts over the leading axes.
            u: Where z = u - w is what will be stored: w is kept as far inside as `feasible_step`
                does, so that rounding does not bring u - z outside. Broadcasts against b.

        Raises:
            ValueError: If a radial phi, other than a quadratic one, weighs the coordinates of a
                group differently.
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

    def contains(self, w: Tensor) -> Tensor:
        """Whether w lies strictly inside dom phi, as stored in floating point. -> bool (...)."""
        if isinstance(self.size, Separable):  # rounding is monotone: the largest decides for all
            return self.reach(w).square().squeeze(-1) < self.profile.bound
        return (self._sizes(self._scaled(w)) < self.profile.bound).all(-1)

    def max_step(self, w: Tensor, d: Tensor) -> Tensor:
        """The end of the interval of t >= 0 with w + t d in dom phi; inf where there is none.

        The open end, in exact arithmetic: w + t d itself is outside. `w` must be inside.
        (..., n), (..., n) -> (...).
        """
        if not self.bounded:
            return torch.full_like((w * d)[..., 0], math.inf)
        return self._boundary_step(w, d, self.profile.bound)

    def feasible_step(self, w: Tensor, d: Tensor, u: Tensor, reach: Tensor | None = None) -> Tensor:
        """The line search of section 6: the largest of 1, 1/2, 1/4, ... that keeps w + t d inside.

        The paper halves until the point is inside. dom phi is convex, so the answer is the largest
        power of two below `max_step`; no trial is needed. What is stored is not w but u and z, with
        w = u - z rounded: the boundary is moved inwards by a bound on those rounding errors (a few
        units in the last place of |u| and of the radius), so that the stored point is inside, and
        stays so for every smaller step, which another rank may ask for. Only a boundary step within
        that rounding of a power of two gives half the step a trial would have found.

        0 where there is no such step: w is within rounding of the boundary and d points outwards.
        The caller then stays where it is, which is feasible.

        A radial w nearer to the boundary than the rounding of u, which no step of this method
        leaves, has no guarantee inwards: rounding may keep the outward part of d alone.

        Args:
            w: The point, inside dom phi. (..., n)
            d: The direction. (..., n)
            u: The minuend of w = u - z; its magnitude decides the rounding. Broadcasts against w.
            reach: Of w, where it is known. (..., G or 1)

        Returns:
            The step. (...)
        """
        if not self.bounded:
            return torch.ones_like((w * d)[..., 0])
        if w.device.type == "cpu":
            reach = self.reach(w) if reach is None else reach
            if self.surely_feasible(reach, d, u):
                return torch.ones_like(w[..., 0])
        shrunk = self._safe_radius(self.reach(u)).clamp(min=0.0).square()
        return _largest_halving_below(self._boundary_step(w, d, shrunk))

    def reach(self, w: Tensor) -> Tensor:
        """How far w is from 0, in units of x: |x_l|, or max_i |x_i|. (..., n) -> (..., G or 1)."""
        scale = self._scale_for(w)
        if isinstance(scale, Tensor) and scale.ndim and scale.shape[-1] > 1:
            return self.size.largest(w * scale)
        return self.size.largest(w) * scale  # without a vector of the x

    def surely_feasible(self, reach: Tensor, d: Tensor, u: Tensor) -> bool:
        """Whether `feasible_step` is 1 already by the triangle inequality, |x| + |d| < radius.

        Far from the boundary, which is nearly always, this costs less than the boundary step; and
        whoever knows only the largest reach of all workers can tell it for all. An eighth of the
        radius is left, so that rounding cannot make the boundary step say anything else. Brings one
        number to the host: for tensors on the CPU.

        Args:
            reach: Of the point or points w. (..., G or 1)
            d: The direction, which broadcasts against w. (..., n)
            u: As in `feasible_step`.
        """
        of_d, of_u = (self.size.length(self._scaled(x)) for x in (d, u))
        if self.far_inside(reach, of_d, of_u):
            return True
        return self.far_inside(reach, self.reach(d), self.reach(u))

    def far_inside(self, reach: Tensor, reach_of_d: Tensor, reach_of_u: Tensor) -> bool:
        """`surely_feasible` by what is known of w, d and u. Each (..., G or 1)."""
        safe = self._safe_radius(reach_of_u)
        return bool((reach + reach_of_d <= 0.875 * safe).all())

    def _safe_radius(self, reach_of_u: Tensor) -> Tensor:
        """The radius of dom phi in units of x, less what the rounding of u - z may hide."""
        radius = math.sqrt(self.profile.bound)
        eps = torch.finfo(reach_of_u.dtype).eps
        return radius - eps * (32.0 * radius + 4.0 * reach_of_u)

    def _boundary_step(self, w: Tensor, d: Tensor, bound: float | Tensor) -> Tensor:
        """The t >= 0 where the first group of x + t d reaches the bound, 0 if past it. -> (...)."""
        t = self.size.exit(self._scaled(w), self._scaled(d), bound)
        # A group is past the bound where the root is negative, or complex (nan).
        return t.amin(-1).nan_to_num(nan=0.0, posinf=math.inf).clamp(min=0.0)

    def _scale_for(self, w: Tensor) -> float | Tensor:
        return self.scale.to(w) if isinstance(self.scale, Tensor) else self.scale

    def _scaled(self, w: Tensor) -> Tensor:
        scale = self._scale_for(w)
        return w if isinstance(scale, float) and scale == 1.0 else w * scale

    def _scaled_(self, w: Tensor) -> Tensor:
        scale = self._scale_for(w)
        return w if isinstance(scale, float) and scale == 1.0 else w.mul_(scale)

    def _sizes(self, x: Tensor) -> Tensor:
        return self.size.inner(x, x)

    def surely_inside(self, s: Tensor) -> bool:
        """Whether all sizes s are below the bound, where asking costs less than caring.

        Brings one number to the host: for tensors on the CPU.
        """
        return s.device.type == "cpu" and bool((s.amax() < self.profile.bound).all())

    def dpsi_within(self, reach: Tensor) -> Callable[[Tensor], Tensor] | float:
        """The cheapest form of psi' for all s <= reach^2.

        Brings one number to the host: for tensors on the CPU.
        """
        return self.profile.dpsi_up_to(float(reach.amax()) ** 2, reach.dtype)

    def _inside(self, s: Tensor, inside: Tensor, outside: float) -> Tensor:
        # tan s and 1 / (1 - s) have innocent values beyond the pole: never let them pass for phi.
        if not self.bounded or self.surely_inside(s):
            return inside
        return torch.where(s < self.profile.bound, inside, outside)

    def __repr__(self) -> str:
        scale = "tensor" if isinstance(self.scale, Tensor) else self.scale
        return f"{type(self).__name__}(size={self.size!r}, scale={scale})"


def _largest_halving_below(t: Tensor) -> Tensor:
    """The largest of 1, 1/2, 1/4, ... strictly below t > 0, exactly; 0 for t = 0."""
    mantissa, _ = torch.frexp(t)  # t = mantissa 2^exponent, mantissa in [1/2, 1)
    # The quotient is the power of two itself, and a division that has an exact result gives it;
    # a power function need not, on every device.
    halving = torch.where(mantissa == 0.5, 0.5 * t, t / (2.0 * mantissa))
    return torch.where(t > 1.0, 1.0, torch.where(t > 0.0, halving, 0.0))


# ---------------------------------------------------------------------------- the table of names

POTENTIALS: Registry[Potential] = Registry("potential")


@POTENTIALS.register("quad")
def quad() -> Potential:
    """phi(x) = |x|^2: synchronous EASGD."""
    return Potential(QUAD, Radial())


@POTENTIALS.register("cubic")
def cubic(eps: float = 0.0) -> Potential:
    """phi(x) = |x|^3 + eps |x|^2; (A3) fails at 0 unless eps > 0."""
    return Potential(power_profile(3.0, eps), Radial())


@POTENTIALS.register("tan")
def tan() -> Potential:
    """phi(x) = tan |x|^2 on |x|^2 < pi/2."""
    return Potential(TAN, Radial())


@POTENTIALS.register("tan_sep")
def tan_sep() -> Potential:
    """phi(x) = sum_i tan x_i^2 on x_i^2 < pi/2."""
    return Potential(TAN, Separable())


@POTENTIALS.register("log")
def log() -> Potential:
    """phi(x) = -log(1 - |x|^2) on |x| < 1."""
    return Potential(LOG, Radial())


@POTENTIALS.register("log_sep")
def log_sep() -> Potential:
    """phi(x) = -sum_i log(1 - x_i^2) on |x_i| < 1."""
    return Potential(LOG, Separable())


@POTENTIALS.register("scaled_quad")
def scaled_quad(weight: float | Sequence[float] | Tensor = 1.0) -> Potential:
    """phi(x) = x^T Q x, Q diagonal and positive.

    Args:
        weight: The diagonal of Q: one number, or one for each coordinate, or, inside `Layerwise`,
            one for each layer.

    Raises:
        ValueError: If a weight is not positive and finite.
    """
    q = torch.as_tensor(weight, dtype=torch.float64)
    if not bool(((q > 0) & (q < math.inf)).all()):
        raise ValueError(f"`weight` is {weight}; allowed: finite numbers > 0")
    return Potential(QUAD, Radial(), scale=math.sqrt(q.item()) if q.numel() == 1 else q.sqrt())


@POTENTIALS.register("pseudo_huber")
def pseudo_huber(separable: bool = True) -> Potential:
    """phi(x) = sum_i sqrt(1 + x_i^2) - 1, a smooth |x|_1: its consensus is nearly the median."""
    return Potential(PSEUDO_HUBER, Separable() if separable else Radial())


@POTENTIALS.register("log_cosh")
def log_cosh(separable: bool = True) -> Potential:
    """phi(x) = sum_i log cosh x_i, another smooth |x|_1."""
    return Potential(LOG_COSH, Separable() if separable else Radial())


@POTENTIALS.register("power")
def power(p: float = 4.0, eps: float = 0.0, separable: bool = False) -> Potential:
    """phi(x) = |x|^p + eps |x|^2, p > 1."""
    return Potential(power_profile(p, eps), Separable() if separable else Radial())
