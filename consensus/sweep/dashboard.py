"""Dashboard of a sweep: running, completed and failed jobs, and the estimated time left.

It reads the files of the runs, and therefore works alike for local runs and for cluster jobs.
"""

import math
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from consensus.problem.losses import LOSSES
from consensus.records import (
    at_commas,
    diverged,
    format_cell,
    is_percent,
    last_row,
    number,
    set_and_metric,
)
from consensus.report.runs import deciding_column, is_run, read_config
from consensus.report.table1 import heading, words
from consensus.sweep.earlier import Found
from consensus.sweep.grid import Job
from consensus.sweep.halving import Rung
from consensus.sweep.job import Status

ROWS = 20  # of the live table, at most
NAME_WIDTH = 37  # of a run in the table, in which 80 columns suffice for all


class Dashboard:
    """The state of a sweep on standard output, refreshed by a thread. A context manager.

    In a terminal it is a live table, elsewhere one line for each run that ends.
    """

    def __init__(
        self,
        path: Path,
        earlier: Mapping[Job, Found],
        console: Console | None = None,
        every_s: float = 1.0,
    ) -> None:
        self.console = console or Console(soft_wrap=True, highlight=False)
        self.print = partial(self.console.print, markup=False)
        self.path, self.earlier, self.every_s = path, earlier, every_s
        self.statuses = {job.name: self._read(job) for job in earlier}
        self.before = self.number("done")
        self._lasts = {job.name: last_row(path / job.name) for job in earlier}
        self._signs: dict[str, float] = {}
        self._iterations: dict[str, int | None] = {
            j.name: f.iterations for j, f in earlier.items() if f.iterations
        }
        self._rung, self._targets, self._later = "", dict[str, int](), 0
        self._started = time.monotonic()
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._follow, name="dashboard", daemon=True)
        self._live: Live | None = None
        if self.console.is_terminal:
            self._live = Live(console=self.console, auto_refresh=False, transient=True)

    def _read(self, job: Job) -> Status:
        found = self.earlier[job]
        if found.state == "damaged":
            return Status("failed", message=found.problem)
        status = Status.read(self.path / job.name, found.iterations or 0)
        # What is done is known from its config, and not from a status of another machine.
        return Status("done", seconds=status.seconds) if found.state == "done" else status

    def number(self, state: str) -> int:
        """The number of jobs in a state."""
        return sum(status.state == state for status in self.statuses.values())

    def run_dirs(self) -> list[Path]:
        """The directories of the jobs that have begun and can be read."""
        readable = (job.name for job, found in self.earlier.items() if found.state != "damaged")
        return [self.path / name for name in readable if is_run(self.path / name)]

    def damaged(self) -> dict[Path, str]:
        """The directories of the damaged runs, with the reasons."""
        return {self.path / job.name: f.problem for job, f in self.earlier.items() if f.problem}

    def begin_rung(self, rung: str, jobs: Sequence[Job], iterations: int, later: int) -> None:
        """From now on these jobs train to so many iterations, and `later` ones follow in all."""
        self._targets = {job.name: iterations for job in jobs}
        self._rung, self._later = f"{rung}: ", later

    def list_runs(self, stopped: Mapping[Job, Rung]) -> None:
        """Print what there is of each run, for `--dry-run`; `stopped` do not go on after a rung."""
        self.print(self._heading())
        for job, found in self.earlier.items():
            unfinished = found.state in ("new", "continues")
            rung = stopped.get(job) if unfinished else None
            line = f"{'stopped' if rung else found.state:>9}  {job.name}"
            if rung is not None:
                line += f"  after rung {rung.number}, {rung.iterations:,} iterations"
            elif found.state == "continues":
                line += f"  at iteration {found.done:,} of {found.iterations:,} or before"
            self.print(f"{line}  {found.problem}".rstrip())

    def _heading(self) -> str:
        done = f", {self.before} of them done before" if self.before else ""
        return (
            f"{len(self.earlier)} run{'s' if len(self.earlier) != 1 else ''} in {self.path}{done}"
        )

    def __enter__(self) -> "Dashboard":
        """Start the thread."""
        self.print(self._heading())
        for job, found in self.earlier.items():
            if found.problem:
                self.print(f" failed  {job.name}  {found.problem}")
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
        try:
            while not self._stop.wait(self.every_s):
                self.refresh()
                if self._live is not None:
                    self._live.update(self.table(), refresh=True)
        except Exception as error:  # the runs go on
            self.print(f"no dashboard: {error}")

    def refresh(self) -> None:
        """Read the status files; print a line for each run that has ended."""
        with self._lock:
            self._refresh()

    def _refresh(self) -> None:
        for job, found in self.earlier.items():
            old = self.statuses[job.name]
            if old.state == "done" or found.state == "damaged":
                continue
            new = self.statuses[job.name] = self._read(job)
            if new.state == "running" or new != old:
                self._lasts[job.name] = last_row(self.path / job.name)
            told = old.state == "running" or new.code is not None or new.message
            if new.state in ("done", "failed", "stopped") and new != old and told:
                self.print(self.line(job, new))

    def line(self, job: Job, status: Status) -> str:
        """The line of a run that has ended."""
        line = f"{status.state:>7}  {job.name}  {status.seconds:.0f} s"
        if status.state == "failed":
            code = "" if status.code is None else f"exit code {status.code}: "
            return f"{line}  {code}{status.message}"
        found = self._result(job.name)
        return f"{line}  {_shown(*found)}" if found else line

    def _result(self, name: str) -> tuple[str, float] | None:
        """The column that decides which run is the best, and its number at the last evaluation.

        None without a number, or if the run has diverged.
        """
        last = self._lasts[name]
        if last is None or diverged(last):
            return None
        column = deciding_column([last])
        value = number(last, column)
        return (column, value) if math.isfinite(value) else None

    def counts(self) -> str:
        """One line: the number of jobs in each state, and the estimated time left."""
        states = ("done", "running", "waiting", "stopped", "failed")
        parts = [f"{self.number(state)} {state}" for state in states if self.number(state)]
        left = self.seconds_left()
        return self._rung + ", ".join(parts) + (f"; about {duration(left)} left" if left else "")

    def seconds_left(self) -> float | None:
        """An estimate from the iterations done and to do; None before the first and at the end.

        A run that has not started is taken to be as long as the others are on average.
        """
        done = {name: row["iteration"] if row else 0 for name, row in self._lasts.items()}
        for name, row in self._lasts.items():
            if row and name not in self._iterations:
                self._iterations[name] = _iterations_of(self.path / name)
        known = list(filter(None, self._iterations.values()))
        if not known:
            return None
        usual = sum(known) / len(known)
        now = sum(max(0, done[job.name] - found.done) for job, found in self.earlier.items())
        left = self._later + sum(
            max(0, (self._targets.get(name) or self._iterations.get(name) or usual) - done[name])
            for name, status in self.statuses.items()
            if status.state not in ("done", "failed") and name in (self._targets or self.statuses)
        )
        return (time.monotonic() - self._started) / now * left if now and left > 0 else None

    def best(self) -> dict[str, tuple[float, str]]:
        """Of each column that decides, the best number of the last evaluations, and its run."""
        ranked: dict[str, list[tuple[float, str, float]]] = {}
        for name in self.statuses:
            if found := self._result(name):
                column, value = found
                sign = self._signs[name] = self._signs.get(name) or _sign_of(self.path / name)
                if sign:
                    ranked.setdefault(column, []).append((sign * value, name, value))
        best = {column: min(of_column) for column, of_column in ranked.items()}
        return {column: (value, name) for column, (_, name, value) in best.items()}

    def table(self) -> Table:
        """The running, failed and stopped jobs, in 80 columns."""
        title = self.counts()
        for column, (value, name) in self.best().items():
            title += f"\nbest so far: {_shown(column, value)}, {name}"
        found = {name: self._result(name) for name in self.statuses}
        metrics = {set_and_metric(pair[0])[1] for pair in found.values() if pair}
        result = heading(metrics.pop()) if len(metrics) == 1 else "result"
        table = Table(title=escape(title), title_justify="left", box=None, padding=(0, 1))
        table.add_column("state", no_wrap=True)
        table.add_column("run", overflow="fold", max_width=NAME_WIDTH)
        for column in ("iteration", result, "time"):
            table.add_column(column, justify="right", no_wrap=True)
        order = {"running": 0, "failed": 1, "stopped": 2}
        shown = [job for job in self.earlier if self.statuses[job.name].state in order]
        shown.sort(key=lambda job: order[self.statuses[job.name].state])
        for job in shown[:ROWS]:
            status, last = self.statuses[job.name], self._lasts[job.name]
            table.add_row(
                status.state,
                escape("\n".join(filter(None, (at_commas(job.name, NAME_WIDTH), status.message)))),
                f"{last['iteration'] if last else 0:,}",
                format_cell(*pair) if (pair := found[job.name]) else "",
                duration(status.seconds) if status.seconds else "",
            )
        if len(shown) > ROWS:
            table.caption = f"and {len(shown) - ROWS} more"
        return table


def _iterations_of(run_dir: Path) -> int | None:
    """The iterations of a run according to its config.yaml; None if it cannot be read."""
    try:
        return int(read_config(run_dir)["algorithm.iterations"])
    except (ValueError, KeyError):
        return None


def _sign_of(run_dir: Path) -> float:
    """1 if the lowest number in the column that decides is the best, -1 if the highest is.

    0 if the loss is not known. From the config: a run has a summary.json only at its end.
    """
    prefix = "loss.options."
    try:
        config = read_config(run_dir)
        options = {k.removeprefix(prefix): v for k, v in config.items() if k.startswith(prefix)}
        _, goal = LOSSES.make(config.get("loss.name", "cross_entropy"), **options).best
    except Exception:  # a damaged config, or a loss of a plugin that is not there
        return 0.0
    return -1.0 if goal == "max" else 1.0


def _shown(column: str, value: float) -> str:
    """A number with its column and its unit."""
    return f"{words(column)} {format_cell(column, value)}" + " %" * is_percent(column)


def duration(seconds: float) -> str:
    """A duration as text, such as `3 h 5 min`, `12 min` or `40 s`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
