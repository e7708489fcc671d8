"""tree_sum: the order of its additions, and the layouts that share it."""

import math

import pytest
import torch

from consensus.tree_sum import adding, layouts, tree_sum


@pytest.mark.parametrize("m", [1, 2, 3, 4, 6, 8, 9, 12, 15, 30])
def test_the_sum_of_blocks_is_the_sum_of_all(m):
    """Numbers of very different sizes: another order of additions has other bits."""
    torch.manual_seed(m)
    parts = torch.randn(m, 501) * 10.0 ** torch.randint(-4, 5, (m, 501))
    whole = tree_sum(parts.unbind())
    torch.testing.assert_close(whole, parts.double().sum(0).float(), rtol=1e-5, atol=1e-2)
    for processes in layouts(m):
        blocks = [tree_sum(block.unbind()) for block in parts.tensor_split(processes)]
        assert torch.equal(tree_sum(blocks), whole)


def test_other_blocks_have_other_bits():
    torch.manual_seed(0)
    parts = torch.randn(12, 501)
    blocks = [tree_sum(block.unbind()) for block in parts.tensor_split(3)]
    assert not torch.equal(tree_sum(blocks), tree_sum(parts.unbind()))


def test_the_order_of_additions():
    a, b, c, d, e, f = torch.randn(6, 1000).unbind()
    assert torch.equal(tree_sum([a, b, c, d]), (a + b) + (c + d))
    assert torch.equal(tree_sum([a, b, c]), (a + b) + c)
    assert torch.equal(tree_sum([a, b, c, d, e, f]), ((a + b) + c) + ((d + e) + f))


def test_the_summands_stay():
    parts = torch.randn(8, 5)
    before, out = parts.clone(), torch.empty(5)
    assert tree_sum(parts.unbind(), out) is out
    assert torch.equal(parts, before)


@pytest.mark.parametrize(
    ("m", "expected"),
    [
        (1, [1]),
        (2, [1, 2]),
        (4, [1, 2, 4]),
        (8, [1, 2, 4, 8]),
        (12, [1, 2, 4, 12]),
        (6, [1, 2, 6]),
        (9, [1, 3, 9]),
        (15, [1, 3, 15]),
        (7, [1, 7]),
        (100, [1, 2, 4, 20, 100]),
    ],
)
def test_layouts(m, expected):
    assert layouts(m) == expected


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_additions_in_pieces_see_what_is_in_memory(monkeypatch, ranks):
    monkeypatch.setattr("consensus.tree_sum.CHUNK", 3)
    parts, total = torch.zeros(ranks, 8), torch.full((8,), math.nan)
    add = adding(parts, total)
    for factor in (1.0, 2.0):  # whole numbers: their sums are exact in every order
        parts.copy_(factor * torch.arange(8.0 * ranks).view(ranks, 8))
        add()
        assert total.tolist() == [factor * sum(8 * r + i for r in range(ranks)) for i in range(8)]
