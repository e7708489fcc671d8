"""Lines 3 and 6 by hand, against autograd on (15), and against torch's Nesterov SGD."""

import math

import pytest
import torch
from torch import nn

from consensus.core.kernels import Block, Hyperparameters, LineSearch, TotalForce
from consensus.core.kernels.plain import ExactUpdate, Plain, ProximalStep, velocity
from consensus.core.layerwise import Layerwise
from consensus.core.potentials import POTENTIALS
from consensus.core.updates import look_ahead, objective

F64 = torch.float64
SMOOTH = ("quad", "cubic", "tan", "tan_sep", "log", "log_sep", "pseudo_huber", "log_cosh", "power")


def t(*values, dtype=F64):
    return torch.tensor(values, dtype=dtype)


def line_3(phi, u, z, t_u, agree=lambda own: own):
    """u+, s_u and the number of cuts of one line 3 by `Plain`. (n,), (), ()."""
    kernel, moved = Plain(phi, u), u.clone()
    force, step, cuts = torch.empty_like(u), u.new_ones(()), torch.zeros((), dtype=torch.int64)
    reach = kernel.forces(u, z, force, None)
    reach = None if reach is None else reach.amax(0)
    search = LineSearch(step, cuts, agree)
    kernel.move_consensus(moved, z, TotalForce(force, reach), t_u, search, torch.empty_like(u))
    return moved, float(step), int(cuts)


def line_6(phi, u, z, v, delta, anchor=None, **numbers):
    """z+, v+, the smallest s_j and the cuts of one line 6 by `Plain`. (K, n), (K, n), (), (K,)."""
    z, v, cuts, step = z.clone(), v.clone(), torch.zeros(len(z), dtype=torch.int64), u.new_ones(())
    anchor = u if anchor is None else anchor
    block, search = Block(z, v, delta.clone()), LineSearch(step, cuts)
    Plain(phi, u).move_workers(block, u, anchor, Hyperparameters(**numbers), search)
    return z, v, float(step), cuts


def test_line_3_by_hand():
    """u = 1, z = (0, 3), phi = x^2: force 2 (1) + 2 (-2) = -2, so u moves by +2 t_u."""
    phi = Layerwise(POTENTIALS["quad"], [(0, 1)])
    moved, step, cuts = line_3(phi, t(1.0), t([0.0], [3.0]), 0.25)
    assert (moved.tolist(), step, cuts) == ([1.5], 1.0, 0)


def test_tau_one_over_2m_is_the_mean():
    """The quad of Table 2 is |x|^2: with tau = 1 / (2 M), line 3 ends at the mean of the z_j."""
    z = torch.randn(4, 6, dtype=F64, generator=torch.Generator().manual_seed(0))
    phi = Layerwise(POTENTIALS["quad"], [(0, 2), (2, 6)])
    moved, _, _ = line_3(phi, torch.ones(6, dtype=F64), z, 1 / 8)
    torch.testing.assert_close(moved, z.mean(0))


def test_the_step_of_line_3_is_halved_until_u_is_inside_for_all_workers():
    """log, u = 0, z = (-0.5, 0.2): force -(2 / 0.75) 0.5 ... from Table 2; steps by trial."""
    phi = Layerwise(POTENTIALS["log"], [(0, 1)])
    z, t_u = t([-0.5], [0.2]), 3.0
    force = sum(2 * w / (1 - w * w) for w in (0.5, -0.2))
    s = 1.0
    while not all(abs(-s * t_u * force - z_j) < 1 for z_j in (-0.5, 0.2)):
        s /= 2
    assert s < 1
    moved, step, cuts = line_3(phi, t(0.0), z, t_u)
    assert (step, cuts) == (s, 1)
    assert moved.item() == pytest.approx(-s * t_u * force, rel=1e-14)


def test_the_smallest_step_of_all_ranks_counts():
    phi = Layerwise(POTENTIALS["log"], [(0, 1)])
    z = t([-0.9])
    own, step, _ = line_3(phi, t(0.0), z, 0.2)
    moved, agreed, cuts = line_3(phi, t(0.0), z, 0.2, agree=lambda s: s.mul_(0.25))
    assert (agreed, cuts) == (step / 4, 1)
    torch.testing.assert_close(moved, own / 4)


def test_velocity_by_hand():
    """0.5 * 4 - 0.25 * (3 + 0.5 * 8) = 0.25; the regularizer is taken at z."""
    assert velocity(t(4.0), t(3.0), t(8.0), 0.5, 0.25, 0.5).tolist() == [0.25]


