"""Alternating minimization and PALM against linear systems, SciPy, grids and subdifferentials."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from consensus.core.layerwise import Layerwise
from consensus.core.potentials import POTENTIALS
from consensus.theory.composite import Function, LinearMap, Model
from consensus.theory.splitting import Status, alternating_minimization, palm
from tests.testing.composite import (
    ALPHA,
    BETA,
    LAM,
    PHI,
    RUNS,
    U0,
    Z0,
    A,
    B,
    C,
    M,
    N,
    closed_form_model,
    every_phi,
    every_run,
    half_steps,
    inside,
    l1,
    linear_model,
    linear_solution,
    lorentz,
    square,
    tensor,
    truncated,
)


@every_run
@pytest.mark.parametrize("g_way", ["gradient", "prox"])
@pytest.mark.parametrize("f_way", ["gradient", "prox"])
def test_the_linear_system(run, g_way, f_way):
    found = run(linear_model(g_way, f_way), tensor(np.zeros(N)), relative=1e-8)
    u, z = linear_solution()
    assert found.status is Status.CONVERGED
    assert found.unsolved == 0
    np.testing.assert_allclose(found.u, u, atol=1e-6)
    np.testing.assert_allclose(found.z, z, atol=1e-6)


# -------------------------------------------------------------------------------- SciPy, if convex


def huber(v, lam):
    """The envelope of |.| with phi = w^2: min over z of |z| + (v - z)^2 / lam, by hand."""
    return np.where(np.abs(v) <= lam / 2, v**2 / lam, np.abs(v) - lam / 4)


@every_run
def test_the_envelope_of_the_l1_norm_is_the_huber_loss(run):
    model = Model(
        square(C, 0.1, "prox"),
        l1(B),
        POTENTIALS.make("power", p=2.0, separable=True),
        LAM,
        LinearMap.matrix(tensor(A)),
    )
    found = run(model, tensor(np.zeros(N)), relative=1e-9)

    def loss(u):
        return huber(A @ u - B, LAM).sum() + 0.05 * ((u - C) ** 2).sum()

    other = minimize(loss, np.zeros(N), method="BFGS", options={"gtol": 1e-7})
    assert found.objective[-1] == pytest.approx(other.fun, abs=1e-10)
    assert loss(found.u.numpy()) == pytest.approx(found.objective[-1], abs=1e-10), "z is minimal"
    np.testing.assert_allclose(found.u, other.x, atol=1e-5)


def softplus(x):
    return np.logaddexp(0.0, x)


@every_phi
@pytest.mark.parametrize("run", [alternating_minimization, palm])
def test_logistic_losses_are_minimized_as_scipy_does(run, name):
    # Convex in (u, z): sum_i softplus(z_i) - p_i z_i + ridge, for each of the six phi.
    p, ridge, lam = np.array([0.9, 0.2, 0.6, 0.1, 0.7]), 0.2, 0.8
    f = Function.smooth(
        lambda z: (torch.nn.functional.softplus(4.0 * z) - 4.0 * tensor(p) * z).sum()
    )
    model = Model(square(C, ridge, "prox"), f, POTENTIALS[name], lam, LinearMap.matrix(tensor(A)))
    found = run(model, tensor(np.zeros(N)), relative=1e-5)

    def total(x):
        u, z = x[:N], x[N:]
        w = A @ u - z
        if not inside(name, w):
            return 1e3 + 1e3 * (w**2).sum()
        f = (softplus(4.0 * z) - 4.0 * p * z).sum()
        return f + 0.5 * ridge * ((u - C) ** 2).sum() + PHI[name][0](w) / lam

    start = np.zeros(N + M)
    other = minimize(total, start, method="BFGS", options={"gtol": 1e-6})
    assert found.status is Status.CONVERGED
    assert found.unsolved == 0
    assert found.objective[-1] == pytest.approx(other.fun, abs=1e-8)
    assert total(np.concatenate([found.u, found.z])) == pytest.approx(
        found.objective[-1], abs=1e-12
    )
    np.testing.assert_allclose(np.concatenate([found.u, found.z]), other.x, atol=1e-3)


@every_run
def test_phi_acts_on_each_row(run):
    # Consensus (15): three quadratics in R^2, phi radial in each row of z (3, 2).
    centres, weights = np.random.default_rng(1).normal(size=(3, 2)), np.array([[1.0], [2.0], [4.0]])
    f = Function.smooth(lambda z: (0.5 * tensor(weights) * (z - tensor(centres)) ** 2).sum())
    copies = LinearMap.copies(3)
    by_rows = Model(Function.zero(), f, POTENTIALS["tan"], 0.5, copies)
    found = run(by_rows, tensor(np.zeros(2)), relative=1e-7)

    def total(x):
        u, z = x[:2], x[2:].reshape(3, 2)
        if not inside("tan", u - z):
            return 1e3 + 1e3 * ((u - z) ** 2).sum()
        return (0.5 * weights * (z - centres) ** 2).sum() + PHI["tan"][0](u - z).sum() / 0.5

    other = minimize(total, np.zeros(8), method="BFGS", options={"gtol": 1e-7})
    assert found.objective[-1] == pytest.approx(other.fun, abs=1e-10)
    np.testing.assert_allclose(found.u, other.x[:2], atol=1e-5)
    # The same problem as one vector, with rows defined by `Layerwise`.
    flat = LinearMap(lambda u: u.repeat(3), lambda z: z.view(3, 2).sum(0))
    phi = Layerwise(POTENTIALS["tan"], [(0, 2), (2, 4), (4, 6)])
    as_vector = Model(
        Function.zero(), Function.smooth(lambda z: f.value(z.view(3, 2))), phi, 0.5, flat
    )
    again = run(as_vector, tensor(np.zeros(2)), relative=1e-7)
    np.testing.assert_allclose(again.u, found.u, atol=1e-5)


# ------------------------------------------------------------------ nonconvex: what theory promises

NONCONVEX = {"truncated": truncated, "lorentz": lorentz}


@every_phi
@every_run
@pytest.mark.parametrize("loss", NONCONVEX.values(), ids=NONCONVEX)
def test_f_decreases_and_every_iterate_is_feasible(run, name, loss):
    far = 4.0 * B  # outliers: the coupling is pulled to its boundary
    model = Model(l1(C, 0.2), loss(far), POTENTIALS[name], 2.0, LinearMap.matrix(tensor(A)))
    u0 = np.linalg.lstsq(A, far, rcond=None)[0]
    path = []
    run(model, tensor(u0), tensor(A @ u0), budget=15, callback=lambda u, z: path.append((u, z)))

    def total(u, z):
        r = (z - far) ** 2
        f = np.minimum(r, 0.3).sum() if loss is truncated else np.log1p(r).sum()
        return 0.2 * np.abs(u - C).sum() + f + PHI[name][0](A @ u - z) / 2.0

    points = [(u0, A @ u0), *((u.numpy(), z.numpy()) for u, z in path)]
    assert all(inside(name, A @ u - z) for u, z in points)
    values = np.array([total(u, z) for u, z in points])
    assert (np.diff(values) <= 1e-12 * np.abs(values[0])).all()
    assert values[-1] < values[0] - 0.1, "F decreases noticeably"


def test_the_global_minimum_of_a_small_nonconvex_problem():
    # One u, one z: a grid finds the minimum, near enough that both methods must end in its basin.
    lam, a, b = 0.5, 1.3, 2.0

    def total(u, z):
        return (
            0.1 * (u - 0.5) ** 2
            + np.minimum((z - b) ** 2, 0.3)
            - np.log1p(-((a * u - z) ** 2)) / lam
        )

    grid = np.linspace(-1.0, 3.0, 1601)
    u, z = np.meshgrid(grid, grid, indexing="ij")
    apart = np.abs(a * u - z) < 1.0
    values = np.full(u.shape, np.inf)
    values[apart] = total(u[apart], z[apart])
    best = np.unravel_index(values.argmin(), values.shape)
    model = Model(
        square([0.5], 0.2, "prox"),
        truncated([b]),
        POTENTIALS["log"],
        lam,
        LinearMap.matrix(tensor([[a]])),
    )
    for run in RUNS.values():
        found = run(model, tensor([u[best] + 0.1]), tensor([a * (u[best] + 0.1)]))
        assert found.objective[-1] == pytest.approx(values[best], abs=1e-4)
        assert found.objective[-1] <= values[best] + 1e-9
        np.testing.assert_allclose([found.u[0], found.z[0]], [u[best], z[best]], atol=5e-3)


# -------------------------------------------------------------------------------- (5a), (5b), ends


def distance_of_zero(x, kink, weight, force):
    """Of 0 from weight d|x - kink|_1 + force, coordinate by coordinate."""
    r = x - kink
    at_kink = np.maximum(np.abs(force) - weight, 0.0)
    return np.linalg.norm(np.where(r == 0.0, at_kink, np.abs(weight * np.sign(r) + force)))


@every_run
@pytest.mark.parametrize("relative", [1e-3, 1e-7])
def test_residuals_bound_the_distances(run, relative):
    model = Model(l1(C, 0.5), l1(B), POTENTIALS["quad"], LAM, LinearMap.matrix(tensor(A)))
    found = run(model, tensor(np.zeros(N)), relative=relative)
    u, z = found.u.numpy(), found.z.numpy()
    y = 2.0 * (A @ u - z) / LAM
    of_u = distance_of_zero(u, C, 0.5, A.T @ y)
    of_z = distance_of_zero(z, B, 1.0, -y)
    assert found.status is Status.CONVERGED
    assert found.unsolved == 0
    assert of_u <= found.residuals[-1][0] + 1e-13
    assert of_z <= found.residuals[-1][1] + 1e-13
    # dg and df are subgradients, and the residuals follow the formulas.
    a, b = found.dg.numpy(), found.df.numpy()
    assert (np.abs(a) <= 0.5 + 1e-9).all()
    assert (np.abs(b) <= 1.0 + 1e-9).all()
    np.testing.assert_allclose(a[u != C], 0.5 * np.sign(u - C)[u != C], atol=1e-8)
    np.testing.assert_allclose(b[z != B], np.sign(z - B)[z != B], atol=1e-8)
    formulas = (np.linalg.norm(a + A.T @ y), np.linalg.norm(b - y))
    np.testing.assert_allclose(found.residuals[-1], formulas, atol=1e-13)
    forces = np.linalg.norm(y) * np.linalg.norm(A, 2) + np.linalg.norm(a)
    assert formulas[0] <= 1e-9 + relative * forces
    assert formulas[1] <= 1e-9 + relative * (np.linalg.norm(y) + np.linalg.norm(b))
    # A neighbouring point is not stationary.
    away = model.residuals(found.u + 0.1, found.z, found.dg, found.df)
    assert min(away) > 100 * max(found.residuals[-1])


@every_run
def test_residuals_of_smooth_functions_are_the_distances(run):
    found = run(linear_model("gradient", "gradient"), tensor(U0), tensor(Z0), budget=2)
    u, z = found.u.numpy(), found.z.numpy()
    y = 2.0 * (A @ u - z) / LAM
    expected = (np.linalg.norm(ALPHA * (u - C) + A.T @ y), np.linalg.norm(BETA * (z - B) - y))
    assert found.status is Status.BUDGET
    np.testing.assert_allclose(found.residuals[-1], expected, rtol=1e-10, atol=1e-13)


@every_run
def test_the_budget_is_kept(run):
    found = run(linear_model("prox", "prox"), tensor(U0), budget=3)
    assert found.status is Status.BUDGET
    assert found.iterations == 3 == len(found.objective) - 1
    assert run(linear_model("prox", "prox"), tensor(U0), budget=0).iterations == 0


@every_run
def test_a_wrong_gradient_ends_stuck(run):
    honest = square(B, BETA, "gradient")
    f = Function(honest.value, gradient=lambda z: (honest.value(z), -3.0 * BETA * (z - tensor(B))))
    model = Model(
        square(C, ALPHA, "gradient"), f, POTENTIALS["quad"], LAM, LinearMap.matrix(tensor(A))
    )
    found = run(model, tensor(U0), budget=500)
    assert found.status is Status.STUCK
    assert found.iterations < 500
    assert (np.diff(found.objective) <= 1e-12 * found.objective[0]).all()


@every_run
@pytest.mark.parametrize(
    ("value", "gradient", "statuses"),
    [
        (lambda z: -(z**4).sum(), lambda z: -4.0 * z**3, {Status.UNBOUNDED}),
        # The gradient overflows where F is still finite: there, no residual says anything.
        (lambda z: z.log().sum(), lambda z: 1.0 / z, {Status.STUCK, Status.BUDGET}),
    ],
)
def test_a_function_without_a_lower_bound_never_converges(run, value, gradient, statuses):
    f = Function(value, gradient=lambda z: (value(z), gradient(z)))
    eye = LinearMap.matrix(torch.eye(2, dtype=torch.float64))
    model = Model(Function.zero(), f, POTENTIALS["quad"], 1.0, eye)
    found = run(model, torch.ones(2, dtype=torch.float64), budget=200)
    assert found.status in statuses


def test_a_stationary_start_is_kept():
    u, z = linear_solution()
    found = palm(linear_model("prox", "prox"), tensor(u), tensor(z), relative=1e-8)
    assert (found.status, found.iterations) == (Status.CONVERGED, 1)
    np.testing.assert_allclose(found.u, u, atol=1e-12)


def test_arguments_are_not_modified():
    u, z = tensor(U0), tensor(Z0)
    palm(linear_model("prox", "prox"), u, z, budget=5)
    assert torch.equal(u, tensor(U0))
    assert torch.equal(z, tensor(Z0))


@every_run
def test_evaluations_counts_all_calls(run):
    calls = []

    def counted(function):
        return Function(
            lambda x: (calls.append(1), function.value(x))[1],
            prox=lambda x, step: (calls.append(1), function.prox(x, step))[1],
        )

    plain = linear_model("prox", "prox")
    model = Model(counted(plain.g), counted(plain.f), plain.phi, plain.lam, plain.linear)
    found = run(model, tensor(U0), budget=7)
    checks = 2  # F at the start is evaluated before the counting begins
    assert found.evaluations == len(calls) - checks


@every_run
def test_the_same_run_gives_the_same_bits(run):
    model = Model(l1(C), lorentz(B), POTENTIALS["log_sep"], LAM, LinearMap.matrix(tensor(A)))
    one, two = (run(model, tensor(np.zeros(N)), budget=20) for _ in range(2))
    assert torch.equal(one.u, two.u)
    assert one.objective == two.objective


# ----------------------------------------------------------------------------------- wrong input


def wrong_adjoint():
    a = tensor(A)
    return LinearMap(lambda u: a @ u, lambda z: 2.0 * a.mT @ z)


def of(phi="quad", lam=LAM, linear=None, g=None, f=None):
    linear = LinearMap.matrix(tensor(A)) if linear is None else linear
    return Model(
        g or square(C, 1.0, "prox"), f or square(B, 1.0, "prox"), POTENTIALS[phi], lam, linear
    )


START = tensor(np.zeros(N))
BAD = {
    "float32": (lambda run: run(of(), START.float()), "`u` is torch.float32; allowed: a float64"),
    "a number": (lambda run: run(of(), tensor(1.0)), "`u` is a number; allowed: a float64 tensor"),
    "budget": (lambda run: run(of(), START, budget=-1), "`budget` is -1; allowed: a whole number"),
    "budget of no number": (lambda run: run(of(), START, budget=1e3), "`budget` is 1000.0; all"),
    "z of another shape": (lambda run: run(of(), START, START), "z like A u"),
    "adjoint": (lambda run: run(of(linear=wrong_adjoint()), START), "allowed: equal products"),
    "outside": (
        lambda run: run(of("log"), START, tensor(np.ones(M))),
        "the start is outside the domain",
    ),
    "F inf": (
        lambda run: run(of(g=Function(lambda u: tensor(math.inf), prox=lambda u, s: u)), START),
        "F is inf at the start",
    ),
    "nothing known": (
        lambda run: run(of(f=Function(lambda z: z.sum())), START),
        "`f` has none of the oracles of this method: gradient, prox",
    ),
    "tolerance": (lambda run: run(of(), START, relative=-1.0), "tolerances are -1.0"),
    "tolerance nan": (lambda run: run(of(), START, absolute=math.nan), "tolerances are"),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
@every_run
def test_bad_input_is_refused(run, call, message):
    with pytest.raises(ValueError, match=message):
        call(run)


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_a_bad_weight_is_refused(weight):
    with pytest.raises(ValueError, match="`prox_weight` is"):
        alternating_minimization(of(), START, prox_weight=weight)


@pytest.mark.parametrize("reduction", [0.0, 1.0])
def test_a_bad_inner_reduction_is_refused(reduction):
    with pytest.raises(ValueError, match="`inner_reduction` is"):
        alternating_minimization(of(), START, inner_reduction=reduction)


def test_a_bad_inner_budget_is_refused():
    with pytest.raises(ValueError, match="`inner_budget` is 0; allowed: a whole number >= 1"):
        alternating_minimization(of(), START, inner_budget=0)


def test_a_closed_form_of_the_exact_scheme_is_refused_in_other_schemes():
    with pytest.raises(ValueError, match="`g` has none of the oracles of this method"):
        alternating_minimization(closed_form_model(), tensor(U0), prox_weight=1.0)
    with pytest.raises(ValueError, match="`g` has none of the oracles of this method"):
        palm(closed_form_model(), tensor(U0))


def test_a_wrong_closed_form_is_refused():
    with pytest.raises(ValueError, match=r"F rose from .* do not belong together"):
        alternating_minimization(closed_form_model(sign=-1.0), *map(tensor, half_steps(0.0)))


@every_run
def test_a_wrong_prox_is_refused(run):
    away = Function(
        lambda u: (u - tensor(C)).square().sum(), prox=lambda x, step: x + 0.1 * (x - tensor(C))
    )
    model = of(g=away)
    with pytest.raises(ValueError, match="F rose from"):
        run(model, tensor(C + 1.0))
