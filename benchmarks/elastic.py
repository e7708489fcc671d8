"""Membership changes in one elastic run: kills, clean leaves, joins, several at once.

Started as `scripts/bench elastic`. Processes of one run of Algorithm 1 (deterministic, one worker
each) are killed by SIGKILL, asked to leave by SIGTERM, and added, at random moments, between
LEAST and MOST of them. After each change all members have compared the digests of u. Reported are,
from the membership log, the seconds

    detect   from a SIGKILL to the first member that has noticed it
    agree    until all living members know who takes part
    heal     until they are connected, have the same u and go on

and the test error at the end beside undisturbed runs of 2, 4 and 6 workers. The replay of the run
on one process has the same u at every evaluation, or the benchmark fails.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from benchmarks import harness
from consensus.comm.rendezvous import connect, serve
from consensus.run.elastic.log import MEMBERSHIP, Change, read_changes

LEAST, MOST, FIRST = 2, 6, 3
PATIENCE_S = 120.0  # for a change; a benchmark that waits longer reports a hang
KINDS = (
    *("kill", "kill the first", "leave", "leave the first", "join", "join"),
    *("kill two", "kill and join", "leave and join", "join two", "kill while one joins"),
)


CONTEXT = multiprocessing.get_context("forkserver")  # imports torch once, not in each process


def be_member(environment: dict[str, str], overrides: list[str]) -> None:
    """Be a process of the run, without its output."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.environ |= environment
    sys.argv = ["consensus.train", "group.elastic=true", *overrides]
    importlib.import_module("consensus.train").main()


@dataclass
class Event:
    """A disturbance of the run, and the changes that followed."""

    kind: str
    changes: list[Change] = field(default_factory=list)  # that followed
    detect_s: float | None = None


class Run:
    """An elastic run and its processes.

    Args:
        folder: Of the run.
        overrides: Of consensus.train.
    """

    def __init__(self, folder: Path, overrides: Sequence[str]) -> None:
        self.folder, self.overrides = folder, [*overrides, f"output.run_dir={folder}"]
        self._server, self.port = serve(0, "127.0.0.1")
        self.store = connect("127.0.0.1", self.port, "", timedelta(seconds=60))
        self.processes: dict[str, BaseProcess] = {}  # that have not ended, by name
        self.codes: Counter[int] = Counter()

    def start(self) -> str:
        """Start a process; returns its name as a member."""
        name = uuid.uuid4().hex[:12]
        environment = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.port),
            "CONSENSUS_MEMBER": name,
            "CONSENSUS_MEMBERS": str(FIRST),
        }
        process = CONTEXT.Process(target=be_member, args=(environment, self.overrides), daemon=True)
        process.start()
        self.processes[name] = process
        return name

    def reap(self) -> None:
        """Tell the others of ended processes, as the launcher does."""
        for name, process in list(self.processes.items()):
            if (code := process.exitcode) is not None:
                del self.processes[name]
                self.codes[code] += 1
                self.store.compare_set(f"gone/{name}", "", f"exit code {code}")

    def changes(self) -> list[Change]:
        """The membership log so far."""
        return read_changes(self.folder) if (self.folder / MEMBERSHIP).exists() else []

    def members(self) -> list[str]:
        """The living members of the newest view, by rank."""
        self.reap()
        number = int(self.store.get("latest").decode())
        view = json.loads(self.store.get(f"view/{number}"))
        return [name for name in view["members"] if name in self.processes]

    def finished(self) -> bool:
        """Whether all processes have ended."""
        self.reap()
        return not self.processes

    def await_members(self, count: int, seen: int) -> list[Change]:
        """Wait for changes after which `count` workers take part; returns those since `seen`."""
        deadline = time.monotonic() + PATIENCE_S
        while not self.finished():
            found = self.changes()
            if len(found) > seen and len(found[-1].workers) == count:
                return found[seen:]
            if time.monotonic() > deadline:
                sizes = [len(change.workers) for change in found[seen:]]
                raise SystemExit(f"no change to {count} workers in {PATIENCE_S:g} s, but {sizes}")
            time.sleep(0.02)
        return self.changes()[seen:]


def act(run: Run, kind: str, seen: int, rng: random.Random) -> Event | None:
    """Do one thing to the run and wait for the change; None if there are too few or too many."""
    members = run.members()
    lost = 2 if kind == "kill two" else int(kind.startswith(("kill", "leave")))
    new = 2 if kind == "join two" else int("join" in kind)
    after = len(members) - lost + new
    if not LEAST <= after <= MOST or len(members) - lost < 1 or len(members) + new > MOST + 1:
        return None
    event = Event(kind)
    if kind == "kill while one joins":
        run.start()
        time.sleep(rng.uniform(0.0, 2.0))  # its plan, or its admission
        members = run.members()
    victims = members[:1] if "first" in kind else rng.sample(members, lost)
    number = signal.SIGTERM if kind.startswith("leave") else signal.SIGKILL
    killed = time.time()
    for name in victims:
        with suppress(ProcessLookupError):
            os.kill(run.processes[name].pid or 0, number)
    if new and kind != "kill while one joins":
        for _ in range(new):
            run.start()
    event.changes = run.await_members(after, seen)
    noticed = [change.noticed for change in event.changes if change.gone]
    if number == signal.SIGKILL and lost and noticed:
        event.detect_s = max(0.0, noticed[0] - killed)
    return event


