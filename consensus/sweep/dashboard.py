"""Dashboard of a sweep: running, completed and failed jobs, and the estimated time left.

It reads the files of the runs, and therefore works alike for local runs and for cluster jobs.
"""

import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from consensus.records import last_row
from consensus.sweep.grid import Job
from consensus.sweep.job import Status

ROWS = 20  # of the live table, at most


class Dashboard:
    """The state of a sweep on standard output, refreshed by a thread. A context manager.

    In a terminal it is a live table, elsewhere one line for each run that ends.
    """

    def __init__(
        self, path: Path, jobs: Sequence[Job], console: Console | None = None, every_s: float = 1.0
    ) -> None:
        self.console = console or Console(soft_wrap=True, highlight=False)
        self.print = partial(self.console.print, markup=False)
        self.path, self.jobs, self.every_s = path, jobs, every_s
        self.statuses = {job.name: Status.read(path / job.name) for job in jobs}
        self.before = self.number("done")
        self._started = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="dashboard", daemon=True)
        self._live: Live | None = None
        if self.console.is_terminal:
            self._live = Live(console=self.console, auto_refresh=False, transient=True)

    def number(self, state: str) -> int:
        """The number of jobs in a state."""
        return sum(status.state == state for status in self.statuses.values())

    def __enter__(self) -> "Dashboard":
        """Start the thread."""
        done = f", {self.before} of them done before" if self.before else ""
        runs = f"{len(self.jobs)} run{'s' if len(self.jobs) != 1 else ''}"
        self.print(f"{runs} in {self.path}{done}")
        if self._live is not None:
            self._live.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Refresh a last time, and print the counts."""
        self._stop.set()
        self._thread.join()
        self.refresh()
        if self._live is not None:
            self._live.stop()
        self.print(self.counts())

    def _follow(self) -> None:
        while not self._stop.wait(self.every_s):
            self.refresh()
            if self._live is not None:
                self._live.update(self.table(), refresh=True)

    def refresh(self) -> None:
        """Read the status files; print a line for each run that has ended."""
        for job in self.jobs:
            old = self.statuses[job.name]
            if old.state == "done":
                continue
            new = self.statuses[job.name] = Status.read(self.path / job.name)
            ended = new.state in ("done", "failed", "stopped")
            if ended and new != old and (old.state == "running" or new.code is not None):
                self.print(self.line(job, new))

    def line(self, job: Job, status: Status) -> str:
        """The line of a run that has ended."""
        line = f"{status.state:>7}  {job.name}  {status.seconds:.0f} s"
        if status.state == "failed":
            return f"{line}  exit code {status.code}: {status.message}"
        last = last_row(self.path / job.name)
        if status.state == "done" and last and last.get("test_error") is not None:
            line += f"  test error {last['test_error']:.2f} %"
        return line

    def counts(self) -> str:
        """One line: the number of jobs in each state, and the estimated time left."""
        states = ("done", "running", "waiting", "stopped", "failed")
        parts = [f"{self.number(state)} {state}" for state in states if self.number(state)]
        left = self.seconds_left()
        return ", ".join(parts) + (f"; about {duration(left)} left" if left else "")

    def seconds_left(self) -> float | None:
        """An estimate from the runs that have ended; None before the first and at the end."""
        ended = self.number("done") - self.before + self.number("failed")
        to_do = len(self.jobs) - self.number("done") - self.number("failed")
        if not ended or not to_do:
            return None
        return (time.monotonic() - self._started) / ended * to_do

    def table(self) -> Table:
        """The running, failed and stopped jobs."""
        table = Table(title=self.counts(), title_justify="left")
        for column in ("state", "run", "iteration", "test error", "seconds", ""):
            table.add_column(column, justify="left" if column in ("state", "run", "") else "right")
        order = {"running": 0, "failed": 1, "stopped": 2}
        shown = [job for job in self.jobs if self.statuses[job.name].state in order]
        shown.sort(key=lambda job: order[self.statuses[job.name].state])
        for job in shown[:ROWS]:
            status, last = self.statuses[job.name], last_row(self.path / job.name)
            error = last.get("test_error") if last else None
            table.add_row(
                status.state,
                job.name,
                f"{last['iteration'] if last else 0:,}",
                "" if error is None else f"{error:.2f}",
                f"{status.seconds:.0f}" if status.seconds else "",
                status.message,
            )
        if len(shown) > ROWS:
            table.caption = f"and {len(shown) - ROWS} more"
        return table


def duration(seconds: float) -> str:
    """A duration as text, such as `3 h 5 min`, `12 min` or `40 s`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
