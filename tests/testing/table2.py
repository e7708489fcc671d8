"""Table 2 written again in mpmath, for tests of potentials and of their domains.

The expected values come from `TABLE` alone: phi on one layer as a function of a list of mpmath
numbers, differentiated by central differences in 50 digits. To test a new potential, add a line.
"""

import math
from dataclasses import dataclass, field

import mpmath
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from mpmath import mp, mpf

from consensus.core.potentials import POTENTIALS

mp.dps = 50
torch.set_num_threads(1)
F32, F64 = torch.float32, torch.float64
HALF_PI = mp.pi / 2


def radial(psi):
    return lambda x: psi(mpmath.fsum(c * c for c in x))


def separable(psi):
    return lambda x: mpmath.fsum(psi(c * c) for c in x)


def power(p, eps=0):
    return lambda s: s ** (mpf(p) / 2) + eps * s


@dataclass(frozen=True)
class Case:
    """One line of Table 2: phi, the end of its domain in s, what holds, and what holds at 0."""

    name: str
    phi: object
    bound: object = mp.inf
    options: dict = field(default_factory=dict)
    fails: str = ""  # which of (A1) to (A5)
    slope: float = math.inf  # the supremum of |grad phi|, per group
    kink: float = math.inf  # the length where the curvature jumps, to 0 along a ray

    @property
    def id(self):
        return "-".join([self.name, *(f"{k}={v}" for k, v in self.options.items())])

    @property
    def separable(self):
        """Whether each coordinate has a domain of its own: two points on a diagonal decide."""
        r = mpf("0.9") * mp.sqrt(self.bound) if self.bound < mp.inf else mpf(3)
        return mp.almosteq(self.phi([r / 2, r / 3]), self.phi([r / 2, 0]) + self.phi([0, r / 3]))

    def make(self):
        return POTENTIALS.make(self.name, **self.options)


def log1m(s):
    return -mp.log(1 - s)


def pseudo_huber(s):
    return mp.sqrt(1 + s) - 1


def huber(s):
    return s / 2 if s <= 1 else mp.sqrt(s) - mpf(1) / 2


def log_cosh(s):
    return mp.log(mp.cosh(mp.sqrt(s)))


TABLE = [
    Case("quad", radial(lambda s: s)),
    Case("cubic", radial(power(3)), fails="A3"),
    Case("cubic", radial(power(3, mpf("0.25"))), options={"eps": 0.25}),
    Case("tan", radial(mp.tan), HALF_PI),
    Case("tan_sep", separable(mp.tan), HALF_PI),
    Case("log", radial(log1m), mpf(1)),
    Case("log_sep", separable(log1m), mpf(1)),
    Case("scaled_quad", radial(lambda s: s)),
    Case("scaled_quad", radial(lambda s: mpf("2.25") * s), options={"weight": 2.25}),
    Case("pseudo_huber", separable(pseudo_huber), fails="A4", slope=1.0),
    Case("pseudo_huber", radial(pseudo_huber), options={"separable": False}, fails="A4", slope=1.0),
    Case("huber", radial(huber), fails="A1 A3 A4", slope=1.0, kink=1.0),
    Case("huber", separable(huber), mp.inf, {"separable": True}, "A1 A3 A4", 1.0, 1.0),
    Case("log_cosh", separable(log_cosh), fails="A4", slope=1.0),
    Case("log_cosh", radial(log_cosh), options={"separable": False}, fails="A4", slope=1.0),
    Case("power", radial(power(4)), fails="A3"),
    Case("power", radial(power(1.5)), options={"p": 1.5}, fails="A3"),
    Case("power", radial(power(2)), options={"p": 2.0}),
    Case("power", radial(power(4, mpf("0.5"))), options={"p": 4.0, "eps": 0.5}),
    Case("power", radial(power(1.5, 1)), options={"p": 1.5, "eps": 1.0}, fails="A3"),
    Case("power", separable(power(2.5)), options={"p": 2.5, "separable": True}, fails="A3"),
    Case("power", separable(power(3, 1)), options={"p": 3.0, "eps": 1.0, "separable": True}),
]

every = pytest.mark.parametrize("case", TABLE, ids=lambda case: case.id)
bounded = pytest.mark.parametrize(
    "case", [case for case in TABLE if case.bound < mp.inf], ids=lambda case: case.id
)
unbounded = pytest.mark.parametrize(
    "case", [case for case in TABLE if case.bound == mp.inf], ids=lambda case: case.id
)
both_dtypes = pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])


def examples(count):
    """Reproducible inputs: the same in every run."""
    return settings(max_examples=count, deadline=None, derandomize=True, database=None)


# --------------------------------------------------------------------------- expected values


def exact(x):
    """The numbers as stored, in 50 digits."""
    return [mpf(float(c)) for c in x]


def mp_grad(phi, x):
    h, grad = mpf(10) ** -20, []
    for i in range(len(x)):
        up, down = list(x), list(x)
        up[i] += h
        down[i] -= h
        grad.append((phi(up) - phi(down)) / (2 * h))
    return grad


def mp_hvp(phi, x, v):
    h = mpf(10) ** -15
    plus = mp_grad(phi, [a + h * b for a, b in zip(x, v, strict=True)])
    minus = mp_grad(phi, [a - h * b for a, b in zip(x, v, strict=True)])
    return [(p - m) / (2 * h) for p, m in zip(plus, minus, strict=True)]


def hvp_error(case, p, x, v):
    """Of `p.hvp`, relative to it; to |v| where the Hessian may vanish."""
    unit = 1e-300 if case.kink == math.inf else float(v.norm())
    return error(p.hvp(x, v), mp_hvp(case.phi, exact(x), exact(v)), unit)


def norm(x):
    return mp.sqrt(mpmath.fsum(c * c for c in x))


def error(actual, expected, unit=1e-300):
    """|actual - expected| / |expected| of vectors, in 50 digits; |expected| counts as >= unit."""
    expected = [mpf(c) for c in expected]
    actual = exact(actual.tolist())
    difference = norm([a - b for a, b in zip(actual, expected, strict=True)])
    return float(difference / max(norm(expected), mpf(unit)))


def size(case, x):
    """The s that decides whether x (numbers) is inside: |x|^2, or the largest x_i^2."""
    squares = [mpf(float(c)) ** 2 for c in x]
    return max(squares) if case.separable else mpmath.fsum(squares)


def inside(case, seed, n=4, share=0.9, dtype=F64, rows=None):
    """Random points with s <= share * bound; where the domain is everything, |x| from 0 to 3."""
    generator = torch.Generator().manual_seed(seed)
    shape = (n,) if rows is None else (rows, n)
    x = torch.rand(*shape, generator=generator, dtype=F64) - 0.5
    length = x.abs().amax(-1, keepdim=True) if case.separable else x.norm(dim=-1, keepdim=True)
    radius = math.sqrt(share * float(case.bound)) if case.bound < mp.inf else 3.0
    stretch = torch.rand(*shape[:-1], 1, generator=generator, dtype=F64)
    return (x * (stretch * radius / length)).to(dtype)


seeds = st.integers(0, 10**6)
