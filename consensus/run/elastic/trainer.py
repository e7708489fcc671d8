"""Training with members that join and leave, without a restart.

Every member is at a position (done, stage): after `done` iterations, before what is due there
(EVENTS: evaluations, checkpoints), or before the next iteration (ITERATION). When a member is lost,
a collective fails on the others, one after another. They agree on the next view, connect, and meet
at the position of the foremost. Members can be apart by one communication only, since the next one
needs all. Whoever is behind takes u from one that has finished it.

A candidate is admitted where line 3 is due. It begins with z_j = u and velocity 0. In each
communication the members add up who wants a change, beside the sum of line 3, so all learn of it in
the same iteration and make it at the next communication.
"""

import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from consensus.algorithm import Consensus
from consensus.comm import Group, Members, Pending
from consensus.records import Row
from consensus.repeatable import RepeatableOracle, RepeatableServer, begin_at_consensus
from consensus.run.build import tau_of
from consensus.run.checkpoint.directory import JoinedDirectory
from consensus.run.checkpoint.manifest import as_hex
from consensus.run.checkpoint.resume import Resumed, remove_incomplete, resume
from consensus.run.diagnosis import Diagnosis
from consensus.run.elastic.log import Change, read_changes, write_changes
from consensus.run.metrics import better
from consensus.run.plan import Plan
from consensus.run.progress import Screen
from consensus.run.signals import TRY_AGAIN, RunStopped, StopSignals
from consensus.run.stationarity import Stationarity
from consensus.run.trainer import Trainer

EVENTS, ITERATION = 0, 1
"""Stages of a position."""


@dataclass(frozen=True)
class Report:
    """Progress of a member that has taken part, for the members of the next view."""

    at: tuple[int, int]  # its position
    finished: int  # the number of communications that it has finished
    rows: int  # the number of evaluations that it has
    owed: bool  # whether it knows of a checkpoint that was lost with a member
    noticed: float  # Unix time at which it stopped
    agreed: float  # Unix time at which it knew the view


@dataclass(frozen=True)
class History:
    """Files and evaluations of the run so far, for a new member; u is apart."""

    run_dir: Path
    rows: list[Row]
    seconds: float  # of training so far
    changes: list[Change]


