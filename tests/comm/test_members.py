"""The agreement of members: real stores, one thread for each process."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from consensus.comm import LEAVING, LOST, PLANNED, GroupError, Members, View
from consensus.comm.members import StoreLostError


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr(Members, "BEAT_S", 0.02)
    monkeypatch.setattr(Members, "SILENT_S", 0.5)
    monkeypatch.setattr(Members, "LOOK_S", 0.001)


@pytest.fixture
def member() -> Iterator[Callable[..., Members]]:
    """`member(name, ...)`: a process of this test's store, in order of arrival."""
    store, made = dist.HashStore(), []

    def make(name: str, **options) -> Members:
        # Members of one test share a process, whose end thus says nothing about one of them.
        made.append(Members(store, name=name, **options))
        return made[-1]

    yield make
    for own in made:
        own._ended.set()


def at_once(*calls: Callable[[], View]) -> list[View]:
    """The results of calls in a thread each; their exceptions are raised."""
    futures: list[Future[View]] = [Future() for _ in calls]

    def run(call, future) -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    for pair in zip(calls, futures, strict=True):
        threading.Thread(target=run, args=pair, daemon=True).start()
    return [future.result(20.0) for future in futures]


def begin(member, names: str, **options) -> list[Members]:
    """Members of a first view."""
    made = [member(name, expected=len(names), **options) for name in names]
    views = at_once(*(own.join for own in made))
    assert all(view == views[0] for view in views)
    return made


def change(*ready: tuple[Members, str]) -> View:
    """The view that members agree on."""
    views = at_once(*(lambda own=own, why=why: own.change(why) for own, why in ready))
    assert all(view == views[0] for view in views)
    return views[0]


def test_the_first_view_has_all_in_order_of_arrival(member):
    a, b, c = begin(member, "abc", workers=2)
    assert (a.view.number, a.view.members, a.view.new) == (0, ("a", "b", "c"), ("a", "b", "c"))
    assert a.view.workers == ((0, 1), (2, 3), (4, 5))
    assert [own.rank for own in (a, b, c)] == [0, 1, 2]


def test_it_waits_for_as_many_as_are_expected(member, monkeypatch):
    a = member("a", expected=2)
    with pytest.raises(GroupError, match="stopped before"):
        a.join(iter([False, False, False, True]).__next__)
    monkeypatch.setattr(Members, "QUIET_S", 0.05)
    assert a.join().members == ("a",), "nobody came for a while"


def test_a_candidate_takes_the_lowest_free_number_at_a_planned_change(member):
    a, b, c = begin(member, "abc")
    d = member("d")
    until(lambda: a.requests_change)
    assert not any((b.requests_change, c.requests_change)), "one asks for all"
    b.leaving = True
    assert b.requests_change
    views = at_once(
        lambda: a.change(PLANNED), lambda: b.change(LEAVING), lambda: c.change(PLANNED), d.join
    )
    for view in views:
        assert (view.members, view.workers) == (("a", "c", "d"), ((0,), (2,), (1,)))
        assert (view.new, view.gone) == (("d",), {"b": "has left"})
    assert [own.rank for own in (a, c, d)] == [0, 1, 2], "seniority decides, not the number"
    assert not a.requests_change


def test_a_lost_member_is_missing_in_the_next_view_which_admits_nobody(member):
    a, b, c = begin(member, "abc")
    member("d")
    until(lambda: a.requests_change)
    assert b.lost() == ""
    c.declare_gone("a", "killed")
    assert b.lost() == "a: killed"
    view = change((b, LOST), (c, LOST))
    assert (view.members, view.workers, view.gone) == (("b", "c"), ((1,), (2,)), {"a": "killed"})
    assert b.rank == 0
    until(lambda: b.requests_change)


def test_all_wait_for_a_member_that_lives(member):
    a, b = begin(member, "ab")
    views = []
    thread = threading.Thread(target=lambda: views.append(a.change(LOST)), daemon=True)
    thread.start()
    until(lambda: b.lost() == "a has lost a peer")
    thread.join(0.2)
    assert not views
    assert b.change(LOST).members == ("a", "b")
    thread.join(5.0)
    assert views == [b.view]


