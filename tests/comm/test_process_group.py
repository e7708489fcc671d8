import contextlib
import os
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from consensus import POTENTIALS, Layerwise
from consensus.comm import (
    GroupError,
    Launch,
    PeerLostError,
    ProcessGroup,
    choose_backend,
    open_group,
    shared_memory,
)
from consensus.server import Server, digest
from tests.comm.test_group import closed_form, collectives
from tests.testing.ranks import RankError

CPU = torch.device("cpu")


def lose_a_peer(group):
    if group.rank == 1:
        os._exit(7)
    return failing_sum(group)


def failing_sum(group):
    started = time.monotonic()
    try:
        group.sum_(torch.ones(1))
    except PeerLostError as error:
        return str(error), time.monotonic() - started
    return None


@pytest.mark.ranks
def test_a_dead_rank_is_reported(ranks):
    # The pool reports the death; test_train.py tests that the survivors leave.
    with pytest.raises(RankError, match="rank 1 died with exit code 7"):
        ranks(2, lose_a_peer)


def survive(group):
    if group.rank == 1:
        time.sleep(1.0)  # rank 0 is in the collective by then
        group.close()
        return None
    return failing_sum(group)[0]


@pytest.mark.ranks
def test_a_lost_peer_is_one_line_that_names_rank_and_collective(ranks):
    message = ranks(2, survive)[0]
    assert message.startswith("rank 0: lost a peer in `sum`: ")
    assert "\n" not in message


def connect_slowly(group):
    # Gloo waits for each peer in turn: with several dead peers, a multiple of the timeout.
    group.timeout_s = 1.0
    connect = dist.new_group
    dist.new_group = lambda *_, **__: time.sleep(20.0)
    started = time.monotonic()
    try:
        group.side()
    except PeerLostError as error:
        return str(error), time.monotonic() - started
    finally:
        dist.new_group = connect
    return None


@pytest.mark.ranks
def test_the_timeout_covers_all_connections_together(ranks):
    for rank, (message, seconds) in enumerate(ranks(2, connect_slowly)):
        assert message.startswith(f"rank {rank}: lost a peer in `start`: ")
        assert seconds < 10.0


def gloo_threads():
    found = []
    for path in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # a thread that has ended meanwhile
            found.append(path.read_text().strip())
    return [name for name in found if "gloo" in name]


def steady_gloo_threads():
    """The number of Gloo threads, once all that have started have their names."""
    before, now = -1, len(gloo_threads())
    while now != before:
        time.sleep(0.1)
        before, now = now, len(gloo_threads())
    return now


def gloo_threads_after(expected):
    """The Gloo threads; the kernel takes a moment to remove one that has ended."""
    deadline = time.monotonic() + 10.0
    while len(gloo_threads()) > expected and time.monotonic() < deadline:
        time.sleep(0.01)
    return len(gloo_threads())


def close_with_a_side(group):
    side = group.side()
    side.barrier()
    before = gloo_threads()
    group.close()
    return before, gloo_threads_after(0), hasattr(side, "handle")


@pytest.mark.ranks
def test_a_closed_group_leaves_no_thread_that_could_abort_the_process(ranks):
    for before, after, held in ranks(2, close_with_a_side):
        assert before
        assert (after, held) == (0, False)


def close_a_side_alone(group):
    side = group.side()
    side.close()
    return group.sum_(torch.ones(1)).item()


@pytest.mark.ranks
def test_a_closed_side_leaves_its_group_open(ranks):
    assert ranks(2, close_a_side_alone) == [2.0, 2.0]


def open_late(group):
    """When rank 0 has connected, half a second late; when this rank has its side."""
    connect, connected = dist.new_group, 0.0

    def connect_late(*given, **options):
        nonlocal connected
        made = connect(*given, **options)
        time.sleep(0.5 * (group.rank == 0))
        connected = time.monotonic()
        return made

    dist.new_group = connect_late
    try:
        side = group.side()
    finally:
        dist.new_group = connect
    opened = time.monotonic()
    side.close()
    return connected, opened


@pytest.mark.ranks
def test_no_rank_has_a_side_before_all_have_connected(ranks):
    """It could close its side at once, and with it the connections that others still make."""
    (connected, _), (_, opened) = ranks(2, open_late)
    assert opened >= connected


def unsupported_type(group):
    group.sum_(torch.ones(2).to(torch.float8_e4m3fn))  # on all ranks, so that none is lost first


@pytest.mark.ranks
def test_a_bug_is_not_called_a_lost_peer(ranks):
    with pytest.raises(RankError, match="raised") as failure:
        ranks(2, unsupported_type)
    assert "PeerLostError" not in str(failure.value)


def test_auto_takes_gloo_without_a_device_of_its_own():
    assert choose_backend("auto", CPU, Launch(0, 4, 0, 4)) == "gloo"
    assert choose_backend("nccl", CPU, Launch()) == "nccl"  # as named; the plan refuses it


