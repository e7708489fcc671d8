"""Every potential against its formula in Table 2, written again here in mpmath.

The expected values come from `TABLE` alone: phi on one layer as a function of a list of mpmath
numbers, differentiated by central differences in 50 digits. To test a new potential, add a line.
"""

import math
import textwrap
from dataclasses import dataclass, field
from itertools import pairwise

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp, mpf
from scipy.optimize import minimize

from consensus.core import potentials
from consensus.core.layerwise import Layerwise
from consensus.core.potentials import POTENTIALS, Potential
from consensus.core.profiles import ALL_ASSUMPTIONS, Profile, power_profile
from consensus.core.sizes import Radial, Separable

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

    @property
    def id(self):
        return "-".join([self.name, *(f"{k}={v}" for k, v in self.options.items())])

    @property
    def separable(self):
        """Whether each coordinate has a domain of its own: two points on a diagonal decide."""
        r = mpf("0.9") * mp.sqrt(self.bound) if self.bound < mp.inf else mpf(1)
        return mp.almosteq(self.phi([r / 2, r / 3]), self.phi([r / 2, 0]) + self.phi([0, r / 3]))

    def make(self):
        return POTENTIALS.make(self.name, **self.options)


def log1m(s):
    return -mp.log(1 - s)


def huber(s):
    return mp.sqrt(1 + s) - 1


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
    Case("pseudo_huber", separable(huber), fails="A4", slope=1.0),
    Case("pseudo_huber", radial(huber), options={"separable": False}, fails="A4", slope=1.0),
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


def norm(x):
    return mp.sqrt(mpmath.fsum(c * c for c in x))


def error(actual, expected):
    """|actual - expected| / |expected| of vectors, in 50 digits."""
    expected = [mpf(c) for c in expected]
    actual = exact(actual.tolist())
    difference = norm([a - b for a, b in zip(actual, expected, strict=True)])
    return float(difference / max(norm(expected), mpf("1e-300")))


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


# --------------------------------------------------------------------------- the table itself


def test_every_potential_of_the_package_is_in_the_table():
    own = {
        name
        for name in POTENTIALS
        if POTENTIALS._factory(name).__module__ == "consensus.core.potentials"
    }
    assert own == {case.name for case in TABLE}


@bounded
def test_repr_names_the_size(case):
    assert ("Separable" in repr(case.make())) == case.separable


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
    assert error(p.hvp(x, v), mp_hvp(case.phi, exact(x), exact(v))) < 1e-11


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
    assert error(p.hvp(x, v), mp_hvp(case.phi, exact(x), exact(v))) < 1e-4


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


# --------------------------------------------------------------------------- domain


@bounded
@both_dtypes
@pytest.mark.parametrize("position", [0, 2])
def test_boundary_to_the_last_digit(case, dtype, position):
    """Around sqrt(bound), float by float: what is said and given agrees with exact arithmetic."""
    p, eps = case.make(), torch.finfo(dtype).eps
    edge = torch.tensor(float(mp.sqrt(case.bound)), dtype=dtype)
    point = edge
    for _ in range(6):
        point = torch.nextafter(point, torch.zeros_like(point))
    verdicts = []
    for _ in range(12):
        x = torch.zeros(3, dtype=dtype)
        x[position] = point
        s = mpf(point.item()) ** 2
        verdict = bool(p.contains(x))
        if s < case.bound * (1 - 2 * eps):
            assert verdict
        if s >= case.bound * (1 + eps):
            assert not verdict
        assert bool(p.value(x).isfinite()) == bool(p.grad(x).isfinite().all()) == verdict
        assert verdict or (p.value(x) == math.inf and p.grad(x)[position].isnan())
        verdicts.append(verdict)
        point = torch.nextafter(point, torch.full_like(point, math.inf))
    assert verdicts == sorted(verdicts, reverse=True)
    assert verdicts[0]
    assert not verdicts[-1]


