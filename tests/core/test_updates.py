"""Lines 3 to 6 and (15): one example by hand for each function, and one iteration in a loop."""

import math

import pytest
import torch
from torch import nn

from consensus.core.layerwise import Layerwise
from consensus.core.potentials import POTENTIALS
from consensus.core.updates import (
    consensus_direction,
    coupling,
    look_ahead,
    objective,
    regularizer,
    velocity,
    worker_direction,
)

F32, F64 = torch.float32, torch.float64


def t(*values, dtype=F64):
    return torch.tensor(values, dtype=dtype)


def test_line_3_by_hand():
    """u = 1, z = (0, 3), phi = x^2: force 2 (1) + 2 (-2) = -2, so u moves by +2 t_u."""
    phi = Layerwise(POTENTIALS["quad"], [(0, 1)])
    force = phi.grad(t(1.0) - t(0.0, 3.0).view(2, 1)).sum(0)
    assert consensus_direction(force, 0.25).tolist() == [0.5]


def test_tau_one_over_2m_is_the_mean():
    """The quad of Table 2 is |x|^2: with tau = 1 / (2 M), line 3 lands on the mean of the z_j."""
    z = torch.randn(4, 6, dtype=F64, generator=torch.Generator().manual_seed(0))
    u = torch.ones(6, dtype=F64)
    phi = Layerwise(POTENTIALS["quad"], [(0, 2), (2, 6)])
    moved = u + consensus_direction(phi.grad(u - z).sum(0), 1 / 8)
    torch.testing.assert_close(moved, z.mean(0))


def test_look_ahead_by_hand():
    assert look_ahead(t(2.0), t(-0.5), 0.5).tolist() == [1.75]


def test_velocity_by_hand():
    """0.5 * 4 - 0.25 * (3 + 0.5 * 8) = 0.25; the regularizer is taken at z."""
    assert velocity(t(4.0), t(3.0), t(8.0), 0.5, 0.25, 0.5).tolist() == [0.25]


def test_worker_direction_by_hand():
    assert worker_direction(t(1.0), t(-6.0), 0.5).tolist() == [-2.0]


def test_the_coupling_pulls_z_towards_u():
    phi = Layerwise(POTENTIALS["tan"], [(0, 1)])
    u, z = t(0.5), t(-0.5)
    d = worker_direction(t(0.0), phi.grad(u - z), 0.01)
    assert d.item() == pytest.approx(0.01 * 2 / math.cos(1.0) ** 2)


def test_regularizer_by_hand():
    assert regularizer(t([3.0, 4.0], [0.0, 2.0]), 0.5).tolist() == [6.25, 1.0]


def test_coupling_by_hand():
    """-log(1 - 0.25) and -log(1 - 0.36), over lam = 0.5."""
    phi = Layerwise(POTENTIALS["log"], [(0, 1)])
    values = coupling(phi, t(0.5), t([0.0], [1.1]), 0.5)
    torch.testing.assert_close(values, t(-2 * math.log(0.75), -2 * math.log(0.64)))


def test_objective_15_by_hand():
    """sum_j loss_j + (nu / 2) |z_j|^2 + (1 / lam) phi(u - z_j), not a mean over the workers."""
    phi = Layerwise(POTENTIALS["quad"], [(0, 1), (1, 2)], eta=2.0)
    u, z = t(1.0, 1.0), t([1.0, 3.0], [-1.0, 1.0])
    losses = t(10.0, 20.0)
    # R: 0.05 * 10 + 0.05 * 2; phi: 4 / 4 and 4 / 4, over lam = 0.25
    assert objective(losses, phi, u, z, lam=0.25, nu=0.1).item() == pytest.approx(30 + 0.6 + 8)
    assert objective(losses, phi, u.unsqueeze(0), z, 0.25, 0.1).item() == pytest.approx(38.6)


def test_objective_is_infinite_outside_the_domain():
    phi = Layerwise(POTENTIALS["log"], [(0, 1)])
    assert objective(t(1.0), phi, t(0.0), t(2.0).view(1, 1), 0.1, 0.0) == math.inf


