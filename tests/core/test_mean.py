"""The proximal step of phi, and the phi-mean, against closed forms, bisection and SciPy."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, minimize

from consensus import POTENTIALS, Layerwise, Potential, Radial
from consensus.core.mean import phi_mean
from consensus.core.potentials import scaled_quad
from consensus.core.profiles import TAN

F64 = torch.float64
LAYERS = [(0, 3), (3, 8)]
TABLE2 = ("quad", "cubic", "tan", "tan_sep", "log", "log_sep")
NAMES = (*TABLE2, "pseudo_huber", "log_cosh", "power")
SLOPES = {  # psi' of Table 2 and beyond, from their formulas
    "quad": lambda s: 1.0,
    "cubic": lambda s: 1.5 * math.sqrt(s),
    "tan": lambda s: 1.0 / math.cos(s) ** 2,
    "tan_sep": lambda s: 1.0 / math.cos(s) ** 2,
    "log": lambda s: 1.0 / (1.0 - s),
    "log_sep": lambda s: 1.0 / (1.0 - s),
    "pseudo_huber": lambda s: 0.5 / math.sqrt(1.0 + s),
    "log_cosh": lambda s: 0.5 * math.tanh(math.sqrt(s)) / math.sqrt(s) if s else 0.5,
    "power": lambda s: 2.0 * s,
}
BOUNDS = {"tan": math.pi / 2, "tan_sep": math.pi / 2, "log": 1.0, "log_sep": 1.0}


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def group_of(name):
    separable = name.endswith("_sep") or name in ("pseudo_huber", "log_cosh")
    return [slice(i, i + 1) for i in range(8)] if separable else [slice(*layer) for layer in LAYERS]


# ---- the proximal step


def prox_by_bisection(name, b, step, eta):
    """Group by group: |x| solves rho + 2 (step / eta^2) psi'(rho^2) rho = |b| / eta."""
    w = np.zeros_like(b)
    top = math.sqrt(BOUNDS.get(name, math.inf))
    for part in group_of(name):
        r = np.linalg.norm(b[part]) / eta

        def f(rho, r=r):
            return rho + 2.0 * step / eta**2 * SLOPES[name](rho * rho) * rho - r

        high = min(r, top * (1 - 1e-16))
        # If it is below 0 even there, the root lies between the two largest numbers inside.
        rho = high if f(high) <= 0 else brentq(f, 0.0, high, xtol=1e-300, rtol=1e-15)
        w[part] = b[part] * (rho / r) if r else 0.0
    return w


@pytest.mark.parametrize("eta", [0.5, 2.0])
@pytest.mark.parametrize("step", [1e-4, 1.0, 2000.0])
@pytest.mark.parametrize("length", [1e-6, 0.3, 10.0])
@pytest.mark.parametrize("name", NAMES)
def test_prox_against_bisection(name, length, step, eta):
    phi = Layerwise(POTENTIALS[name], LAYERS, eta)
    b = length * draws(3, 8)
    w = phi.prox(b, step)
    for row, expected in zip(w.numpy(), b.numpy(), strict=True):
        np.testing.assert_allclose(
            row, prox_by_bisection(name, expected, step, eta), rtol=1e-11, atol=1e-300
        )


def test_prox_has_a_step_for_each_row():
    phi = Layerwise(POTENTIALS["tan"], LAYERS)
    b, steps = draws(3, 8), torch.tensor([0.1, 1.0, 10.0], dtype=F64)
    together = phi.prox(b, steps)
    for row, step in enumerate(steps.tolist()):
        np.testing.assert_allclose(together[row], phi.prox(b[row], step), rtol=1e-14)


def test_prox_of_a_weighted_quadratic():
    weight = [1.0, 2.0, 3.0, 4.0]
    b = draws(4)
    w = scaled_quad(weight=weight).prox(b, 0.5)  # w + 2 * 0.5 * weight * w = b
    np.testing.assert_allclose(w, b / (1.0 + torch.tensor(weight, dtype=F64)), rtol=1e-14)


