"""Totals of adders.py: the bits of a sum of scaled messages by torch, and equal bits on ranks."""

import math

import pytest
import torch
from torch import nn

from consensus import Coupling
from consensus.comm import shared_memory
from consensus.comm.sums import SumInSharedMemory
from consensus.core.kernels.adders import CommonWeights, ScaledSum
from consensus.server import digest
from consensus.tree_sum import tree_sum

LAYERS = [(0, 1), (1, 1500), (1500, 1503), (1503, 4000)]
N = LAYERS[-1][1]


def total_of(adder, messages):
    """The total by the functions of all ranks, in an order that is not theirs; nan if not set."""
    total = torch.full_like(messages[0], math.nan)
    for rank in reversed(range(len(messages))):
        adder.adding(messages, total, rank)()
    return total


def messages_of(ranks, width, dtype):
    generator = torch.Generator().manual_seed(ranks)
    return torch.randn(ranks, width, dtype=dtype, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ranks", [2, 3, 4, 6, 7, 8])
def test_factors_of_layers_are_applied_as_they_are_summed(library, ranks, dtype):
    messages = messages_of(ranks, N + len(LAYERS), dtype)
    messages[0, 5], messages[-1, N] = math.inf, 0.0
    scaled = messages.clone()
    for layer, (start, stop) in enumerate(LAYERS):
        scaled[:, start:stop] *= scaled[:, N + layer : N + layer + 1]
    total = total_of(ScaledSum(library, LAYERS), messages)
    assert total.numpy().tobytes() == tree_sum(scaled.unbind()).numpy().tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_weights_are_summed_if_they_differ(ranks, dtype):
    messages = messages_of(ranks, 2 * N + 1, dtype)
    messages[1, -1] = math.nan
    total = total_of(CommonWeights(N), messages)
    assert total.numpy().tobytes() == tree_sum(messages.unbind()).numpy().tobytes()
    messages[:, -1], messages[:, N : 2 * N] = 0.25, math.inf  # not to be read
    total = total_of(CommonWeights(N), messages)
    assert torch.equal(total[:N], tree_sum(messages[:, :N].unbind()))
    assert total[-1] == 0.25 * ranks


def test_a_part_for_each_rank():
    """No coordinate is added up twice, and the parts are equal but for one coordinate."""
    messages = torch.ones(3, 2 * N + 1)
    found = []
    for rank in range(3):
        total = torch.zeros(2 * N + 1)
        CommonWeights(N).adding(messages, total, rank)()
        found.append(total[:N] != 0)
    assert torch.stack(found).sum(0).eq(1).all()
    assert {int(part.sum()) for part in found} == {N // 3, N // 3 + 1}


def gradients(model, rank, t):
    """In float32: separable potentials have native.c for it alone."""
    for i, own in enumerate(model.parameters()):
        shift = torch.cos(torch.arange(own.numel()) * (rank + 2.0) + t + i)
        own.grad = own.detach() - shift.view_as(own)


def coupled(group, name, pull, period, later, large, eta=1.0):
    """Digests of u and z_j in a run with large sums or small ones, and whether an adder is used.

    `later`: whether it may be.
    """
    limit, add_by = shared_memory.SMALL, SumInSharedMemory.add_by
    try:
        if large:
            shared_memory.SMALL = 0
        if not later:
            SumInSharedMemory.add_by = lambda *_: False
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 20), nn.Linear(20, 1100))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        coupling = Coupling(model, optimizer, name, pull=pull, period=period, eta=eta)
        for t in range(6 * period):
            gradients(model, group.rank, t)
            optimizer.step()
            coupling.step()
            if t == 4 * period:
                coupling.load_state_dict(coupling.state_dict())
        state, (part,) = coupling.state_dict(), coupling._parts
        used = getattr(part._together, "_scaled_later", getattr(part._together, "_brief", None))
        coupling.close()
        return int(digest(state["u"])), int(digest(state["z"])), used
    finally:
        shared_memory.SMALL, SumInSharedMemory.add_by = limit, add_by


@pytest.mark.usefixtures("library")
@pytest.mark.ranks
@pytest.mark.parametrize("ranks_", [2, 4])
@pytest.mark.parametrize("name", ["tan", "cubic", "log", "tan_sep"])
def test_a_coupling_has_the_same_bits(ranks, ranks_, name):
    # At a small eta coordinates are far from 0, and the weights of a separable potential differ.
    for period, eta in ((1, 10.0), (3, 10.0), (3, 0.6)):
        runs = {
            later: ranks(ranks_, coupled, name, 0.3, period, later, True, eta)
            for later in (False, True)
        }
        assert [run[:2] for run in runs[True]] == [run[:2] for run in runs[False]]
        assert {run[2] for run in runs[True]} == {True}
        assert {run[2] for run in runs[False]} == {False}
        assert len({run[0] for run in runs[True]}) == 1, "the replicas of u"
        assert len({run[1] for run in runs[True]}) == ranks_, "the copies differ"


@pytest.mark.usefixtures("library")
@pytest.mark.ranks
def test_a_full_pull_and_small_sums_are_added_up_as_they_are(ranks):
    for pull, large in ((1.0, True), (0.3, False)):
        assert {run[2] for run in ranks(2, coupled, "tan", pull, 2, True, large)} == {False}
