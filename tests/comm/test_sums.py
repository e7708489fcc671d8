import time

import pytest
import torch

from consensus.comm import PeerLostError, sent_sum
from consensus.comm.shared_memory import available
from consensus.server import digest


def summands(size, numel, dtype):
    """Numbers of widely different magnitudes for each rank, the same on every rank."""
    random = torch.Generator().manual_seed(5)
    x = torch.randn(size, numel, generator=random, dtype=torch.float64)
    return (x * torch.logspace(-6, 6, numel, dtype=torch.float64)).to(dtype)


def sum_compressed(group, numel, dtype):
    x = summands(group.size, numel, dtype)
    repeated = sent_sum(group, torch.empty(numel, dtype=dtype), "bf16")
    for _ in range(3):  # in the same memory
        repeated.message.copy_(x[group.rank])
        total = repeated.start().wait()
        assert total.dtype == dtype
        error = (total.double() - x.double().sum(0)).abs()
        u = 2.0**-8  # unit roundoff of bfloat16
        bound = group.size * u / (1 - group.size * u) * x.double().abs().sum(0)
        assert (error <= bound).all()
        assert (error > 0).any()  # it was compressed
    return repeated.num_bytes, int(digest(total))


@pytest.mark.ranks
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sum_in_bfloat16_is_near_and_the_same_on_all_ranks(ranks, size, dtype):
    found = ranks(size, sum_compressed, 10_001, dtype)
    assert found == [(2 * 10_001, found[0][1])] * size


def kinds_of_sum(group):
    x, names = torch.zeros(3), []
    for compress in (None, "bf16", "int8"):
        for shared in (True, False):
            group._compress, group._shared_memory = compress, shared
            names.append(type(group.repeated_sum(3, x)).__name__)
    group.barrier()  # a rank that ends earlier is lost to the other, which announces memory to it
    return names


@pytest.mark.ranks
def test_only_sent_sums_are_compressed(ranks):
    here = "SumInSharedMemory" if available() else None
    sent = ["ExchangedSum", "Bfloat16Sum", "Int8Sum"]
    expected = [name for kind in sent for name in (here or kind, kind)]
    assert ranks(2, kinds_of_sum) == [expected] * 2


def open_without_the_other(group, compress):
    group._compress, group._shared_memory = compress, False
    if group.rank == 1:
        return ""  # and closes the group
    group.gather_objects = lambda value: [value, ""]  # whether all are on one host; it was asked
    try:
        for _ in range(100):  # to announce memory to a rank that has left is no error
            total = group.repeated_sum(3, torch.zeros(3))
            time.sleep(0.01)
        total.start().wait()
    except PeerLostError as error:
        return str(error)
    return "not lost"


@pytest.mark.ranks
@pytest.mark.parametrize("compress", [None, "bf16", "int8"])
def test_a_peer_that_is_lost_before_the_first_sum_is_told(ranks, compress):
    found, _ = ranks(2, open_without_the_other, compress)
    assert found.startswith("rank 0: lost a peer in `sum`: ")