def test_a_rank_that_never_comes_is_named_once(tmp_path):
    with pytest.raises(PeerLostError) as failure:
        open_group(Launch(0, 3), "gloo", CPU, 1.0, init_method=f"file://{tmp_path}/store")
    assert str(failure.value) == (
        "rank 0: lost a peer in `start`: rank 1, 2 did not come within 1 s"
    )


# ---- groups that the user has created


@contextmanager
def world_of_the_user(group, folder):
    """torch's default group over the ranks of a group of the pool, which is closed."""
    group.close()
    method = f"file://{folder}/world"
    dist.init_process_group("gloo", init_method=method, rank=group.rank, world_size=group.size)
    try:
        yield dist.group.WORLD
        assert dist.is_initialized(), "the default group belongs to the user"
        dist.barrier()
    finally:
        dist.destroy_process_group()


def plain_sum(handle, value):
    """An all-reduce by torch alone."""
    tensor = torch.tensor([float(value)])
    dist.all_reduce(tensor, group=handle)
    return tensor.item()


def follow(group, numel=5):
    """u after 20 updates towards one worker per rank: (rank, digest of u, u)."""
    u = torch.zeros(numel, dtype=torch.float64)
    server = Server(u, Layerwise(POTENTIALS["quad"], [(0, 2), (2, numel)]), group)
    z = torch.linspace(0.0, 1.0, numel, dtype=torch.float64)[None] * (group.rank + 1)
    for _ in range(20):
        u = server.finish(server.start(z), 0.05)
    return group.rank, int(digest(u)), u.tolist()


def followed(size, numel=5):
    """Closed form of u: a geometric approach to the mean of the z_j, with factor 1 - 2 P tau."""
    mean = torch.linspace(0.0, 1.0, numel, dtype=torch.float64) * (size + 1) / 2
    return mean * (1.0 - (1.0 - 2 * size * 0.05) ** 20)


def use(handle, options):
    """All collectives, and u, over a handle of the user; then what is left after `close`."""
    group = ProcessGroup(handle, CPU, 60.0, **options)
    found = collectives(group)
    repeated = group.repeated_sum(3, torch.zeros(1))
    repeated.message.fill_(group.rank + 1.0)
    kind, total = type(repeated).__name__, repeated.start().wait()
    exact = all(x == plain_sum(handle, group.rank + 1.0) for x in total.tolist())
    state = follow(group)
    group.close()
    assert not hasattr(group, "handle")
    return found, (kind, exact), state, plain_sum(handle, 1.0)


def use_groups_of_the_user(group, folder, options):
    with world_of_the_user(group, folder) as world:
        some = dist.new_group([1, 3])
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "worker"))
        found = {"world": use(world, options)}
        if dist.get_rank() in (1, 3):
            found["1 and 3"] = use(some, options)
        else:
            with pytest.raises(ValueError, match=r"`handle` is .*; allowed: a group that has this"):
                ProcessGroup(some, CPU, 60.0)
        for name in ("worker", "replica"):
            found[name] = use(mesh.get_group(name), options)
        found["again"] = use(world, options)
        return found


@pytest.mark.ranks
@pytest.mark.parametrize("options", [{}, {"shared_memory": False}])
def test_groups_that_the_user_has_created(ranks, tmp_path, options):
    kinds = {2: "ExchangedSum", 4: "SentSum"}  # by the number of processes
    if not options and shared_memory.available():
        kinds = dict.fromkeys(kinds, "SumInSharedMemory")
    sizes = {"world": 4, "1 and 3": 2, "worker": 2, "replica": 2, "again": 4}
    places = {  # rank within the group, by global rank
        "world": [0, 1, 2, 3],
        "1 and 3": [None, 0, None, 1],
        "worker": [0, 1, 0, 1],
        "replica": [0, 0, 1, 1],
        "again": [0, 1, 2, 3],
    }
    answers = ranks(4, use_groups_of_the_user, str(tmp_path), options)
    for name, size in sizes.items():
        digests = set()
        for place, answer in zip(places[name], answers, strict=True):
            if place is None:
                assert name not in answer
                continue
            found, kind_and_exact, (rank, bits, u), left = answer[name]
            assert found == closed_form(size), name
            assert kind_and_exact == (kinds[size], True), name
            assert left == size, "the user's group still sums after `close`"
            assert rank == place
            torch.testing.assert_close(torch.tensor(u).double(), followed(size))
            digests.add(bits)
        assert len(digests) == 1, name


