"""Progress of a run on the screen of rank 0: a live line in a terminal, plain lines elsewhere."""

import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from consensus.records import Row, cells, columns, evaluation_lines, headings, number, text_table
from consensus.run.sinks import MINIBATCH_LOSS, Sink


class Screen(Sink):
    """Progress of a run on standard output, `enabled` on rank 0 alone. A context manager."""

    def __init__(self, iterations: int, enabled: bool, console: Console | None = None) -> None:
        # Lines of text in a notebook too, where rich would make a block of HTML of each.
        how: dict[str, Any] = {"soft_wrap": True, "highlight": False, "force_jupyter": False}
        self.console = console or Console(**how, quiet=not enabled)
        if console is None and not self.console.is_terminal:
            self.console.width = 120  # a log file: 80 columns would fold the tables
        self._live = Progress(
            TextColumn("iteration"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),  # what the others leave
            TextColumn("elapsed"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[news]}"),
            expand=True,
            console=self.console,
            disable=not (enabled and self.console.is_terminal),
        )
        self._task = self._live.add_task("train", total=iterations, news="")

    def __enter__(self) -> "Screen":
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop the live line, so that it does not overwrite later output."""
        if not self._live.disable:
            self._live.stop()

    def begin(self, start: int) -> None:
        """Start the clock at iteration `start`: earlier iterations do not count for the speed."""
        self._live.reset(self._task, start=True, completed=start)

    def say(self, text: str) -> None:
        """Print one line; a terminal that is narrower shows several, which end between words."""
        if self.console.is_terminal and len(text) > self.console.width:
            width = self.console.width  # paths and overrides stay whole
            text = textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)
        self.console.print(text, markup=False)

    def scalars(self, values: Mapping[str, float | None], t: int) -> None:
        """Advance the live line to iteration t, with the minibatch loss."""
        if not self._live.disable:
            loss = number(values, MINIBATCH_LOSS)
            self._live.update(self._task, completed=t, news=f"minibatch loss {loss:.4g}")

    def evaluation(self, row: Row) -> None:
        """Print the line of an evaluation, and one for its stationarity."""
        for line in evaluation_lines(row):
            terminal = self.console.is_terminal  # a log has one line for an evaluation
            for part in _broken(line, self.console.width) if terminal else [line]:
                self.say(part)

    def table(self, rows: Sequence[Row], title: str) -> None:
        """Print the final table: evenly chosen evaluations and the last."""
        self.console.print(evaluation_table(rows, title))


def _broken(line: str, width: int) -> list[str]:
    """A line in parts of at most `width` columns that end where a column ends: two spaces."""
    text = line.lstrip()
    first, *columns = re.split(r"  (?=[^\s\d])", text)
    parts = [line.removesuffix(text) + first]
    for column in columns:
        if len(parts[-1]) + 2 + len(column) <= width:
            parts[-1] += f"  {column}"
        else:
            parts.append(f"    {column}")
    return parts


def evaluation_table(rows: Sequence[Row], title: str, most: int = 12) -> Table:
    """Table of evaluations; of more than `most`, evenly chosen ones and the last."""
    stride = max(1, -(-len(rows) // most))
    chosen = rows[::-1][::stride][::-1]
    shown = columns(rows)
    return text_table(title, [headings(shown), *(cells(row, shown) for row in chosen)])
