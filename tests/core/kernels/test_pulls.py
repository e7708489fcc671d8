"""Pulls of a displaced model, tile by tile, against scalar equations solved by scipy."""

import numpy as np
import pytest
import torch
from torch import nn

from consensus import POTENTIALS, Layerwise
from consensus.core import parameters as flat_parameters
from consensus.core import sizes
from consensus.core.flat import FlatLayout
from consensus.core.kernels import weighted
from consensus.core.kernels.pulls import Copy, choose_pull
from consensus.core.parameters import FlatParameters
from tests.testing.proximal import groups, removed

ETA, PULL = 0.6, 0.3


class Shaped(nn.Module):
    """Parameters of these shapes."""

    def __init__(self, *shapes):
        super().__init__()
        self.own = nn.ParameterList(torch.zeros(shape, dtype=torch.float64) for shape in shapes)


def displaced_model():
    """Layers of 13 and 15 coordinates; one parameter is not contiguous, and one has none."""
    model = nn.Sequential(Shaped((4, 3), ()), Shaped((2, 3, 2), (0, 2), (3,)))
    model[1].own[0].data = torch.zeros(2, 2, 3, dtype=torch.float64).transpose(1, 2)
    layout = FlatLayout.trainable(model)
    assert layout.layers == ((0, 13), (13, 28))
    rng = np.random.default_rng(0)
    z, u, d = 0.5 * rng.normal(size=(3, layout.size))
    for parameter, piece in zip(
        (p for p in model.parameters() if p.numel()),
        torch.from_numpy(z + d).split([12, 1, 12, 3]),
        strict=True,
    ):
        parameter.data.copy_(piece.view(parameter.shape))
    return model, layout, z, u, d


@pytest.mark.parametrize("displaced", [True, False])
@pytest.mark.parametrize("tile", [1, 5, 1000])
@pytest.mark.parametrize("name", ["quad", "tan", "cubic", "tan_sep", "pseudo_huber"])
def test_z_moves_by_its_displacement_and_by_the_fraction_of_the_way(
    name, tile, displaced, monkeypatch
):
    for module in (flat_parameters, sizes, weighted):
        monkeypatch.setattr(module, "CHUNK", tile)
    model, layout, z, u, d = displaced_model()
    if not displaced:
        z, d = z + d, 0.0 * d
    wanted = z + d
    strength = 0.5 * ETA**2 * PULL / (1.0 - PULL)
    for a, b in groups(name, list(layout.layers)):
        c = removed(name, np.linalg.norm((u - z)[a:b]), strength, ETA)
        wanted[a:b] += c * (u - z)[a:b]
    parameters = FlatParameters(model, layout)
    own, center = torch.from_numpy(z.copy()), torch.from_numpy(u)
    copy = Copy(parameters, own, lambda: torch.full_like(own, 7.0))
    pull = choose_pull(Layerwise(POTENTIALS[name], layout.layers, ETA), own[None], PULL, None)
    with torch.no_grad():
        pull.move(copy, center, center, PULL, displaced)
    np.testing.assert_allclose(own.numpy(), wanted, rtol=1e-12, atol=1e-12)
    written = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    assert torch.equal(written, own)


def test_a_rounded_model_is_displaced_from_what_was_written():
    """bfloat16: z in float32 keeps what a parameter cannot hold."""
    model = nn.Linear(4, 2).bfloat16()
    layout = FlatLayout.trainable(model)
    z = torch.linspace(0.1, 1.0, layout.size)
    parameters, written = FlatParameters(model, layout), z.bfloat16()
    parameters.write(z)
    with torch.no_grad():
        model.bias += 0.5
    moved = nn.utils.parameters_to_vector(model.parameters()).detach().float() - written.float()
    wanted = z + moved + 1.0
    copy = Copy(parameters, z, lambda: torch.full_like(z, 7.0))
    center, own, step = copy.operands(z + 2.0, displaced=True)
    copy.add(torch.sub(center, own, out=step), 0.5)
    torch.testing.assert_close(z, wanted, rtol=1e-6, atol=0.0)
    assert torch.equal(nn.utils.parameters_to_vector(model.parameters()), wanted.bfloat16())
