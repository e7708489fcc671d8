"""The inner solvers of potentials on adversarial inputs: huge, tiny, next to a pole, any strength.

Expected values are formulas of tests/testing/plain_run.py and bisection, in the extended precision
of `numpy.longdouble`. A solver with a fixed number of steps is shown to need fewer.
"""

import math

import numpy as np
import pytest
import torch

from consensus.core import profiles
from consensus.core.potentials import POTENTIALS
from consensus.core.profiles import Profile
from consensus.core.scalar_equation import NotConvergedError
from tests.testing.plain_run import Shape, shape_of

LONG = np.longdouble
OPTIONS = [
    *({"name": name} for name in ("quad", "tan", "log", "pseudo_huber", "huber", "log_cosh")),
    *({"name": "cubic", "eps": eps} for eps in (0.0, 0.1)),
    *({"name": "power", "p": p, "eps": eps} for p in (1.05, 2.5, 7.0) for eps in (0, 0.1)),
]
STRENGTHS = [0.0, 1e-300, 1e-30, 1e-8, 1e-3, 0.1, 1.0, 10.0, 1e3, 1e8, 1e16]


def of(options) -> tuple[Profile, Shape]:
    """The profile under test, without a closed form, and its formulas."""
    name, rest = options["name"], {k: v for k, v in options.items() if k != "name"}
    own = POTENTIALS.make(name, **rest).profile
    generic = Profile(own.psi, own.dpsi, own.d2psi, bound=own.bound, numbers=own.numbers)
    return generic, shape_of(name, rest)[0]


smooth = pytest.mark.parametrize(  # huber has a fraction in closed form
    "options",
    [o for o in OPTIONS if o["name"] != "huber"],
    ids=lambda o: "-".join(map(str, o.values())),
)
every = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))


def lengths(shape):
    """r > 0: from 1e-30 to 1e60 but where the slope overflows, and crowded around 1 and the end."""
    near = np.logspace(-15, -0.1, 20)
    end = math.sqrt(min(shape.bound, 1.0))
    r = np.concatenate(
        [
            np.logspace(-30, 60, 100),
            np.logspace(-3, 3, 60),
            *(end * (1 + sign * near) for sign in (-1, 1)),
        ]
    )
    if shape.bound == math.inf:
        r = r[shape.slope(LONG(r)) * 1e16 * r < 1e300]
    return np.sort(r)


def solution(shape, r, c):
    """The rho with rho + c h'(rho) = r, by bisection of its logarithm."""
    low, high = np.full(r.shape, LONG("1e-1000")), np.minimum(r, np.sqrt(LONG(shape.bound)))
    for _ in range(80):
        rho = np.sqrt(low) * np.sqrt(high)
        above = rho + c * shape.slope(rho) > r
        low, high = np.where(above, low, rho), np.where(above, rho, high)
    return low


@pytest.mark.parametrize("name", ["tan", "log"])
@pytest.mark.parametrize("r", [1e60, 1e87, 1e100, 1e150])
def test_a_fraction_far_outside_of_a_bounded_domain_is_one(name, r):
    """The prox is inside the domain, whose radius is nothing beside r."""
    profile = POTENTIALS[name].profile
    for c in (1e-3, 1.0, 1e6):
        assert profile.fractions([r], c, torch.float64) == [1.0]
        assert profile.fraction(torch.tensor([r], dtype=torch.float64), c).tolist() == [1.0]


def wanted_fraction(shape, r, c):
    """1 - rho / r = c h'(rho) / r, the first where the second would be that of a pole."""
    r, c = LONG(r), LONG(c)
    rho = solution(shape, r, c)
    far = (rho < 0.5 * r) | (r > np.sqrt(LONG(shape.bound)))
    return np.where(far, 1 - rho / r, c * shape.slope(rho) / r).astype(float)


