"""Domains and their line search, against Table 2 in mpmath and the paper's halving by trial."""

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mpmath import mp, mpf

from consensus import POTENTIALS
from consensus.core import feasibility
from consensus.core.layerwise import Layerwise
from tests.testing.table2 import (
    F32,
    F64,
    TABLE,
    both_dtypes,
    bounded,
    every,
    exact,
    examples,
    inside,
    seeds,
    size,
    unbounded,
)

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


def test_the_shape_of_the_points_needs_no_module_beyond_torch(monkeypatch):
    """By `torch.broadcast_shapes` the first call imported 500, SymPy among them."""
    monkeypatch.setattr(torch, "_refs", None)
    quad = Layerwise(POTENTIALS["quad"], [(0, 2), (2, 5)])
    w, d = torch.zeros(3, 1, 5), torch.zeros(4, 5)
    assert quad.max_step(w, d).shape == (3, 4)
    assert quad.feasible_step(w, d, w).shape == (3, 4)


@unbounded
def test_without_a_boundary_there_is_no_bound(case):
    p = case.make()
    assert not p.bounded
    far = torch.tensor([1e100, -1e100], dtype=F64)
    assert p.contains(far)
    w, d = inside(case, 1, rows=3), inside(case, 2)
    assert torch.equal(p.max_step(w, d), torch.full((3,), math.inf, dtype=F64))
    assert torch.equal(p.feasible_step(w, d, w), torch.ones(3, dtype=F64))


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
    assert torch.equal(feasibility.largest_halving_below(t), expected)


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
