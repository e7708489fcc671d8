"""The domain of a potential and the line search that keeps steps inside it (section 6).

dom phi = {w : |scale w|^2 < bound, each group} is convex and symmetric, so the feasible steps along
a ray are an interval from 0. Its end has a closed form: no trial step is needed.
"""

import math

import torch
from torch import Tensor

from consensus.core.sizes import Separable, Size


class Domain:
    """The open set {w : |scale w|^2 < bound, for each group}, on blocks (..., n)."""

    bound: float  # of the squared size s; inf: the whole space
    size: Size
    scale: float | Tensor

    @property
    def bounded(self) -> bool:
        """Whether the domain is not the whole space, so that steps must be cut."""
        return math.isfinite(self.bound)

    def contains(self, w: Tensor) -> Tensor:
        """Whether w lies strictly inside, as stored in floating point. -> bool (...)."""
        if isinstance(self.size, Separable):  # rounding is monotone: the largest decides for all
            return self.reach(w).square().squeeze(-1) < self.bound
        return (self._sizes(self._scaled(w)) < self.bound).all(-1)

    def max_step(self, w: Tensor, d: Tensor) -> Tensor:
        """The end of the interval of t >= 0 with w + t d inside; inf where there is none.

        The end is open, in exact arithmetic: w + t d itself is outside. `w` must be inside.
        (..., n), (..., n) -> (...).
        """
        if not self.bounded:
            return w.new_full(_points(w, d), math.inf)
        return self._boundary_step(w, d, self.bound)

    def feasible_step(self, w: Tensor, d: Tensor, u: Tensor, reach: Tensor | None = None) -> Tensor:
        """The line search of section 6: the largest of 1, 1/2, 1/4, ... that keeps w + t d inside.

        That is the largest power of two below `max_step`, since the domain is convex. u and z are
        stored, and w = u - z, inside the domain, is rounded. The boundary is therefore moved
        inwards by a bound on those errors (a few units in the last place of |u| and of the radius).
        The stored point is then inside, also for every smaller step, which another rank may
        require. Only a boundary step within that rounding of a power of two gives half the step
        that a trial would have found. `u` broadcasts against w; `reach` is that of w, if known.

        The step is 0 where w is within rounding of the boundary and d points outwards. A radial w
        nearer to the boundary than the rounding of u, which no step of this method leaves, has no
        guarantee inwards: rounding may keep the outward part of d alone.
        (..., n), (..., n), (..., n) -> (...).
        """
        if not self.bounded:
            return w.new_ones(_points(w, d))
        if w.device.type == "cpu":
            reach = self.reach(w) if reach is None else reach
            if self.surely_feasible(reach, d, u):
                return torch.ones_like(w[..., 0])
        shrunk = self._safe_radius(self.reach(u)).clamp(min=0.0).square()
        return largest_halving_below(self._boundary_step(w, d, shrunk))

    def reach(self, w: Tensor) -> Tensor:
        """The distance of w from 0 in units of x: |x_l|, or max_i |x_i|. -> (..., G or 1)."""
        scale = self._scale_for(w)
        if isinstance(scale, Tensor) and scale.ndim and scale.shape[-1] > 1:
            return self.size.largest(w * scale)
        return self.size.largest(w) * scale  # without a vector of the x

    def surely_feasible(self, reach: Tensor, d: Tensor, u: Tensor) -> bool:
        """Whether `feasible_step` is 1 by the triangle inequality alone, |x| + |d| < radius.

        Cheaper than the boundary step, and true for nearly every step of a run. `reach` is that of
        w, or the largest of several points. Brings one number to the host: for the CPU.
        """
        of_d, of_u = (self.size.length(self._scaled(x)) for x in (d, u))
        if self.far_inside(reach, of_d, of_u):
            return True
        return self.far_inside(reach, self.reach(d), self.reach(u))

    def step_within(self, reach: Tensor, d: Tensor, u: Tensor) -> Tensor:
        """The largest of 1, 1/2, 1/4, ... that is feasible for every w of a reach.

        By the triangle inequality, |x| + t |d| < radius in every group, with the margins of
        `feasible_step`: it needs the `reach` of the points alone, not the points.
        (..., G or 1), (..., n), (..., n) -> (...).
        """
        left = self._safe_radius(self.reach(u)) - reach
        length = self.reach(d).abs()  # that of a separable 0 may be -0
        return largest_halving_below(self._first(left / length))

    def far_inside(self, reach: Tensor, reach_of_d: Tensor, reach_of_u: Tensor) -> bool:
        """`surely_feasible` from the reaches of w, d and u. Each (..., G or 1)."""
        # An eighth of the radius as a margin: rounding cannot make the boundary step disagree.
        return bool((reach + reach_of_d <= 0.875 * self._safe_radius(reach_of_u)).all())

    def surely_inside(self, s: Tensor) -> bool:
        """Whether all sizes s are below the bound, tested only where that is cheap: on a CPU."""
        return s.device.type == "cpu" and bool((s.amax() < self.bound).all())

    def _safe_radius(self, reach_of_u: Tensor) -> Tensor:
        """The radius in units of x, less a bound on the rounding of u - z."""
        radius = math.sqrt(self.bound)
        eps = torch.finfo(reach_of_u.dtype).eps
        return radius - eps * (32.0 * radius + 4.0 * reach_of_u)

    def _boundary_step(self, w: Tensor, d: Tensor, bound: float | Tensor) -> Tensor:
        """The t >= 0 where the first group of x + t d reaches the bound, 0 if past it. -> (...)."""
        return self._first(self.size.exit(self._scaled(w), self._scaled(d), bound))

    @staticmethod
    def _first(t: Tensor) -> Tensor:
        """The least exit of all groups. (..., G) -> (...)."""
        # A group is past the bound where the root is negative, or complex (nan).
        return t.amin(-1).nan_to_num(nan=0.0, posinf=math.inf).clamp(min=0.0)

    def _inside(self, s: Tensor, inside: Tensor, outside: float) -> Tensor:
        # tan s and 1 / (1 - s) are finite beyond the pole: never take those values for phi.
        if not self.bounded or self.surely_inside(s):
            return inside
        return torch.where(s < self.bound, inside, outside)

    def _sizes(self, x: Tensor) -> Tensor:
        return self.size.inner(x, x)

    def _scale_for(self, w: Tensor) -> float | Tensor:
        return self.scale.to(w) if isinstance(self.scale, Tensor) else self.scale

    def _scaled(self, w: Tensor) -> Tensor:
        scale = self._scale_for(w)
        return w if isinstance(scale, float) and scale == 1.0 else w * scale

    def _scaled_(self, w: Tensor) -> Tensor:
        scale = self._scale_for(w)
        return w if isinstance(scale, float) and scale == 1.0 else w.mul_(scale)


def _points(w: Tensor, d: Tensor) -> torch.Size:
    """The shape (...) of the points w + t d (..., n)."""
    # `torch.broadcast_shapes` imports 500 modules, SymPy among them, at its first call.
    first, _ = torch.broadcast_tensors(w[..., :1], d[..., :1])
    shape: torch.Size = first.shape[:-1]
    return shape


def largest_halving_below(t: Tensor) -> Tensor:
    """The largest of 1, 1/2, 1/4, ... strictly below t > 0, exactly; 0 for t = 0."""
    mantissa, _ = torch.frexp(t)  # t = mantissa 2^exponent, mantissa in [1/2, 1)
    # The quotient is the power of two itself, and a division with an exact result returns it;
    # a power function need not, on every device.
    halving = torch.where(mantissa == 0.5, 0.5 * t, t / (2.0 * mantissa))
    return torch.where(t > 1.0, 1.0, torch.where(t > 0.0, halving, 0.0))