@bounded
def test_far_outside_nothing_innocent_comes_back(case):
    """tan s and 1 / (1 - s) have finite values beyond their pole."""
    p = case.make()
    radius = float(mp.sqrt(case.bound))
    for share in (1.0, 1.0 + 1e-12, 1.3, 2.0, 2.1, 50.0):
        x = torch.tensor([0.1, -share * radius * (1 + 1e-15)], dtype=F64)
        assert not p.contains(x)
        assert p.value(x) == math.inf
        assert p.grad(x)[1].isnan()
        assert p.hvp(x, torch.ones_like(x))[1].isnan()
    block = torch.stack([torch.zeros(2, dtype=F64), x])
    assert p.contains(block).tolist() == [True, False]
    assert p.value(block)[0] == 0
    assert torch.equal(p.grad(block)[0], torch.zeros(2, dtype=F64))


@bounded
def test_radial_and_separable_domains_differ(case):
    """(0.8 r, 0.8 r) is in the box and not in the ball."""
    x = torch.full((2,), 0.8 * float(mp.sqrt(case.bound)), dtype=F64)
    assert bool(case.make().contains(x)) == case.separable


@every
def test_contains_refuses_nan(case):
    p = case.make()
    assert not p.contains(torch.tensor([0.0, math.nan], dtype=F64))


@bounded
@both_dtypes
def test_a2_the_gradient_blows_up(case, dtype):
    p = case.make()
    assert p.bounded
    previous = 0.0
    for k in range(1, 7 if dtype == F32 else 15):
        x = torch.tensor([0.0, float(mp.sqrt(case.bound) * (1 - mpf(10) ** -k))], dtype=dtype)
        slope = p.grad(x)[1].item()
        assert slope > max(0.3 * 10**k, previous)
        previous = slope


@unbounded
def test_without_a_boundary_there_is_no_bound(case):
    p = case.make()
    assert not p.bounded
    far = torch.tensor([1e100, -1e100], dtype=F64)
    assert p.contains(far)
    w, d = inside(case, 1, rows=3), inside(case, 2)
    assert torch.equal(p.max_step(w, d), torch.full((3,), math.inf, dtype=F64))
    assert torch.equal(p.feasible_step(w, d, w), torch.ones(3, dtype=F64))


# --------------------------------------------------------------------------- assumptions


@every
def test_assumptions_are_the_stated_ones(case):
    failing = {case.fails} if case.fails else set()
    assert case.make().assumptions == ALL_ASSUMPTIONS - failing
    assert sorted(ALL_ASSUMPTIONS) == ["A1", "A2", "A3", "A4", "A5"]


@every
@examples(20)
@given(seed=seeds, share=st.floats(0.1, 0.9))
def test_a1_strictly_convex_along_segments(case, seed, share):
    p = case.make()
    a, b = inside(case, seed), inside(case, seed + 1)
    between = (1 - share) * a + share * b
    chord = (1 - share) * p.value(a) + share * p.value(b)
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
    length = min(10.0**exponent, 0.999 * float(mp.sqrt(case.bound)))
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
    "case", [case for case in TABLE if case.slope < math.inf], ids=Case.id.fget
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


SOLVED = [case for case in TABLE if case.make().profile.radius is not None]


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


@pytest.mark.parametrize("name", ["tan", "log", "pseudo_huber", "cubic", "power", "log_sep"])
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


# --------------------------------------------------------------------------- the end of a ray


def mp_max_step(case, w, d):
    """By bisection in 50 digits; inf where d is 0."""
    if all(c == 0 for c in d):
        return mp.inf
    w, d = exact(w), exact(d)

    def is_inside(t):
        return size_mp(case, [a + t * b for a, b in zip(w, d, strict=True)]) < case.bound

    high = 4 * mp.sqrt(case.bound) / max(abs(c) for c in d)
    low = mpf(0)
    for _ in range(120):
        middle = (low + high) / 2
        low, high = (middle, high) if is_inside(middle) else (low, middle)
    return low


def size_mp(case, x):
    return max(c * c for c in x) if case.separable else mpmath.fsum(c * c for c in x)


