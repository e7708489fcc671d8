"""Both lines tile by tile, compared with proximal steps by scipy and plain NumPy."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from consensus.core import parameters as flat_parameters
from consensus.core import sizes
from consensus.core.flat import FlatLayout
from consensus.core.kernels import native_together, pulls
from consensus.core.kernels import together as module
from consensus.core.kernels.native import library
from consensus.core.kernels.pulls import choose_pull
from consensus.core.layerwise import Layerwise
from consensus.core.parameters import FlatParameters
from consensus.core.potentials import POTENTIALS
from tests.testing.proximal import groups, removed

ETA, PULL, OUTER, RANKS = 0.6, 0.3, 0.7, 3
NAMES = ["quad", "tan", "cubic", "huber", "tan_sep", "pseudo_huber"]
STRENGTH = 0.5 * ETA**2 * PULL / (1.0 - PULL)


def alone(own: torch.Tensor) -> torch.Tensor:
    """The minimum over one process."""
    return own


class Case:
    """A model with parameters p, its z and u, and z of other ranks, as NumPy vectors."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float64, spread: float = 1.0) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)
        self.layout = FlatLayout.trainable(self.model)
        random = np.random.default_rng(1)
        size = (RANKS + 2, self.layout.size)
        self.u, self.p, *others = random.standard_normal(size) * 0.4 * spread
        self.z = np.array(others)
        self.write(self.p)
        self.phi = Layerwise(POTENTIALS[name], self.layout.layers, ETA)
        self.groups = groups(name, list(self.layout.layers))
        self.name = name
        self.parameters = FlatParameters(self.model, self.layout)
        self.own_u, self.own_z = (
            torch.from_numpy(x).to(dtype, copy=True) for x in (self.u, self.z[0])
        )
        self.pull = choose_pull(self.phi, self.own_z[None], PULL, None)
        found = self.pull.together(self.parameters, self.own_u, self.own_z, alone)
        assert found is not None
        self.together = found

    @torch.no_grad()
    def write(self, values: np.ndarray) -> None:
        """Give the parameters these values."""
        start = 0
        for p in self.model.parameters():
            p.copy_(torch.from_numpy(values[start : start + p.numel()]).view(p.shape))
            start += p.numel()

    def written(self) -> np.ndarray:
        """The values of the parameters."""
        return nn.utils.parameters_to_vector(self.model.parameters()).detach().double().numpy()

    def c(self, w: np.ndarray) -> np.ndarray:
        """c of each coordinate."""
        found = np.empty_like(w)
        for a, b in self.groups:
            found[a:b] = (
                PULL
                if self.name == "quad"
                else removed(self.name, float(np.linalg.norm(w[a:b])), STRENGTH, ETA)
            )
        return found

    def message(self, z: np.ndarray) -> torch.Tensor:
        """The message of a rank with this z, which is read from the parameters."""
        keep = self.written()
        self.write(z)
        message = torch.full((self.pull.kernel.force_size,), 7.0, dtype=self.own_u.dtype)
        with torch.no_grad():
            self.together.start(message, True)
        np.testing.assert_allclose(self.own_z.numpy(), z, rtol=1e-6)
        self.write(keep)
        return message


# The last of torch: pieces of a tile by foreach, as in a model of many parameters.
@pytest.fixture(
    params=[
        *(("torch", 1, 16), ("torch", 5, 16), ("torch", 1000, 16), ("torch", 1000, 0)),
        *(("c", 5, None), ("c", 1000, None)),
    ]
)
def tile(request, monkeypatch):
    """The coordinates in a tile, of operations of torch or of native.c."""
    lines, size, few = request.param
    if lines == "c":
        if library() is None:
            pytest.skip("no C compiler")
        monkeypatch.setattr(native_together, "TILE", size)
        return
    monkeypatch.setattr(pulls, "agreed", lambda smallest, u: None)
    for place in (flat_parameters, sizes, module):
        monkeypatch.setattr(place, "CHUNK", size)
    monkeypatch.setattr(module, "FEW", few)


