"""The exact u-update against closed forms of (14a)."""

import pytest
import torch

from consensus.core.kernels import LineSearch, TotalForce
from consensus.core.kernels.exact import ExactUpdate
from consensus.core.layerwise import Layerwise
from consensus.core.potentials import POTENTIALS

F64 = torch.float64


def moved(phi, u, z, total=lambda x: x, agree=lambda x: x):
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
    torch.testing.assert_close(moved(phi, torch.zeros(6, dtype=F64), z), z.mean(0))


@pytest.mark.parametrize("name", ["cubic", "tan", "tan_sep", "log", "log_sep", "pseudo_huber"])
def test_two_workers_meet_half_way(name):
    """phi is even and strictly convex: the minimizer for two points is their midpoint."""
    z = torch.tensor([[0.3, -0.2, 0.1], [-0.1, 0.4, 0.2]], dtype=F64)
    phi = Layerwise(POTENTIALS[name], [(0, 1), (1, 3)])
    u = torch.tensor([0.2, 0.0, 0.1], dtype=F64)
    torch.testing.assert_close(moved(phi, u, z), z.mean(0), rtol=0, atol=1e-7)


def test_the_sums_are_over_all_ranks():
    """Another rank with the same workers: every sum doubles, and the minimizer stays."""
    z = torch.tensor([[0.3, -0.2], [-0.1, 0.4]], dtype=F64)
    phi, calls = Layerwise(POTENTIALS["log"], [(0, 2)]), []

    def total(x):
        calls.append(x)
        return 2 * x

    u = torch.zeros(2, dtype=F64)
    torch.testing.assert_close(moved(phi, u, z, total), moved(phi, u, z), rtol=0, atol=1e-12)
    assert calls
