"""The Triton kernels, on a CPU by Triton's interpreter, against the formulas.

The expected values come from `Layerwise`, whose own tests check it against closed forms. On a GPU
the same tests run the compiled kernels.
"""

import itertools
import math

import pytest
import torch

pytest.importorskip("triton")

from consensus import POTENTIALS, Layerwise
from consensus.core.kernels import Block, Hyperparameters, LineSearch, TotalForce
from consensus.core.kernels.plain import Plain, velocity
from consensus.core.kernels.triton import Triton
from tests.testing.interpreter import search_once_in_a_launch

# NumPy, which interprets, warns where a lane divides by zero that no one asks.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
TABLE_2 = ("quad", "cubic", "tan", "tan_sep", "log", "log_sep")
TRIALS = 100 if ON_GPU else 40
NUMBERS = {"kappa": 0.9, "sigma": 0.3, "nu": 0.01}
LAYERS = {
    "one": [(0, 100)],
    "crossing": [(0, 70), (70, 71), (71, 90), (90, 275), (275, 300)],
    "aligned": [(0, 64), (64, 192), (192, 256)],
}


def cases(every, few):
    """Layers and a further parameter. The interpreter takes a few of them for simpler layers."""
    return [(name, x) for name in LAYERS for x in (every if ON_GPU or name == "crossing" else few)]


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    search_once_in_a_launch(monkeypatch)  # without effect on a GPU