def test_the_coupling_pulls_z_towards_u():
    phi = Layerwise(POTENTIALS["tan"], [(0, 1)])
    u, z, zero = t(0.5), t([-0.5]), t([0.0])
    numbers = {"kappa": 0.9, "sigma": 1.0, "nu": 0.0, "pull": 0.01}
    moved, v, _, _ = line_6(phi, u, z, zero, zero, **numbers)
    pull = 0.01 * 2 / math.cos(1.0) ** 2
    assert (moved - z).item() == pytest.approx(pull)
    assert v.item() == 0.0
    _, v, _, _ = line_6(phi, u, z, zero, zero, **numbers, through=True)
    assert v.item() == pytest.approx(pull)


def test_jacobi_order_pulls_to_the_anchor():
    phi = Layerwise(POTENTIALS["quad"], [(0, 1)])
    zero = t([0.0])
    numbers = {"kappa": 0.0, "sigma": 1.0, "nu": 0.0, "pull": 0.25}
    moved, _, _, _ = line_6(phi, t(7.0), t([1.0]), zero, zero, t(3.0), **numbers)
    assert moved.item() == 1.0 + 0.25 * 2 * (3.0 - 1.0)


def test_without_pull_line_6_is_momentum_alone_and_stays_inside():
    phi = Layerwise(POTENTIALS["log"], [(0, 1)])
    numbers = {"kappa": 1.0, "sigma": 0.0, "nu": 0.0, "pull": None}
    moved, v, step, cuts = line_6(phi, t(0.0), t([0.5]), t([1.5]), t([0.0]), **numbers)
    assert (moved.item(), v.item(), step, cuts.tolist()) == (0.875, 0.375, 0.25, [1])


@pytest.mark.parametrize("name", SMOOTH)
def test_lines_3_and_6_descend_on_the_objective(name):
    """Their directions are minus the gradient of (15) by autograd, times t_u = tau / lam, sigma."""
    lam, nu, tau, sigma = 0.3, 0.2, 1e-3, 1e-3
    generator = torch.Generator().manual_seed(1)
    u = (0.2 * torch.randn(5, dtype=F64, generator=generator)).requires_grad_()
    z = (0.2 * torch.randn(3, 5, dtype=F64, generator=generator)).requires_grad_()
    phi = Layerwise(POTENTIALS[name], [(0, 2), (2, 5)])
    value = objective(z.sin().sum(-1), phi, u, z, lam, nu)
    du, dz = torch.autograd.grad(value, (u, z))
    with torch.no_grad():
        moved, step, _ = line_3(phi, u.detach(), z.detach(), tau / lam)
        assert step == 1.0
        torch.testing.assert_close(moved - u, -tau * du, rtol=1e-9, atol=1e-15)
        zero = torch.zeros_like(z)
        numbers = {"kappa": 0.9, "sigma": sigma, "nu": nu, "pull": sigma / lam}
        new, v, step, _ = line_6(phi, u.detach(), z.detach(), zero, z.cos(), **numbers)
        assert step == 1.0
        torch.testing.assert_close(new - z, -sigma * dz, rtol=1e-9, atol=1e-15)
        torch.testing.assert_close(v, -sigma * (z.cos() + nu * z), rtol=1e-12, atol=1e-15)


def test_uncoupled_worker_is_sgd_with_nesterov_momentum():
    """torch.optim.SGD stores the look-ahead points z + kappa v: same iterates (nu = 0)."""
    target = t(1.0, -2.0, 0.5)
    kappa, sigma = 0.9, 0.03
    parameter = nn.Parameter(torch.zeros(3, dtype=F64))
    optimizer = torch.optim.SGD([parameter], lr=sigma, momentum=kappa, nesterov=True)
    z, v = torch.zeros(1, 3, dtype=F64), torch.zeros(1, 3, dtype=F64)
    phi = Layerwise(POTENTIALS["quad"], [(0, 3)])
    numbers = {"kappa": kappa, "sigma": sigma, "nu": 0.0, "pull": None}
    for _ in range(20):
        at = look_ahead(z, v, kappa)
        torch.testing.assert_close(at[0], parameter.detach())
        parameter.grad = (parameter.detach() - target) * t(1.0, 3.0, 10.0)
        optimizer.step()
        delta = (at - target) * t(1.0, 3.0, 10.0)
        z, v, _, _ = line_6(phi, torch.zeros(3, dtype=F64), z, v, delta, **numbers)


# -------- the exact u-update against closed forms of (14a)


def exact(phi, u, z, total=lambda x: x, agree=lambda x: x):
    kernel, u = ExactUpdate(phi, total), u.clone()
    assert (kernel.force_size, kernel.reach_size, kernel.closed_form) == (0, 0, False)
    empty, step = u.new_empty(0), u.new_full((), 0.5)
    assert kernel.forces(u, z, empty, None) is None
    search = LineSearch(step, torch.zeros((), dtype=torch.int64), agree)
    kernel.move_consensus(u, z, TotalForce(empty), 0.1, search, empty)
    assert float(step) == 1.0
    return u


