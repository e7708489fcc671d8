"""Every potential against its formula in Table 2, written again in mpmath."""

import math
import textwrap
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mpmath import mp, mpf
from scipy.optimize import minimize

from consensus.core import potentials, sizes
from consensus.core.layerwise import Layerwise
from consensus.core.potentials import POTENTIALS, Potential
from consensus.core.profiles import ALL_ASSUMPTIONS, Profile, power_profile
from consensus.core.sizes import Radial, Separable
from tests.testing.table2 import (
    F32,
    F64,
    TABLE,
    Case,
    both_dtypes,
    bounded,
    error,
    every,
    exact,
    examples,
    hvp_error,
    inside,
    mp_grad,
    mp_hvp,
    seeds,
    separable,
    size,
)

# --------------------------------------------------------------------------- the table itself


def test_every_potential_of_the_package_is_in_the_table():
    own = {
        name
        for name in POTENTIALS
        if POTENTIALS._factories[name].__module__ == "consensus.core.potentials"
    }
    assert own == {case.name for case in TABLE}


@bounded
def test_repr_has_the_name_and_the_size(case):
    shown = repr(case.make())
    assert f"{case.name!r}" in shown
    assert ("Separable" in shown) == case.separable


def test_a_potential_without_a_name_and_a_table_in_repr():
    potential = Potential(power_profile(2.0, 0.0), Radial())
    assert repr(potential) == "Potential(size=Radial(layers=None), scale=1.0)"
    assert {"quad", "tan_sep"} <= set(repr(POTENTIALS).partition(": ")[2][:-1].split(", "))


# --------------------------------------------------------------------------- derivatives


@every
@examples(12)
@given(seed=seeds)
def test_value_grad_and_hvp_are_those_of_the_formula(case, seed):
    p, x = case.make(), inside(case, seed)
    v = inside(case, seed + 1)
    value = case.phi(exact(x))
    assert abs(p.value(x).item() - value) <= 1e-13 * abs(value)
    assert error(p.grad(x), mp_grad(case.phi, exact(x))) < 1e-12
    assert hvp_error(case, p, x, v) < 1e-11


@every
@examples(6)
@given(seed=seeds)
def test_in_float32(case, seed):
    p = case.make()
    x, v = inside(case, seed, share=0.8, dtype=F32), inside(case, seed + 1, dtype=F32)
    assert p.value(x).dtype == p.grad(x).dtype == p.hvp(x, v).dtype == F32
    value = case.phi(exact(x))
    assert abs(p.value(x).item() - value) <= 1e-5 * abs(value)
    assert error(p.grad(x), mp_grad(case.phi, exact(x))) < 1e-5
    assert hvp_error(case, p, x, v) < 1e-4


@every
@both_dtypes
@pytest.mark.parametrize("length", [1e-12, 1e-6, 1e-3, 0.0315, 0.0317, 0.2, 0.23, 0.99, 1.01, 12.0])
def test_formulas_do_not_cancel_at_any_length(case, dtype, length):
    """Near 0, around the switches between series and formula, and far out."""
    if length**2 > 0.9 * case.bound:
        length = 0.9 * float(mp.sqrt(case.bound))
    x = torch.tensor([length, 0.0], dtype=dtype)
    v = torch.tensor([1.0, 0.5], dtype=dtype)
    p, eps = case.make(), torch.finfo(dtype).eps
    if case.phi(exact(x)) < 1e3 * torch.finfo(dtype).tiny:
        return  # |x|^4 in float32
    value, grad = case.phi(exact(x)), mp_grad(case.phi, exact(x))
    assert abs(p.value(x).item() - value) <= 40 * eps * abs(value)
    assert error(p.grad(x), grad) < 40 * eps
    if "A3" not in case.fails:  # else the second coordinate sits where the Hessian is singular
        loss = 2000 if case.name == "log_cosh" else 100
        assert error(p.hvp(x, v), mp_hvp(case.phi, exact(x), exact(v))) < loss * eps


