"""Groups of coordinates: inner products, scaling and exits, by hand and in pieces."""

import math

import pytest
import torch

from consensus.core import sizes
from consensus.core.sizes import Radial, Separable

LAYERS = [(0, 2), (2, 5)]
X = torch.tensor([3.0, 4.0, 1.0, -2.0, 2.0], dtype=torch.float64)
Y = torch.tensor([1.0, 2.0, -1.0, 1.0, 0.5], dtype=torch.float64)


@pytest.mark.parametrize(
    ("size", "inner", "norm"),
    [
        (Radial(), [11 - 1 - 2 + 1.0], [math.sqrt(34)]),
        (Radial(LAYERS), [11.0, -2.0], [5.0, 3.0]),
        (Separable(), [3.0, 8.0, -1.0, -2.0, 1.0], [3.0, 4.0, 1.0, 2.0, 2.0]),
    ],
    ids=["one group", "layers", "separable"],
)
def test_inner_products_and_lengths_by_hand(size, inner, norm):
    assert size.inner(X, Y).tolist() == inner
    torch.testing.assert_close(size.norm(X).tolist(), norm)
    assert (size.largest(X) >= size.norm(X)).all()
    assert (size.length(X) >= size.norm(X)).all()
    factor = torch.arange(1.0, len(norm) + 1, dtype=torch.float64)
    scaled = size.scale(factor, X)
    torch.testing.assert_close(size.norm(scaled), factor * size.norm(X))
    assert torch.equal(size.scale_(factor, X.clone()), scaled)


def test_exits_by_hand():
    """|x + t d|^2 = 25: (3, 4) leaves at once along itself, (0, 0) along (3, 4) after t = 1."""
    d = torch.tensor([3.0, 4.0])
    assert Radial().exit(torch.zeros(2), d, 25.0).tolist() == [1.0]
    assert Radial().exit(d, d, 25.0).tolist() == [0.0]
    assert Radial().exit(d, torch.zeros(2), 36.0).tolist() == [math.inf]
    x, d = torch.tensor([1.0, -1.0]), torch.tensor([2.0, 2.0])
    assert Separable().exit(x, d, 25.0).tolist() == [2.0, 3.0]


@pytest.mark.parametrize("layers", [None, LAYERS])
def test_inner_products_in_pieces(monkeypatch, layers):
    expected = Radial(layers).inner(X, Y)
    monkeypatch.setattr(sizes, "CHUNK", 2)
    assert torch.equal(Radial(layers).inner(X, Y), expected)


def test_over_layers():
    assert Radial().over(LAYERS).inner(X, X).tolist() == [25.0, 9.0]
    assert isinstance(Separable().over(LAYERS), Separable)
