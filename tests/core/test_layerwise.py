"""Equation (18): the sum over layers of the potential of each layer, with eta and weights."""

import math

import pytest
import torch

from consensus.core.layerwise import Layerwise
from consensus.core.potentials import POTENTIALS

torch.set_num_threads(1)
F32, F64 = torch.float32, torch.float64
LAYERS = [(0, 3), (3, 4), (4, 9)]
NAMES = sorted(
    name
    for name in POTENTIALS
    if POTENTIALS._factories[name].__module__ == "consensus.core.potentials"
)
every = pytest.mark.parametrize("name", NAMES)


def blocks(*shape, seed=0, dtype=F64, size=0.3):
    generator = torch.Generator().manual_seed(seed)
    return ((torch.rand(*shape, generator=generator, dtype=F64) - 0.5) * 2 * size).to(dtype)


def by_layer(method, w, *others):
    """`method` of one-layer arguments, layer by layer."""
    return [method(w[..., a:b], *(other[..., a:b] for other in others)) for a, b in LAYERS]


@every
@pytest.mark.parametrize("dtype", [F32, F64])
def test_is_the_sum_over_layers(name, dtype):
    p = POTENTIALS[name]
    phi = Layerwise(p, LAYERS)
    w, d = blocks(2, 4, 9, dtype=dtype), blocks(2, 4, 9, seed=1, dtype=dtype, size=3.0)
    torch.testing.assert_close(phi.value(w), sum(by_layer(p.value, w)))
    torch.testing.assert_close(phi.grad(w), torch.cat(by_layer(p.grad, w), -1))
    torch.testing.assert_close(phi.hvp(w, d), torch.cat(by_layer(p.hvp, w, d), -1))
    y = phi.grad(w)
    torch.testing.assert_close(
        phi.conjugate_grad(y), torch.cat(by_layer(p.conjugate_grad, y), -1), rtol=1e-5, atol=1e-7
    )
    torch.testing.assert_close(phi.conjugate_grad(y), w, rtol=1e-5, atol=1e-6)
    ends = torch.stack(by_layer(p.max_step, w, d)).amin(0)
    torch.testing.assert_close(phi.max_step(w, d), ends)
    steps = torch.stack(by_layer(p.feasible_step, w, d, w)).amin(0)
    assert torch.equal(phi.feasible_step(w, d, w), steps)
    assert phi.bounded == p.bounded
    assert phi.assumptions == p.assumptions
    for result in (phi.value(w), phi.max_step(w, d), phi.feasible_step(w, d, w)):
        assert result.shape == (2, 4)
        assert result.dtype == dtype


@every
def test_one_layer_outside_is_outside(name):
    p = POTENTIALS[name]
    phi = Layerwise(p, LAYERS)
    for k, (start, _) in enumerate(LAYERS):
        w = torch.zeros(2, 9, dtype=F64)
        w[1, start] = 5.0
        assert phi.contains(w).tolist() == [True, not p.bounded], k
        assert phi.value(w).isfinite().tolist() == [True, not p.bounded]


def test_radial_size_is_per_layer_not_of_the_whole_vector():
    """|w| = 1.2 > 1, but each layer is shorter than 1: inside, with -log(1 - 0.72) twice."""
    phi = Layerwise(POTENTIALS["log"], [(0, 1), (1, 3)])
    w = torch.tensor([math.sqrt(0.72), 0.6, 0.6], dtype=F64)
    assert phi.contains(w)
    assert phi.value(w).item() == pytest.approx(-2 * math.log(0.28))
    by_hand = 2 * w / 0.28  # (2 / eta) psi'(s) x
    torch.testing.assert_close(phi.grad(w), by_hand)
    assert not POTENTIALS["log"].contains(w)