def test_prox_of_a_radial_potential_with_weights_is_refused():
    weighed = Potential(TAN, Radial(), torch.tensor([1.0, 2.0], dtype=F64))
    with pytest.raises(ValueError, match="a weight for each coordinate"):
        weighed.prox(draws(2), 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("name", ["tan", "tan_sep", "log", "log_sep"])
@pytest.mark.parametrize("far", [1.0, 1e3, 1e12])
def test_what_prox_stores_is_inside_however_far_it_comes_from(name, dtype, far):
    """Stored is z = u - w; the exact difference u - z of the stored numbers has to be inside."""
    phi = Layerwise(POTENTIALS[name], LAYERS, 0.5)
    u = (3.0 * draws(8, seed=1)).to(dtype)
    y = (far * draws(50, 8, seed=2)).to(dtype)
    z = u - phi.prox(u - y, 1e-6, u)
    x = ((u.double() - z.double()) / 0.5).square()
    sizes = torch.stack([x[:, part].sum(1) for part in group_of(name)])
    assert float(sizes.max()) < BOUNDS[name]
    if far > 1.0:
        assert float(sizes.max()) > 0.99 * BOUNDS[name], "the boundary was never near: no test"


# ---- the phi-mean


def spread(count=5, share=0.4):
    """Points whose differences from their middle are well inside every domain."""
    z = draws(count, 8, seed=3)
    return share * z / z.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("share", [0.05, 0.4])
@pytest.mark.parametrize("name", NAMES)
def test_mean_against_scipy(name, share):
    phi, z = Layerwise(POTENTIALS[name], LAYERS), spread(share=share)
    found = phi_mean(phi, z, torch.zeros(8, dtype=F64), tolerance=1e-12)
    assert found.residual <= 1e-12
    groups = group_of(name)

    def gradient(u):
        total = np.zeros(8)
        for w in u - z.numpy():
            for part in groups:
                total[part] += 2.0 * SLOPES[name](float(w[part] @ w[part])) * w[part]
        return total

    strength = np.abs([gradient(u) for u in z.numpy()]).sum()
    assert np.linalg.norm(gradient(found.u.numpy())) <= 1e-11 * strength
    by_scipy = minimize(
        lambda u: float(phi.value(torch.from_numpy(u) - z).sum()),
        z.numpy().mean(0), jac=gradient, method="BFGS", options={"gtol": 1e-12},
    )  # fmt: skip
    np.testing.assert_allclose(found.u, by_scipy.x, rtol=0, atol=1e-5 if name == "power" else 1e-7)


@pytest.mark.parametrize("name", TABLE2)
def test_mean_of_two_points_is_their_middle(name):
    phi, z = Layerwise(POTENTIALS[name], LAYERS), spread(2)
    found = phi_mean(phi, z, z[0] + 0.01, tolerance=1e-13)
    np.testing.assert_allclose(found.u, z.mean(0), rtol=0, atol=1e-12)


def test_mean_of_quad_is_the_mean_at_once():
    z = spread()
    found = phi_mean(Layerwise(POTENTIALS["quad"], LAYERS, 0.3), z, z[0])
    assert found.iterations == 0
    np.testing.assert_allclose(found.u, z.mean(0), rtol=1e-14)


@pytest.mark.parametrize(("name", "asked"), [("cubic", False), ("tan", True)])
def test_ranks_agree_on_a_step_only_where_the_domain_has_a_boundary(name, asked):
    steps = []

    def smallest(step):
        steps.append(float(step))
        return step

    phi = Layerwise(POTENTIALS[name], LAYERS)
    phi_mean(phi, spread(), torch.zeros(8, dtype=F64), smallest=smallest)
    assert bool(steps) == asked


def test_mean_of_a_narrow_pseudo_huber_is_the_median_of_each_coordinate():
    z = torch.cat([spread(4), torch.full((1, 8), 100.0, dtype=F64)])  # one broken worker
    phi = Layerwise(POTENTIALS["pseudo_huber"], LAYERS, 1e-4)
    found = phi_mean(phi, z, z.mean(0), tolerance=1e-10)
    np.testing.assert_allclose(found.u, z.median(0).values, rtol=0, atol=1e-3)
    assert float((z.mean(0) - z.median(0).values).abs().min()) > 1.0


def test_mean_begins_near_the_boundary():
    """At one of two points, and the other all but outside."""
    z = torch.stack([torch.zeros(8, dtype=F64), torch.zeros(8, dtype=F64)])
    z[1, 0] = 1.0 - 1e-9
    for name in ("log", "log_sep"):
        found = phi_mean(Layerwise(POTENTIALS[name], LAYERS), z, z[0], tolerance=1e-12)
        np.testing.assert_allclose(found.u, z.mean(0), rtol=0, atol=1e-9)


def test_mean_stays_where_all_points_are():
    z = torch.ones(3, 8)
    found = phi_mean(Layerwise(POTENTIALS["tan"], LAYERS), z, torch.ones(8))
    assert torch.equal(found.u, torch.ones(8))
    assert found.residual == 0.0


def test_float32_ends_at_its_rounding():
    z = spread().float()
    found = phi_mean(Layerwise(POTENTIALS["tan"], LAYERS), z, z[0], tolerance=0.0)
    exact = phi_mean(Layerwise(POTENTIALS["tan"], LAYERS), z.double(), z[0].double(), tolerance=0.0)
    assert found.iterations < 20
    np.testing.assert_allclose(found.u, exact.u, rtol=0, atol=1e-6)