@smooth
@pytest.mark.parametrize(("steps", "weakest"), [(16, 1e-8), (12, 1e-3)])
def test_a_fraction_has_more_steps_than_it_needs(options, steps, weakest, monkeypatch):
    """All 16 only for a strength below 1e-3, next to the end of a domain.

    As on a GPU, where it takes all steps without a look at its values: `_CONVERGED` < 0.
    """
    profile, shape = of(options)
    r = lengths(shape)
    end = r > 0.99 * math.sqrt(shape.bound)  # where 1 - rho / r is as exact as r is
    monkeypatch.setattr(profiles, "_STEPS", steps)
    monkeypatch.setattr(profiles, "_CONVERGED", -1.0)
    for c in (c for c in STRENGTHS if c >= weakest or steps == 16):
        with np.errstate(all="ignore"):
            wanted = wanted_fraction(shape, r, c)
        allowed = 1e-9 * wanted + np.where(end, 1e-15 if c >= weakest else 1e-7, 1e-300)
        found = {"tensor": profile.fraction(torch.from_numpy(r), c).numpy()}
        if profile.numbers is not None:
            found["numbers"] = np.array(profile.fractions(r.tolist(), c, torch.float64))
        for way, values in found.items():
            wrong = ~(np.abs(values - wanted) <= allowed)
            assert not wrong.any(), f"{way}, c = {c}, r = {r[wrong][:3]}: {values[wrong][:3]}"


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_solutions_are_within_a_few_roundings(options, dtype):
    """Either rho or g(rho) is: rho + c h'(rho), and h'(rho) for the inverse gradient (c = None)."""
    profile, shape = of(options)
    single = dtype == torch.float32
    few = 16 * torch.finfo(dtype).eps
    rho = np.logspace(-17, 15, 150) if single else np.logspace(-140, 60, 300)
    end = np.sqrt(LONG(shape.bound))
    near = end * (1 - np.logspace(-6 if single else -15, -0.1, 50)) if end < math.inf else []
    rho = np.concatenate([rho[rho < 0.9 * end], near]).astype(LONG)
    rho = rho[(end < math.inf) | (shape.slope(rho) < 0.01 * torch.finfo(dtype).max)]
    limits = torch.finfo(dtype)
    for c in [None, *(c for c in STRENGTHS if c > limits.tiny)]:

        def g(x, c=c):
            slope = np.where(x < end, shape.slope(np.minimum(x, end)), math.inf)
            return slope if c is None else x + LONG(c) * slope

        with np.errstate(all="ignore"):
            r = torch.from_numpy(g(rho).astype(float)).to(dtype)
            r = r[(r > 100 * limits.tiny) & (r < 0.1 * math.sqrt(limits.max))]  # |x|^2 is finite
            found = profile.invert(r) if c is None else profile.shrink(r, c)
            assert found.dtype == dtype
            r, x = (LONG(a.double().numpy()) for a in (r, found))
            fits = (g(x * (1 - few)) <= r * (1 + few)) & (g(x * (1 + few)) >= r * (1 - few))
        unreachable = np.isnan(x) & (c is None)  # a bounded slope, rounded to its supremum
        wrong = ~fits & ~(unreachable & (r > 1 - few))
        assert not wrong.any(), f"c = {c}, r = {r[wrong][:3]}: {x[wrong][:3]}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_number_has_a_solution(dtype):
    """From the smallest to the largest number: where g overflows, and where rho is r."""
    r = torch.cat([torch.zeros(1), torch.logspace(-37, 37, 400)]).to(dtype)
    few = 16 * torch.finfo(dtype).eps
    steep = Profile(torch.expm1, torch.exp, torch.exp)
    for profile in (steep, profiles.TAN, profiles.LOG, profiles.power_profile(30.0)):
        for c in STRENGTHS[1:]:
            rho = profile.shrink(r, c)
            subnormal = 2.0 * torch.finfo(dtype).tiny
            assert bool((rho.diff() >= -few * rho[1:] - subnormal).all())
            assert bool((rho <= r * (1 + few) + subnormal).all())
            assert bool((rho.square() <= profile.bound).all())
    outside = profiles.LOG.shrink(torch.tensor([math.nan, math.inf, 0.3], dtype=dtype), 1.0)
    assert outside.isnan().tolist() == [True, True, False]


def test_a_solver_that_does_not_converge_says_so():
    r = torch.tensor([0.5, 3.0], dtype=torch.float64)
    nowhere = Profile(torch.exp, lambda s: s * math.nan, torch.exp)
    with pytest.raises(NotConvergedError, match=r"psi' of a potential is not a number at \|x\| ="):
        nowhere.shrink(r, 1.0)

    def falling(s):  # 2 psi'(s) rho = 2 / rho^7: two solutions or none
        return s**-4.0

    def steeper(s):
        return -4.0 * s**-5.0

    wrong = Profile(falling, falling, steeper, numbers=(falling, steeper))
    said = r"did not converge in 16 steps: .*; allowed: a psi' with psi'\(s\) s increasing"
    with pytest.raises(NotConvergedError, match=said):
        wrong.fraction(r, 1.0)
    with pytest.raises(NotConvergedError, match=said):
        wrong.fractions(r.tolist(), 1.0, torch.float64)
