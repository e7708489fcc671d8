"""The periodic check: non-finite values, stop signals, write errors, and its interval."""

import math
import signal

import pytest
import torch

from consensus.comm import GroupError, Solo
from consensus.run import health as health_module
from consensus.run.health import HealthCheck

ADVICE = "; smaller algorithm.sigma and algorithm.tau, or a larger algorithm.lam, may help"


SOME = "iteration 4: one of the workers 0 to 1 on rank 0 became non-finite, and u with it"


def finite(workers: int = 2):
    return torch.ones(5), torch.ones(workers, 5)


@pytest.mark.parametrize(
    ("workers", "where", "message"),
    [
        (2, "z", SOME),
        (1, "z", "iteration 4: worker 0 on rank 0 became non-finite, and u with it"),
        (2, "u", "iteration 4: u became non-finite"),
        (2, "both", SOME),
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_first_non_finite_iterate_is_named(workers, where, message, value):
    health = HealthCheck(Solo(), range(workers), log_every=100)
    health.observe(2, *finite(workers))
    assert health.check(3) == 0
    u, z = finite(workers)
    if where != "u":
        z[-1, 2] = value
    if where != "z":
        u[1] = value
    health.observe(3, u, z)
    health.observe(4, torch.full((5,), math.nan), z)
    with pytest.raises(GroupError) as caught:
        health.check(5)
    assert str(caught.value) == message + ADVICE


def first_failure(group, bad_rank):
    health = HealthCheck(group, range(2 * group.size), log_every=100)
    u, z = finite()
    if group.rank == bad_rank:
        z[0, 0] = math.nan
    health.observe(7, u, z)
    health.observe(8, torch.full((5,), math.nan), z)  # u is spoilt everywhere
    try:
        health.check(9)
    except GroupError as error:
        return str(error)


@pytest.mark.ranks
def test_all_ranks_name_the_rank_that_failed_first(ranks):
    message = "iteration 8: one of the workers 2 to 3 on rank 1 became non-finite, and u with it"
    assert ranks(2, first_failure, 1) == [message + ADVICE] * 2


def test_a_signal_is_returned_and_a_problem_raised():
    health = HealthCheck(Solo(), range(1), log_every=100)
    assert health.check(1, signal.SIGTERM) == signal.SIGTERM
    with pytest.raises(GroupError, match="cannot write"):
        health.check(2, problem="cannot write")


@pytest.mark.parametrize(("seconds", "stride"), [(0.25, 4), (3.0, 1), (0.001, 7)])
def test_the_interval_is_about_a_second_and_at_most_log_every(monkeypatch, seconds, stride):
    now = 0.0
    monkeypatch.setattr(health_module.time, "perf_counter", lambda: now)
    health = HealthCheck(Solo(), range(1), log_every=7)
    assert health.due(1), "the first iteration is always checked"
    now = seconds
    health.check(1)
    assert [health.due(1 + k) for k in (stride - 1, stride)] == [False, True]


def lines_about_drops(group):
    """Three checks of two workers on each rank, of which worker 1 of rank 1 is dropped."""
    dropped = torch.zeros(2, dtype=torch.int64)
    health, lines = HealthCheck(group, range(2 * group.size), 100, dropped), []
    for done, times in ((3, 2), (5, 3), (9, 4)):
        if group.rank == 1:
            dropped[1] = times
        health.check(done)
        lines.append(health.remark())
    return lines


@pytest.mark.ranks
def test_all_ranks_have_the_same_line_about_dropped_workers(ranks):
    told = "non-finite, left out of u and begun again at u: worker 3"
    lines = [f"iteration 3: {told} (2 so far)", None, f"iteration 9: {told} (4 so far)"]
    assert ranks(2, lines_about_drops) == [lines] * 2


def late(group):
    """Signals that come before and during an exchange that takes three iterations."""
    health = HealthCheck(group, range(group.size), log_every=100, late=3)
    health.observe(0, *finite(1))
    own = signal.SIGTERM if group.rank == 1 else 0
    found = [health.due(1), health.check(1, own, wait=False)]
    found += [health.due(2), health.due(3), health.due(4), health.check(4, wait=False)]
    health._stride = 1
    found += [health.due(5), health.check(5, wait=False)]
    found += [health.check(6, own)]  # an evaluation is due: it waits for both
    health._stride = 1
    health.check(7, problem="the disk is full" if group.rank == 1 else None, wait=False)
    try:
        health.check(10, wait=False)
    except GroupError as error:
        return found, str(error)


@pytest.mark.ranks
def test_a_check_that_nobody_waits_for(ranks):
    term = signal.SIGTERM
    expected = [True, 0, False, False, True, term, True, 0, term], "rank 1: the disk is full"
    assert ranks(2, late) == [expected, expected]