def test_a_member_that_is_late_for_too_long_is_gone(member):
    a, b = begin(member, "ab", timeout_s=0.2)
    assert a.change(LOST).gone == {"b": "did not come within 0.2 s"}
    with pytest.raises(GroupError, match="go on without this process, b: did not come within"):
        b.change(PLANNED)


def test_the_second_composes_where_the_first_is_lost_during_the_change(member):
    a, b, c = begin(member, "abc")
    a.store.set(f"ready/0/{a.name}", PLANNED)  # it has stopped, and died before it wrote the view
    a.declare_gone("a", "killed")
    assert change((b, PLANNED), (c, PLANNED)).members == ("b", "c")


def test_a_process_without_a_heartbeat_is_gone(member):
    a, b = begin(member, "ab")
    a._ended.set()
    until(lambda: b.lost() == "a: no heartbeat for 0.5 s")
    assert b.change(LOST).members == ("b",)
    with pytest.raises(GroupError, match="go on without this process, a: no heartbeat"):
        a.change(LOST)


def test_too_few_are_left_at_a_planned_change(member):
    a, b, c = begin(member, "abc", least=2)
    view = change((a, LEAVING), (b, PLANNED), (c, LEAVING))
    assert (view.members, view.gone) == (("a", "b", "c"), {}), "they stop together"
    assert view.stop == "1 workers are left, and group.min_workers is 2"


def test_all_leave(member):
    a, b = begin(member, "ab")
    view = change((a, LEAVING), (b, LEAVING))
    assert (view.members, view.stop) == (
        ("a", "b"),
        "0 workers are left, and group.min_workers is 1",
    )


def test_one_that_leaves_finds_the_view_that_is_written_while_it_looks(member, monkeypatch):
    a, b = begin(member, "ab")
    b.leaving, read, views = True, b._read, []

    def read_just_before_it_is_written(number: int) -> View | None:
        found = read(number)
        if not views:  # then a writes the view, and declares b gone
            views.append(a.change(PLANNED))
        return found

    monkeypatch.setattr(b, "_read", read_just_before_it_is_written)
    assert b.change(LEAVING) == views[0]
    assert views[0].members == ("a",)


def test_too_few_are_left_after_a_loss(member):
    a, _ = begin(member, "ab", least=2)
    a.declare_gone("b", "killed")
    view = a.change(LOST)
    assert (view.members, view.stop != "") == (("a",), True)


def test_candidates_begin_again_where_all_members_are_gone(member):
    a, b = begin(member, "ab")
    for own in (a, b):
        own.close("has ended")
    c, d = member("c", expected=2), member("d", expected=2)
    views = at_once(c.join, d.join)
    assert views[0] == views[1]
    assert (views[0].number, views[0].members, views[0].workers) == (1, ("c", "d"), ((0,), (1,)))


def test_nobody_joins_a_run_that_is_complete(member):
    (a,) = begin(member, "a")
    a.close(finished=True)
    with pytest.raises(GroupError, match="the run has finished"):
        member("b").join()


def test_a_view_is_written_once(member):
    a, b = begin(member, "ab")
    a._publish(View(1, ("a",), ((0,),)))
    b._publish(View(1, ("b",), ((1,),)))
    assert b._read(1).members == ("a",)


def test_a_store_that_is_lost(member, monkeypatch):
    (a,) = begin(member, "a")

    def refuse(*_: object) -> None:
        raise RuntimeError("Broken pipe\nframe #0")

    monkeypatch.setattr(a, "_text", refuse)
    assert a.lost() == "", "nothing is known"
    with pytest.raises(StoreLostError, match=r"the store of the members is lost: Broken pipe$"):
        a.change(PLANNED)


names = st.lists(st.text("abcdef", min_size=1), unique=True, max_size=5)


@given(st.integers(0, 99), names, st.integers(1, 3), st.text(max_size=5))
@settings(max_examples=30, deadline=None)
def test_a_view_survives_the_store(number, members, each, stop):
    workers = tuple(tuple(range(i, i + each)) for i in range(len(members)))
    view = View(number, tuple(members), workers, tuple(members[1:]), {"x": "y"}, stop)
    assert View.from_json(view.to_json()) == view
    assert view.numbers == tuple(j for own in workers for j in own)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
