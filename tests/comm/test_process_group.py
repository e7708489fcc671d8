import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from consensus.comm import (
    GroupError,
    Launch,
    LaunchError,
    PeerLostError,
    ProcessGroup,
    Solo,
    choose_backend,
    sent_sum,
)
from consensus.comm.shared_memory import available
from consensus.server import digest
from tests.testing.ranks import RankError


def collectives(group):
    """Every collective once, on numbers that tell the ranks apart."""
    mine = torch.tensor([1.0, 10.0]) * (group.rank + 1)
    pending = group.start_sum(mine.clone())
    return {
        "sum": group.sum_(mine.clone()).tolist(),
        "async": pending.wait().tolist(),
        "min": group.min_(mine.clone()).tolist(),
        "broadcast": group.broadcast_(mine.clone()).tolist(),
        "gather": group.gather(mine).tolist(),
        "share": group.share({"rank": group.rank}),
        "objects": group.gather_objects(group.rank),
    }


@pytest.mark.ranks
@pytest.mark.parametrize("size", [1, 2, 4])
def test_collectives_give_every_rank_the_closed_form(ranks, size):
    total = size * (size + 1) / 2
    for answer in ranks(size, collectives):
        assert answer == {
            "sum": [total, 10 * total],
            "async": [total, 10 * total],
            "min": [1.0, 10.0],
            "broadcast": [1.0, 10.0],
            "gather": [[float(r + 1), 10.0 * (r + 1)] for r in range(size)],
            "share": {"rank": 0},
            "objects": list(range(size)),
        }


def complain(group, wrong):
    try:
        group.raise_together("the disk is full" if group.rank in wrong else None)
    except GroupError as error:
        return str(error)
    return None


@pytest.mark.ranks
def test_one_ranks_problem_is_raised_by_all_with_its_rank(ranks):
    assert ranks(4, complain, (2, 3)) == ["rank 2: the disk is full"] * 4
    assert ranks(4, complain, ()) == [None] * 4


def lose_a_peer(group):
    if group.rank == 1:
        os._exit(7)
    started = time.monotonic()
    try:
        group.sum_(torch.ones(1))
    except PeerLostError as error:
        return str(error), time.monotonic() - started
    return None


@pytest.mark.ranks
def test_a_lost_peer_is_one_line_that_names_rank_and_collective(ranks):
    # The pool reports the death; that the survivors leave is seen in test_train.py.
    with pytest.raises(RankError, match="rank 1 died with exit code 7"):
        ranks(2, lose_a_peer)


def survive(group, path):
    if group.rank == 1:
        time.sleep(1.0)  # rank 0 is in the collective by then
        group.close()
        return None
    message, _ = lose_a_peer(group)
    return message


@pytest.mark.ranks
def test_the_survivor_of_a_closed_group_gets_the_error(ranks, tmp_path):
    message = ranks(2, survive, str(tmp_path))[0]
    assert message.startswith("rank 0: lost a peer in `sum`: ")
    assert "\n" not in message


def connect_slowly(group):
    # Gloo gives each peer the timeout, one after another: with some that died while they were
    # connecting it waits for a multiple of it.
    group._timeout = timedelta(seconds=1.0)
    connect = dist.new_group
    dist.new_group = lambda **_: time.sleep(20.0)
    started = time.monotonic()
    try:
        group.side()
    except PeerLostError as error:
        return str(error), time.monotonic() - started
    finally:
        dist.new_group = connect
    return None


@pytest.mark.ranks
def test_the_timeout_is_for_all_connections_together(ranks):
    for rank, (message, seconds) in enumerate(ranks(2, connect_slowly)):
        assert message.startswith(f"rank {rank}: lost a peer in `start`: ")
        assert seconds < 10.0


def gloo_threads():
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


def close_with_a_side(group):
    side = group.side()
    side.barrier()
    before = gloo_threads()
    group.close()
    deadline = time.monotonic() + 10.0  # the kernel takes a moment to forget a thread
    while gloo_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    return before, gloo_threads(), hasattr(side, "handle")


@pytest.mark.ranks
def test_a_closed_group_leaves_no_thread_that_could_abort_the_end_of_the_process(ranks):
    for before, after, held in ranks(2, close_with_a_side):
        assert before
        assert (after, held) == ([], False)


def refuse(group):
    raise ValueError(f"from rank {group.rank}")