def disturb(run: Run, wanted: int, pace_s: float, rng: random.Random) -> list[Event]:
    """Change the members until there were `wanted` changes or the run is complete."""
    for _ in range(FIRST):
        run.start()
    seen, events = len(run.await_members(FIRST, 0)), []
    while seen <= wanted and not run.finished():
        time.sleep(rng.uniform(0.0, 2 * pace_s))
        if (event := act(run, rng.choice(KINDS), seen, rng)) is not None:
            events.append(event)
            seen += len(event.changes)
    while not run.finished():
        time.sleep(0.1)
    return events


def train(folder: Path, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """The evaluations of an undisturbed run in one process."""
    command = [sys.executable, "-m", "consensus.train", *overrides, f"output.run_dir={folder}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    return rows_of(folder)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The evaluations of a run."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def compare(folder: Path, work: Path) -> None:
    """Replay a run; SystemExit unless u is the same at every evaluation."""
    again = train(work / "replay", [f"group.replay={folder}"])
    here = [(row["iteration"], row["digest"]) for row in rows_of(folder)]
    there = [(row["iteration"], row["digest"]) for row in again]
    if here != there:
        wrong = [t for (t, a), (_, b) in zip(here, there, strict=False) if a != b]
        raise SystemExit(f"the replay has another u at iterations {wrong}")
    print(f"replay: u has the same bits at all {len(here)} evaluations")


def print_times(events: Sequence[Event]) -> list[dict[str, Any]]:
    """A table of seconds for each kind of event; returns its rows."""
    rows = []
    for kind in dict.fromkeys(KINDS):
        own = [event for event in events if event.kind == kind]
        changes = [change for event in own for change in event.changes]
        if not changes:
            continue
        detect = [event.detect_s for event in own if event.detect_s is not None]
        columns = detect, [c.agree_s for c in changes], [c.heal_s for c in changes]
        rows.append((kind, len(own), len(changes), *(spread(values) for values in columns)))
    heads = {"event": "<", "events": ">", "changes": ">", "detect s": ">", "agree s": ">"}
    print(harness.table({**heads, "heal s": ">"}, rows))
    return [dict(zip((*heads, "heal s"), row, strict=True)) for row in rows]


def spread(values: Sequence[float]) -> str:
    """Median, and the largest."""
    return f"{statistics.median(values):.2f} ({max(values):.2f})" if values else ""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, disturb, compare, print, write."""
    CONTEXT.set_forkserver_preload(["consensus.train"])
    parser = harness.parser("elastic", quick="five changes, 400 iterations of digits")
    parser.add_argument("--changes", type=int, default=100)
    parser.add_argument("--pace", type=float, default=1.0, help="mean seconds between two events")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--undisturbed", type=int, nargs="*", default=[2, 4, 6], metavar="M")
    parser.add_argument("overrides", nargs="*", help="of consensus.train")
    options = parser.parse_args(arguments)
    measure(options)


def measure(options: argparse.Namespace) -> None:
    """The whole benchmark."""
    given = ["deterministic=true", *options.overrides]
    if options.quick:
        options.changes, options.undisturbed = 5, []
        given += ["experiment=smoke", "algorithm.iterations=1500", "output.eval_every=100"]
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        run = Run(work / "run", given)
        try:
            events = disturb(run, options.changes, options.pace, random.Random(options.seed))
        finally:
            for process in run.processes.values():
                process.kill()
        rows, changes = rows_of(work / "run"), run.changes()
        count, last = len(changes) - 1, rows[-1]
        print(f"{count} changes in {last['iteration']:,} iterations; exit codes {dict(run.codes)}")
        table = print_times(events)
        compare(work / "run", work)
        errors = {f"disturbed, {LEAST} to {MOST}": last["test_error"]}
        for workers in options.undisturbed:
            undisturbed = train(work / str(workers), [*given, f"workers={workers}"])
            errors[f"{workers} workers"] = undisturbed[-1]["test_error"]
        for label, error in errors.items():
            print(f"test error of u, {label}: {error:.2f} %")
    content = {"environment": harness.environment(), "changes": count, "table": table}
    harness.write_json(options.json, {**content, "errors": errors})


if __name__ == "__main__":
    main()
