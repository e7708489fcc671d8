"""The tiled kernel against the formulas."""

import pytest
import torch

from consensus import POTENTIALS, Layerwise
from consensus.core.kernels import Block, Hyperparameters, LineSearch, TotalForce
from consensus.core.kernels.plain import velocity
from consensus.core.kernels.tiled import Tiled

NAMES = ("quad", "cubic", "tan", "tan_sep", "log", "log_sep", "huber", "power")
NAMES += ("pseudo_huber", "log_cosh")
NUMBERS = {"kappa": 0.9, "sigma": 0.3, "nu": 0.01}
LAYERS = {"one": [(0, 100)], "several": [(0, 70), (70, 71), (71, 90), (90, 275), (275, 300)]}


def make(name, layers="several", eta=0.7, dtype=torch.float64, num_workers=3, spread=0.3):
    phi = Layerwise(POTENTIALS[name], LAYERS[layers], eta)
    n = LAYERS[layers][-1][1]
    random = torch.Generator().manual_seed(3)

    def noise(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    u, w = noise(n), noise(num_workers, n)
    for start, stop in LAYERS[layers]:
        part = w[:, start:stop]
        part *= spread * eta / part.norm(dim=1, keepdim=True)
    v, delta = (noise(num_workers, n) * 0.1 * eta * spread for _ in range(2))
    tensors = [x.to(dtype) for x in (u, u - w, v, delta)]
    return phi, Tiled(phi, tensors[0], tile=64), *tensors


def close(a, b, dtype=torch.float64):
    rtol, atol = (1e-12, 1e-13) if dtype == torch.float64 else (2e-5, 2e-6)
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("num_workers", [1, 3])
@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("name", NAMES)
def test_the_sum_of_forces_and_the_reach(name, layers, num_workers, dtype):
    phi, tiled, u, z, *_ = make(name, layers, dtype=dtype, num_workers=num_workers)
    out = torch.full_like(u, torch.nan)
    reach = tiled.forces(u, z, out)
    close(out, phi.grad(u - z).sum(0), dtype)
    if phi.bounded:
        close(reach, phi.reach(u - z), torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_a_force_outside_the_domain_is_not_a_number(name):
    phi, tiled, u, z, *_ = make(name, num_workers=1)
    z[0, 70] = u[70] - 2.0  # the second layer has one coordinate
    out = torch.empty_like(u)
    tiled.forces(u, z, out)
    assert bool(out[70].isnan()) == phi.bounded
    assert not out[:70].isnan().any()
    assert not out[71:].isnan().any()


@pytest.mark.parametrize("t_u", [1e-3, 0.1, 1.0, 30.0])
@pytest.mark.parametrize("spread", [0.02, 0.9])
@pytest.mark.parametrize("name", NAMES)
def test_line_3(name, spread, t_u):
    phi, tiled, u, z, *_ = make(name, spread=spread)
    force = phi.grad(u - z).sum(0)
    d = -t_u * force
    expected = phi.feasible_step(u - z, d, u).amin()
    step, cuts, moved = u.new_ones(()), torch.zeros((), dtype=torch.int64), u.clone()
    reach = phi.reach(u - z).amax(0) if phi.bounded else None
    asked = []

    def agree(own):
        asked.append(float(own))
        return own

    search = LineSearch(step, cuts, agree)
    tiled.move_consensus(moved, z, TotalForce(force, reach), t_u, search, None)
    close(moved, u + expected * d)
    assert int(cuts) == int(expected < 1)
    if phi.bounded:  # the ranks agree on a step unless the reach decides for all of them
        assert torch.equal(step, expected)
        assert asked == ([] if phi.surely_feasible(reach, d, u) else [float(expected)])


def test_a_smaller_step_of_another_rank_counts():
    phi, tiled, u, z, *_ = make("log", spread=0.9)
    force = phi.grad(u - z).sum(0)
    step, cuts, moved = u.new_ones(()), torch.zeros((), dtype=torch.int64), u.clone()
    search = LineSearch(step, cuts, lambda own: own.fill_(0.125))
    total = TotalForce(force, phi.reach(u - z).amax(0))
    tiled.move_consensus(moved, z, total, 1.0, search, None)
    close(moved, u - 0.125 * force)
    assert (float(step), int(cuts)) == (0.125, 1)


@pytest.mark.parametrize("through", [False, True])
@pytest.mark.parametrize("pull", [None, 1e-3, 0.1, 1.0, 30.0])
@pytest.mark.parametrize(("num_workers", "spread"), [(1, 0.9), (3, 0.9), (3, 0.02)])
@pytest.mark.parametrize("name", NAMES)
def test_line_6(name, num_workers, spread, pull, through):
    phi, tiled, u, z, v, delta = make(name, num_workers=num_workers, spread=spread)
    new = velocity(v, delta, z, **NUMBERS)
    d = new if pull is None else new + pull * phi.grad(u - z)
    s = phi.feasible_step(z - u, d, u)
    new = d if through and pull is not None else new
    expected_z, expected_v = z + s[:, None] * d, s[:, None] * new
    step, cuts = u.new_ones(()), torch.full((num_workers,), 5)
    numbers = Hyperparameters(**NUMBERS, pull=pull, through=through)
    tiled.move_workers(Block(z, v, delta), u, u, numbers, LineSearch(step, cuts))
    close(z, expected_z)
    close(v, expected_v)
    assert torch.equal(step, s.amin())
    assert torch.equal(cuts, 5 + (s < 1))


def test_the_cases_meet_the_boundary_and_stay_far_from_it():
    steps, known = set(), set()
    for spread in (0.02, 0.9):
        for pull in (1e-3, 0.1, 1.0, 30.0):
            phi, _, u, z, v, delta = make("tan", spread=spread)
            d = velocity(v, delta, z, **NUMBERS) + pull * phi.grad(u - z)
            steps |= set(phi.feasible_step(z - u, d, u).tolist())
            known.add(phi.surely_feasible(phi.reach(u - z), d, u))
    assert 1.0 in steps
    assert len(steps) >= 3
    assert known == {False, True}


def test_step_sizes_may_be_tensors():
    results = []
    for kind in (float, lambda x: torch.tensor(x, dtype=torch.float64)):
        _, tiled, u, z, v, delta = make("tan")
        step, cuts = u.new_ones(()), torch.zeros(3, dtype=torch.int64)
        numbers = {key: kind(value) for key, value in NUMBERS.items()}
        numbers = Hyperparameters(**numbers, pull=kind(0.1))
        tiled.move_workers(Block(z, v, delta), u, u, numbers, LineSearch(step, cuts))
        total = TotalForce(z[0] / 100, tiled.phi.reach(u - z).amax(0))
        tiled.move_consensus(u, z, total, kind(0.1), LineSearch(step, cuts[0]), None)
        results.append((u, z, v))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["quad", "log"])
def test_jacobi_order_pulls_to_the_anchor_and_stays_inside_around_u(name):
    phi, tiled, u, z, v, delta = make(name, spread=0.5)
    anchor = u + 0.01
    d = velocity(v, delta, z, **NUMBERS) + 0.1 * phi.grad(anchor - z)
    s = phi.feasible_step(z - u, d, u)
    expected = z + s[:, None] * d
    step, cuts = u.new_ones(()), torch.zeros(3, dtype=torch.int64)
    numbers = Hyperparameters(**NUMBERS, pull=0.1)
    tiled.move_workers(Block(z, v, delta), u, anchor, numbers, LineSearch(step, cuts))
    close(z, expected)