@every
@pytest.mark.parametrize("eta", [0.4, 2.5])
def test_eta_scales_every_method(name, eta):
    """phi(w) = p(w / eta): grad has a 1/eta, the Hessian two, the domain and grad phi* an eta."""
    phi, unit = Layerwise(POTENTIALS[name], LAYERS, eta), Layerwise(POTENTIALS[name], LAYERS)
    x, d = blocks(4, 9), blocks(4, 9, seed=1, size=3.0)
    w = eta * x
    close = {"rtol": 1e-12, "atol": 1e-14}
    torch.testing.assert_close(phi.value(w), unit.value(x), **close)
    torch.testing.assert_close(phi.grad(w), unit.grad(x) / eta, **close)
    torch.testing.assert_close(phi.hvp(w, d), unit.hvp(x, d) / eta**2, **close)
    torch.testing.assert_close(phi.conjugate_grad(unit.grad(x) / eta), w, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(phi.max_step(w, eta * d), unit.max_step(x, d), **close)
    assert torch.equal(phi.feasible_step(w, eta * d, w), unit.feasible_step(x, d, x))
    assert torch.equal(phi.contains(30 * w), unit.contains(30 * x))


@every
@pytest.mark.parametrize("dtype", [F32, F64])
def test_eta_as_a_tensor_over_the_leading_axes(name, dtype):
    """Three runs, each with its own width, two workers to a run; a float64 eta is only a number."""
    etas = [0.5, 1.0, 2.0]
    eta = torch.tensor(etas, dtype=F64).view(3, 1)
    phi = Layerwise(POTENTIALS[name], LAYERS, eta)
    w, d = blocks(3, 2, 9, dtype=dtype, size=0.2), blocks(3, 2, 9, seed=1, dtype=dtype)
    y = phi.grad(w)
    for run, width in enumerate(etas):
        alone = Layerwise(POTENTIALS[name], LAYERS, width)
        for method, *arguments in [
            ("value", w), ("grad", w), ("hvp", w, d), ("conjugate_grad", y), ("contains", w),
            ("max_step", w, d), ("feasible_step", w, d, w),
        ]:  # fmt: skip
            together = getattr(phi, method)(*arguments)[run]
            single = getattr(alone, method)(*(argument[run] for argument in arguments))
            assert together.dtype == single.dtype, method
            torch.testing.assert_close(together, single, msg=method)
    scalar = Layerwise(POTENTIALS[name], LAYERS, torch.tensor(0.5, dtype=F64))
    torch.testing.assert_close(scalar.grad(w[0]), phi.grad(w)[0])
    assert scalar.grad(w).dtype == dtype


@pytest.mark.parametrize("weight", [2.0, [2.0], [0.5, 3.0, 1.5], [float(i) for i in range(1, 10)]])
@pytest.mark.parametrize("eta", [1.0, 0.5, torch.tensor([0.5, 1.0], dtype=F64)], ids=str)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_weights_of_the_scaled_quadratic(weight, eta, dtype):
    """A number, one a layer, one a coordinate: w^T Q w / eta^2."""
    w = blocks(2, 9, dtype=dtype)
    if isinstance(weight, float) or len(weight) == 1:
        q = torch.full((9,), 2.0)
    elif len(weight) == 3:
        q = torch.tensor([0.5] * 3 + [3.0] + [1.5] * 5)
    else:
        q = torch.tensor(weight)
    q = q.to(dtype) / torch.as_tensor(eta, dtype=dtype).expand(2).unsqueeze(-1) ** 2
    phi = Layerwise(POTENTIALS.make("scaled_quad", weight=weight), LAYERS, eta)
    torch.testing.assert_close(phi.value(w), (q * w * w).sum(-1))
    torch.testing.assert_close(phi.grad(w), 2 * q * w)
    torch.testing.assert_close(phi.hvp(w, w + 1), 2 * q * (w + 1))
    torch.testing.assert_close(phi.conjugate_grad(w), w / (2 * q))
    assert phi.grad(w).dtype == dtype
    assert not phi.bounded


@pytest.mark.parametrize("weight", [[1.0, 2.0], [1.0] * 8, [1.0] * 10])
def test_weights_that_fit_nothing_are_refused(weight):
    allowed = r"allowed: 1, 3 \(one a layer\) or 9 \(one a coordinate\)"
    with pytest.raises(ValueError, match=f"`weight` has {len(weight)} entries; {allowed}"):
        Layerwise(POTENTIALS.make("scaled_quad", weight=weight), LAYERS)


@pytest.mark.parametrize(
    "layers",
    [[], [(1, 3)], [(0, 3), (4, 9)], [(0, 3), (2, 9)], [(0, 0)], [(0, 3), (3, 3)], [(0, 3), (3, 2)],
     [(3, 9), (0, 3)], [(0, -1)]],
    ids=str,
)  # fmt: skip
def test_layers_must_partition(layers):
    with pytest.raises(ValueError, match=r"`layers` is .*each starting where the one before"):
        Layerwise(POTENTIALS["quad"], layers)


@pytest.mark.parametrize(
    "eta",
    [0.0, -1.0, math.inf, math.nan, torch.tensor([1.0, 0.0]), torch.tensor([1.0, math.nan])],
    ids=str,
)
def test_eta_must_be_positive(eta):
    with pytest.raises(ValueError, match=r"`eta` is .*a finite number > 0"):
        Layerwise(POTENTIALS["quad"], LAYERS, eta)


@pytest.mark.parametrize("name", ["quad", "tan", "log_sep"])
def test_distance_is_in_the_units_of_the_parameters(name):
    """Not divided by eta, and one number a layer for separable potentials too."""
    phi = Layerwise(POTENTIALS[name], [(0, 2), (2, 3)], eta=0.1)
    w = torch.tensor([[[3.0, 4.0, -2.0], [0.0, 0.0, 0.0]]])
    assert phi.distance(w).tolist() == [[[5.0, 2.0], [0.0, 0.0]]]


def test_to_moves_the_scale_and_leaves_the_original():
    eta = torch.tensor([0.5, 2.0], dtype=F64)
    phi = Layerwise(POTENTIALS["tan"], LAYERS, eta)
    w = blocks(2, 9, dtype=F32, size=0.1)
    moved = phi.to(w)
    assert isinstance(moved, Layerwise)
    assert moved.scale.dtype == F32
    assert phi.scale.dtype == F64
    assert torch.equal(moved.grad(w), phi.grad(w))
    assert moved.layers == phi.layers == tuple(LAYERS)
    number = Layerwise(POTENTIALS["tan"], LAYERS, 0.5)
    assert torch.equal(number.to(w).grad(w), number.grad(w))
