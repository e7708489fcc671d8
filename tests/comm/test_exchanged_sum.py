import time

import numpy as np
import pytest
import torch
import torch.distributed as dist

from consensus.comm import PeerLostError, ProcessGroup
from consensus.comm.exchanged_sum import LARGEST, ExchangedSum
from consensus.server import digest
from tests.comm.test_process_group import (
    gloo_threads,
    gloo_threads_after,
    steady_gloo_threads,
)

pytestmark = pytest.mark.ranks
CPU = torch.device("cpu")


def sending(group):
    """A group on the same handle whose sums do not use shared memory."""
    return ProcessGroup(group.handle, CPU, 60.0, shared_memory=False)


def summand(rank, t, numel, dtype):
    """Numbers of widely different magnitudes."""
    random = np.random.default_rng((rank, t))
    return (random.normal(size=numel) * 10.0 ** random.integers(-30, 30, numel)).astype(dtype)


def exchanged(group, numel, dtype):
    found = []
    total = sending(group).repeated_sum(numel, torch.empty(0, dtype=dtype))
    assert isinstance(total, ExchangedSum)
    for t in range(5):
        mine = torch.from_numpy(summand(group.rank, t, numel, str(dtype).partition(".")[2]))
        total.message.copy_(mine)
        pending = total.start()
        if t == group.rank + 2:
            time.sleep(0.1)  # the other one has begun its next sum by then
        got = pending.wait().clone()
        dist.all_reduce(mine, group=group.handle)
        found.append((got.numpy(), int(digest(got)), int(digest(mine))))
    return found


@pytest.mark.parametrize("numel", [1, 2, 33_581])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bits_are_those_of_an_all_reduce_and_of_numpy(ranks, numel, dtype):
    both = ranks(2, exchanged, numel, dtype)
    name = str(dtype).partition(".")[2]
    for t, ((one, *bits), (other, *others)) in enumerate(zip(*both, strict=True)):
        expected = summand(0, t, numel, name) + summand(1, t, numel, name)
        assert np.array_equal(one, expected)
        assert np.array_equal(other, expected)
        assert len({*bits, *others}) == 1


def in_bfloat16(group):
    mine = ProcessGroup(group.handle, CPU, 60.0, shared_memory=False, compress="bf16")
    total, found = mine.repeated_sum(33_581, torch.empty(0)), []
    for t in range(3):
        own, other = (
            torch.from_numpy(summand(rank, t, 33_581, "float32")).bfloat16()
            for rank in (group.rank, 1 - group.rank)
        )
        total.message.copy_(torch.from_numpy(summand(group.rank, t, 33_581, "float32")))
        got = total.start().wait()
        by_torch = (own + other).float()
        dist.all_reduce(own, group=group.handle)
        found.append(torch.equal(got, by_torch) and torch.equal(got, own.float()))
    return found, total.num_bytes, type(total._sent).__name__, int(digest(got))


def test_in_bfloat16_the_bits_are_those_of_an_all_reduce_and_of_torch(ranks):
    one, other = ranks(2, in_bfloat16)
    assert one == other
    assert one[:3] == ([True] * 3, 2 * 33_581, "ExchangedSum")


def not_numbers(group):
    total = sending(group).repeated_sum(3, torch.empty(0))
    bits = [[0x7FC00001, 0x7F800000, 0], [0x7FC00002, 0x3F800000, 0x7F800000]]
    total.message.copy_(torch.tensor(bits[group.rank], dtype=torch.int32).view(torch.float32))
    return total.start().wait().view(torch.int32).tolist()


def test_not_a_number_has_the_same_bits_on_both(ranks):
    one, other = ranks(2, not_numbers)
    assert one == other
    assert one[1:] == [0x7F800000] * 2
    assert np.isnan(np.array(one[:1], np.int32).view(np.float32)).all()


def several(group):
    """Sums in another order on each rank, over two groups on one handle."""
    sums = [sending(group).repeated_sum(2, torch.empty(0)) for _ in range(2)]
    found = []
    for _ in range(4):
        for factor, total in zip((1.0, 10.0), sums, strict=True):
            total.message.fill_(factor * (group.rank + 1))
        order = (0, 1) if group.rank else (1, 0)
        pending = {i: sums[i].start() for i in order}
        values = {i: pending[i].wait().tolist() for i in reversed(order)}
        found.append([values[0], values[1]])
    return found


def test_sums_on_one_handle_do_not_mix(ranks):
    assert ranks(2, several) == [[[[3.0, 3.0], [30.0, 30.0]]] * 4] * 2


def kinds(group):
    mine = sending(group)
    numel = LARGEST // 4
    return [type(mine.repeated_sum(n, torch.empty(0))).__name__ for n in (0, numel, numel + 1)]


@pytest.mark.parametrize(("size", "small"), [(2, "ExchangedSum"), (3, "SentSum")])
def test_large_sums_and_those_of_more_processes_are_reduced(ranks, size, small):
    assert ranks(size, kinds) == [["SentSum", small, "SentSum"]] * size


def lose_a_peer(group, late):
    """Rank 1 leaves before its third sum: after rank 0 has begun to wait if `late`, else before."""
    mine = sending(group)
    total = mine.repeated_sum(1000, torch.empty(0))
    for _ in range(2):
        total.message.fill_(1.0)
        total.start().wait()
    time.sleep(0.5 * (late == (group.rank == 1)))
    if group.rank == 1:
        mine.close()
        group.close()
        return None
    try:
        total.start().wait()
    except PeerLostError as error:
        return str(error)


@pytest.mark.parametrize("late", [False, True])
def test_a_peer_that_leaves_is_one_line(ranks, late):
    message, _ = ranks(2, lose_a_peer, late)
    assert message.startswith("rank 0: lost a peer in `sum`: ")
    assert "\n" not in message


def finish_a_sum_after_the_peer_has_left(group):
    """On rank 0, which must not lose a total whose terms have all come."""
    side = group.side()
    total = sending(side).repeated_sum(1000, torch.empty(0))
    total.message.fill_(group.rank + 1.0)
    pending = total.start()
    if group.rank == 1:
        pending.wait()
        side.close()
        group.close()
        return None
    time.sleep(0.5)
    found = pending.wait().clone()
    try:
        total.start().wait()
    except PeerLostError as error:
        return found, str(error)


def test_a_peer_that_leaves_after_a_sum_is_no_error_of_this_sum(ranks):
    (total, message), _ = ranks(2, finish_a_sum_after_the_peer_has_left)
    assert torch.equal(total, torch.full((1000,), 3.0))
    assert message.startswith("rank 0: lost a peer in `sum`: ")


def close_with_announced_memory(group):
    """The Gloo threads before, during and after; other tests may have left some in this process."""
    before = steady_gloo_threads()
    side = group.side()
    mine = sending(side)
    total = mine.repeated_sum(1000, torch.empty(0))
    total.message.fill_(1.0)
    pending = total.start()
    pending.wait()
    during = len(gloo_threads())
    mine.close()
    side.close()
    after = gloo_threads_after(before)
    return before, during, after, hasattr(total, "message"), hasattr(pending, "wait")


def test_closing_leaves_no_connection(ranks):
    for before, during, after, *held in ranks(2, close_with_announced_memory):
        assert during > before
        assert after <= before
        assert held == [True, True]
