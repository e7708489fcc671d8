"""Scalar profiles: the generic solver against closed forms, and cheap forms near zero."""

import math

import numpy as np
import pytest
import torch
from mpmath import mp, mpf

from consensus.core.potentials import POTENTIALS
from consensus.core.profiles import Profile
from tests.testing.table2 import (
    F32,
    F64,
    TABLE,
    both_dtypes,
)

SOLVED = [
    case for case in TABLE if case.make().profile.radius is not None and case.kink == math.inf
]
NEAR_ZERO = [
    pytest.param(p.profile, end, form, id=f"{name}-{end:.2g}")
    for name, p in ((name, POTENTIALS[name]) for name in ("tan", "tan_sep"))
    for end, form in p.profile.near_zero
]


@pytest.mark.parametrize(("profile", "end", "form"), NEAR_ZERO)
def test_a_form_near_zero_is_psi_prime_up_to_its_last_place(profile, end, form):
    s = torch.cat([torch.tensor([0.0, end]), torch.logspace(-12, 0, 20_001) * end]).clamp(max=end)
    found = form(s) if callable(form) else torch.full_like(s, form)
    exact = 1.0 / np.cos(s.numpy().astype(np.longdouble)) ** 2
    places = np.abs(found.numpy().astype(np.longdouble) - exact) / np.finfo(np.float32).eps
    assert places.max() <= 1.0
    assert profile.dpsi_up_to(end, F32) is form
    assert profile.dpsi_up_to(float(np.nextafter(end, 1.0)), F32) is not form
    assert profile.dpsi_up_to(end, F64) is profile.dpsi


@pytest.mark.parametrize("case", SOLVED, ids=lambda case: case.id)
@both_dtypes
def test_generic_solver_against_closed_forms(case, dtype):
    """A profile without its own inverse: rho from 1e-12 to the boundary, all in one call."""
    profile = case.make().profile
    generic = Profile(profile.psi, profile.dpsi, profile.d2psi, bound=profile.bound)
    q = case.options.get("weight", 1.0)  # in the scale, not in psi
    top = 0.999 * math.sqrt(profile.bound) if profile.bound < math.inf else 1e6
    if case.slope < math.inf:
        top = 4.0 if dtype == F64 else 2.0
    rho = np.geomspace(1e-70 if dtype == F64 else 1e-6, top, 80)

    def psi_of_square(r):
        return case.phi([mpf(r) / mp.sqrt(q)])

    def slope(r):
        h = r * mpf(10) ** -20
        return float((psi_of_square(r + h) - psi_of_square(r - h)) / (2 * h))

    with mp.workdps(400):  # 1 - 1e-140 is not 1
        r = [slope(mpf(x)) for x in rho]
    solved = generic.invert(torch.tensor([0.0, *r], dtype=dtype))
    assert solved.dtype == dtype
    assert solved[0] == 0
    tolerance = 1e-10 if dtype == F64 else 1e-3
    np.testing.assert_allclose(solved[1:].double().numpy(), rho, rtol=tolerance)
    outside = generic.invert(torch.tensor([math.nan, 1.5, math.inf], dtype=dtype))
    assert outside[[0, 2]].isnan().all()
    assert bool(outside[1].isnan()) == (case.slope < math.inf)
