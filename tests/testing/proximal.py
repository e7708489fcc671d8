"""Proximal steps of one group of coordinates, by scipy: an implementation for comparison."""

import math

import scipy.optimize
import torch

SLOPES = {  # psi'(s) of Table 2 and beyond, and the end of the domain of s
    "quad": (lambda s: 1.0, math.inf),
    "cubic": (lambda s: 1.5 * math.sqrt(s), math.inf),
    "tan": (lambda s: 1.0 / math.cos(s) ** 2, math.pi / 2),
    "log": (lambda s: 1.0 / (1.0 - s), 1.0),
    "pseudo_huber": (lambda s: 0.5 / math.sqrt(1.0 + s), math.inf),
    "huber": (lambda s: 0.5 / math.sqrt(max(s, 1.0)), math.inf),
    "power": (lambda s: 2.0 * s, math.inf),
}


def removed(name: str, r: float, strength: float, eta: float) -> float:
    """1 - p / r, where p minimizes (p - r)^2 / 2 + strength psi(p^2 / eta^2)."""
    if math.isinf(strength) or r == 0.0:
        return 1.0
    slope, bound = SLOPES[name.removesuffix("_sep")]

    def force(p):
        return p - r + strength * 2.0 * slope(p * p / eta**2) * p / eta**2

    high = min(r, eta * math.sqrt(bound) * (1.0 - 1e-13))
    return 1.0 - scipy.optimize.brentq(force, 0.0, high, xtol=1e-22, rtol=1e-15) / r


def groups(name: str, layers: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The slices of the groups of coordinates: layers, or single coordinates."""
    separable = name.endswith("_sep") or name == "pseudo_huber"
    return [(i, i + 1) for i in range(layers[-1][1])] if separable else layers


def pulled(kernel, z, d, u, strength):
    """z + d + c(u - z) (u - z) of one worker by `WeightedProximal.factors`. (n,)."""
    w = torch.empty_like(u)
    factors = kernel.factors(u, z, w, strength)
    if isinstance(factors, list):
        for (start, stop), c in zip(kernel.phi.layers, factors, strict=True):
            w[start:stop] *= c
        factors = 1.0
    return z + d + factors * w
