"""The weighted proximal steps against loops with scalar equations solved by scipy."""

import math

import numpy as np
import pytest
import torch

from consensus import POTENTIALS, Layerwise
from consensus.core import potentials, profiles, sizes
from consensus.core.kernels import LineSearch, TotalForce
from consensus.core.kernels import weighted as module
from consensus.core.kernels.pulls import Explicit, Linear, Proximal, choose_pull
from consensus.core.kernels.weighted import WeightedProximal
from tests.testing.proximal import groups, pulled, removed

LAYERS = [(0, 3), (3, 7), (7, 8)]
N, ETA = 8, 0.6
NAMES = ["quad", "cubic", "tan", "tan_sep", "log", "log_sep", "pseudo_huber", "huber"]


def expected_c(name, w, strength):
    """c of every group, from scalar equations."""
    return [removed(name, np.linalg.norm(w[a:b]), strength, ETA) for a, b in groups(name, LAYERS)]


def points(seed, workers=3, spread=1.0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=N), spread * rng.normal(size=(workers, N))


def phi(name, layers=LAYERS):
    return Layerwise(POTENTIALS[name], layers, ETA)


def line_3(kernel, u, z, outer):
    """u+ from the messages of all workers. (n,)."""
    moved, total = u.clone(), u.new_zeros(kernel.force_size)
    for own in z:
        out = u.new_full((kernel.force_size,), math.nan)
        assert kernel.forces(u, own[None], out, None) is None
        total += out
    cuts = torch.zeros((), dtype=torch.int64)
    search = LineSearch(u.new_ones(()), cuts)
    kernel.move_consensus(moved, z[:1], TotalForce(total), outer, search, torch.empty_like(total))
    assert (float(search.step), int(cuts)) == (1.0, 0)
    return moved