@every
def test_grad_is_the_central_difference_of_value(case):
    """The two methods agree with each other in the arithmetic that they are used in."""
    p, h = case.make(), 1e-5
    x = inside(case, 5, share=0.6)
    steps = h * torch.eye(len(x), dtype=F64)
    differences = (p.value(x + steps) - p.value(x - steps)) / (2 * h)
    torch.testing.assert_close(p.grad(x), differences, rtol=1e-7, atol=1e-7)
    slopes = (p.grad(x + steps) - p.grad(x - steps)) / (2 * h)
    torch.testing.assert_close(p.hvp(x, torch.eye(len(x), dtype=F64)), slopes, rtol=1e-7, atol=1e-7)


@every
@both_dtypes
def test_a5_at_zero(case, dtype):
    assert "A5" in case.make().assumptions
    p, zero = case.make(), torch.zeros(2, 3, dtype=dtype)
    assert torch.equal(p.value(zero), torch.zeros(2, dtype=dtype))
    assert torch.equal(p.grad(zero), zero)
    assert torch.equal(p.conjugate_grad(zero), zero)
    assert p.contains(zero).all()
    assert p.hvp(zero, torch.ones_like(zero)).isfinite().all()
    some = torch.tensor([0.0, 0.5, 0.0], dtype=dtype)  # a separable one has zeros among others
    assert p.grad(some)[0] == p.grad(some)[2] == 0
    assert p.hvp(some, some).isfinite().all()


@every
@both_dtypes
def test_tiny_points_give_finite_results(case, dtype):
    x = torch.tensor([1e-20, -1e-20], dtype=dtype)  # the square is subnormal in float32
    p = case.make()
    assert p.value(x).isfinite().all()
    assert p.grad(x).isfinite().all()
    if case.options.get("p") != 1.5:  # there the Hessian itself blows up
        assert p.hvp(x, torch.ones_like(x)).isfinite().all()
        assert p.hvp(x, torch.ones_like(x)).abs().max() < 100


def test_hessian_at_zero_by_hand():
    zero, v = torch.zeros(2, dtype=F64), torch.tensor([1.0, -3.0], dtype=F64)
    for name, options, factor in [
        ("quad", {}, 2), ("cubic", {}, 0), ("cubic", {"eps": 0.5}, 1), ("tan", {}, 2),
        ("log_sep", {}, 2), ("pseudo_huber", {}, 1), ("log_cosh", {}, 1), ("power", {}, 0),
        ("huber", {}, 1), ("huber", {"separable": True}, 1),
        ("power", {"p": 2.0, "eps": 0.5}, 3), ("power", {"p": 2.0, "separable": True}, 2),
        ("scaled_quad", {"weight": [1.0, 3.0]}, torch.tensor([2.0, 6.0], dtype=F64)),
    ]:  # fmt: skip
        hvp = POTENTIALS.make(name, **options).hvp(zero, v)
        torch.testing.assert_close(hvp, factor * v, msg=name)


@every
@both_dtypes
def test_blocks_are_independent_points(case, dtype):
    """(S, M, n) at once is the same as one vector after the other, for every method."""
    p = case.make()
    x = inside(case, 3, n=5, dtype=dtype, rows=6).view(2, 3, 5)
    d = inside(case, 4, n=5, dtype=dtype, rows=6).view(2, 3, 5)
    y = p.grad(x)
    together = {
        "value": p.value(x),
        "grad": y,
        "hvp": p.hvp(x, d),
        "conjugate_grad": p.conjugate_grad(y),
        "contains": p.contains(x),
        "max_step": p.max_step(x, d),
        "feasible_step": p.feasible_step(x, d, 10 * x),
    }
    for s in range(2):
        for m in range(3):
            xs, ds = x[s, m].clone(), d[s, m].clone()
            alone = {
                "value": p.value(xs),
                "grad": p.grad(xs),
                "hvp": p.hvp(xs, ds),
                "conjugate_grad": p.conjugate_grad(y[s, m]),
                "contains": p.contains(xs),
                "max_step": p.max_step(xs, ds),
                "feasible_step": p.feasible_step(xs, ds, 10 * xs),
            }
            for name, result in alone.items():
                block = together[name][s, m]
                assert block.shape == result.shape == ((5,) if result.ndim else ()), name
                assert block.dtype == result.dtype == (torch.bool if name == "contains" else dtype)
                torch.testing.assert_close(block, result, msg=name)


