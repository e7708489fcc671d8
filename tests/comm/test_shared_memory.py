import os
import platform
import random
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from consensus.comm import Launch, PeerLostError, may_share_memory
from consensus.comm.shared_memory import SMALL, PeersGoneError, SharedSum, available

# Not `available()`: if it were wrongly False, nothing would be tested.
HERE = sys.platform == "linux" and platform.machine() == "x86_64"
pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(not HERE, reason="shared memory needs Linux on x86-64"),
]
SUMS = 40
LARGE = SMALL // 8 + 12345  # numbers, at two ranks and more; a container may have no room for many


def test_available():
    assert available()


def leftovers():
    return set(Path("/dev/shm").glob("consensus-*"))


def leave_no_name(before):
    """Whether no name stays; other tests beside this one have names for milliseconds."""
    deadline = time.monotonic() + 10.0
    while leftovers() - before:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def summand(numel, rank, t):
    """Whole numbers: their sums are exact in every order."""
    return ((torch.arange(numel) * (rank + 1) + 7 * t) % 1001).to(torch.float32)


def repeat(group, numel, dtype, jitter):
    """Compare sums with their closed form, while ranks start at random times."""
    ranks = random.Random(group.rank)
    repeated = group.repeated_sum(numel, torch.empty(0, dtype=dtype))
    name = type(repeated).__name__
    for t in range(SUMS if numel < LARGE else 6):
        repeated.message.copy_(summand(numel, group.rank, t))
        pending = repeated.start()
        time.sleep(jitter * ranks.random())
        total = pending.wait()
        time.sleep(jitter * ranks.random())
        expected = sum(summand(numel, rank, t) for rank in range(group.size)).to(dtype)
        if not torch.equal(total, expected):
            return name, f"sum {t} is wrong"
        repeated.message.fill_(-1.0)  # allowed from `wait` to `start`: no rank may still read it
    return name, "right"


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("numel", [1, 3, 5000, LARGE])
def test_sums_equal_their_closed_form(ranks, size, numel, dtype):
    before = leftovers()
    for answer in ranks(size, repeat, numel, dtype, 2e-3):
        assert answer == ("SumInSharedMemory", "right")
    assert leave_no_name(before)


def bits(group, numel):
    random = torch.Generator().manual_seed(group.rank)
    repeated = group.repeated_sum(numel, torch.empty(0))
    torch.randn(numel, generator=random, out=repeated.message)
    total = repeated.start().wait()
    return total.double().mul(torch.arange(1, numel + 1)).sum().item(), total[:5].tolist()


@pytest.mark.parametrize("numel", [5000, LARGE])
def test_all_ranks_get_the_same_bits_added_along_the_tree(ranks, numel):
    first, *others = ranks(4, bits, numel)
    assert others == [first] * 3
    streams = [torch.Generator().manual_seed(rank) for rank in range(4)]
    rows = [torch.randn(numel, generator=stream) for stream in streams]
    expected = (rows[0] + rows[1]) + (rows[2] + rows[3])
    assert first[1] == expected[:5].tolist()


def without(group):
    group._shared_memory = group.rank == 0  # one machine that cannot, of two
    repeated = group.repeated_sum(3, torch.empty(0))
    repeated.message.fill_(group.rank + 1.0)
    return type(repeated).__name__, repeated.start().wait().tolist()


def test_if_one_rank_cannot_share_memory_all_ranks_send(ranks):
    assert ranks(2, without) == [("ExchangedSum", [3.0] * 3)] * 2


def no_room(group):
    def full(*_):
        raise OSError("No space left on device")

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as told:
        patch.setattr(SharedSum, "reserve", full)
        warnings.simplefilter("always")
        repeated = group.repeated_sum(3, torch.empty(0))
    repeated.message.fill_(group.rank + 1.0)
    lines = [str(warning.message) for warning in told]
    return lines, type(repeated).__name__, repeated.start().wait().tolist()


def test_without_room_one_line_is_printed_and_all_ranks_send(ranks):
    line = "rank 0: no shared memory, sums go through Gloo: No space left on device"
    answers = ranks(2, no_room)
    assert [lines for lines, *_ in answers] == [[line], []]
    assert [rest for _, *rest in answers] == [["ExchangedSum", [3.0] * 3]] * 2


def another_folder(group):
    """Rank 1 does not find the file, as on another host."""
    share = group.share
    group.share = lambda value: share(value) + (".elsewhere" if group.rank == 1 else "")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        repeated = group.repeated_sum(3, torch.empty(0))
    repeated.message.fill_(group.rank + 1.0)
    return len(told), type(repeated).__name__, repeated.start().wait().tolist()


