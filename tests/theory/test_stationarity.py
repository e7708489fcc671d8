"""The phi-prox, the phi-envelope and its gradient, against brute force and closed forms.

Theorem 4.3 and Corollary 4.4 say: near a point where f is prox-regular, and for lam small enough,
the phi-prox is single-valued and Lipschitz, and the envelope is differentiable with gradient (13).
Envelopes are computed here on grids, from the formulas of f and of Table 2 alone.
"""

import math

import numpy as np
import pytest
import torch

from consensus import POTENTIALS, Layerwise
from consensus.theory.stationarity import consensus_residual, prox, worker_residual

F64 = torch.float64
VALUES = {  # phi(w) of Table 2 with eta = 1, for one coordinate
    "quad": lambda w: w**2,
    "cubic": lambda w: np.abs(w) ** 3,
    "tan": lambda w: np.where(w**2 < np.pi / 2, np.tan(np.minimum(w**2, 1.57)), np.inf),
    "log": lambda w: -np.log(np.maximum(1 - w**2, 1e-300)) + np.where(w**2 < 1, 0.0, np.inf),
}
VALUES |= {"tan_sep": VALUES["tan"], "log_sep": VALUES["log"]}
SLOPES = {
    "quad": lambda w: 2 * w,
    "cubic": lambda w: 3 * np.abs(w) * w,
    "tan": lambda w: 2 * w / np.cos(w**2) ** 2,
    "log": lambda w: 2 * w / (1 - w**2),
}
SLOPES |= {"tan_sep": SLOPES["tan"], "log_sep": SLOPES["log"]}
NAMES = tuple(VALUES)
LINE = [(0, 1)]

FUNCTIONS = {  # on the line: f, its derivative, and a point u where f is prox-regular
    "double well": (lambda x: (x**2 - 1) ** 2 / 4, lambda x: x * (x**2 - 1), 0.9),
    "quartic": (lambda x: x**4 - x**2 + x / 3, lambda x: 4 * x**3 - 2 * x + 1 / 3, 0.5),
    "|x^2 - 1|": (lambda x: np.abs(x**2 - 1), None, 0.95),
    "|x|": (np.abs, None, 0.02),
}
SMOOTH = [name for name, (_, slope, _) in FUNCTIONS.items() if slope is not None]


def on_line(name):
    """A function of the line for blocks (..., 1) of torch."""
    f, slope, _ = FUNCTIONS[name]
    return lambda z: (f(z)[..., 0], slope(z))


def by_brute_force(f, name, u, lam, reach=1.2, points=100_001):
    """The envelope and the prox at each u, on a grid refined twice around the best point."""
    values, best = [], []
    for at in np.atleast_1d(u):
        low, high = at - reach, at + reach
        for _ in range(4):
            grid = np.linspace(low, high, points)
            with np.errstate(all="ignore"):
                total = f(grid) + VALUES[name](at - grid) / lam
            i = int(np.nanargmin(total))
            width = grid[1] - grid[0]
            low, high, points = grid[i] - 2 * width, grid[i] + 2 * width, 4001
        values.append(total[i])
        best.append(grid[i])
    return np.array(values), np.array(best)


# ---- Theorem 4.3 and Corollary 4.4