@every
def test_a_direction_or_minuend_broadcasts(case):
    """One u for all workers: (n,) against (M, n)."""
    p, x = case.make(), inside(case, 3, rows=4)
    d = inside(case, 4)
    for one, many in [
        (p.hvp(x, d), p.hvp(x, d.expand(4, -1))),
        (p.max_step(x, d), p.max_step(x, d.expand(4, -1))),
        (p.max_step(d, x), p.max_step(d.expand(4, -1), x)),
        (p.feasible_step(x, d, 100 * d), p.feasible_step(x, d, 100 * d.expand(4, -1))),
    ]:
        assert one.shape[0] == 4
        torch.testing.assert_close(one, many, rtol=1e-14, atol=0)


# --------------------------------------------------------------------------- scales


@every
@examples(5)
@given(seed=seeds, eta=st.sampled_from([0.05, 0.5, 3.0]))
def test_scale_is_one_over_eta(case, seed, eta):
    """phi(w) = p(w / eta): value, and the 1/eta, 1/eta^2 and eta of the derivatives."""
    base = case.make()
    if isinstance(base.scale, torch.Tensor) or base.scale != 1.0:
        return
    p = Potential(base.profile, base.size, scale=1.0 / eta)
    w, v = eta * inside(case, seed), inside(case, seed + 1)

    def phi(w):
        return case.phi([c / mpf(eta) for c in w])

    value = phi(exact(w))
    assert abs(p.value(w).item() - value) <= 1e-12 * abs(value)
    assert error(p.grad(w), mp_grad(phi, exact(w))) < 1e-11
    if case.kink < math.inf:
        return  # its Hessian may vanish, and points beyond have the same gradient
    assert error(p.hvp(w, v), mp_hvp(phi, exact(w), exact(v))) < 1e-10
    assert error(p.conjugate_grad(p.grad(w)), exact(w)) < 1e-10
    tensor = Potential(base.profile, base.size, scale=torch.tensor([[1.0 / eta], [1.0]], dtype=F32))
    block = tensor.grad(torch.stack([w, w / eta]).to(F64))
    single = Potential(base.profile, base.size, float(np.float32(1 / eta)))
    torch.testing.assert_close(block[0], single.grad(w))
    torch.testing.assert_close(block[1], base.grad(w / eta))


@pytest.mark.parametrize("dtype", [F32, F64])
def test_scaled_quad_is_x_q_x(dtype):
    x = torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.25, 0.0]], dtype=dtype)
    q = [0.25, 4.0, 2.0]
    p = POTENTIALS.make("scaled_quad", weight=q)
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 0.0}
    by_hand = torch.tensor([0.25 + 16.0 + 18.0, 0.0625 + 0.25], dtype=dtype)
    torch.testing.assert_close(p.value(x), by_hand, **tolerance)
    diagonal = torch.tensor(q, dtype=dtype)
    torch.testing.assert_close(p.grad(x), 2 * diagonal * x, **tolerance)
    torch.testing.assert_close(p.hvp(x, x + 1), 2 * diagonal * (x + 1), **tolerance)
    torch.testing.assert_close(p.conjugate_grad(x), x / (2 * diagonal), **tolerance)
    one = POTENTIALS.make("scaled_quad", weight=[0.25])  # a list of one is a number
    torch.testing.assert_close(one.value(x), 0.25 * (x * x).sum(-1), **tolerance)


@pytest.mark.parametrize("weight", [0.0, -1.0, math.inf, math.nan, [1.0, 0.0]])
def test_scaled_quad_refuses(weight):
    with pytest.raises(ValueError, match=r"`weight` is .*finite numbers > 0"):
        POTENTIALS.make("scaled_quad", weight=weight)