@bounded
@examples(25)
@given(
    seed=seeds,
    gap=st.sampled_from([0.999, 0.3, 1e-3, 1e-8, 1e-13]),
    length=st.sampled_from([1e-12, 1e-3, 1.0, 1e4, 1e30]),
    way=st.sampled_from(["any", "outwards", "inwards", "along"]),
)
def test_max_step_against_bisection(case, seed, gap, length, way):
    w = inside(case, seed, n=3, share=1.0)
    w = w * (math.sqrt((1 - gap) * float(case.bound) / float(size(case, w))))
    if size(case, w) >= case.bound:
        return
    d = inside(case, seed + 1, n=3)
    if way == "outwards":
        d = d * (d * w).sign()
    elif way == "inwards":
        d = -d * (d * w).sign()
    elif way == "along":
        d = -2 * w
    d = d * (length / d.norm())
    t = case.make().max_step(w, d).item()
    expected = mp_max_step(case, w.tolist(), d.tolist())
    # c = s - bound is known to a few eps * bound, and the root moves by c / slope
    slack = mpf(2) ** -50 * (1 + case.bound / (case.bound - size(case, w)))
    assert abs(t - expected) <= min(slack, 1) * expected


@bounded
@both_dtypes
def test_max_step_by_hand(case, dtype):
    """In one coordinate: w + t d = +- r."""
    p, r = case.make(), float(mp.sqrt(case.bound))
    w = torch.tensor([[0.0], [0.5 * r], [0.5 * r], [-0.5 * r], [0.25 * r], [0.0]], dtype=dtype)
    d = torch.tensor([[2 * r], [r], [-r], [-r], [0.0], [-0.0]], dtype=dtype)
    expected = torch.tensor([0.5, 0.5, 1.5, 0.5, math.inf, math.inf], dtype=dtype)
    torch.testing.assert_close(p.max_step(w, d), expected)
    still = torch.tensor([[0.5 * r, 0.0, 0.25 * r]], dtype=dtype)  # a coordinate that stands still
    along = torch.tensor([[0.0, r, 0.0]], dtype=dtype)
    expected = 1.0 if case.separable else math.sqrt(1 - 5 / 16)
    torch.testing.assert_close(p.max_step(still, along), torch.tensor([expected], dtype=dtype))
    zero = torch.zeros(2, 3, dtype=dtype)
    assert torch.equal(p.max_step(still, zero), torch.full((2,), math.inf, dtype=dtype))


@pytest.mark.parametrize("name", ["log", "log_sep"])
def test_max_step_does_not_cancel_next_to_the_boundary(name):
    """w and |w|^2 have few digits, so the gap 2^-20 is exact and t can be, too."""
    case = next(case for case in TABLE if case.name == name)
    w = torch.tensor([1 - 2.0**-20, 0.0], dtype=F64)
    for d in ([0.7, 0.3], [1.3, 0.0], [0.9, -0.1], [1e3, 0.1]):
        d = torch.tensor(d, dtype=F64)
        t = case.make().max_step(w, d).item()
        assert t == pytest.approx(
            float(mp_max_step(case, w.tolist(), d.tolist())), rel=1e-14, abs=0
        )


# --------------------------------------------------------------------------- section 6


@both_dtypes
def test_largest_halving_strictly_below(dtype):
    one = torch.ones((), dtype=dtype)
    above, below = torch.nextafter(one, 2 * one).item(), torch.nextafter(one, 0 * one).item()
    tiny = 2.0 ** (-140 if dtype == F32 else -1060)  # subnormal
    cases = [(1.0, 0.5), (above, 1.0), (below, 0.5), (0.5, 0.25), (0.75, 0.5), (0.5 * above, 0.5),
             (0.25, 0.125), (3.0, 1.0), (4.0, 1.0), (math.inf, 1.0), (0.0, 0.0),
             (2.0**-30, 2.0**-31), (3 * 2.0**-100, 2.0**-99), (2 * tiny, tiny)]  # fmt: skip
    t = torch.tensor([t for t, _ in cases], dtype=dtype)
    expected = torch.tensor([step for _, step in cases], dtype=dtype)
    assert torch.equal(potentials._largest_halving_below(t), expected)


def halving_trial(case, w, d, scale=1.0):
    """The paper's line search on exact numbers: 1, 1/2, 1/4, ... until inside."""
    w, d, t = exact(w), exact(d), mpf(1)
    while size_mp(case, [scale * (a + t * b) for a, b in zip(w, d, strict=True)]) >= case.bound:
        t /= 2
        if t < mpf(2) ** -1000:
            return mpf(0)
    return t


def is_halving(s):
    return s == 0 or (0 < s <= 1 and math.frexp(s)[0] == 0.5)