@pytest.mark.parametrize("lam", [0.02, 0.1])
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_of_the_envelope_is_13(name, function, lam):
    f, _, point = FUNCTIONS[function]
    u = point + np.linspace(-0.05, 0.05, 11)
    h = 1e-6
    right, _ = by_brute_force(f, name, u + h, lam)
    left, _ = by_brute_force(f, name, u - h, lam)
    _, p = by_brute_force(f, name, u, lam)
    slope = (right - left) / (2 * h)
    np.testing.assert_allclose(SLOPES[name](u - p) / lam, slope, rtol=1e-4, atol=1e-4)
    # The gradient of the package at the prox of the brute force.
    w = torch.from_numpy(u - p)[:, None]
    ours = Layerwise(POTENTIALS[name], LINE).grad(w)[:, 0] / lam
    np.testing.assert_allclose(ours, slope, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lam", [0.02, 0.1])
@pytest.mark.parametrize("function", SMOOTH)
@pytest.mark.parametrize("name", NAMES)
def test_prox_agrees_with_brute_force(name, function, lam):
    f, _, point = FUNCTIONS[function]
    u = point + np.linspace(-0.05, 0.05, 11)
    value, p = by_brute_force(f, name, u, lam)
    found = prox(
        on_line(function), Layerwise(POTENTIALS[name], LINE), torch.from_numpy(u)[:, None], lam,
        tolerance=1e-10,
    )  # fmt: skip
    assert bool(found.converged.all())
    np.testing.assert_allclose(found.value, value, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.point[:, 0], p, rtol=0, atol=1e-6)
    np.testing.assert_allclose(found.gradient[:, 0], SLOPES[name](u - p) / lam, rtol=0, atol=1e-4)


@pytest.mark.parametrize("function", ["double well", "|x^2 - 1|"])
@pytest.mark.parametrize("name", NAMES)
def test_the_prox_is_lipschitz_near_the_point(name, function):
    """|P(u) - P(u')| <= L |u - u'| with an L that does not grow when the u are nearer."""
    f, _, point = FUNCTIONS[function]
    slopes = []
    for width in (1e-1, 1e-2, 1e-3):
        u = point + np.linspace(-width / 2, width / 2, 21)
        _, p = by_brute_force(f, name, u, 0.05)
        slopes.append(np.abs(np.diff(p) / np.diff(u)).max())
    assert max(slopes) < 3.0


def kink(name, lam):
    """The jump of the slope of the envelope of the double well at its top, u = 0."""
    f = FUNCTIONS["double well"][0]
    h = 1e-4
    (left, middle, right), _ = by_brute_force(f, name, np.array([-h, 0.0, h]), lam)
    return (right - 2 * middle + left) / h


@pytest.mark.parametrize("name", ["quad", "tan", "tan_sep", "log", "log_sep"])
def test_above_the_threshold_the_theorem_fails(name):
    """At its top the double well has curvature -1, and phi at 0 has 2 / lam: together 0 at lam = 2.

    Below, the prox of 0 is 0 and the envelope is smooth there. Above, it is two points, and the
    envelope has a kink: the one-sided slopes differ, and (13) is neither.
    """
    f = FUNCTIONS["double well"][0]
    assert abs(kink(name, 1.5)) < 1e-3
    assert kink(name, 8.0) < -0.05
    _, (left, right) = by_brute_force(f, name, np.array([-1e-6, 1e-6]), 8.0)
    assert left < -0.1
    assert right > 0.1
    _, (left, right) = by_brute_force(f, name, np.array([-1e-6, 1e-6]), 1.5)
    assert abs(left - right) < 1e-4


@pytest.mark.parametrize("lam", [0.01, 0.1, 1.0])
def test_cubic_has_no_threshold_where_f_is_concave(lam):
    """Without (A3): |w|^3 is flat at 0 and outweighs no negative curvature, whatever lam is.

    f + |z|^3 / lam has the slope z^3 - z + 3 z^2 / lam: it vanishes off 0 at the root below.
    """
    f = FUNCTIONS["double well"][0]
    root = (-3 / lam + math.sqrt(9 / lam**2 + 4)) / 2
    _, (left, right) = by_brute_force(f, "cubic", np.array([-1e-9, 1e-9]), lam)
    np.testing.assert_allclose([left, right], [-root, root], rtol=1e-3)


@pytest.mark.parametrize("lam", [0.05, 0.2])
@pytest.mark.parametrize("name", ["quad", "tan", "log", "log_sep", "tan_sep"])
def test_rank_one_factorization(name, lam):
    """f(a, b) = (a b - 1)^2 / 2 near (1.2, 0.9), in the plane."""
    phi = Layerwise(POTENTIALS[name], [(0, 2)])

    def f(z):
        rest = z[..., 0] * z[..., 1] - 1
        return rest**2 / 2, torch.stack([rest * z[..., 1], rest * z[..., 0]], -1)

    u = torch.tensor([1.2, 0.9], dtype=F64)
    found = prox(f, phi, u, lam, tolerance=1e-11)

    def envelope(at):
        middle, width = at, 0.3
        for _ in range(8):
            axes = [np.linspace(m - width, m + width, 101) for m in middle]
            a, b = np.meshgrid(*axes, indexing="ij")
            wa, wb = at[0] - a, at[1] - b
            if name.endswith("_sep") or name == "quad":
                coupling = VALUES[name](wa) + VALUES[name](wb)
            else:
                coupling = VALUES[name](np.hypot(wa, wb))
            total = (a * b - 1) ** 2 / 2 + coupling / lam
            i, j = np.unravel_index(np.argmin(total), total.shape)
            middle, width = (a[i, j], b[i, j]), width / 10
        return total[i, j], middle

    value, point = envelope(u.numpy())
    np.testing.assert_allclose(found.value, value, rtol=0, atol=1e-13)
    np.testing.assert_allclose(found.point, point, rtol=0, atol=1e-6)
    h = 1e-4
    for axis in range(2):
        step = h * np.eye(2)[axis]
        slope = (envelope(u.numpy() + step)[0] - envelope(u.numpy() - step)[0]) / (2 * h)
        np.testing.assert_allclose(found.gradient[axis], slope, rtol=0, atol=1e-6)


@pytest.mark.parametrize("lam", [0.1, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_indicator_of_a_circle(name, lam):
    """f is 0 on |z| = 1 and infinite elsewhere: prox-regular on the circle, and not convex."""

    def envelope(at):
        low, high = -0.6, 0.9
        for _ in range(4):
            angles = np.linspace(low, high, 4001)
            circle = np.stack([np.cos(angles), np.sin(angles)], -1)
            w = at - circle
            if name.endswith("_sep") or name == "quad":
                coupling = VALUES[name](w[:, 0]) + VALUES[name](w[:, 1])
            else:
                coupling = VALUES[name](np.hypot(w[:, 0], w[:, 1]))
            i = int(np.argmin(coupling))
            width = 2 * (angles[1] - angles[0])
            low, high = angles[i] - width, angles[i] + width
        return coupling[i] / lam, circle[i]

    u = np.array([1.3, 0.2])
    _, p = envelope(u)
    gradient = Layerwise(POTENTIALS[name], [(0, 2)]).grad(torch.from_numpy(u - p)) / lam
    h = 1e-4
    for axis in range(2):
        step = h * np.eye(2)[axis]
        slope = (envelope(u + step)[0] - envelope(u - step)[0]) / (2 * h)
        np.testing.assert_allclose(gradient[axis], slope, rtol=1e-4, atol=1e-4)
    if not name.endswith("_sep"):  # a radial phi depends on the distance alone: the nearest point
        np.testing.assert_allclose(p, u / np.linalg.norm(u), rtol=0, atol=1e-6)


# ---- closed forms


def test_a_quadratic_with_quad():
    """f(z) = z^T A z / 2 - b^T z: (A + 2 / lam) p = b + 2 u / lam."""
    generator = np.random.default_rng(0)
    root = generator.normal(size=(6, 6))
    a, b, u, lam = root @ root.T, generator.normal(size=6), generator.normal(size=(3, 6)), 0.3
    matrix, vector = torch.from_numpy(a), torch.from_numpy(b)

    def f(z):
        return ((z @ matrix) * z).sum(-1) / 2 - z @ vector, z @ matrix - vector

    phi = Layerwise(POTENTIALS["quad"], [(0, 6)])
    found = prox(f, phi, torch.from_numpy(u), lam, tolerance=1e-12)
    p = np.linalg.solve(a + 2 / lam * np.eye(6), (b + 2 / lam * u).T).T
    np.testing.assert_allclose(found.point, p, rtol=0, atol=1e-9)
    np.testing.assert_allclose(found.gradient, 2 / lam * (u - p), rtol=0, atol=1e-8)
    value = np.einsum("ri,ij,rj->r", p, a, p) / 2 - p @ b + ((u - p) ** 2).sum(1) / lam
    np.testing.assert_allclose(found.value, value, rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_the_accuracy_is_the_distance_of_13_to_the_gradient_of_f(name):
    phi = Layerwise(POTENTIALS[name], LINE)
    u = torch.tensor([[1.4]], dtype=F64)
    f = on_line("double well")
    rough = prox(f, phi, u, 0.5, tolerance=1e-12, budget=5)
    p = float(rough.point)
    expected = abs(p * (p**2 - 1) - SLOPES[name](1.4 - p) / 0.5)
    assert float(rough.accuracy) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert not bool(rough.converged)
    assert rough.evaluations == 5
    assert bool(prox(f, phi, u, 0.5, tolerance=1e-12).converged)


def test_rows_are_independent_problems():
    phi = Layerwise(POTENTIALS["tan"], LINE)
    u = torch.tensor([[1.6], [0.3], [-1.0]], dtype=F64)  # the last is stationary at once
    f = on_line("double well")
    together = prox(f, phi, u, 0.4, tolerance=1e-10, absolute=1e-12)
    assert bool(together.converged.all())
    assert float(together.point[2]) == -1.0
    for row in range(3):
        alone = prox(f, phi, u[row], 0.4, tolerance=1e-10, absolute=1e-12)
        np.testing.assert_allclose(together.point[row], alone.point, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["tan", "tan_sep", "log", "log_sep"])
def test_a_large_force_does_not_cross_the_boundary(name):
    """f(z) = -1e6 z: p is near the boundary, where the force of phi is as large."""
    phi = Layerwise(POTENTIALS[name], LINE)
    u = torch.zeros(1, dtype=F64)

    def f(z):
        return -1e6 * z[..., 0], torch.full_like(z, -1e6)

    found = prox(f, phi, u, 1.0, tolerance=1e-6, budget=400)
    assert bool(phi.contains(u - found.point))
    w = float(u - found.point)
    assert SLOPES[name](w) == pytest.approx(-1e6, rel=1e-5)


def test_a_start_outside_is_refused():
    phi = Layerwise(POTENTIALS["log"], LINE)
    with pytest.raises(ValueError, match="`start` is outside the domain"):
        prox(on_line("double well"), phi, torch.zeros(1), 1.0, start=torch.ones(1))


def test_residuals_by_hand():
    """One coordinate, quad: grad phi = 2 w. Two workers."""
    phi = Layerwise(POTENTIALS["quad"], LINE)
    u, z = torch.tensor([1.0], dtype=F64), torch.tensor([[0.5], [2.0]], dtype=F64)
    assert float(consensus_residual(phi, u, z, 0.1)) == pytest.approx((1.0 - 2.0) / 0.1)
    gradient = torch.tensor([[3.0], [-20.0]], dtype=F64)
    found = worker_residual(gradient, phi, u, z, 0.1)
    np.testing.assert_allclose(found[:, 0], [3.0 - 10.0, -20.0 + 20.0], atol=1e-12)


@pytest.mark.parametrize("lam", [0.0, -1.0, math.nan, torch.tensor([[1.0], [0.0]])])
def test_a_lam_that_is_not_positive_is_refused(lam):
    with pytest.raises(ValueError, match=r"^`lam` is .*; allowed: numbers > 0$"):
        prox(lambda z: (z.square().sum(-1), 2.0 * z), POTENTIALS["tan"], torch.ones(2, 3), lam)


def test_a_budget_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match=r"^`budget` is 0; allowed: a whole number >= 1$"):
        prox(lambda z: (z.square().sum(-1), 2.0 * z), POTENTIALS["tan"], torch.ones(2), 1, budget=0)