@pytest.mark.parametrize(("p", "eps", "culprit"), [
    (1.0, 0.0, "`p` is 1.0"), (math.inf, 0.0, "`p`"), (math.nan, 0.0, "`p`"),
    (3.0, -0.1, "`eps` is -0.1"), (3.0, math.inf, "`eps`"), (3.0, math.nan, "`eps`"),
])  # fmt: skip
def test_power_refuses(p, eps, culprit):
    with pytest.raises(ValueError, match=culprit):
        power_profile(p, eps)


# --------------------------------------------------------------------------- assumptions


@every
def test_assumptions_are_the_stated_ones(case):
    assert case.make().assumptions == ALL_ASSUMPTIONS - set(case.fails.split())
    assert sorted(ALL_ASSUMPTIONS) == ["A1", "A2", "A3", "A4", "A5"]


@every
@examples(20)
@given(seed=seeds, share=st.floats(0.1, 0.9))
def test_a1_strictly_convex_along_segments(case, seed, share):
    p = case.make()
    a, b = inside(case, seed), inside(case, seed + 1)
    between = (1 - share) * a + share * b
    chord = (1 - share) * p.value(a) + share * p.value(b)
    if "A1" in case.fails:
        assert chord >= p.value(between) - 1e-15
        assert ((p.grad(a) - p.grad(b)) * (a - b)).sum() >= 0
        return
    gap = share * (1 - share) * (a - b).square().sum()
    assert chord - p.value(between) > 1e-3 * gap.item() ** 2 / (1 + gap.item()) > 0
    assert ((p.grad(a) - p.grad(b)) * (a - b)).sum() > 0  # strictly monotone


def smallest_eigenvalue(p, x):
    """Of the Hessian at x, which must be symmetric."""
    hessian = p.hvp(x, torch.eye(len(x), dtype=F64))
    torch.testing.assert_close(hessian, hessian.T)
    return float(np.linalg.eigvalsh(hessian.numpy())[0])


@every
def test_a3_positive_definite_hessian(case):
    p = case.make()
    if case.kink < math.inf:
        return  # see test_huber_is_straight_beyond_its_kink
    for seed in range(20):
        x = inside(case, seed)
        assert smallest_eigenvalue(p, x) > 1e-3 * min(1.0, x.abs().min().item() ** 2)
    zero = [mpf(0)] * 3
    curvature = [mp_hvp(case.phi, zero, [mpf(i == j) for j in range(3)])[i] for i in range(3)]
    if "A3" in case.fails:  # singular at 0, or infinite: not twice differentiable
        assert all(abs(c) < 1e-3 or c > 1e3 for c in curvature)
    else:
        assert smallest_eigenvalue(p, torch.zeros(3, dtype=F64)) > 0.4
        assert all(0.4 < c < 100 for c in curvature)


@every
def test_a4_super_coercive_or_not(case):
    """phi(t x) / t without bound as t grows, or below the limit slope."""
    p = case.make()
    x = torch.tensor([0.6, -0.8], dtype=F64)
    ratios = [(p.value(t * x) / t).item() for t in (1e2, 1e4, 1e6, 1e8)]
    if "A4" in case.fails:
        limit = case.slope * (1.4 if case.separable else 1.0)
        assert all(0.9 * limit < ratio < limit * (1 + 1e-12) for ratio in ratios)
    elif case.bound < mp.inf:
        assert ratios == [math.inf] * 4
    else:
        assert all(b > 5 * a for a, b in pairwise(ratios))


# --------------------------------------------------------------------------- Lemma 3.2


@every
@pytest.mark.parametrize("exponent", [-50, -30, -8, -3, -1, 0, 1, 3, 8])
def test_conjugate_grad_inverts_grad(case, exponent):
    """x to grad phi(x) and back, over many orders of magnitude, within 1e-10."""
    p = case.make()
    length = min(10.0**exponent, 0.999 * float(mp.sqrt(case.bound)), case.kink)
    if case.slope < math.inf and length > 3:
        length = 3.0 if case.name == "log_cosh" else 1e3  # else grad is 1 to the last digit
    for x in ([length, 0.0, 0.0], [0.3 * length, -0.4 * length, 0.5 * length]):
        x = torch.tensor(x, dtype=F64)
        assert error(p.conjugate_grad(p.grad(x)), exact(x)) < 1e-10
        if exponent >= -8:  # and from the gradient of the formula, not of the code
            y = torch.tensor([float(c) for c in mp_grad(case.phi, exact(x))], dtype=F64)
            assert error(p.conjugate_grad(y), exact(x)) < 1e-10


