"""Line 5 and (15): one example by hand for each function, and hyperparameters as tensors."""

import math

import pytest
import torch

from consensus.core.kernels.plain import velocity
from consensus.core.layerwise import Layerwise
from consensus.core.potentials import POTENTIALS
from consensus.core.updates import (
    coupling,
    look_ahead,
    objective,
    regularizer,
)

F32, F64 = torch.float32, torch.float64


def t(*values, dtype=F64):
    return torch.tensor(values, dtype=dtype)


def test_look_ahead_by_hand():
    assert look_ahead(t(2.0), t(-0.5), 0.5).tolist() == [1.75]


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


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("axes", [(3,), (2, 3), (2, 1), (1, 3), ()], ids=str)
def test_tensors_of_hyperparameters_are_runs_side_by_side(axes, dtype):
    """lam, tau, sigma, kappa, nu over the leading axes (runs, workers), whatever their dtype."""
    generator = torch.Generator().manual_seed(2)

    def random(*shape):
        return torch.rand(shape, generator=generator, dtype=F64)

    z, v, delta = (random(2, 3, 4).to(dtype) for _ in range(3))
    kappa, sigma, nu, lam = (0.1 + random(*axes) for _ in range(4))
    phi = Layerwise(POTENTIALS["quad"], [(0, 1), (1, 4)])
    u = random(2, 1, 4).to(dtype)
    together = {
        "look_ahead": look_ahead(z, v, kappa),
        "velocity": velocity(v, delta, z, kappa, sigma, nu),
    }
    values = {"regularizer": regularizer(z, nu), "coupling": coupling(phi, u, z, lam)}
    k, s, n, l = (a.expand(2, 3).tolist() for a in (kappa, sigma, nu, lam))  # noqa: E741
    rows = [(i, j) for i in range(2) for j in range(3)]
    tolerance = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 1e-6 if dtype == F32 else 1e-14}
    for i, j in rows:
        rows_of_one = (z[i, j], v[i, j], delta[i, j], u[i, 0] - z[i, j])
        zz, vv, dd, ww = ([c.item() for c in row] for row in rows_of_one)
        kk, ss, nn_, ll = k[i][j], s[i][j], n[i][j], l[i][j]
        by_hand = {
            "look_ahead": [a + kk * b for a, b in zip(zz, vv, strict=True)],
            "velocity": [kk * b - ss * (d + nn_ * a) for a, b, d in zip(zz, vv, dd, strict=True)],
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
