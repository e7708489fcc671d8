import os
import time

import pytest

from tests.testing.ranks import RankError


def refuse(group):
    raise ValueError(f"from rank {group.rank}")


def sleep(group):
    time.sleep(60.0)


def pids(group):
    return os.getpid()


@pytest.mark.ranks
def test_the_pool_reuses_processes_and_replaces_failed_ones(ranks):
    first = ranks(2, pids)
    assert ranks(2, pids) == first
    with pytest.raises(RankError, match=r"rank . raised ValueError: from rank ."):
        ranks(2, refuse)
    with pytest.raises(RankError, match=r"ranks \[0, 1\] gave no answer in 1.0 s"):
        ranks(2, sleep, timeout=1.0)
    assert set(ranks(2, pids)).isdisjoint(first)