@every
@pytest.mark.parametrize("exponent", [-50, -30, -8, -3, -1, 0, 1, 3, 8, 30])
def test_grad_inverts_conjugate_grad(case, exponent):
    """y to grad phi*(y) and back: near the boundary as exact as the conditioning allows."""
    p = case.make()
    length = 10.0**exponent
    if case.slope < math.inf:
        length = min(length, 0.999 * case.slope)
    elif case.bound < mp.inf and exponent > 12:
        return  # the solution is within rounding of the boundary
    for y in ([length, 0.0, 0.0], [0.3 * length, -0.4 * length, 0.5 * length]):
        y = torch.tensor(y, dtype=F64)
        x = p.conjugate_grad(y)
        assert p.contains(x)
        assert x.isfinite().all()
        kappa = 10 * length if case.bound < mp.inf else 1.0
        assert error(p.grad(x), exact(y)) < max(1e-10, 1e-15 * kappa)


@every
def test_conjugate_grad_in_float32(case):
    p = case.make()
    x = inside(case, 8, share=0.8, dtype=F32) * (0.3 if case.slope < math.inf else 1.0)
    y = p.grad(x)
    assert p.conjugate_grad(y).dtype == F32
    torch.testing.assert_close(p.conjugate_grad(y), x, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize(
    "case",
    [case for case in TABLE if case.slope < math.inf and case.kink == math.inf],
    ids=Case.id.fget,
)
@both_dtypes
def test_nan_where_y_is_no_gradient(case, dtype):
    """|grad phi| < 1 per group: 1 and more have no preimage, the float below 1 has."""
    p = case.make()
    below = torch.nextafter(torch.ones((), dtype=dtype), torch.zeros((), dtype=dtype)).item()
    for r, reachable in [(below, True), (1.0, False), (1.5, False), (1e10, False)]:
        for sign in (1.0, -1.0):
            x = p.conjugate_grad(torch.tensor([0.0, sign * r], dtype=dtype))
            assert bool(x[1].isfinite()) == reachable
            assert reachable or x[1].isnan()
            assert not reachable or x[1] * sign > 3


@both_dtypes
def test_huber_is_straight_beyond_its_kink(dtype):
    """(A1), (A3): the Hessian is I inside, (I - e e^T) / |x| outside; its force is a clipped x."""
    p = POTENTIALS["huber"]
    e = torch.tensor([0.6, -0.8], dtype=dtype)
    across = torch.tensor([0.8, 0.6], dtype=dtype)
    few = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 2 * torch.finfo(dtype).eps}
    for length, force, value in ((0.5, 0.5, 0.125), (2.0, 1.0, 1.5), (3.0, 1.0, 2.5)):
        torch.testing.assert_close(p.grad(length * e), force * e, **few)
        assert p.value(length * e).item() == pytest.approx(value, rel=few["rtol"])
        along, sideways = (1.0, 1.0) if length < 1 else (0.0, 1.0 / length)
        torch.testing.assert_close(p.hvp(length * e, e), along * e, **few)
        torch.testing.assert_close(p.hvp(length * e, across), sideways * across, **few)
    assert p.profile.dpsi_up_to(1.0, F32) == 0.5  # psi = s / 2 there
    assert callable(p.profile.dpsi_up_to(np.nextafter(1.0, 2.0), F32))
    one = torch.ones((), dtype=dtype)
    for length in (one, torch.nextafter(one, 2 * one)):  # the force is continuous there
        unit = length * torch.tensor([0.0, 1.0], dtype=dtype)
        torch.testing.assert_close(p.grad(unit), torch.tensor([0.0, 1.0], dtype=dtype), **few)
    found = p.conjugate_grad(torch.tensor([[0.0, 1.0], [0.0, 0.3], [0.0, 1.001]], dtype=dtype))
    torch.testing.assert_close(found[:2, 1], torch.tensor([1.0, 0.3], dtype=dtype))  # the shortest
    assert found[2].isnan().any()


