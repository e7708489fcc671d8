"""Collectives over a view: equal to those of torch's process group, and an end with a member."""

from datetime import timedelta

import pytest
import torch

from consensus.comm import LOST, Members, PeerLostError, Solo, ViewGroup, open_view
from consensus.comm.rendezvous import connect, serve
from consensus.server import digest
from tests.testing.ranks import RankPool

CPU = torch.device("cpu")
VALUES = [0.1, -0.3, 1e-8, 7.0]


def joined(group, **options) -> Members:
    """This rank as a member, in the order of ranks, through a store that rank 0 keeps."""
    if group.rank == 0:
        group.kept = serve(0, "127.0.0.1")
    port = group.share(group.kept[1] if group.rank == 0 else None)
    store = connect("127.0.0.1", port, "", timedelta(seconds=30))
    for rank in range(group.size):
        if rank == group.rank:
            members = Members(store, name=f"member {rank}", expected=group.size, **options)
        group.barrier()
    members.join()
    return members


def _collectives(group, tree: bool, shared_memory: bool) -> dict[str, object]:
    members = joined(group)
    view = open_view(members, CPU, 30.0, tree=tree, shared_memory=shared_memory)
    mine = torch.tensor(VALUES) * (group.rank + 1)
    last = group.size - 1
    both = {}
    for name, own in (("torch", group), ("view", view)):
        numbers = own.repeated_sum(4, mine)
        numbers.message.copy_(mine)
        both[name] = {
            "min": own.min_(mine.clone()).tolist(),
            "broadcast": own.broadcast_(mine.clone(), last).tolist(),
            "gather": own.gather(mine).tolist(),
            "share": own.share({"rank": group.rank}, last),
            "objects": own.gather_objects("x" * group.rank),
            "problem": own.first_problem("late" if group.rank == last else None),
        }
        if not tree:  # torch adds two or four numbers along a tree too, but not three
            both[name] |= {
                "sum": own.sum_(mine.double()).tolist(),
                "repeated": numbers.start().wait().tolist(),
            }
    both["in shared memory"] = view.repeated_sum(4, mine).in_shared_memory
    both["kind"] = type(numbers).__name__
    side = view.side()
    both["side"] = side.sum_(torch.ones(1)).item()
    both["digest"] = int(digest(view.sum_(mine.clone())))
    both["rank"] = view.rank, view.size
    view.barrier()
    view.close()
    members.close()
    return both


@pytest.mark.parametrize(
    ("size", "tree", "shared", "kind"),
    [
        (2, False, True, "SumInSharedMemory"),
        (2, False, False, "SentSum"),  # no exchange: a lost member must end it
        (4, True, False, "TreeSum"),
    ],
)
def test_collectives_are_those_of_torch(rank_pool, tmp_path, size, tree, shared, kind):
    found = rank_pool.run(size, _collectives, tree, shared, folder=tmp_path, timeout=60)
    for rank, own in enumerate(found):
        assert own["view"] == own["torch"]
        assert own["side"] == size
        assert own["in shared memory"] == shared
        assert own["kind"] == kind
        assert own["rank"] == (rank, size)
    assert len({own["digest"] for own in found}) == 1


def test_one_member_needs_no_connection(monkeypatch):
    monkeypatch.setattr(Members, "BEAT_S", 0.02)
    _, port = serve(0, "127.0.0.1")
    members = Members(connect("127.0.0.1", port, "", timedelta(seconds=10)))
    members.join()
    assert isinstance(open_view(members, CPU, 10.0), Solo)
    members.close()


def _stopped(group, shared_memory: bool) -> tuple[str, int]:
    """What the others notice of a rank that makes no more progress, and their next sum."""
    Members.BEAT_S, Members.SILENT_S = 0.1, 4.0  # in this process; busy cores may rest for 1 s
    members = joined(group)
    view = open_view(members, CPU, 60.0, shared_memory=shared_memory)
    assert isinstance(view, ViewGroup)
    numbers = view.repeated_sum(8, torch.ones(1))
    for _ in range(3):
        numbers.message.fill_(1.0)
        assert float(numbers.start().wait()[0]) == group.size
    found = "", 0
    if group.rank == 0:
        members._ended.set()  # no heartbeat, and no part in the next sum
    else:
        numbers.message.fill_(1.0)
        pending = numbers.start()
        with pytest.raises(PeerLostError) as error:
            pending.wait()
        assert members.change(LOST).members == ("member 1", "member 2")
        again = open_view(members, CPU, 60.0)
        found = str(error.value), int(digest(again.sum_(torch.arange(3.0))))
        members.close()
    group.barrier()  # rank 0 keeps the store
    return found


@pytest.mark.parametrize("shared", [False, True])
def test_a_member_without_progress_is_noticed_though_its_connections_live(tmp_path, shared):
    pool = RankPool()  # of its own, since these ranks have other heartbeats
    try:
        found = pool.run(3, _stopped, shared, folder=tmp_path, timeout=60)
    finally:
        pool.close()
    (_, (first, u), (second, v)) = found
    assert u == v != 0
    for why in (first, second):
        assert "no heartbeat for 4 s" in why or "has lost a peer" in why
    assert "no heartbeat" in first + second