def stored_size(case, u, z, groups):
    """The largest s / bound of the stored numbers u - z, and of its groups, in long doubles."""
    w = u.double().numpy().astype(np.longdouble) - z.double().numpy().astype(np.longdouble)
    squares = w * w
    if not case.separable:
        squares = np.stack([squares[..., a:b].sum(-1) for a, b in groups], -1)
    return squares.max(-1) / np.longdouble(mpmath.nstr(case.bound, 30))


@bounded
@both_dtypes
@pytest.mark.parametrize("ratio", [0.0, 1.0, 1e3, 1e6])
@pytest.mark.parametrize("layers", [[(0, 3)], [(0, 1), (1, 3)], [(0, 1)]], ids=str)
@pytest.mark.parametrize("moves", ["u", "z"])
def test_feasible_step_keeps_the_stored_point_inside(case, dtype, ratio, layers, moves):
    """For s and every smaller power of two, from points as near to the boundary as steps leave.

    Thousands of random u, z, d at once: gaps to the boundary and lengths of d over many orders of
    magnitude. A radial w closer to the boundary than the rounding of u is left out: no step leaves
    one, and no inward step from it can be certified, since rounding may drop its inward part.
    """
    eps, radius, n = torch.finfo(dtype).eps, float(mp.sqrt(case.bound)), layers[-1][1]
    p = Layerwise(case.make(), layers)
    generator = torch.Generator().manual_seed(int(ratio) + n)
    rows = 4000

    def random(*shape):
        return torch.rand(*shape, generator=generator, dtype=F64)

    def normalized(x):
        pieces = [x[:, a:b] / x[:, a:b].norm(dim=-1, keepdim=True) for a, b in layers]
        return x / x.abs().amax(-1, keepdim=True) if case.separable else torch.cat(pieces, -1)

    u = (ratio * radius * normalized(random(rows, n) - 0.5)).to(dtype)
    gap = 10 ** (-8 * random(rows, 1)) * random(rows, 1)
    w = radius * (1 - gap) * normalized(random(rows, n) - 0.5)
    z = (u.double() - w).to(dtype)
    d = (random(rows, n) - 0.5) * 10 ** (24 * random(rows, 1) - 12)
    turned = torch.arange(rows) % 4  # a quarter straight outwards, a quarter straight inwards
    d = torch.where(turned[:, None] == 1, d.abs() * w, d)
    d = torch.where(turned[:, None] == 2, -d.abs() * w, d).to(dtype)
    rounding = eps * (4 * radius + 0.5 * u.double().norm(dim=-1).numpy()) / radius
    start = np.sqrt(stored_size(case, u, z, layers).astype(float))
    keep = p.contains(u - z) & torch.from_numpy(start < 1 - (1e-15 if case.separable else rounding))
    u, z, d = u[keep], z[keep], d[keep]
    assert len(u) > 0.05 * rows

    s = p.feasible_step(u - z, d, u)
    assert s.dtype == dtype
    assert all(is_halving(value) for value in s.tolist())
    if ratio <= 1e3:
        assert (s > 0).float().mean() > 0.6
        assert (s == 1).float().mean() > 0.2
        assert (s < 1).float().mean() > 0.2
    for k in [*range(12), 20, 30, 45, 60, 100]:
        step = (s * 2.0**-k).unsqueeze(-1)
        u2, z2 = (u + step * d, z) if moves == "u" else (u, z - step * d)
        assert (stored_size(case, u2, z2, layers) < 1).all()
        assert p.contains(u2 - z2).all()  # and the code agrees


@bounded
@examples(60)
@given(
    seed=seeds,
    ratio=st.sampled_from([0.0, 1.0, 1e3]),
    exponent=st.floats(-6, 12),
    eta=st.sampled_from([1.0, 0.3]),
)
def test_feasible_step_is_the_halving_trial(case, seed, ratio, exponent, eta):
    """Except where the boundary is within rounding of a power of two: then half of it."""
    p = Layerwise(case.make(), [(0, 3)], eta)
    w = eta * inside(case, seed, n=3, share=0.98)
    u = ratio * inside(case, seed + 2, n=3)
    d = inside(case, seed + 1, n=3) * 10**exponent
    s = p.feasible_step(w, d, u).item()
    trial = halving_trial(case, w, d, 1 / mpf(eta))
    if s != trial:
        assert s == trial / 2
        end = mp_max_step(case, (w / eta).tolist(), (d / eta).tolist())
        # the margin in w, over the speed with which the ray crosses the boundary
        assert end / trial - 1 < 1e-8 * (1 + ratio)