@pytest.mark.parametrize("few", [0, 64])  # by operations on tensors, and by numbers
@pytest.mark.parametrize("separable", [False, True])
def test_the_proximal_step_of_huber_is_in_closed_form(monkeypatch, separable, few):
    """b / (1 + c) up to |b| = 1 + c, and c shorter beyond: the switch is at 1 + c, not at 1."""
    monkeypatch.setattr(potentials, "_FEW", few)
    p = POTENTIALS.make("huber", separable=separable)
    for dtype in (F32, F64):
        few_eps = 8 * torch.finfo(dtype).eps
        for c in (1e-3, 0.5, 1.0, 40.0):
            lengths = [1e-6, 0.5, 1.0, 1.0 + 0.5 * c, 1.0 + c, 1.001 * (1.0 + c), 9.0 + 9.0 * c]
            wanted = [r / (1 + c) if r <= 1 + c else r - c for r in lengths]
            b = torch.tensor([[0.0, r] for r in lengths], dtype=dtype)
            moved = p.prox(b, c)[:, 1].tolist()
            for found, r, rho in zip(moved, lengths, wanted, strict=True):
                rounded = few_eps * (r if r > 1 + c else 0.0)
                assert found == pytest.approx(rho, rel=few_eps, abs=rounded), (dtype, c)
            wanted = [c / max(1.0 + c, r) for r in lengths]
            assert p.fraction(b, c)[:, -1].tolist() == pytest.approx(wanted, rel=few_eps)


@pytest.mark.parametrize(
    "name", ["tan", "log", "pseudo_huber", "huber", "cubic", "power", "log_sep"]
)
@pytest.mark.parametrize("y", [(0.3, -0.5), (0.0, 0.6), (-0.05, 0.02)])
def test_fenchel_young(name, y):
    """phi(x) + phi*(y) = <x, y> at x = grad phi*(y), with phi* from a general-purpose maximizer."""
    case = next(case for case in TABLE if case.name == name and not case.options)

    def negative(x):
        if size(case, x) >= case.bound:
            return math.inf
        return float(case.phi(exact(x)) - x[0] * y[0] - x[1] * y[1])

    options = {"xatol": 1e-9, "fatol": 1e-15, "maxiter": 2000}
    start = [0.1 * y[0] + 0.01, 0.1 * y[1]]
    best = minimize(negative, start, method="Nelder-Mead", options=options)
    x = case.make().conjugate_grad(torch.tensor(y, dtype=F64))
    conjugate = -best.fun
    assert case.make().value(x).item() + conjugate == pytest.approx(
        x[0].item() * y[0] + x[1].item() * y[1], rel=1e-9
    )
    np.testing.assert_allclose(x.numpy(), best.x, atol=1e-6)


# --------------------------------------------------------------------------- registration


def test_the_example_of_the_module_docstring_works(monkeypatch):
    monkeypatch.setattr(POTENTIALS, "_factories", dict(POTENTIALS._factories))
    text = potentials.__doc__
    example = textwrap.dedent(text[text.index("    @POTENTIALS.register") :])
    exec(example, {name: vars(potentials)[name] for name in
                   ("POTENTIALS", "Potential", "Profile", "Radial", "torch")})  # fmt: skip
    p = POTENTIALS["quartic"]
    assert p.assumptions == ALL_ASSUMPTIONS - {"A3"}
    x = torch.tensor([1.0, -2.0], dtype=F64)  # |x|^4 = 25, grad 4 |x|^2 x, inverse by the solver
    assert p.value(x) == 25
    assert p.grad(x).tolist() == [20.0, -40.0]
    torch.testing.assert_close(p.conjugate_grad(p.grad(x)), x)
    torch.testing.assert_close(p.hvp(x, x), 60 * x)  # 12 |x|^2 along x
    y = torch.tensor([-2.0, 1.0], dtype=F64)
    torch.testing.assert_close(p.hvp(x, y), 20 * y + 8 * (x @ y) * x)
    phi = Layerwise(p, [(0, 1), (1, 2)], eta=2.0)
    assert phi.value(x).item() == pytest.approx(0.5**4 + 1.0)


