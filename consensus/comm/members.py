"""Members of an elastic run: processes that join and leave, and agree on a list of themselves.

The list is a `View`. It changes only where all members have stopped for the change, so every
collective belongs to one view. The agreement needs a key-value store, which a launcher keeps:

    candidate/N    a process that wants to take part, in order of arrival
    view/E         the view number E, written once, by the first member that is alive
    ready/E/ID     member ID of view E has stopped for a change, and why
    gone/ID        ID is lost or has left, and why; it is never a member again
    alive/ID       its heartbeat

A process is known to be gone if it says so itself, its launcher does, no process of its number is
left on this host, or its heartbeat has stopped.
"""

import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from consensus.comm.group import GroupError
from consensus.comm.rendezvous import first_line, read_text
from consensus.comm.view import View, has_ended, place_of

PLANNED, LOST, LEAVING = "planned", "lost", "leaving"
"""Reasons of a member to stop for a change: the members agreed on one, a collective failed, or it
leaves at an agreed one."""


class StoreLostError(GroupError):
    """The store cannot be reached any more; its launcher is gone."""


@contextmanager
def _without_store() -> Iterator[None]:
    """StoreLostError in place of torch's errors of the store."""
    try:
        yield
    except GroupError:
        raise
    except RuntimeError as error:
        why = f"the store of the members is lost: {first_line(error)}"
        raise StoreLostError(why) from error