def test_quad_is_the_mean():
    z = torch.randn(4, 6, dtype=F64, generator=torch.Generator().manual_seed(0))
    phi = Layerwise(POTENTIALS["quad"], [(0, 2), (2, 6)])
    torch.testing.assert_close(exact(phi, torch.zeros(6, dtype=F64), z), z.mean(0))


@pytest.mark.parametrize("name", ["cubic", "tan", "tan_sep", "log", "log_sep", "pseudo_huber"])
def test_two_workers_meet_half_way(name):
    """phi is even and strictly convex: the minimizer for two points is their midpoint."""
    z = torch.tensor([[0.3, -0.2, 0.1], [-0.1, 0.4, 0.2]], dtype=F64)
    phi = Layerwise(POTENTIALS[name], [(0, 1), (1, 3)])
    u = torch.tensor([0.2, 0.0, 0.1], dtype=F64)
    torch.testing.assert_close(exact(phi, u, z), z.mean(0), rtol=0, atol=1e-7)


def test_the_sums_are_over_all_ranks():
    """Another rank with the same workers: every sum doubles, and the minimizer stays."""
    z = torch.tensor([[0.3, -0.2], [-0.1, 0.4]], dtype=F64)
    phi, calls = Layerwise(POTENTIALS["log"], [(0, 2)]), []

    def total(x):
        calls.append(x)
        return 2 * x

    u = torch.zeros(2, dtype=F64)
    torch.testing.assert_close(exact(phi, u, z, total), exact(phi, u, z), rtol=0, atol=1e-12)
    assert calls


# -------- the proximal step of line 6 against closed forms and its optimality condition

NUMBERS = {"kappa": 0.5, "sigma": 0.1, "nu": 0.3}


def start(seed=0):
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, dtype=F64, generator=random) for shape in [(5,), *[(3, 5)] * 3]]


def implicit(phi, u, z, v, delta, **numbers):
    z, v, step, cuts = z.clone(), v.clone(), u.new_full((), 0.5), torch.zeros(3, dtype=torch.int64)
    kernel = ProximalStep(phi, Plain(phi, u))
    block, search = Block(z, v, delta.clone()), LineSearch(step, cuts)
    kernel.move_workers(block, u, u, Hyperparameters(**NUMBERS, **numbers), search)
    return z, v, float(step), cuts.tolist()


@pytest.mark.parametrize("pull", [0.1, 1e3])
def test_quad_by_hand(pull):
    """z+ = (y + c u) / (1 + c), c = 2 sigma / (lam eta^2), y = z + v+."""
    eta = 0.5
    phi = Layerwise(POTENTIALS["quad"], [(0, 2), (2, 5)], eta)
    u, z, v, delta = start()
    new = 0.5 * v - 0.1 * (delta + 0.3 * z)
    c = 2 * pull / eta**2
    found, velocity, step, cuts = implicit(phi, u, z, v, delta, pull=pull)
    torch.testing.assert_close(found, (z + new + c * u) / (1 + c))
    torch.testing.assert_close(velocity, new)
    assert (step, cuts) == (1.0, [0, 0, 0])
    found, velocity, _, _ = implicit(phi, u, z, v, delta, pull=pull, through=True)
    torch.testing.assert_close(velocity, found - z)


@pytest.mark.parametrize("name", ["cubic", "tan", "tan_sep", "log", "log_sep", "huber"])
@pytest.mark.parametrize("pull", [0.05, 50.0])
def test_the_force_is_taken_at_the_new_point(name, pull):
    """Optimality: z+ = y + pull grad phi(u - z+), inside the domain for any y."""
    phi = Layerwise(POTENTIALS[name], [(0, 2), (2, 5)])
    u, z, v, delta = start(1)
    y = z + 0.5 * v - 0.1 * (delta + 0.3 * z)
    found, _, _, _ = implicit(phi, u, z, v, delta, pull=pull)
    assert bool(phi.contains(u - found).all())
    torch.testing.assert_close(found, y + pull * phi.grad(u - found), rtol=1e-8, atol=1e-8)


def test_an_iteration_without_coupling_is_the_explicit_one():
    phi = Layerwise(POTENTIALS["quad"], [(0, 5)])
    u, z, v, delta = start(2)
    new = 0.5 * v - 0.1 * (delta + 0.3 * z)
    found, velocity, _, _ = implicit(phi, u, z, v, delta, pull=None)
    torch.testing.assert_close(found, z + new)
    torch.testing.assert_close(velocity, new)