def test_a_potential_of_ones_own_needs_no_registration():
    p = Potential(Profile(torch.sinh, torch.cosh, torch.sinh), Separable())
    x = torch.tensor([0.3, -1.1], dtype=F64)
    phi = separable(mp.sinh)
    assert error(p.grad(x), mp_grad(phi, exact(x))) < 1e-14
    assert error(p.conjugate_grad(p.grad(x)), exact(x)) < 1e-12
    assert Radial() is not Radial()  # sizes hold no shared state


# --------------------------------------------------------------------------- in place, in pieces


@every
@both_dtypes
@pytest.mark.parametrize("layers", [None, [(0, 3), (3, 20), (20, 31)]])
@pytest.mark.parametrize("chunk", [None, 7])
def test_grad_in_place_and_in_pieces_is_grad(monkeypatch, case, dtype, layers, chunk):
    p = case.make() if layers is None else Layerwise(case.make(), layers, eta=0.7)
    generator = torch.Generator().manual_seed(3)
    w = 0.1 * torch.randn(2, 3, 31, generator=generator, dtype=F64).to(dtype)
    if case.bound < mp.inf:
        w[1, 2] *= 100.0  # outside: nan in whole groups
    expected = p.grad(w)
    if chunk is not None:
        monkeypatch.setattr(sizes, "CHUNK", chunk)
    found = w.clone()
    assert p.grad_(found) is found
    tolerance = 20 * torch.finfo(dtype).eps  # a sum of pieces is another order of summation
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("scale", [torch.full((31,), 2.0), torch.tensor([[[0.5]], [[2.0]]])])
def test_a_scale_is_cut_with_its_coordinates(monkeypatch, scale):
    w = 0.1 * torch.randn(2, 3, 31, generator=torch.Generator().manual_seed(3))
    scale = scale * torch.linspace(1.0, 2.0, scale.shape[-1])
    p = Potential(POTENTIALS["tan"].profile, Separable(), scale)
    expected = p.grad(w)
    monkeypatch.setattr(sizes, "CHUNK", 7)
    torch.testing.assert_close(p.grad_(w.clone()), expected, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("largest", [1e-3, 0.015, 0.016, 0.1, 0.22, 0.23, 1.0, 1.2, 1.3, math.nan])
@pytest.mark.parametrize("eta", [1.0, 0.5])
@pytest.mark.parametrize("chunk", [None, 10])
def test_the_gradient_in_place_whatever_form_serves(monkeypatch, largest, eta, chunk):
    if chunk is not None:
        monkeypatch.setattr(sizes, "CHUNK", chunk)
    x = torch.rand(2, 31, generator=torch.Generator().manual_seed(4)) * 2.0 - 1.0
    x[1, 17] = 1.0
    w = x * (largest * eta)
    exact = (w / eta).numpy().astype(np.longdouble)
    expected = 2.0 / eta * exact / np.cos(exact * exact) ** 2
    expected[exact * exact >= np.pi / 2] = np.nan
    expected = torch.from_numpy(expected.astype(np.float64)).float()
    p = Layerwise(POTENTIALS["tan_sep"], [(0, 20), (20, 31)], eta)
    tolerance = 1e-3 if largest >= 1.2 else 1e-6  # near the pole rounding of s counts
    for found in (p.grad_(w.clone()), p.grad_and_reach_(w.clone())[0]):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=0.0, equal_nan=True)
    _, reach = p.grad_and_reach_(w.clone())
    torch.testing.assert_close(reach, (w / eta).abs().amax(-1, keepdim=True), equal_nan=True)


def test_a_size_without_parentheses_is_refused():
    with pytest.raises(ValueError, match=r"^size is the class Radial; allowed: Radial\(\)$"):
        Potential(POTENTIALS["quad"].profile, Radial)