def sleep(group):
    time.sleep(60.0)


def pids(group):
    return os.getpid()


@pytest.mark.ranks
def test_the_pool_itself(ranks):
    first = ranks(2, pids)
    assert ranks(2, pids) == first, "processes are reused"
    with pytest.raises(RankError, match="ValueError: from rank"):
        ranks(2, refuse)
    with pytest.raises(RankError, match=r"ranks \[0, 1\] gave no answer in 1.0 s"):
        ranks(2, sleep, timeout=1.0)
    assert set(ranks(2, pids)).isdisjoint(first), "failed ones are replaced"


def test_launch_reads_what_torchrun_sets(monkeypatch):
    for name, value in {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert Launch.from_environment() == Launch(rank=5, size=8, local_rank=1, local_size=4)
    for name, value, message in (
        ("RANK", "a", "`RANK` is a; allowed: a whole number"),
        ("RANK", "8", "`RANK` is 8; allowed: below WORLD_SIZE = 8"),
        ("LOCAL_RANK", "4", "`LOCAL_RANK` is 4; allowed: below LOCAL_WORLD_SIZE = 4"),
        ("MASTER_PORT", None, "`MASTER_PORT` is not set"),
    ):
        with monkeypatch.context() as patch:
            patch.delenv(name) if value is None else patch.setenv(name, value)
            with pytest.raises(LaunchError, match=message):
                Launch.from_environment()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name)
    assert Launch.from_environment() == Launch()


@pytest.mark.parametrize(
    ("rank", "size", "block"), [(0, 1, [0, 1, 2, 3]), (1, 2, [2, 3]), (3, 4, [3])]
)
def test_workers_are_dealt_out_in_blocks(rank, size, block):
    assert list(Launch(rank, size).block(4)) == block


@pytest.mark.ranks
def test_a_bug_is_not_called_a_lost_peer(ranks):
    with pytest.raises(RankError, match="raised:") as failure:
        ranks(2, unsupported_type)
    assert "PeerLostError" not in str(failure.value)


def unsupported_type(group):
    group.sum_(torch.ones(2).to(torch.float8_e4m3fn))  # on all ranks, so that none is lost first


def test_auto_takes_gloo_without_a_device_of_its_own():
    cpu = torch.device("cpu")
    assert choose_backend("auto", cpu, Launch(0, 4, 0, 4)) == "gloo"
    assert choose_backend("nccl", cpu, Launch()) == "nccl"  # as named; the plan refuses it


def test_solo_opens_no_process_group():
    Solo().sum_(torch.ones(1))
    assert not torch.distributed.is_initialized()


def test_a_rank_that_never_comes_is_named_once(tmp_path):
    with pytest.raises(PeerLostError) as failure:
        ProcessGroup(Launch(0, 3), "gloo", torch.device("cpu"), 1.0, f"file://{tmp_path}/store")
    assert str(failure.value) == (
        "rank 0: lost a peer in `start`: rank 1, 2 did not come within 1 s"
    )


# ---- compressed sums


def summands(group, numel, dtype):
    """One of widely spread numbers for each rank, and the same on every rank."""
    random = torch.Generator().manual_seed(5)
    x = torch.randn(group.size, numel, generator=random, dtype=torch.float64)
    return (x * torch.logspace(-6, 6, numel, dtype=torch.float64)).to(dtype)


def sum_compressed(group, numel, dtype):
    x = summands(group, numel, dtype)
    repeated = sent_sum(group, numel, x, "bf16")
    for _ in range(3):  # again and again, in the same memory
        repeated.message.copy_(x[group.rank])
        total = repeated.start().wait()
        assert total.dtype == dtype
        error = (total.double() - x.double().sum(0)).abs()
        u = 2.0**-8  # of bfloat16, to nearest
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
    for compress in (None, "bf16"):
        for shared in (True, False):
            group._compress, group._shared_memory = compress, shared and available()
            names.append(type(group.repeated_sum(3, x)).__name__)
    return names


@pytest.mark.ranks
def test_only_what_is_sent_is_compressed(ranks):
    here = "_SumInSharedMemory" if available() else None
    expected = [here or "_SumOfTensors", "_SumOfTensors", here or "_SumInBfloat16"]
    assert ranks(2, kinds_of_sum) == [[*expected, "_SumInBfloat16"]] * 2
