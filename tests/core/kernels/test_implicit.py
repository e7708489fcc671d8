"""The proximal step of line 6 against closed forms and its optimality condition."""

import pytest
import torch

from consensus.core.kernels import Block, Hyperparameters, LineSearch
from consensus.core.kernels.implicit import ProximalStep
from consensus.core.kernels.plain import Plain
from consensus.core.layerwise import Layerwise
from consensus.core.potentials import POTENTIALS

F64 = torch.float64
NUMBERS = {"kappa": 0.5, "sigma": 0.1, "nu": 0.3}


def start(seed=0):
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, dtype=F64, generator=random) for shape in [(5,), *[(3, 5)] * 3]]


def moved(phi, u, z, v, delta, **numbers):
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
    found, velocity, step, cuts = moved(phi, u, z, v, delta, pull=pull)
    torch.testing.assert_close(found, (z + new + c * u) / (1 + c))
    torch.testing.assert_close(velocity, new)
    assert (step, cuts) == (1.0, [0, 0, 0])
    found, velocity, _, _ = moved(phi, u, z, v, delta, pull=pull, through=True)
    torch.testing.assert_close(velocity, found - z)


@pytest.mark.parametrize("name", ["cubic", "tan", "tan_sep", "log", "log_sep", "log_cosh"])
@pytest.mark.parametrize("pull", [0.05, 50.0])
def test_the_force_is_taken_at_the_new_point(name, pull):
    """Optimality: z+ = y + pull grad phi(u - z+), inside the domain for any y."""
    phi = Layerwise(POTENTIALS[name], [(0, 2), (2, 5)])
    u, z, v, delta = start(1)
    y = z + 0.5 * v - 0.1 * (delta + 0.3 * z)
    found, _, _, _ = moved(phi, u, z, v, delta, pull=pull)
    assert bool(phi.contains(u - found).all())
    torch.testing.assert_close(found, y + pull * phi.grad(u - found), rtol=1e-8, atol=1e-8)


def test_an_iteration_without_coupling_is_the_explicit_one():
    phi = Layerwise(POTENTIALS["quad"], [(0, 5)])
    u, z, v, delta = start(2)
    new = 0.5 * v - 0.1 * (delta + 0.3 * z)
    found, velocity, _, _ = moved(phi, u, z, v, delta, pull=None)
    torch.testing.assert_close(found, z + new)
    torch.testing.assert_close(velocity, new)