@pytest.fixture(params=["torch", "c"])
def lines(request, monkeypatch):
    """Operations of torch or of native.c."""
    if request.param == "torch":
        monkeypatch.setattr(pulls, "agreed", lambda smallest, u: None)
    elif library() is None:
        pytest.skip("no C compiler")


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("name", NAMES)
def test_both_lines(name):
    case = Case(name)
    total = sum(case.message(z) for z in case.z[::-1])  # the last is the own one
    weights = [np.ones_like(case.u) if name == "quad" else case.c(case.u - z) for z in case.z]
    top = sum(c * (case.u - z) for c, z in zip(weights, case.z, strict=True))
    u = case.u - OUTER * top / sum(weights)
    wanted = case.p + case.c(u - case.z[0]) * (u - case.z[0])
    with torch.no_grad():
        t_u = case.pull.t_u(OUTER, RANKS)
        case.together.move(total, t_u, case.pull.strength(PULL), keep=True)
    np.testing.assert_allclose(case.own_u.numpy(), u, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(case.written(), wanted, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(case.own_z.numpy(), case.written())


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("name", NAMES)
def test_line_6_alone_with_another_strength(name):
    """As after an outer optimizer, and between communications; z need not be kept."""
    case = Case(name)
    w = case.u - case.z[0]
    with torch.no_grad():
        case.together.move(None, 0.0, case.pull.strength(PULL), keep=False)
    np.testing.assert_allclose(case.written(), case.p + case.c(w) * w, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(case.own_u.numpy(), case.u)


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("displaced", [True, False])
def test_a_full_pull_is_exact(displaced):
    case = Case("tan")
    with torch.no_grad():
        case.together.replace(displaced)
    wanted = case.p - case.z[0] + case.u if displaced else case.u
    np.testing.assert_array_equal(case.written(), wanted)
    np.testing.assert_array_equal(case.own_z.numpy(), wanted)


@pytest.mark.usefixtures("lines")
@pytest.mark.parametrize("spread", [[1e-4] * 3, [1e-4, 1.0, 1e-4]])
def test_equal_weights_of_all_ranks_and_of_some(spread):
    """float32, where the weights are one number near 0: the total tells whether all are equal."""
    case = Case("tan_sep", torch.float32)
    zs = [case.u + s * (z - case.u) for s, z in zip(spread, case.z, strict=True)]
    messages = [case.message(z) for z in zs[::-1]]
    assert [math.isnan(m[-1]) for m in messages[::-1]] == [s == 1.0 for s in spread]
    weights = [case.c(case.u - z) for z in zs]
    top = sum(c * (case.u - z) for c, z in zip(weights, zs, strict=True))
    with torch.no_grad():
        case.together.move(sum(messages), OUTER, case.pull.strength(PULL), keep=True)
    wanted = case.u - OUTER * top / sum(weights)
    np.testing.assert_allclose(case.own_u.numpy(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("tile")
def test_parameters_whose_memory_was_replaced():
    case = Case("quad")
    case.message(case.z[0])
    for p in case.model.parameters():
        p.data = p.data.clone()
    w = case.u - case.z[0]
    with torch.no_grad():
        case.together.move(None, 0.0, PULL, keep=True)
    np.testing.assert_allclose(case.written(), case.p + PULL * w, rtol=1e-12, atol=1e-12)


def test_tiles_of_one_machine_only():
    """bfloat16 has roundings to keep, and the kernels of Algorithm 1 have tiles of their own."""
    model = nn.Linear(4, 2)
    layout, z = FlatLayout.trainable(model), torch.zeros(10)
    for kind, implicit, taken in ("quad", None, True), ("tan", None, True), ("tan", False, False):
        pull = choose_pull(Layerwise(POTENTIALS[kind], layout.layers), z[None], PULL, implicit)
        found = pull.together(FlatParameters(model, layout), z, z.clone(), alone)
        assert (found is not None) == taken
        rounded = FlatParameters(nn.Linear(4, 2).bfloat16(), layout)
        assert pull.together(rounded, z, z.clone(), alone) is None
