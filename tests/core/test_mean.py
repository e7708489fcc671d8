"""The proximal step of phi, and the phi-mean, against closed forms, bisection and SciPy."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, minimize

from consensus import POTENTIALS, Layerwise, Potential, Radial
from consensus.comm import GroupError, Launch, Solo
from consensus.core import mean
from consensus.core.kernels import consensus_kernel
from consensus.core.mean import phi_mean
from consensus.core.potentials import scaled_quad
from consensus.core.profiles import TAN
from consensus.run.build import build_algorithm
from consensus.run.plan import make_plan
from consensus.server import Server

F64 = torch.float64
LAYERS = [(0, 3), (3, 8)]
TABLE2 = ("quad", "cubic", "tan", "tan_sep", "log", "log_sep")
NAMES = (*TABLE2, "pseudo_huber", "huber", "log_cosh", "power")
SLOPES = {  # psi' of Table 2 and beyond, from their formulas
    "quad": lambda s: 1.0,
    "cubic": lambda s: 1.5 * math.sqrt(s),
    "tan": lambda s: 1.0 / math.cos(s) ** 2,
    "tan_sep": lambda s: 1.0 / math.cos(s) ** 2,
    "log": lambda s: 1.0 / (1.0 - s),
    "log_sep": lambda s: 1.0 / (1.0 - s),
    "pseudo_huber": lambda s: 0.5 / math.sqrt(1.0 + s),
    "huber": lambda s: 0.5 / math.sqrt(max(s, 1.0)),
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


@pytest.mark.parametrize(("name", "asked"), [("quad", 0), ("cubic", 1), ("tan", 1), ("log_sep", 1)])
def test_ranks_agree_once_on_the_box_of_all_points(name, asked):
    boxes = []

    def smallest(box):
        boxes.append(box)
        return box

    z = spread()
    phi_mean(Layerwise(POTENTIALS[name], LAYERS), z, z[0], smallest=smallest)
    assert len(boxes) == asked
    for box in boxes:
        np.testing.assert_array_equal(box, torch.cat([z.amin(0), -z.amax(0)]))


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


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_mean_at_a_kink(dtype, scale):
    """The median of three coordinates, up to the rounding of u: |w|^1.2 has a kink there.

    With a force F of the other two it is off by (F / 1.2)^5 = 1e-10, which cannot be stored.
    """
    phi = Layerwise(POTENTIALS.make("power", p=1.2), [(0, 1)], scale)
    for middle in torch.linspace(-0.01, 0.01, 5, dtype=dtype):
        z = scale * (2.0 + torch.stack([middle - 1.0, middle, middle + 1.05]))[:, None]
        found = phi_mean(phi, z, z[0] + 0.7 * scale, tolerance=1e-5)
        assert found.converged, found
        assert abs(float(found.u - z[1])) <= 4e-7 * scale


# ---- the phi-mean of any points

WIDE = [(0, 1), (1, 3), (3, 8), (8, 20)]
MANY = {
    "cubic": ("cubic", {}),
    "tan": ("tan", {}),
    "log_sep": ("log_sep", {}),
    "pseudo_huber": ("pseudo_huber", {}),
    "pseudo_huber, radial": ("pseudo_huber", {"separable": False}),
    "huber": ("huber", {}),
    "huber, separable": ("huber", {"separable": True}),
    "log_cosh": ("log_cosh", {}),
    "log_cosh, radial": ("log_cosh", {"separable": False}),
    "power": ("power", {}),
    "kink": ("power", {"p": 1.2}),
    "kink, separable": ("power", {"p": 1.2, "separable": True}),
}
SLOPE_OF_ROOT = {  # of psi(rho^2) by rho, elementwise
    "cubic": lambda rho: 3.0 * rho**2,
    "tan": lambda rho: 2.0 * rho / np.cos(rho**2) ** 2,
    "log_sep": lambda rho: 2.0 * rho / (1.0 - rho**2),
    "pseudo_huber": lambda rho: rho / np.sqrt(1.0 + rho**2),
    "huber": lambda rho: np.minimum(rho, 1.0),
    "log_cosh": np.tanh,
    "power": lambda rho: 4.0 * rho**3,
    "kink": lambda rho: 1.2 * rho**0.2,
}


def points(kind, count, phi, random):
    z = random.standard_normal((count, 20))
    if kind == "outlier":
        z[-1] = 1e6 * random.standard_normal(20)
    elif kind == "ties":
        z = z.round()
    elif kind == "equal":
        z[:] = z[0]
    elif kind == "scales":
        z *= np.logspace(-6, 3, 20)
    z = torch.from_numpy(z)
    if phi.bounded:
        widest = float(phi.reach(z.unsqueeze(0) - z.unsqueeze(1)).amax())
        z = 0.1 + z * (0.9 * math.sqrt(phi.bound) / max(widest, 1e-9))
    return z


def imbalance(case, eta, z, u, eps):
    """|sum of forces|, the sum of |force|, what rounding of u and u - z_j changes. Each (G,)."""
    separable = case in ("log_sep", "pseudo_huber", "log_cosh") or "separable" in case
    slope = SLOPE_OF_ROOT[case.partition(",")[0]]
    w = u - z
    groups = [slice(i, i + 1) for i in range(20)] if separable else [slice(*a) for a in WIDE]
    rows = []
    for group in groups:
        r = np.sqrt((w[:, group] ** 2).sum(1)) / eta
        force = slope(r) / eta
        unit = w[:, group] / np.where(r > 0, r * eta, 1.0)[:, None]
        total = np.linalg.norm((force[:, None] * unit).sum(0))
        step = 1e-4 * r
        curvature = (slope(r + step) - slope(r - step)) / np.where(r > 0, 2 * step, 1.0)
        across = np.where(r > 0, slope(r) / np.where(r > 0, r, 1.0), 0.0)
        curvature = np.maximum(curvature, across) / eta**2
        moved = eps * (eta * r + np.linalg.norm(u[group]))
        kink = np.where(eta * r <= moved, slope(moved / eta) / eta, 0.0)  # it may be infinite there
        rows.append((total, force.sum(), np.maximum(curvature * moved, kink).sum()))
    return np.array(rows).T


@pytest.mark.parametrize("case", MANY)
def test_mean_of_any_points_is_in_their_box_and_balances_the_forces(case):
    name, options = MANY[case]
    random = np.random.default_rng(0)
    kinds = ("normal", "outlier", "ties", "equal", "scales")
    settings = [
        (eta, count, dtype)
        for eta in (1e-3, 0.02, 10.0)
        for count in (1, 2, 3, 16)
        for dtype in (torch.float32, F64)
    ]
    for i, (eta, count, dtype) in enumerate(settings):
        phi = Layerwise(POTENTIALS.make(name, **options), WIDE, eta)
        for kind in (kinds[i % 5], kinds[(i + 2) % 5])[: 2 if count == 3 else 1]:
            z = points(kind, count, phi, random).to(dtype)
            start = z[0] if phi.bounded else torch.from_numpy(random.standard_normal(20)).to(dtype)
            tolerance = 1e-5 if dtype == torch.float32 else 1e-9
            found = phi_mean(phi, z, start, tolerance=tolerance)
            where = f"{case}, eta {eta}, {count} points, {dtype}, {kind}"
            assert found.converged, f"{where}: {found}"
            assert bool(((found.u >= z.amin(0)) & (found.u <= z.amax(0))).all()), where
            if count == 1 or kind == "equal":
                assert torch.equal(found.u, z[0]), where
            u, eps = found.u.double().numpy(), torch.finfo(dtype).eps
            with np.errstate(all="ignore"):
                total, strength, rounding = imbalance(case, eta, z.double().numpy(), u, eps)
            balanced = total <= 1.01 * tolerance * strength + 20.0 * rounding
            if len(balanced) == 20:  # or there is a zero between the neighbours of u
                balanced |= changes_sign(case, eta, z.double().numpy(), found.u)
            assert balanced.all(), f"{where}: {total} of {strength}"


def changes_sign(case, eta, z, u):
    """Whether the force changes sign within two units of rounding of u, or of the square of it."""
    square = 2.0 * torch.finfo(u.dtype).eps ** 2 * (z.max(0) - z.min(0))
    slope = SLOPE_OF_ROOT[case.partition(",")[0]]
    signs = []
    for end in (-math.inf, math.inf):
        near = u
        for _ in range(2):
            near = torch.nextafter(near, torch.full_like(near, end))
        w = (near.double().numpy() + math.copysign(1.0, end) * square - z) / eta
        with np.errstate(all="ignore"):
            signs.append((np.sign(w) * slope(np.abs(w))).sum(0))
    return (signs[0] <= 0) & (signs[1] >= 0)


@pytest.mark.parametrize("case", ["pseudo_huber", "log_cosh", "kink, separable"])
def test_mean_equals_bisection(case):
    """Coordinate by coordinate, where the equation determines it: an odd number of points."""
    name, options = MANY[case]
    slope = SLOPE_OF_ROOT[case.partition(",")[0]]
    z = draws(5, 200, seed=5)
    for eta in (0.01, 0.3, 4.0):
        phi = Layerwise(POTENTIALS.make(name, **options), [(0, 200)], eta)
        sums = []
        found = phi_mean(
            phi, z, draws(200, seed=6), tolerance=1e-13,
            total=lambda x, sums=sums: sums.append(x) or x,
        )  # fmt: skip
        assert found.converged
        assert len(sums) <= (80 if "kink" in case else 60), "collectives"
        low, high = z.numpy().min(0), z.numpy().max(0)
        for _ in range(100):
            middle = 0.5 * (low + high)
            w = (middle - z.numpy()) / eta
            below = (np.sign(w) * slope(np.abs(w))).sum(0) < 0
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        np.testing.assert_allclose(found.u, low, rtol=0, atol=1e-9)


def test_mean_of_a_point_that_is_not_finite_is_nan():
    for name in ("pseudo_huber", "cubic"):
        z = spread()
        z[1, 2] = math.nan
        found = phi_mean(Layerwise(POTENTIALS[name], LAYERS), z, torch.zeros(8, dtype=F64))
        assert math.isnan(found.residual)
        assert not found.converged


@pytest.mark.parametrize("case", ["pseudo_huber", "pseudo_huber, radial"])
def test_a_mean_that_does_not_converge_says_so(monkeypatch, case):
    monkeypatch.setattr(mean, "MOST_STEPS", 2)
    name, options = MANY[case]
    phi = Layerwise(POTENTIALS.make(name, **options), LAYERS, 0.01)
    found = phi_mean(phi, draws(5, 8), torch.zeros(8, dtype=F64))
    assert not found.converged
    assert 1e-6 < found.residual <= 1.0
    assert found.iterations == 2


def exact_on_ranks(group, case, eta, most_steps):
    """U of the exact update of 4 workers, or the error."""
    name, options = MANY[case]
    phi = Layerwise(POTENTIALS.make(name, **options), WIDE, eta)
    z = points("normal", 4, phi, np.random.default_rng(7))
    server = Server(z[0].clone(), phi, group, consensus_kernel("exact", phi, z[0], group.sum_))
    own = z.chunk(group.size)[group.rank]
    before, mean.MOST_STEPS = mean.MOST_STEPS, most_steps
    try:
        return server.finish(server.start(own), 1.0).tolist()
    except GroupError as error:
        return str(error)
    finally:
        mean.MOST_STEPS = before


def exact_cases(group):
    cases = [("log_cosh", 0.02), ("log_cosh, radial", 0.02), ("tan", 1.0), ("log_sep", 0.5)]
    good = [exact_on_ranks(group, case, eta, mean.MOST_STEPS) for case, eta in cases]
    return good, exact_on_ranks(group, "log_cosh", 0.02, 2)


@pytest.mark.ranks
def test_exact_update_on_ranks(ranks):
    runs = {size: ranks(size, exact_cases) for size in (1, 2, 4)}
    for answers in runs.values():
        assert all(answer[0] == answers[0][0] for answer in answers), "u differs between ranks"
        for rank, (_, error) in enumerate(answers):
            assert error.startswith(f"rank {rank}: the exact update of u did not converge in 2 ")
            assert "eta 0.02): relative residual " in error
    for size in (2, 4):
        for several, one in zip(runs[size][0][0], runs[1][0][0], strict=True):
            np.testing.assert_allclose(several, one, rtol=0, atol=1e-8)


@pytest.mark.parametrize("workers", [1, 4])
def test_exact_update_of_a_run_is_the_minimizer_of_every_iteration(make_config, workers):
    """A potential of bounded force and a coupling so stiff that the z_j oscillate."""
    config = make_config(
        *("model=logistic", f"workers={workers}", "data.partition=label_skew"),
        *("potential=log_cosh", "potential.eta=0.02", "potential.options.separable=true"),
        *("algorithm.lam=0.1", "algorithm.sigma=0.001", "algorithm.batch_size=4"),
        *("algorithm.iterations=8", "algorithm.u_update=exact"),
    )
    algorithm = build_algorithm(make_plan(config, Launch()), Solo())
    for t in range(8):
        z = algorithm.worker.z.clone()
        algorithm.step(t)
        u = algorithm.u
        assert bool(((u >= z.amin(0)) & (u <= z.amax(0))).all())
        w = (u.double() - z.double()).numpy() / 0.02
        force = np.abs(np.tanh(w).sum(0))
        rounding = 1e-6 * ((1 - np.tanh(w) ** 2) * (np.abs(w) + np.abs(u.numpy()) / 0.02)).sum(0)
        assert (force <= 1.01e-5 * np.abs(np.tanh(w)).sum(0) + 2.0 * rounding).all()
        if workers == 1:
            assert torch.equal(u, z[0])
    assert float(algorithm.worker.z.abs().max()) < 10.0
