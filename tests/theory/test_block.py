"""Block updates: subproblems (14a) and (14b), proximal gradient steps, step sizes."""

import math

import numpy as np
import pytest
import torch

from consensus.core.potentials import POTENTIALS
from consensus.theory.composite import Function, LinearMap, Model
from consensus.theory.splitting import Status, alternating_minimization, palm
from tests.testing.composite import (
    PHI,
    U0,
    Z0,
    A,
    B,
    C,
    N,
    closed_form_model,
    half_steps,
    inside,
    l1,
    linear_model,
    linear_solution,
    lorentz,
    square,
    tensor,
)


@pytest.mark.parametrize("weight", [0.0, 0.7])
@pytest.mark.parametrize("way", ["gradient", "prox"])
def test_one_iteration_is_14a_and_14b(weight, way):
    found = alternating_minimization(
        linear_model(way, way),
        tensor(U0),
        tensor(Z0),
        prox_weight=weight,
        budget=1,
        inner_reduction=1e-11,
        inner_budget=2000,
    )
    u, z = half_steps(weight)
    assert found.status is Status.BUDGET
    assert found.unsolved == 0
    np.testing.assert_allclose(found.u, u, atol=1e-8)
    np.testing.assert_allclose(found.z, z, atol=1e-8)


@pytest.mark.parametrize("way", ["gradient", "prox"])
def test_subproblems_above_their_tolerance_are_counted(way):
    """A few steps reduce no residual to a ten-thousandth; both runs still converge."""
    options = {"relative": 1e-8, "inner_reduction": 1e-4}
    hasty = alternating_minimization(
        linear_model(way, way), tensor(U0), tensor(Z0), inner_budget=6 if way == "gradient" else 1,
        **options,
    )  # fmt: skip
    whole = alternating_minimization(linear_model(way, way), tensor(U0), tensor(Z0), **options)
    assert hasty.unsolved > 0
    assert whole.unsolved == 0
    for found in (hasty, whole):
        assert found.status is Status.CONVERGED
        np.testing.assert_allclose(found.u, linear_solution()[0], atol=1e-6)


def test_the_closed_form_is_used():
    once = alternating_minimization(closed_form_model(), tensor(U0), tensor(Z0), budget=1)
    assert once.unsolved == 0
    np.testing.assert_allclose(once.u, half_steps(0.0)[0], atol=1e-13)
    np.testing.assert_allclose(once.z, half_steps(0.0)[1], atol=1e-13)
    found = alternating_minimization(closed_form_model(), tensor(U0), relative=1e-11)
    np.testing.assert_allclose(found.u, linear_solution()[0], atol=1e-8)
    assert found.status is Status.CONVERGED


def test_one_iteration_of_palm_is_its_formula():
    random = np.random.default_rng(1)
    # A = 1, phi = |w|^2: the gradient of the coupling has the Lipschitz constant 2 / lam exactly,
    # so that the first step sizes are 0.9 lam / 2.
    u0, z0, c, lam = C + 1.0, random.normal(size=N), random.normal(size=N), 0.6
    model = Model(l1(C, 0.3), square(c, 2.0, "prox"), POTENTIALS["quad"], lam)
    found = palm(model, tensor(u0), tensor(z0), budget=1)
    tau = 0.9 * lam / 2.0
    x = u0 - tau * (2.0 / lam) * (u0 - z0) - C
    u = C + np.sign(x) * np.maximum(np.abs(x) - 0.3 * tau, 0.0)
    y = z0 + tau * (2.0 / lam) * (u - z0)
    np.testing.assert_allclose(found.u, u, atol=1e-13)
    np.testing.assert_allclose(found.z, (y + tau * 2.0 * c) / (1.0 + tau * 2.0), atol=1e-13)


@pytest.mark.parametrize("name", ["tan", "log"])
def test_iterates_stay_in_the_domain_where_a_full_step_leaves_it(name):
    far = 4.0 * B
    u0 = np.linalg.lstsq(A, far, rcond=None)[0]
    model = Model(l1(C, 50.0), lorentz(far), POTENTIALS[name], 2.0, LinearMap.matrix(tensor(A)))
    first = model.g.prox(tensor(u0), 1.0).numpy()  # at z = A u the coupling has no gradient
    assert not inside(name, A @ first - A @ u0)
    path = []
    palm(model, tensor(u0), budget=30, callback=lambda u, z: path.append((u, z)))
    assert all(inside(name, A @ u.numpy() - z.numpy()) for u, z in path)
    furthest = max(np.sqrt(((A @ u.numpy() - z.numpy()) ** 2).sum()) for u, z in path)
    assert furthest > 0.5 * math.sqrt(PHI[name][1])


def test_a_step_is_limited_to_the_distance_to_the_boundary():
    # phi = -log(1 - w^2), lam = 2, w = 0: L = 1, so the first step size is 0.9 and the prox of
    # 10 |u - 50| moves u by 9, out of |w| < 1. 0.9 of the way to the boundary is u = 0.9; halving
    # would have ended at 0.5625. The second row does not move.
    target = [[50.0], [0.0]]
    model = Model(l1(target, 10.0), l1([[0.0], [0.0]]), POTENTIALS["log"], 2.0)
    found = palm(model, torch.zeros(2, 1, dtype=torch.float64), budget=1)
    np.testing.assert_allclose(found.u, [[0.9], [0.0]], atol=1e-12)


def test_step_sizes_grow_by_half_at_most():
    # The cubic potential has no curvature where it ends, u = z = C: nothing else limits the steps.
    steps = []
    g = square(C, 1.0, "prox")
    noted = Function(g.value, prox=lambda x, step: (steps.append(step), g.prox(x, step))[1])
    palm(Model(noted, square(C, 1.0, "prox"), POTENTIALS["cubic"], 1.0), tensor(C + U0), budget=30)
    ratios = np.array(steps[1:]) / np.array(steps[:-1])
    assert ratios.max() == pytest.approx(1.5)


def test_a_closed_form_outside_the_domain_is_refused():
    f = Function(lambda z: z.square().sum(), coupled=lambda v: v + 2.0)
    model = Model(square(C, 1.0, "prox"), f, POTENTIALS["log"], 0.4, LinearMap.matrix(tensor(A)))
    with pytest.raises(ValueError, match="`coupled` gave a point outside"):
        alternating_minimization(model, tensor(np.zeros(N)))