@pytest.mark.parametrize("strength", [0.03, 1.0, 20.0, math.inf])
@pytest.mark.parametrize("spread", [0.05, 3.0])
@pytest.mark.parametrize("name", NAMES)
def test_line_3_is_the_weighted_mean(name, spread, strength):
    u, z = points(1, spread=spread)
    top, bottom = np.zeros(N), np.zeros(N)
    for own in z:
        for (a, b), c in zip(
            groups(name, LAYERS), expected_c(name, u - own, strength), strict=True
        ):
            top[a:b] += c * (u - own)[a:b]
            bottom[a:b] += c
    kernel = WeightedProximal(phi(name), torch.from_numpy(u), strength)
    moved = line_3(kernel, torch.from_numpy(u), torch.from_numpy(z), 0.7)
    np.testing.assert_allclose(moved.numpy(), u - 0.7 * top / bottom, rtol=1e-12, atol=1e-12)
    parts = [torch.empty(kernel.force_size, dtype=torch.float64) for _ in z]
    for own, part in zip(torch.from_numpy(z), parts, strict=True):
        kernel.forces(torch.from_numpy(u), own[None], part, None)
    np.testing.assert_allclose(sum(parts)[:N].numpy(), top, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("strength", [0.03, 1.0, 20.0, math.inf])
@pytest.mark.parametrize("name", NAMES)
def test_line_6_moves_by_the_fraction_of_the_way(name, strength):
    u, z = points(2)
    d = np.linspace(-0.3, 0.4, z.size).reshape(z.shape)
    wanted = z + d
    for j, own in enumerate(z):
        for (a, b), c in zip(
            groups(name, LAYERS), expected_c(name, u - own, strength), strict=True
        ):
            wanted[j, a:b] += c * (u - own)[a:b]
    kernel = WeightedProximal(phi(name), torch.from_numpy(u), 1.0)
    for own, own_d, own_wanted in zip(*map(torch.from_numpy, (z, d, wanted)), strict=True):
        moved = pulled(kernel, own, own_d, torch.from_numpy(u), strength)
        torch.testing.assert_close(moved, own_wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_equal_copies_stay_equal(name, dtype):
    u = torch.linspace(-1.0, 1.0, N, dtype=dtype)
    kernel = WeightedProximal(phi(name), u, 0.3)
    assert torch.equal(line_3(kernel, u, u.repeat(4, 1), 1.0), u)
    assert torch.equal(pulled(kernel, u, torch.zeros_like(u), u, 0.3), u)


@pytest.mark.parametrize("name", ["tan", "tan_sep"])
def test_pieces_of_a_large_vector_change_nothing(name, monkeypatch):
    """float64: the same numbers with pieces of two coordinates."""
    u, z = (torch.from_numpy(x) for x in points(4))
    kernel = WeightedProximal(phi(name), u, 0.8)
    whole = line_3(kernel, u, z, 1.0), pulled(kernel, z[0], z[1], u, 0.8)
    monkeypatch.setattr(module, "CHUNK", 2)
    monkeypatch.setattr(sizes, "CHUNK", 2)
    kernel = WeightedProximal(phi(name), u, 0.8)
    again = line_3(kernel, u, z, 1.0), pulled(kernel, z[0], z[1], u, 0.8)
    torch.testing.assert_close(again, whole, rtol=1e-14, atol=1e-15)


FRACTIONS = ["cubic", "tan", "log", "pseudo_huber", "huber", "power"]


@pytest.mark.parametrize("few", [0, 64])  # by operations on tensors, and by numbers
@pytest.mark.parametrize("name", FRACTIONS)
def test_the_fraction_over_many_orders_of_magnitude(name, few, monkeypatch):
    monkeypatch.setattr(potentials, "_FEW", few)
    radius, strength = np.logspace(-6, 4, 41), 0.7
    layer = Layerwise(POTENTIALS[name], [(0, 1)], ETA)
    found = layer.fraction(torch.from_numpy(radius)[:, None], strength)[:, 0].numpy()
    wanted = [removed(name, r, strength, ETA) for r in radius]
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-13)
    single = layer.fraction(torch.from_numpy(radius)[:, None].float(), strength)[:, 0].numpy()
    np.testing.assert_allclose(single, wanted, rtol=1e-4, atol=1e-6)


def test_the_fraction_of_a_cube_with_a_square():
    """Numbers in closed form: rho + 2 c (1.5 rho + eps) rho = r at rho = (1 - fraction) r."""
    profile, c, eps = POTENTIALS.make("cubic", eps=0.4).profile, 0.7, 0.4
    radius = np.logspace(-6, 4, 41)
    rho = (1.0 - np.array(profile.fractions(radius.tolist(), c, torch.float64))) * radius
    np.testing.assert_allclose(rho + 2.0 * c * (1.5 * rho + eps) * rho, radius, rtol=1e-9)


def test_a_fixed_number_of_steps_is_enough(monkeypatch):
    """As on a device, where the iteration does not look at its values."""
    r = torch.logspace(-8, 5, 200, dtype=torch.float64)
    for name in FRACTIONS:
        profile = POTENTIALS[name].profile
        early = {c: profile.fraction(r, c) for c in (1e-3, 0.5, 50.0)}
        with monkeypatch.context() as patch:
            patch.setattr(profiles, "_CONVERGED", -1.0)
            for c, values in early.items():
                torch.testing.assert_close(profile.fraction(r, c), values, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("few", [0, 64])
def test_the_limit_at_zero(few, monkeypatch):
    """c(0) = g / (1 + g), g = 2 strength psi'(0) / eta^2."""
    monkeypatch.setattr(potentials, "_FEW", few)
    zero = torch.zeros(1, dtype=torch.float64)
    g = 2.0 * 0.3 / ETA**2
    for name, slope in {"tan": 1.0, "log": 1.0, "huber": 0.5, "cubic": 0.0}.items():
        found = float(Layerwise(POTENTIALS[name], [(0, 1)], ETA).fraction(zero, 0.3))
        assert found == pytest.approx(g * slope / (1.0 + g * slope), rel=1e-12, abs=1e-25)


@pytest.mark.parametrize("few", [0, 64])
def test_small_fractions_keep_their_relative_accuracy(few, monkeypatch):
    """c = 2 strength psi'(s) / eta^2 up to terms of its square, also where 1 - c rounds to 1."""
    monkeypatch.setattr(potentials, "_FEW", few)
    r = torch.tensor([1e-12], dtype=torch.float64)
    for name, slope in {"cubic": lambda s: 1.5 * s**0.5, "power": lambda s: 2.0 * s}.items():
        found = float(Layerwise(POTENTIALS[name], [(0, 1)], ETA).fraction(r, 0.3))
        wanted = 2.0 * 0.3 / ETA**2 * slope((1e-12 / ETA) ** 2)
        assert found == pytest.approx(wanted, rel=1e-9, abs=0.0)


def test_not_a_number_has_no_fraction():
    """A run that diverges goes on to where that is reported."""
    r = torch.tensor([math.nan, math.inf, 0.1], dtype=torch.float64)
    for name in FRACTIONS:
        found = Layerwise(POTENTIALS[name], [(0, 1)], ETA).fraction_of(r, 0.3)
        assert found.isnan().tolist() == [True, True, False], name


def test_weights_within_a_radial_layer_are_refused():
    weighted = Layerwise(POTENTIALS.make("scaled_quad", weight=[1.0, 2.0, 3.0]), LAYERS, ETA)
    with pytest.raises(ValueError, match="several weights"):
        WeightedProximal(weighted, torch.zeros(N), 1.0)


def test_the_choice_of_a_pull():
    z = torch.zeros(1, N)
    assert type(choose_pull(phi("tan"), z, 0.5, None)) is Proximal
    assert type(choose_pull(phi("tan"), z, 0.5, False)) is Explicit
    assert type(choose_pull(phi("quad"), z, 0.5, None)) is Linear
    assert type(choose_pull(phi("quad"), z, 0.5, True)) is Proximal
    scaled = Layerwise(POTENTIALS.make("scaled_quad", weight=2.0), LAYERS, ETA)
    assert type(choose_pull(scaled, z, 0.5, None)) is Explicit
    with pytest.raises(ValueError, match="`pull` is 0; allowed: above 0"):
        choose_pull(phi("tan"), z, 0.0, None)