def test_line_3_and_the_coupling_of_line_6_descend_on_the_objective():
    """Their directions are minus the gradient of (15) by autograd, times t_u = tau / lam, sigma."""
    lam, nu, tau, sigma = 0.3, 0.2, 0.07, 0.05
    generator = torch.Generator().manual_seed(1)
    u = (0.2 * torch.randn(5, dtype=F64, generator=generator)).requires_grad_()
    z = (0.2 * torch.randn(3, 5, dtype=F64, generator=generator)).requires_grad_()
    phi = Layerwise(POTENTIALS["log"], [(0, 2), (2, 5)])

    def objective_by_hand():
        w = u - z
        sizes = w[:, :2].square().sum(-1), w[:, 2:].square().sum(-1)
        phi_by_hand = -sum(torch.log(1 - s) for s in sizes)
        return (z.sin().sum(-1) + nu / 2 * z.square().sum(-1) + phi_by_hand / lam).sum()

    du, dz = torch.autograd.grad(objective_by_hand(), (u, z))
    with torch.no_grad():
        force = phi.grad(u - z)
        torch.testing.assert_close(consensus_direction(force.sum(0), tau / lam), -tau * du)
        v = velocity(torch.zeros_like(z), z.cos(), z, 0.9, sigma, nu)
        torch.testing.assert_close(worker_direction(v, force, sigma / lam), -sigma * dz)
        value = objective(z.sin().sum(-1), phi, u, z, lam, nu)
        torch.testing.assert_close(value, objective_by_hand())


def test_uncoupled_worker_is_sgd_with_nesterov_momentum():
    """torch.optim.SGD stores the look-ahead points z + kappa v: same iterates (nu = 0)."""
    target = t(1.0, -2.0, 0.5)
    kappa, sigma = 0.9, 0.03
    parameter = nn.Parameter(torch.zeros(3, dtype=F64))
    optimizer = torch.optim.SGD([parameter], lr=sigma, momentum=kappa, nesterov=True)
    z, v = torch.zeros(3, dtype=F64), torch.zeros(3, dtype=F64)
    for _ in range(20):
        at = look_ahead(z, v, kappa)
        torch.testing.assert_close(at, parameter.detach())
        parameter.grad = (parameter.detach() - target) * t(1.0, 3.0, 10.0)
        optimizer.step()
        v = velocity(v, (at - target) * t(1.0, 3.0, 10.0), z, kappa, sigma, 0.0)
        z = worker_direction(z, v, 1.0)  # z + v


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("axes", [(3,), (2, 3), (2, 1), (1, 3), ()], ids=str)
def test_tensors_of_hyperparameters_are_runs_side_by_side(axes, dtype):
    """lam, tau, sigma, kappa, nu over the leading axes (runs, workers), whatever their dtype."""
    generator = torch.Generator().manual_seed(2)

    def random(*shape):
        return torch.rand(shape, generator=generator, dtype=F64)

    z, v, delta, force = (random(2, 3, 4).to(dtype) for _ in range(4))
    kappa, sigma, nu, lam = (0.1 + random(*axes) for _ in range(4))
    phi = Layerwise(POTENTIALS["quad"], [(0, 1), (1, 4)])
    u = random(2, 1, 4).to(dtype)
    together = {
        "consensus": consensus_direction(force, sigma),
        "look_ahead": look_ahead(z, v, kappa),
        "velocity": velocity(v, delta, z, kappa, sigma, nu),
        "worker": worker_direction(v, force, sigma / lam),
    }
    values = {"regularizer": regularizer(z, nu), "coupling": coupling(phi, u, z, lam)}
    k, s, n, l = (a.expand(2, 3).tolist() for a in (kappa, sigma, nu, lam))  # noqa: E741
    rows = [(i, j) for i in range(2) for j in range(3)]
    tolerance = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 1e-6 if dtype == F32 else 1e-14}
    for i, j in rows:
        zz, vv, dd, ff, ww = (
            [c.item() for c in row] for row in (z[i, j], v[i, j], delta[i, j], force[i, j],
                                                u[i, 0] - z[i, j])
        )  # fmt: skip
        kk, ss, nn_, ll = k[i][j], s[i][j], n[i][j], l[i][j]
        by_hand = {
            "consensus": [-ss * f for f in ff],
            "look_ahead": [a + kk * b for a, b in zip(zz, vv, strict=True)],
            "velocity": [kk * b - ss * (d + nn_ * a) for a, b, d in zip(zz, vv, dd, strict=True)],
            "worker": [b + ss / ll * f for b, f in zip(vv, ff, strict=True)],
        }
        for name, expected in by_hand.items():
            assert together[name].dtype == dtype, name
            torch.testing.assert_close(together[name][i, j], t(*expected, dtype=dtype), **tolerance)
        assert values["regularizer"][i, j].item() == pytest.approx(
            nn_ / 2 * sum(a * a for a in zz), rel=1e-5
        )
        assert values["coupling"][i, j].item() == pytest.approx(
            sum(a * a for a in ww) / ll, rel=1e-5
        )
    losses = random(2, 3)
    total = objective(losses, phi, u, z, lam, nu)
    expected = (losses + values["regularizer"] + values["coupling"]).sum(-1)
    assert total.shape == (2,)
    torch.testing.assert_close(total, expected)