def test_a_rank_without_the_file_creates_none(ranks):
    before = leftovers()
    answers = ranks(2, another_folder)
    assert answers == [(told, "ExchangedSum", [3.0] * 3) for told in (0, 1)]
    assert leave_no_name(before)


def lose_at_the_start(group):
    def lost(_):
        raise PeerLostError("rank 1 is gone")

    group.share = lost
    with pytest.raises(PeerLostError):
        group.repeated_sum(3, torch.empty(0))


def test_a_peer_lost_at_the_start_leaves_no_memory_behind(ranks):
    before = leftovers()
    ranks(2, lose_at_the_start)
    assert leave_no_name(before)


def test_missing_memory_is_an_error_and_no_signal():
    # Touching memory that a full file system cannot give ends a process by SIGBUS.
    before = leftovers()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(OSError, match=r"."):
            SharedSum.reserve(2, 1 << 20, torch.float32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert leave_no_name(before)


def test_reserved_memory_is_allocated():
    path = SharedSum.reserve(2, 1 << 20, torch.float32)
    try:
        assert os.stat(path).st_blocks * 512 >= 2 * 4 << 20
        assert os.stat(path).st_mode & 0o077 == 0, "for this user alone"
    finally:
        os.unlink(path)


@pytest.mark.parametrize(
    ("launch", "wanted", "shared"),
    [
        (Launch(0, 2, 0, 2), True, True),
        (Launch(0, 2, 0, 1), True, False),  # two machines
        (Launch(0, 2, 0, 2), False, False),
    ],
)
def test_may_share_memory(launch, wanted, shared):
    assert may_share_memory(launch, wanted) == shared


def lose(group, numel, how):
    repeated = group.repeated_sum(numel, torch.empty(0))
    repeated.message.fill_(1.0)
    repeated.start().wait()
    if group.rank == 1:
        how(group, repeated)
        return None
    repeated.message.fill_(1.0)
    started = time.monotonic()
    try:
        repeated.start().wait()
    except PeerLostError as error:
        return str(error), time.monotonic() - started
    return None


def leave(group, repeated):
    group.close()


@pytest.mark.parametrize("numel", [5000, LARGE])
def test_a_peer_that_leaves_is_noticed_at_once(ranks, numel):
    message, seconds = ranks(2, lose, numel, leave)[0]
    assert message.startswith("rank 0: lost a peer in `sum`: ")
    assert seconds < 20.0  # the timeout of these groups is longer


@pytest.mark.parametrize("numel", [5000, LARGE])
def test_a_killed_peer_is_noticed(numel):
    # Without the pool, which would kill the survivor as soon as its peer is dead.
    path = SharedSum.reserve(2, numel, torch.float32)
    peer = f"""
import time, torch
from consensus.comm.shared_memory import SharedSum
shared = SharedSum({path!r}, 1, 2, {numel}, torch.float32, 20.0)
print("opened", flush=True)
shared.message.fill_(2.0)
shared.start()
print(shared.wait()[0].item(), flush=True)
time.sleep(100.0)
"""
    try:
        with subprocess.Popen([sys.executable, "-c", peer], stdout=subprocess.PIPE) as process:
            shared = SharedSum(path, 0, 2, numel, torch.float32, 20.0)
            assert process.stdout.readline() == b"opened\n"  # both ranks have, before one waits
            shared.message.fill_(1.0)
            shared.start()
            assert shared.wait()[[0, -1]].tolist() == [3.0, 3.0]
            assert process.stdout.readline() == b"3.0\n"
            process.kill()
            shared.start()
            with pytest.raises(PeersGoneError, match="rank 1 is gone"):
                shared.wait()
    finally:
        os.unlink(path)


def hurry(group):
    repeated = group.repeated_sum(10, torch.empty(0))
    shared = repeated._shared
    shared._timeout = 1.0
    repeated.message.fill_(1.0)
    if group.rank == 1:
        time.sleep(3.0)
        return None
    shared.start()
    try:
        shared.wait()
    except PeersGoneError as error:
        return str(error)
    return None


def test_a_late_peer_ends_the_wait(ranks):
    assert ranks(2, hurry)[0] == "timed out after 1 s"


def post_and_leave(group):
    repeated = group.repeated_sum(10, torch.empty(0))
    repeated.message.fill_(group.rank + 1.0)
    if group.rank == 2:
        time.sleep(1.5)
    pending = repeated.start()
    if group.rank == 1:
        repeated._shared.close()  # it has posted, and may leave
        return None
    return pending.wait()[0].item()


def test_a_rank_that_has_posted_may_leave_before_the_others_post(ranks):
    assert ranks(3, post_and_leave) == [6.0, None, 6.0]