class Members:
    """The view of one process, and its part in the agreement on the next; with its heartbeat.

    Args:
        store: The key-value store of the run.
        name: Of this process, unique; None: a random one.
        workers: The number of workers on each process.
        expected: The number of processes with which the first view waits to begin.
        least: The smallest number of workers with which the run goes on.
        timeout_s: Longest wait for a member that is alive, in seconds.

    Attributes:
        view: The current view; None before `join`.
        leaving: Whether this process leaves at the next planned change.
    """

    BEAT_S = 0.5
    SILENT_S = 10.0  # without a heartbeat: gone
    QUIET_S = 30.0  # without a new candidate: the first view begins with fewer than expected
    LOOK_S = 0.005  # between two looks at the store during an agreement

    def __init__(
        self,
        store: dist.Store,
        *,
        name: str | None = None,
        workers: int = 1,
        expected: int = 1,
        least: int = 1,
        timeout_s: float = 600.0,
    ) -> None:
        self.store, self.name = store, name or uuid.uuid4().hex[:12]
        self.view: View | None = None
        self.leaving = False
        self._workers, self._expected, self._least = workers, expected, least
        self._timeout_s = timeout_s
        self._gone: dict[str, str] = {}
        self._places: dict[str, dict[str, str]] = {}  # name -> host and process
        self._counts: dict[str, tuple[str, float]] = {}  # name -> heartbeat, when it changed
        self._candidates: list[str] = []  # all that have ever come, in order
        self._reading = threading.Lock()  # of the candidates, and of whether one waits
        self._waiting = False  # whether a candidate waits, as the thread has last seen
        self._ended = threading.Event()
        place = {"name": self.name, **place_of(os.getpid())}
        store.set(f"alive/{self.name}", "0")
        store.set(f"candidate/{store.add('candidates', 1)}", json.dumps(place))
        self._thread = threading.Thread(target=self._beat, name="members", daemon=True)
        self._thread.start()

    @classmethod
    def of_launcher(cls, store: dist.Store, **options: Any) -> "Members":
        """The part of a process whose name and number its launcher has put in the environment."""
        name, expected = os.environ.get("CONSENSUS_MEMBER"), os.environ.get("CONSENSUS_MEMBERS", 1)
        return cls(store, name=name, expected=int(expected), **options)

    @property
    def rank(self) -> int:
        """The place of this process in the view."""
        assert self.view is not None
        return self.view.members.index(self.name)

    @property
    def requests_change(self) -> bool:
        """Whether this process leaves, or is the first member while a candidate waits."""
        return self.leaving or (self._waiting and self.rank == 0)

    def join(self, give_up: Callable[[], bool] = lambda: False) -> View:
        """Wait until a view has this process; with no member alive, form one with the candidates.

        GroupError if the run has finished, this process was declared gone, or `give_up` holds.
        """
        with _without_store():
            return self._join(give_up)

    def _join(self, give_up: Callable[[], bool]) -> View:
        latest, quiet, seen = self._latest(), time.monotonic(), 0
        while True:
            if why := self._unwanted() or (give_up() and "stopped before it became a member"):
                raise GroupError(why)
            latest = self._latest(latest)
            if latest is not None and self.name in latest.members:
                return self._enter(latest)
            if latest is None or all(self.is_gone(member) for member in latest.members):
                living = self._living_candidates(latest)
                if len(living) > seen:
                    seen, quiet = len(living), time.monotonic()
                enough = len(living) * self._workers >= self._least
                enough = enough and time.monotonic() > quiet + self.QUIET_S
                if living[:1] == [self.name] and (len(living) >= self._expected or enough):
                    number = 0 if latest is None else latest.number + 1
                    self._publish(self._admit(View(number, (), ()), living))
                    continue
            time.sleep(10 * self.LOOK_S)

    def change(self, ready: str) -> View:
        """Stop for a change and agree on the next view. A collective of the living members.

        The first of them writes it, once all have stopped or are gone. It admits candidates unless
        a member has LOST the collectives of this view. GroupError if this process was declared
        gone; StoreLostError if the store is.
        """
        with _without_store():
            return self._change(ready)

    def _change(self, ready: str) -> View:
        assert self.view is not None
        view, began = self.view, time.monotonic()
        self.store.set(f"ready/{view.number}/{self.name}", ready)
        while True:
            unwanted = self._unwanted()  # before the view: that is written first where it leaves
            if (found := self._read(view.number + 1)) is not None:
                return self._enter(found)
            if unwanted:
                raise GroupError(unwanted)
            stopped = self._stopped(view)
            missing = [m for m in view.members if m not in stopped and not self.is_gone(m)]
            if missing and time.monotonic() > began + self._timeout_s:
                self.declare_gone(missing[0], f"did not come within {self._timeout_s:g} s")
            elif not missing:
                living = [m for m in view.members if not self.is_gone(m)]
                if living[0] == self.name:
                    self._publish(self._next(view, {m: stopped[m] for m in living}))
                    continue
            time.sleep(self.LOOK_S)

    def lost(self) -> str:
        """Why the collectives of the view cannot go on; "" if they can. Reads the store."""
        with suppress(RuntimeError):  # without the store nothing is known
            return self._lost()
        return ""

    def _lost(self) -> str:
        view = self.view
        assert view is not None
        for member in view.members:
            if member != self.name and self.is_gone(member):
                return f"{member}: {self._gone[member]}"
        if lost := [member for member, ready in self._stopped(view).items() if ready == LOST]:
            return f"{lost[0]} has lost a peer"
        return "the members have changed" if self._read(view.number + 1) is not None else ""

    def is_gone(self, member: str) -> bool:
        """Whether a process is known to be gone."""
        if member in self._gone:
            return True
        why = self._text(f"gone/{member}")
        if not why and member != self.name and has_ended(self._place(member)):
            why = "its process has ended"
            self.declare_gone(member, why)
        if why:
            self._gone[member] = why
        return bool(why)

    def declare_gone(self, member: str, why: str) -> None:
        """Say that a process is lost or has left; the first word stands."""
        self.store.compare_set(f"gone/{member}", "", why)

    def await_end(self) -> None:
        """Wait, not for long, until all are at the end: an earlier close fails their collective."""
        assert self.view is not None
        members, deadline = self.view.members, time.monotonic() + self.SILENT_S
        with suppress(RuntimeError):
            self.store.set(f"ended/{self.name}", "ended")
            while not all(self._text(f"ended/{m}") or self.is_gone(m) for m in members):
                if time.monotonic() > deadline:
                    return
                time.sleep(self.LOOK_S)

    def close(self, why: str = "", finished: bool = False) -> None:
        """End the heartbeat and leave, for a reason; `finished`: nobody may join any more."""
        self._ended.set()
        self._thread.join()
        with suppress(RuntimeError):  # the launcher is gone, and the store with it
            if finished:
                self.store.set("finished", "finished")
            self.declare_gone(self.name, why or "has left")

    # ---- composition of views

    def _next(self, view: View, ready: Mapping[str, str]) -> View:
        """The view after one whose living members have stopped, for reasons."""
        stay = [m for m in view.members if ready.get(m, LEAVING) != LEAVING]
        gone = {m: self._gone.get(m, "has left") for m in view.members if m not in stay}
        workers = tuple(view.workers[view.members.index(m)] for m in stay)
        new = View(view.number + 1, tuple(stay), workers, gone=gone)
        planned = LOST not in ready.values()
        joining = self._living_candidates(view) if planned else []
        if (len(stay) + len(joining)) * self._workers >= self._least and (stay or joining):
            return self._admit(new, joining)
        stop = f"{len(new.numbers)} workers are left, and group.min_workers is {self._least}"
        if planned:  # all are still together, those that leave as well
            return View(new.number, view.members, view.workers, (), {}, stop)
        return View(new.number, new.members, new.workers, (), gone, stop)

    def _admit(self, view: View, names: Sequence[str]) -> View:
        """A view with further members, each with the lowest free numbers of workers."""
        workers, taken = list(view.workers), set(view.numbers)
        for _ in names:
            free = [j for j in range(len(taken) + self._workers) if j not in taken]
            workers.append(tuple(free[: self._workers]))
            taken |= set(workers[-1])
        members = (*view.members, *names)
        return View(view.number, members, tuple(workers), (*view.new, *names), view.gone)

    def _publish(self, view: View) -> None:
        """Write a view, unless another process was faster."""
        self.store.compare_set(f"view/{view.number}", "", view.to_json())
        self.store.set("latest", str(view.number))
        for member, why in view.gone.items():  # one that leaves is no candidate meanwhile
            self.declare_gone(member, why)

    def _enter(self, view: View) -> View:
        with self._reading:
            self.view, self._waiting = view, False
        if self.name not in view.members and not self.leaving:
            raise GroupError(self._without())
        return view

    # ---- reading the store

    def _read(self, number: int) -> View | None:
        text = self._text(f"view/{number}")
        return View.from_json(text) if text else None

    def _latest(self, known: View | None = None) -> View | None:
        """The newest view, from a hint or one that is known."""
        number = int(self._text("latest") or 0) if known is None else known.number + 1
        while (found := self._read(number)) is not None:
            known, number = found, number + 1
        return known

    def _stopped(self, view: View) -> dict[str, str]:
        """The members of a view that have stopped for a change, and why."""
        found = {m: self._text(f"ready/{view.number}/{m}") for m in view.members}
        return {m: text for m, text in found.items() if text}

    def _living_candidates(self, view: View | None) -> list[str]:
        """Processes that wait to be admitted, in order of arrival."""
        self._read_candidates()
        present = () if view is None else view.members
        return [c for c in self._candidates if c not in present and not self.is_gone(c)]

    def _place(self, member: str) -> Mapping[str, str]:
        """Host and process of a process that has come."""
        if member not in self._places:
            self._read_candidates()
        return self._places.get(member, {})

    def _read_candidates(self) -> None:
        """Read the processes that have come since the last call."""
        with self._reading:  # a checkpoint is written in a thread of its own
            for n in range(len(self._candidates) + 1, self.store.add("candidates", 0) + 1):
                if not (text := self._text(f"candidate/{n}")):
                    break  # it is about to write it
                place = json.loads(text)
                self._places[place["name"]] = place
                self._candidates.append(place["name"])

    def _text(self, key: str) -> str:
        return read_text(self.store, key)

    def _unwanted(self) -> str:
        """Why this process cannot take part in further views; "" if it can."""
        if self._text("finished"):
            return "the run has finished; another one needs a store of its own"
        return self._without() if self.is_gone(self.name) else ""

    def _without(self) -> str:
        why = self._text(f"gone/{self.name}")
        return f"the others go on without this process, {self.name}: {why}"

    # ---- heartbeat

    def _beat(self) -> None:
        store, beats = self.store.clone(), 0
        store.set_timeout(timedelta(seconds=self.SILENT_S))
        while not self._ended.wait(self.BEAT_S):
            beats += 1
            try:
                store.set(f"alive/{self.name}", str(beats))
                self._observe(store)
            except RuntimeError:  # the store is gone: no change is possible any more
                return

    def _observe(self, store: dist.Store) -> None:
        """Look for candidates, and for heartbeats that have stopped."""
        view, now = self.view, time.monotonic()
        self._read_candidates()
        others = [c for c in self._candidates if c != self.name and not self.is_gone(c)]
        waits = view is not None and any(c not in view.members for c in others)
        with self._reading:  # in another view they may be members
            self._waiting = waits and self.view is view
        for name in others:
            count = store.get(f"alive/{name}").decode()
            before, changed = self._counts.get(name, ("", now))
            self._counts[name] = (count, now if count != before else changed)
            if now - self._counts[name][1] > self.SILENT_S:
                self.declare_gone(name, f"no heartbeat for {self.SILENT_S:g} s")