class ElasticTrainer(Trainer):
    """One run on a member, from view to view; see member.py.

    Args:
        plan: The plan of this member in its first view.
        group: The members of this view, or this process alone where it joins a run.
        members: The agreement of the members.
        signals: The stop signals of this process.
        directory: That of the run which this process joins; None: all members are new.
    """

    def __init__(
        self,
        plan: Plan,
        group: Group,
        members: Members,
        signals: StopSignals,
        directory: JoinedDirectory | None = None,
    ) -> None:
        super().__init__(plan, group, quiet=directory is not None, directory=directory)
        self.members, self.signals = members, signals
        self.at = (0, ITERATION)
        self.changes: list[Change] = []
        self._requested: Pending | None = None  # the number of members that want a change
        self.noticed = self.agreed = time.time()  # of the last change, see `Report`
        self._shows = directory is None and group.rank == 0  # the run, and writes its files
        self._owed = False  # a checkpoint was lost with a member; equal on all members
        self._absent: tuple[int, ...] = ()

    @property
    def server(self) -> RepeatableServer:
        """Line 3."""
        server = self.algorithm.server
        assert isinstance(server, RepeatableServer)
        return server

    @property
    def stop_signal(self) -> int:
        """The signal that asks the whole run to stop: SIGTERM asks this process to leave."""
        received = self.signals.received
        return 0 if received == signal.SIGTERM else received

    @property
    def problem(self) -> str | None:
        """The write error of this rank. A checkpoint that was lost with a member is none."""
        lost = self.writer is None or self.writer.lost
        return self.directory.problem or (None if lost else super().problem)

    def report(self) -> Report:
        """The report to the next view. Waits for the writer."""
        self.finish_writing()
        owed = self._owed or (self.writer is not None and self.writer.lost)
        finished, rows = self.server.finished, len(self.rows)
        return Report(self.at, finished, rows, owed, self.noticed, self.agreed)

    # ---- the first view

    def open(self) -> None:
        """Begin the run, or continue it from a checkpoint, with members that are all new."""
        self.screen.__enter__()
        self.describe()
        self.at = (self.start(), ITERATION)
        self.begin(self.at[0])
        kept: list[Change] = []
        if self.plan.origin.continues and self.group.rank == 0:
            try:
                kept = [c for c in read_changes(self.run_dir) if c.iteration <= self.at[0]]
            except ValueError:
                kept = []  # it was no elastic run before
        self.changes = self.group.share(kept)
        new = [j for own in self.group.gather_objects(self._absent) for j in own]
        self._open_requests()
        self._log(tuple(new if self.at[0] else self.plan.numbers), [self.report()])
        with suppress(RuntimeError):  # a lost store is found out where it is needed
            self.members.store.set("run_dir", str(self.run_dir))  # for others, if all are lost

    def restore(self) -> Resumed:
        """As in `Trainer`; workers that the checkpoint lacks begin at u."""
        where = self.directory, self.algorithm, self.plan.own_numbers
        resumed = resume(*where, self.iterations, self.screen.say, elastic=True)
        self._absent = resumed.absent
        return resumed

    # ---- from one view to the next

    def adopt(self, plan: Plan, group: Group, reports: list[Report | None]) -> None:
        """Go on with the members of another view, where the foremost of them is. A collective."""
        joins = reports[group.rank] is None
        # The last message of a write may have come to some members and not to others.
        self._owed = any(found is not None and found.owed for found in reports)
        self.plan, self.group, self.directory.group = plan, group, group
        known = [(rank, found) for rank, found in enumerate(reports) if found is not None]
        at = max(found.at for _, found in known)
        first = max(known, key=lambda pair: pair[1].finished)
        if any(found is None or found.finished < first[1].finished for found in reports):
            self._take_consensus(first[0], first[1].finished, joins, at[0])
        self._take_history(max(known, key=lambda pair: pair[1].rows)[0], joins)
        self.server.regroup(group)
        assert isinstance(self.algorithm, Consensus)
        self.algorithm.tau = tau_of(self.config, plan.num_workers)
        self._show()
        self.begin(at[0])
        if joins:
            self.server.finished, self.at = first[1].finished, at
        self._catch_up(at)
        self._open_requests()
        if group.rank == 0:  # no member writes a checkpoint any more
            remove_incomplete(self.run_dir)
        self.writer = self.open_writer()
        if self.stationarity is not None:
            self.stationarity = Stationarity(plan, group)
        self.agree()
        numbers, each = plan.numbers, len(plan.own_numbers)
        new = [
            j
            for rank, found in enumerate(reports)
            for j in numbers[rank * each : (rank + 1) * each]
            if found is None
        ]
        self._log(tuple(new), [found for _, found in known])

    def _take_consensus(self, source: int, finished: int, joins: bool, done: int) -> None:
        """Take the state of line 3 from a member that has finished it, where this one lacks it."""
        own = self.server.state_dict()
        sends = self.group.rank == source
        state = {}
        for key, value in own.items():
            copy = torch.empty_like(value, device="cpu")
            state[key] = self.group.broadcast_(copy.copy_(value) if sends else copy, source)
        if joins:
            whole = {key: x.clone() for key, x in self.algorithm.state_dict().items()}
            whole |= {f"server/{key}": value.to(self.plan.device) for key, value in state.items()}
            for k in range(len(self.algorithm.worker.z)):
                begin_at_consensus(whole, k, done)
            self.algorithm.load_state_dict(whole)
        elif self.server.finished < finished:
            self.server.take(lambda: self.server.load_state_dict(state))

    def _take_history(self, source: int, joins: bool) -> None:
        """Take the evaluations that this member lacks, and for a new one the rest as well."""
        seconds = time.perf_counter() - self.started if not joins else 0.0
        own = History(self.run_dir, self.rows, seconds, self.changes)
        history: History = self.group.share(own, source)
        missing = history.rows[len(self.rows) :]
        self.rows, self.changes = history.rows, history.changes
        for row in missing:
            self.best = better(self.best, row, self.plan)
            if self._shows:
                with self.directory.writing():
                    self.sinks.evaluation(row)
        if joins:
            assert isinstance(self.directory, JoinedDirectory)
            self.directory.enter(history.run_dir)
            self.run_dir = self.directory.path
            self.started = time.perf_counter() - history.seconds
        self.diagnosis = Diagnosis(self.plan)
        for row in self.rows:
            self.diagnosis.remarks(row)

    def _show(self) -> None:
        """Show the run and write its files, if this process is the first member now."""
        if self.group.rank > 0 or self._shows:
            return
        self._shows = True
        self.screen = Screen(self.iterations, enabled=True)
        self.screen.__enter__()
        self.screen.begin(self.at[0])
        self.open_sinks(self.rows[-1]["iteration"] if self.rows else 0)

    def _catch_up(self, at: tuple[int, int]) -> None:
        """Come to a position without a collective: `take` has given what line 3 lacks."""
        while self.at < at:
            done, stage = self.at
            if stage == ITERATION:
                self.iterate(done)
            else:
                self.at = (done, ITERATION)

    def _log(self, new: tuple[int, ...], reports: list[Report]) -> None:
        """Add a change to the log, and say so. All members compare u."""
        digest, now = as_hex(self.algorithm.verify()), time.time()
        before = self.changes[-1].workers if self.changes else ()
        view = self.members.view
        assert view is not None
        missing = [j for j in before if j not in self.plan.numbers or j in new]
        why = [text for member, text in view.gone.items()] or ["lost"]
        noticed = min(found.noticed for found in reports)
        agreed = max(found.agreed for found in reports)
        change = Change(
            self.at[0],
            tuple(self.plan.numbers),
            new,
            {str(j): why[min(i, len(why) - 1)] for i, j in enumerate(missing)},
            digest,
            noticed,
            max(0.0, agreed - noticed),
            now - agreed,
        )
        self.changes.append(change)
        if self.group.rank > 0:
            return
        with self.directory.writing():
            write_changes(self.run_dir, self.changes)
        if len(self.changes) > 1:
            self.screen.say(_line(change))

    # ---- iterations

    def train_in_view(self) -> bool:
        """Iterate until the members want a change (False) or the run is complete (True)."""
        while True:
            done, stage = self.at
            if stage == EVENTS:
                self.after(done)
                self.at = (done, ITERATION)
                continue
            if done == self.iterations:
                self.complete(-1)
                return True
            if done % self.config.algorithm.period == 0 and self._change_wanted():
                return False
            self.iterate(done)

    def iterate(self, t: int) -> None:
        """Iteration t and its observation."""
        self.algorithm.step(t)
        oracle = self.algorithm.worker.oracle
        assert isinstance(oracle, RepeatableOracle)
        oracle.release()
        self.health.observe(t, self.algorithm.u, self.algorithm.worker.z)
        self.at = (t + 1, EVENTS)

    def _open_requests(self) -> None:
        """Open the sum of requests for a change, of which none is on its way. A collective."""
        self._request, self._requested = self.group.repeated_sum(1, torch.zeros(1)), None

    def _change_wanted(self) -> bool:
        """Whether a member wanted a change at the last communication; begins to ask again."""
        if self._requested is not None and float(self._requested.wait()[0]) > 0:
            self._requested = None
            return True
        self.members.leaving = self.signals.received == signal.SIGTERM
        lost = self.writer is not None and self.writer.lost  # another view opens another
        self._request.message.fill_(float(self.members.requests_change or lost))
        self._requested = self._request.start()
        return False

    def after(self, done: int) -> None:
        """As in `Trainer`, and a checkpoint that was lost with a member."""
        super().after(done)
        if self._owed and self.writer is not None:
            self._owed = False
            if not self.is_due(self.config.output.checkpoint_every, done):
                self.save(done)

    def evaluate(self, done: int, analyse: bool) -> None:
        """As in `Trainer`, unless the others have the evaluation already."""
        if not self.rows or self.rows[-1]["iteration"] < done:
            super().evaluate(done, analyse)

    def command(self) -> str:
        """The command that starts as many members, without its arguments."""
        return f"python -m consensus.elastic --processes {self.group.size}"

    def end(self, why: str) -> None:
        """Stop the run here, with a checkpoint, and raise RunStopped."""
        done = self.at[0]
        if self.writer is None:
            raise RunStopped(f"stopped at iteration {done} without a checkpoint: {why}", 1)
        self.save(done)
        self.finish_writing()
        self.agree()
        raise RunStopped(f"stopped at iteration {done} with a checkpoint: {why}", TRY_AGAIN)


def _line(change: Change) -> str:
    """A line about a change."""
    names = ", ".join(map(str, change.workers))
    parts = [f"worker {j} is gone ({why})" for j, why in change.gone.items()]
    parts += [f"worker {j} has joined" for j in change.new]
    times = f"agreed in {change.agree_s:.2f} s, went on after {change.heal_s:.2f} s more"
    count = len(change.workers)
    what = "; ".join(parts) or "the same workers"
    return f"iteration {change.iteration:,}: {what}; {count} workers ({names}), {times}"