def two_on_one_handle(group, folder):
    with world_of_the_user(group, folder) as world:
        first, second = (ProcessGroup(world, CPU, 60.0) for _ in range(2))
        sums = [one.repeated_sum(2, torch.zeros(1)) for one in (first, second)]
        for factor, total in zip((1.0, 10.0), sums, strict=True):
            total.message.fill_(factor * (group.rank + 1))
        pending = [total.start() for total in sums]
        values = [one.wait()[0].item() for one in reversed(pending)]
        sides = [one.side() for one in (first, second)]
        values += [side.sum_(torch.ones(1)).item() for side in reversed(sides)]
        first.close()
        values += [second.sum_(torch.ones(1)).item(), sides[1].sum_(torch.ones(1)).item()]
        second.close()
        return values, plain_sum(world, 1.0)


@pytest.mark.ranks
def test_two_groups_on_one_handle_are_independent(ranks, tmp_path):
    expected = [30.0, 3.0, 2.0, 2.0, 2.0, 2.0], 2.0
    assert ranks(2, two_on_one_handle, str(tmp_path)) == [expected] * 2


def open_sides(group, folder):
    with world_of_the_user(group, folder):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "worker"))
        values = []
        for name in ("worker", "replica", "worker"):
            rows = ProcessGroup(mesh.get_group(name), CPU, 60.0)
            plain_sum(rows.handle, 1.0)  # a thread has its name once it runs
            threads = steady_gloo_threads()
            side = rows.side()
            values.append(side.sum_(torch.tensor([float(dist.get_rank())])).item())
            values.append(side.share(dist.get_rank()))
            rows.close()
            del side
            assert gloo_threads_after(threads) <= threads  # those of the job before may end too
        some = dist.new_group([1, 3])  # of all ranks: torch's count of groups is still the same
        if dist.get_rank() in (1, 3):  # last: now it is not
            side = ProcessGroup(some, CPU, 60.0).side()
            values.append(side.sum_(torch.tensor([float(dist.get_rank())])).item())
            side.close()
        return values


@pytest.mark.ranks
def test_sides_of_a_part_of_the_ranks(ranks, tmp_path):
    # Rows of the mesh are {0, 1} and {2, 3}, columns {0, 2} and {1, 3}.
    assert ranks(4, open_sides, str(tmp_path)) == [
        [1.0, 0, 2.0, 0, 1.0, 0],
        [1.0, 0, 4.0, 1, 1.0, 0, 4.0],
        [5.0, 2, 2.0, 0, 5.0, 2],
        [5.0, 2, 4.0, 1, 5.0, 2, 4.0],
    ]


def lose_a_member(group, folder):
    with world_of_the_user(group, folder):
        some = dist.new_group([1, 3])
        if dist.get_rank() not in (1, 3):
            return None
        mine = ProcessGroup(some, CPU, 60.0, shared_memory=False)
        mine.barrier()
        if dist.get_rank() == 1:
            mine.close()
            dist.destroy_process_group(some)
            del some  # the last reference closes the connections
            return None
        with mine.publish_failure():
            return failing_sum(mine)[0]


@pytest.mark.ranks
def test_a_lost_member_of_a_group_of_the_user_is_one_line(ranks, tmp_path):
    *others, message = ranks(4, lose_a_member, str(tmp_path))
    assert others == [None] * 3
    assert message.startswith("rank 1: lost a peer in `sum`: "), "the rank within the group"
    assert "\n" not in message


def another_host(group, folder):
    with world_of_the_user(group, folder) as world, pytest.MonkeyPatch.context() as patch:
        if group.rank == 1:
            patch.setattr(shared_memory, "identity", lambda: "elsewhere")
        mine = ProcessGroup(world, CPU, 60.0)
        repeated = mine.repeated_sum(3, torch.zeros(1))
        mine.close()
        return type(repeated).__name__


@pytest.mark.ranks
def test_ranks_on_two_hosts_do_not_share_memory(ranks, tmp_path):
    assert ranks(2, another_host, str(tmp_path)) == ["ExchangedSum"] * 2


def within_the_group_of_the_user(group, folder):
    """Another group of a launch, in a script that has opened torch's default group."""
    with pytest.raises(GroupError, match="has 2 processes, the launch has 3") as refused:
        open_group(Launch(group.rank, 3, group.rank, 3), "gloo", CPU, 60.0)
    assert "\n" not in str(refused.value)
    sums = []
    for name in "ab":
        launch, method = Launch(group.rank, 2, group.rank, 2), f"file://{folder}/{name}"
        other = open_group(launch, "gloo", CPU, 60.0, init_method=method)
        sums.append(float(other.sum_(torch.tensor([1.0 + other.rank]))))
        other.close()
    return sums, float(group.sum_(torch.ones(1))), dist.is_initialized()


@pytest.mark.ranks
def test_a_group_within_the_default_group_of_the_user(ranks, tmp_path):
    found = ranks(2, within_the_group_of_the_user, str(tmp_path))
    assert found == 2 * [([3.0, 3.0], 2.0, True)]