@bounded
@both_dtypes
def test_boundary_exactly_at_a_power_of_two(case, dtype):
    """w + t d is on the boundary at t = 1, 1/2, 2, ...: the step is the next smaller one."""
    p, radius = case.make(), float(mp.sqrt(case.bound))
    w = torch.zeros(5, 2, dtype=dtype)
    ends = torch.tensor([1.0, 0.5, 2.0**-10, 2.0, 4.0], dtype=dtype)
    d = torch.zeros(5, 2, dtype=dtype)
    d[:, 0] = radius / ends
    expected = torch.tensor([0.5, 0.25, 2.0**-11, 1.0, 1.0], dtype=dtype)
    assert torch.equal(p.feasible_step(w, d, w), expected)
    assert torch.equal(p.feasible_step(w, 0.99 * d, w), 2 * expected.clamp(max=0.5))
    assert torch.equal(p.feasible_step(w, 0 * d, w), torch.ones(5, dtype=dtype))


@bounded
def test_feasible_step_of_tiny_steps_in_float64(case):
    """Huge directions need steps that float32 has no numbers for."""
    p, radius = case.make(), float(mp.sqrt(case.bound))
    w = torch.zeros(1, dtype=F64)
    for exponent in (20, 100, 140, 300, 500):
        d = torch.tensor([1.5 * radius * 2.0**exponent], dtype=F64)
        assert p.feasible_step(w, d, w).item() == 2.0 ** (-exponent - 1)


@bounded
@both_dtypes
def test_feasible_step_is_zero_where_none_is_possible(case, dtype):
    """On the last float inside and outwards; with |u| so large that its rounding is the radius."""
    p = case.make()
    edge = torch.tensor([float(mp.sqrt(case.bound))], dtype=dtype)
    while not p.contains(edge):
        edge = torch.nextafter(edge, torch.zeros_like(edge))
    assert p.feasible_step(edge, torch.ones_like(edge), edge) == 0
    assert p.feasible_step(edge, -0.5 * edge, edge) == 1  # inwards
    assert p.feasible_step(edge, -4 * edge, edge) == 0.25  # through, and out at 1/2
    huge = edge / torch.finfo(dtype).eps
    assert p.feasible_step(0 * edge, edge, huge) == 0


@pytest.mark.parametrize("name", ["tan", "log"])
def test_feasible_step_of_many_coordinates_in_float32(name):
    """The rounding of a sum over 20,000 coordinates is inside the margin too."""
    case = next(case for case in TABLE if case.name == name)
    n, radius = 20_000, float(mp.sqrt(case.bound))
    p = case.make()
    generator = torch.Generator().manual_seed(1)
    u = torch.randn(40, n, generator=generator) * 0.1
    w = torch.randn(40, n, generator=generator, dtype=F64)
    w = w * (radius * 0.5 / w.norm(dim=-1, keepdim=True))
    z = (u - w).to(F32)
    d = torch.randn(40, n, generator=generator)
    for _ in range(8):  # steps that end close under the boundary, one after the other
        w = u - z
        end = p.max_step(w, d)
        d = d * (end * 0.9999).clamp(1e-3, 1e3).unsqueeze(-1)
        s = p.feasible_step(w, d, u)
        u = u + s.unsqueeze(-1) * d
        assert (stored_size(case, u, z, [(0, n)]) < 1).all()


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
        monkeypatch.setattr(potentials, "CHUNK", chunk)
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
    monkeypatch.setattr(potentials, "CHUNK", 7)
    torch.testing.assert_close(p.grad_(w.clone()), expected, rtol=1e-6, atol=0.0)


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


@pytest.mark.parametrize("largest", [1e-3, 0.015, 0.016, 0.1, 0.22, 0.23, 1.0, 1.2, 1.3, math.nan])
@pytest.mark.parametrize("eta", [1.0, 0.5])
@pytest.mark.parametrize("chunk", [None, 10])
def test_the_gradient_in_place_whatever_form_serves(monkeypatch, largest, eta, chunk):
    if chunk is not None:
        monkeypatch.setattr(potentials, "CHUNK", chunk)
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
