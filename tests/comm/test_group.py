import pytest
import torch

from consensus.comm import GroupError, Solo


def collectives(group):
    """Results of all collectives, on numbers that differ between ranks."""
    mine = torch.tensor([1.0, 10.0]) * (group.rank + 1)
    pending = group.start_sum(mine.clone())
    repeated = group.repeated_sum(2, mine)
    repeated.message.copy_(mine)
    return {
        "sum": group.sum_(mine.clone()).tolist(),
        "async": pending.wait().tolist(),
        "repeated": repeated.start().wait().tolist(),
        "min": group.min_(mine.clone()).tolist(),
        "broadcast": group.broadcast_(mine.clone()).tolist(),
        "gather": group.gather(mine).tolist(),
        "share": group.share({"rank": group.rank}),
        "objects": group.gather_objects(group.rank),
    }


def closed_form(size):
    total = size * (size + 1) / 2
    return {
        "sum": [total, 10 * total],
        "async": [total, 10 * total],
        "repeated": [total, 10 * total],
        "min": [1.0, 10.0],
        "broadcast": [1.0, 10.0],
        "gather": [[float(r + 1), 10.0 * (r + 1)] for r in range(size)],
        "share": {"rank": 0},
        "objects": list(range(size)),
    }


@pytest.mark.ranks
@pytest.mark.parametrize("size", [1, 2, 4])
def test_collectives_give_every_rank_the_closed_form(ranks, size):
    assert ranks(size, collectives) == [closed_form(size)] * size


def raise_on(group, wrong):
    try:
        group.raise_together("the disk is full" if group.rank in wrong else None)
    except GroupError as error:
        return str(error)
    return None


@pytest.mark.ranks
def test_all_ranks_raise_the_problem_of_one_with_its_rank(ranks):
    assert ranks(4, raise_on, (2, 3)) == ["rank 2: the disk is full"] * 4
    assert ranks(4, raise_on, ()) == [None] * 4


def test_solo_opens_no_process_group():
    Solo().sum_(torch.ones(1))
    assert not torch.distributed.is_initialized()
