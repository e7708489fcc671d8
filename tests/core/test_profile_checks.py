"""Numerical checks of profiles: those of the package pass, and each mistake is named."""

import dataclasses
import math

import pytest
import torch

from consensus.core import linear_growth, profiles
from consensus.core.potentials import POTENTIALS
from consensus.core.profile_checks import mistake_of
from consensus.core.profiles import ALL_ASSUMPTIONS, Profile, power_profile

BUILT_IN = [n for n in POTENTIALS if POTENTIALS._factories[n].__module__.startswith("consensus.")]


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_potentials_of_the_package_have_no_mistake(name):
    options = {"p": 1.5} if name == "power" else {}
    assert mistake_of(POTENTIALS.make(name, **options).profile) is None


@pytest.mark.parametrize("p", [1.05, 1.2, 2.0, 2.5, 4.0, 10.0, 30.0])
@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_powers_have_no_mistake(p, eps):
    assert mistake_of(power_profile(p, eps)) is None


def of(psi, dpsi, d2psi, **others):
    return Profile(psi, dpsi, d2psi, **others)


def ones(s):
    return torch.ones_like(s)


def zeros(s):
    return torch.zeros_like(s)


SINGLE = of(  # rounds to float32
    lambda s: s.float().double(), ones, zeros
)
EXPONENTIAL = of(torch.expm1, torch.exp, torch.exp)


@pytest.mark.parametrize("profile", [SINGLE, EXPONENTIAL])
def test_profiles_of_users_without_a_mistake(profile):
    assert mistake_of(profile) is None


QUAD, LOG, HUBER = profiles.QUAD, profiles.LOG, linear_growth.PSEUDO_HUBER
NO_A1 = ALL_ASSUMPTIONS - {"A1"}


@pytest.mark.parametrize(
    ("profile", "mistake"),
    [
        (of(lambda s: s, lambda s: 1.5 * ones(s), zeros), "psi' is 1.5 and not 1 at s = 0.0001"),
        (of(lambda s: s**2, lambda s: 2 * s, zeros), "psi'' is 0 and not 2 at s = 0.0001"),
        (of(lambda s: -s, lambda s: -ones(s), zeros), "it is not strictly convex near |x|"),
        (
            of(lambda s: s - 0.01 * s**2, lambda s: 1 - 0.02 * s, lambda s: -0.02 * ones(s)),
            "it is not strictly convex near |x| = 4",
        ),
        (
            of(torch.sqrt, lambda s: 0.5 / s.sqrt(), lambda s: -0.25 * s**-1.5),
            "it is not strictly convex near",
        ),
        (
            of(lambda s: s, lambda s: 1.0, zeros),
            "psi' of a tensor s of shape (50,) is a float; all",
        ),
        (of(lambda s: s.sum(), ones, zeros), "psi of a tensor s of shape (50,) is of shape (); a"),
        (of(lambda s: 1 / 0, ones, zeros), "one of its functions fails: ZeroDivisionError: divis"),
        (dataclasses.replace(LOG, bound=math.inf), "psi is not finite at s = 1.099, inside its"),
        (
            of(
                lambda s: s / (1 - s), lambda s: (1 - s) ** -2, lambda s: 2 * (1 - s) ** -3
            ),  # finite beyond its pole
            "it is not strictly convex near |x| = ",
        ),
        (dataclasses.replace(LOG, bound=2.0), "psi is not finite at s = "),
        (dataclasses.replace(LOG, bound=0.5), "its gradient stays bounded at the boundary of its"),
        (dataclasses.replace(LOG, bound=0.0), "its bound is 0.0; allowed: "),
        (of(lambda s: s + 1, ones, zeros), "psi(0) is 1 and not 0, against (A5)"),
        (dataclasses.replace(QUAD, slope=2.0), "psi' is no constant 2 (`slope`) at s = "),
        (dataclasses.replace(QUAD, radius=lambda r: r), "`radius` does not invert"),
        (dataclasses.replace(HUBER, assumptions=ALL_ASSUMPTIONS), "its slope stays bounded, agai"),
        (
            dataclasses.replace(power_profile(3.0), assumptions=ALL_ASSUMPTIONS),
            "its Hessian at 0 is singular or infinite, against (A3)",
        ),
    ],
)
def test_mistakes(profile, mistake):
    found = mistake_of(profile)
    assert found is not None
    assert found.startswith(mistake), found


OTHER = {"psi": lambda s: 2 * s, "dpsi": lambda s: 2 * ones(s), "d2psi": zeros}
TAN, CUBIC = profiles.TAN, power_profile(3.0)


@pytest.mark.parametrize(
    ("profile", "changes", "mistake"),
    [
        (QUAD, {**OTHER, "slope": None, "radius": None}, "`numbers` is not psi' at s = 0.0001"),
        (
            QUAD,
            {**OTHER, "slope": None, "radius": None, "numbers": None},
            "the psi' of `kernel` quad is another at s = 0.0001",
        ),
        (TAN, {"near_zero": ((0.05, 1.0),)}, "`near_zero` up to 0.05 is not psi' at s = 0.005"),
        (TAN, {"near_zero": ((0.1, lambda s: 1 + s),)}, "`near_zero` up to 0.1 is not psi' at s"),
        (LOG, {"numbers": (LOG.numbers[0], LOG.numbers[0])}, "`numbers` is not psi'' at s = "),
        (LOG, {"kernel": "tan"}, "the psi' of `kernel` tan is another at s = "),
        (LOG, {"kernel": "log1"}, "`kernel` is log1; allowed: quad, cube, tan, log or None"),
        (CUBIC, {"shrunk": lambda r, c: r}, "`shrunk` does not solve rho + 2 c psi'(rho^2) rho ="),
        (CUBIC, {"numbers": None}, "`shrunk` is given without `numbers`"),
        (TAN, {"removed": lambda r, c: 0 * r}, "`removed` does not solve rho + 2 c psi'(rho^2)"),
    ],
)
def test_forms_that_replace_the_derivative_belong_to_it(profile, changes, mistake):
    """A profile made by `replace` keeps those of the one before."""
    found = mistake_of(dataclasses.replace(profile, **changes))
    assert found is not None
    assert found.startswith(mistake), found


def test_claims_that_are_not_made_are_not_checked():
    concave = of(lambda s: -s, lambda s: -ones(s), zeros, assumptions=frozenset({"A5"}))
    assert mistake_of(concave) is None
