"""What a person sees of a sweep: which runs go on, which are done, which failed, and how long yet.

It reads the files of the runs, so it is the same whoever runs them, here or on a cluster.
"""

import threading
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from consensus.records import last_row
from consensus.sweep.grid import Cell
from consensus.sweep.job import Status

ROWS = 20
"""Of the live table: what goes on and what was last."""


class Board:
    """The state of a sweep on standard output, followed in a thread. A context manager.

    In a terminal it is a live table, elsewhere a line for each run that ends.

    Args:
        path: The directory of the sweep.
        cells: Its runs.
        console: Where to write; None: standard output.
        every_s: Between two looks at the files.
    """

    def __init__(
        self,
        path: Path,
        cells: Sequence[Cell],
        console: Console | None = None,
        every_s: float = 1.0,
    ) -> None:
        self.console = console or Console(soft_wrap=True, highlight=False)
        self.path, self.cells, self.every_s = path, cells, every_s
        self.statuses = {cell.name: Status.read(path / cell.name) for cell in cells}
        self.before = self.number("done")
        self._started = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="board", daemon=True)
        self._live: Live | None = None
        if self.console.is_terminal:
            self._live = Live(console=self.console, auto_refresh=False, transient=True)

    def number(self, state: str) -> int:
        """How many runs are in a state."""
        return sum(status.state == state for status in self.statuses.values())

    def __enter__(self) -> "Board":
        """Begin to look."""
        done = f", {self.before} of them done before" if self.before else ""
        runs = f"{len(self.cells)} run{'s' if len(self.cells) != 1 else ''}"
        self.say(f"{runs} in {self.path}{done}")
        if self._live is not None:
            self._live.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Look a last time, and print what there is."""
        self._over.set()
        self._thread.join()
        self.look()
        if self._live is not None:
            self._live.stop()
        self.console.print(self.counts(), markup=False)

    def say(self, line: str) -> None:
        """Print a line."""
        self.console.print(line, markup=False)

    def _follow(self) -> None:
        while not self._over.wait(self.every_s):
            self.look()
            if self._live is not None:
                self._live.update(self.table(), refresh=True)

    def look(self) -> None:
        """Read what has changed; tell of runs that have ended."""
        for cell in self.cells:
            old = self.statuses[cell.name]
            if old.state == "done":
                continue
            new = self.statuses[cell.name] = Status.read(self.path / cell.name)
            ended = new.state in ("done", "failed", "stopped")
            if ended and new != old and (old.state == "running" or new.code is not None):
                self.say(self.ended(cell, new))

    def ended(self, cell: Cell, status: Status) -> str:
        """A line of a run that has ended."""
        line = f"{status.state:>7}  {cell.name}  {status.seconds:.0f} s"
        if status.state == "failed":
            return f"{line}  exit code {status.code}: {status.message}"
        last = last_row(self.path / cell.name)
        if status.state == "done" and last and last.get("test_error") is not None:
            line += f"  test error {last['test_error']:.2f} %"
        return line

    def counts(self) -> str:
        """One line: how many runs are in which state, and the time left."""
        states = ("done", "running", "waiting", "stopped", "failed")
        parts = [f"{self.number(s)} {s}" for s in states if self.number(s)]
        left = self.seconds_left()
        return ", ".join(parts) + (f"; about {duration(left)} left" if left else "")

    def seconds_left(self) -> float | None:
        """From the runs that have ended; None before the first, and at the end."""
        ended = self.number("done") - self.before + self.number("failed")
        to_do = len(self.cells) - self.number("done") - self.number("failed")
        if not ended or not to_do:
            return None
        return (time.monotonic() - self._started) / ended * to_do

    def table(self) -> Table:
        """What goes on, and what failed."""
        table = Table(title=self.counts(), title_justify="left")
        for column in ("state", "run", "iteration", "test error", "seconds", ""):
            table.add_column(column, justify="left" if column in ("state", "run", "") else "right")
        order = {"running": 0, "failed": 1, "stopped": 2}
        shown = [c for c in self.cells if self.statuses[c.name].state in order]
        shown.sort(key=lambda cell: order[self.statuses[cell.name].state])
        for cell in shown[:ROWS]:
            status, last = self.statuses[cell.name], last_row(self.path / cell.name)
            error = last.get("test_error") if last else None
            table.add_row(
                status.state,
                cell.name,
                f"{last['iteration'] if last else 0:,}",
                "" if error is None else f"{error:.2f}",
                f"{status.seconds:.0f}" if status.seconds else "",
                status.message,
            )
        if len(shown) > ROWS:
            table.caption = f"and {len(shown) - ROWS} more"
        return table


def duration(seconds: float) -> str:
    """`3 h 5 min`, `12 min`, `40 s`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