def make(name, layers="crossing", eta=1.0, dtype=torch.float64, num_workers=3, spread=0.3):
    """Potential, kernels and a start inside the domain: |w_l| / eta near `spread`, at most 1."""
    phi = Layerwise(POTENTIALS[name], LAYERS[layers], eta)
    n = LAYERS[layers][-1][1]
    random = torch.Generator().manual_seed(3)

    def noise(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    u = noise(n)
    w = noise(num_workers, n)
    for start, stop in LAYERS[layers]:
        part = w[:, start:stop]
        part *= spread * eta / part.norm(dim=1, keepdim=True)
    z, v, delta = u - w, noise(num_workers, n) * 0.1 * eta, noise(num_workers, n) * 0.1 * eta
    tensors = [x.to(DEVICE, dtype) for x in (u, z, v, delta)]
    return phi, Triton(phi, tensors[0], block=64), *tensors


def close(a, b, dtype=torch.float64):
    rtol, atol = (1e-12, 1e-13) if dtype == torch.float64 else (2e-5, 2e-6)
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("name", TABLE_2)
def test_the_sum_of_forces(name, layers, dtype):
    phi, kernel, u, z, *_ = make(name, layers, eta=0.7, dtype=dtype)
    out = torch.full_like(u, torch.nan)
    kernel.forces(u, z, out)
    close(out, phi.grad(u - z).sum(0), dtype)


@pytest.mark.parametrize("name", TABLE_2)
def test_a_force_outside_the_domain_is_not_a_number(name):
    phi, kernel, u, z, *_ = make(name, num_workers=1)
    z[0, 70] = u[70] - 2.0  # the second layer has one coordinate
    out = torch.empty_like(u)
    kernel.forces(u, z, out)
    assert bool(out[70].isnan()) == phi.bounded
    assert not out[:70].isnan().any()
    assert not out[71:].isnan().any()


@pytest.mark.parametrize(("layers", "t_u"), cases([1e-3, 0.1, 1.0, 30.0], few=[30.0]))
@pytest.mark.parametrize("name", TABLE_2)
def test_line_3(name, layers, t_u):
    phi, kernel, u, z, *_ = make(name, layers, eta=0.7, spread=0.9)
    force = phi.grad(u - z).sum(0)
    d = -t_u * force
    expected = phi.feasible_step(u - z, d, u).amin()
    step, cuts = u.new_full((), torch.nan), torch.zeros((), dtype=torch.int64, device=DEVICE)
    moved, asked = u.clone(), []

    def agree(own):
        asked.append(own.clone())
        return own

    search = LineSearch(step, cuts, agree)
    kernel.move_consensus(moved, z, TotalForce(force), t_u, search, None)
    close(moved, u + expected * d)
    assert int(cuts) == int(expected < 1)
    assert asked == ([expected] if phi.bounded else [])  # the other ranks take part
    if phi.bounded:
        assert torch.equal(step, expected)


STRENGTHS = [(None, False), *itertools.product([1e-3, 0.1, 1.0, 30.0], [False, True])]


@pytest.mark.parametrize(
    ("layers", "strength"), cases(STRENGTHS, few=[(None, False), (0.1, True), (30.0, False)])
)
@pytest.mark.parametrize("name", TABLE_2)
def test_line_6(name, layers, strength):
    pull, through = strength
    phi, kernel, u, z, v, delta = make(name, layers, eta=0.7, spread=0.9)
    new = velocity(v, delta, z, **NUMBERS)
    d = new if pull is None else new + pull * phi.grad(u - z)
    s = phi.feasible_step(z - u, d, u)
    new = d if through and pull is not None else new
    expected_z, expected_v = z + s[:, None] * d, s[:, None] * new
    step, cuts = u.new_ones(()), torch.full((3,), 5, dtype=torch.int64, device=DEVICE)
    z, v = z.clone(), v.clone()
    numbers = Hyperparameters(**NUMBERS, pull=pull, through=through)
    kernel.move_workers(Block(z, v, delta), u, u, numbers, LineSearch(step, cuts))
    close(z, expected_z)
    close(v, expected_v)
    assert torch.equal(step, s.amin())
    assert torch.equal(cuts, 5 + (s < 1))


ETAS = torch.tensor([[0.7], [0.9], [1.3]], dtype=torch.float64, device=DEVICE)
COLUMNS = {  # of three configurations
    "kappa": torch.tensor([0.9, 0.0, 0.5], dtype=torch.float64, device=DEVICE),
    "sigma": torch.tensor([0.3, 0.2, 0.1], dtype=torch.float64, device=DEVICE),
    "nu": torch.tensor([0.01, 0.0, 0.1], dtype=torch.float64, device=DEVICE),
}
PULLS = torch.tensor([30.0, 1e-3, 1.0], dtype=torch.float64, device=DEVICE)


def several(name, make_kernel):
    """Three configurations of two workers in one block, and each of them by itself."""
    starts = [make(name, eta=float(eta), num_workers=2, spread=0.9) for eta in ETAS]
    phi = Layerwise(POTENTIALS[name], LAYERS["crossing"], ETAS)
    u, z, v, delta = (torch.stack(parts) for parts in list(zip(*starts, strict=True))[2:])
    u = u * torch.tensor([[1.0], [-1.0], [2.0]], dtype=u.dtype, device=DEVICE)  # no two alike
    z = u.unsqueeze(1) - (starts[0][2] - starts[0][3]) * ETAS.unsqueeze(-1) / 0.7
    return phi, make_kernel(phi, u), [start[0] for start in starts], u, z, v, delta


KERNELS = {"plain": Plain, "triton": lambda phi, u: Triton(phi, u, block=64)}


@pytest.mark.parametrize("make_kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("name", TABLE_2)
def test_line_3_of_several_configurations(name, make_kernel):
    phi, kernel, alone, u, z, *_ = several(name, make_kernel)
    t_u = PULLS * 0.3
    force = torch.full_like(u, torch.nan)
    reach = kernel.forces(u, z, force, None)
    step, cuts = u.new_ones(3), torch.full((3,), 5, device=DEVICE)
    moved = u.clone()
    total = TotalForce(force, None if reach is None else reach.amax(1))
    search = LineSearch(step, cuts)
    kernel.move_consensus(moved, z, total, t_u, search, torch.empty_like(force))
    for s, own in enumerate(alone):
        expected_force = own.grad(u[s] - z[s]).sum(0)
        close(force[s], expected_force)
        d = -float(t_u[s]) * expected_force
        expected = own.feasible_step(u[s] - z[s], d, u[s]).amin()
        close(moved[s], u[s] + expected * d)
        assert int(cuts[s]) == 5 + int(expected < 1)
    if phi.bounded:
        assert len(set(step.tolist())) > 1


@pytest.mark.parametrize("make_kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("through", [False, True])
@pytest.mark.parametrize("name", TABLE_2)
def test_line_6_of_several_configurations(name, through, make_kernel):
    _, kernel, alone, u, z, v, delta = several(name, make_kernel)
    step, cuts = u.new_ones(3), torch.full((3, 2), 5, device=DEVICE)
    moved, velocities = z.clone(), v.clone()
    block, search = Block(moved, velocities, delta.clone()), LineSearch(step, cuts)
    numbers = Hyperparameters(**COLUMNS, pull=PULLS, through=through)
    kernel.move_workers(block, u, u, numbers, search)
    for s, own in enumerate(alone):
        new = velocity(v[s], delta[s], z[s], **{key: float(c[s]) for key, c in COLUMNS.items()})
        d = new + float(PULLS[s]) * own.grad(u[s] - z[s])
        sizes = own.feasible_step(z[s] - u[s], d, u[s])
        new = d if through else new
        close(moved[s], z[s] + sizes[:, None] * d)
        close(velocities[s], sizes[:, None] * new)
        assert cuts[s].tolist() == (5 + (sizes < 1)).tolist()
        if own.bounded:
            assert float(step[s]) == float(sizes.amin())


def test_the_cases_of_line_6_meet_the_boundary():
    cut = set()
    for pull in (1e-3, 0.1, 1.0, 30.0):
        phi, _, u, z, v, delta = make("tan", eta=0.7, spread=0.9)
        d = velocity(v, delta, z, **NUMBERS) + pull * phi.grad(u - z)
        cut |= set(phi.feasible_step(z - u, d, u).tolist())
    assert 1.0 in cut
    assert len(cut) >= 3


def start_at(radius_of_w, radius, n, random):
    """One worker at that distance from u, in float32; and the direction away from u."""
    u = torch.randn(n, generator=random)
    out = torch.randn(n, generator=random)
    out /= out.norm()
    z = (u - radius_of_w * radius * out).unsqueeze(0)
    return u.to(DEVICE), z.to(DEVICE), -out.to(DEVICE)


@pytest.mark.parametrize("name", ["tan", "log"])
def test_the_stored_point_stays_inside_where_a_step_ends_at_the_boundary(name):
    """|u| is a thousand times the radius: the rounding of u - z is what decides."""
    random, eta, n, crossed = torch.Generator().manual_seed(0), 1e-2, 100, 0
    phi = Layerwise(POTENTIALS[name], [(0, n)], eta)
    radius = eta * math.sqrt(phi.profile.bound)
    kernel = Triton(phi, torch.empty(n, device=DEVICE), block=128)
    for trial in range(TRIALS):
        u, z, outward = start_at(0.5, radius, n, random)
        d = (0.5 * radius * (1 - 1e-6 * (trial % 10))) * outward
        crossed += int(not phi.contains(u - (z + d)))
        step, cuts = u.new_ones(()), torch.zeros(1, dtype=torch.int64, device=DEVICE)
        moved = z.clone()
        block = Block(moved, d.unsqueeze(0).clone(), torch.zeros_like(z))
        numbers = Hyperparameters(kappa=1.0, sigma=0.0, nu=0.0, pull=None)
        kernel.move_workers(block, u, u, numbers, LineSearch(step, cuts))
        assert bool(phi.contains(u - moved))
        kernel.move_consensus(u, z, TotalForce(d), 1.0, LineSearch(step, cuts[0]), None)
        assert bool(phi.contains(u - z))
    assert crossed > 0.1 * TRIALS  # a full step would have left


@pytest.mark.parametrize("name", ["tan", "log"])
def test_the_stored_point_stays_inside_where_pull_and_velocity_cancel(name):
    """v+ = -c w + d with |c w| far above |d|: inner products of the parts know little of d."""
    random, eta, n = torch.Generator().manual_seed(0), 1.0, 100
    phi = Layerwise(POTENTIALS[name], [(0, n)], eta)
    radius = math.sqrt(phi.profile.bound)
    kernel = Triton(phi, torch.empty(n, device=DEVICE), block=128)
    for trial in range(TRIALS):
        u, z, outward = start_at(0.9, radius, n, random)
        pull = 10.0 ** (trial % 5)
        v = -pull * phi.grad(u - z) + 0.3 * radius * outward
        step, cuts = u.new_ones(()), torch.zeros(1, dtype=torch.int64, device=DEVICE)
        numbers = Hyperparameters(kappa=1.0, sigma=0.0, nu=0.0, pull=pull)
        block = Block(z, v, torch.zeros_like(z))
        kernel.move_workers(block, u, u, numbers, LineSearch(step, cuts))
        assert bool(phi.contains(u - z))


def test_halvings_are_the_largest_powers_of_two_below():
    from consensus.core.kernels import triton_kernels

    below = {1.0: 0.5, 0.5: 0.25, 0.75: 0.5, 1.5: 1.0, math.inf: 1.0, 0.0: 0.0, 2.0**-9: 2.0**-10}
    below |= {
        math.nextafter(1.0, 2.0): 1.0,
        math.nextafter(0.5, 0.0): 0.25,
        0.3: 0.25,
        1e-3: 2**-10,
    }
    exits = torch.tensor(list(below), dtype=torch.float64, device=DEVICE)
    exits = torch.stack([exits.clamp(max=1e300), torch.full_like(exits, math.inf)], 1)
    own, smallest = torch.empty(len(below), device=DEVICE), torch.empty((), device=DEVICE)
    cuts = torch.zeros(len(below), dtype=torch.int64, device=DEVICE)
    triton_kernels.steps[(1,)](own, smallest, cuts, exits, len(below), 2, LINE=6, WIDTH=2)
    assert own.tolist() == list(below.values())
    assert float(smallest) == 0.0
    assert cuts.tolist() == [int(value < 1) for value in below.values()]


def test_the_force_of_tan_is_accurate_up_to_its_pole_in_float32():
    phi = Layerwise(POTENTIALS["tan_sep"], [(0, 2000)])
    s = torch.cat([torch.linspace(1e-4, 1.5, 1000), math.pi / 2 - torch.logspace(-0.1, -5, 1000)])
    w = s.sqrt().to(DEVICE)
    out = torch.empty_like(w)
    Triton(phi, w, block=1024).forces(w, torch.zeros(1, 2000, device=DEVICE), out)
    s = w.square().double()  # what the kernel takes the cosine of, rounded
    expected = 2 * w.double() / s.cos().square()
    # A compiler may not round w^2 before the cosine: the conditioning of 1 / cos^2 at s.
    allowed = 1e-6 + (4 * 6e-8 * s * s.tan().abs() if ON_GPU else 0.0)
    assert bool(((out.double() / expected - 1).abs() <= allowed).all())
