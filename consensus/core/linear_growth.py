"""Profiles of linear growth: psi is about sqrt(s) for large s, so that forces are bounded.

A worker that is far from u then pulls it by no more than a worker at a distance of a few eta. (A4)
fails.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from consensus.core.profiles import ALL_ASSUMPTIONS, Profile
from consensus.core.scalar_equation import Elementwise

PSEUDO_HUBER = Profile(  # psi = sqrt(1 + s) - 1: (A4) fails
    psi=lambda s: s / (1.0 + torch.sqrt(1.0 + s)),
    dpsi=lambda s: 0.5 / torch.sqrt(1.0 + s),
    d2psi=lambda s: -0.25 * (1.0 + s) ** -1.5,
    radius=lambda r: torch.where(r < 1.0, r / torch.sqrt((1.0 - r) * (1.0 + r)), math.nan),
    numbers=(lambda s: 0.5 / math.sqrt(1.0 + s), lambda s: -0.25 * (1.0 + s) ** -1.5),
    assumptions=ALL_ASSUMPTIONS - {"A4"},
)


def _huber_fraction(r: Tensor, c: float | Tensor) -> Tensor:
    """1 - rho / r: c / (1 + c) up to r = 1 + c, where the force is linear, and c / r beyond."""
    longest = torch.where(r > 1.0 + c, r, 1.0 + c)
    return torch.where(r < math.inf, c / longest, math.nan)


HUBER = Profile(  # psi = s / 2 up to 1, sqrt(s) - 1/2 beyond: straight along a ray, (A2), (A5) only
    psi=lambda s: torch.where(s <= 1.0, 0.5 * s, s.sqrt() - 0.5),
    dpsi=lambda s: 0.5 / s.clamp(min=1.0).sqrt(),
    d2psi=lambda s: torch.where(s <= 1.0, 0.0, -0.25 * s.clamp(min=1.0) ** -1.5),
    # The force of length 1 of all points beyond has the shortest of them; it may be rounded.
    radius=lambda r: torch.where(r <= 1.0 + 4.0 * torch.finfo(r.dtype).eps, r, math.nan),
    near_zero=((1.0, 0.5),),
    numbers=(
        lambda s: 0.5 / math.sqrt(max(s, 1.0)),
        lambda s: 0.0 if s <= 1.0 else -0.25 * s**-1.5,
    ),
    removed=_huber_fraction,
    shrunk=lambda r, c: r / (1.0 + c) if r <= 1.0 + c else r - c,
    assumptions=frozenset({"A2", "A5"}),
)


def _log_cosh_slope(s: Tensor, series: Sequence[float], direct: Elementwise) -> Tensor:
    """A function of s = rho^2: its power series near 0, where the direct formula cancels."""
    near = s < (1e-3 if s.dtype == torch.float64 else 5e-2)
    polynomial = torch.zeros_like(s)
    for coefficient in reversed(series):
        polynomial = polynomial * s + coefficient
    rho = torch.where(near, 1.0, s).sqrt()  # keeps the unused branch finite
    return torch.where(near, polynomial, direct(rho))


def _log_cosh(rho: Tensor) -> Tensor:
    """Log cosh rho for rho >= 0 without overflow for large and cancellation for small rho."""
    small = torch.log1p(2.0 * torch.sinh(0.5 * rho.clamp(max=1.0)).square())
    large = rho + torch.log1p(torch.exp(-2.0 * rho)) - math.log(2.0)
    return torch.where(rho < 1.0, small, large)


# tanh(rho) / rho = 1 - s/3 + 2 s^2/15 - 17 s^3/315 + 62 s^4/2835 - 1382 s^5/155925 + ...
_TANHC = (1.0, -1 / 3, 2 / 15, -17 / 315, 62 / 2835, -1382 / 155925)
_TANHC_SLOPE = [k * c for k, c in enumerate(_TANHC)][1:]


def _log_cosh_d2psi(s: Tensor) -> Tensor:
    def direct(rho: Tensor) -> Tensor:
        tanh = torch.tanh(rho)
        return (1.0 - tanh.square() - tanh / rho) / (2.0 * rho * rho)

    return 0.5 * _log_cosh_slope(s, _TANHC_SLOPE, direct)


LOG_COSH = Profile(  # psi = log cosh sqrt(s): (A4) fails
    psi=lambda s: _log_cosh(s.sqrt()),
    dpsi=lambda s: 0.5 * _log_cosh_slope(s, _TANHC, lambda rho: torch.tanh(rho) / rho),
    d2psi=_log_cosh_d2psi,
    radius=lambda r: torch.where(r < 1.0, torch.atanh(r), math.nan),
    assumptions=ALL_ASSUMPTIONS - {"A4"},
)
