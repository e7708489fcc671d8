"""What a person sees of a run on rank 0: a live line in a terminal, plain lines elsewhere."""

import math
from collections.abc import Iterable
from types import TracebackType
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

from consensus.run.metrics import Row

COLUMNS = (
    "iteration",
    "epoch",
    "objective",
    "train_loss",
    "train_error",
    "test_loss",
    "test_error",
)


class Screen:
    """Progress of a run on standard output. A context manager.

    Args:
        iterations: The length of the run.
        enabled: False on all ranks but 0, which then say nothing.
        console: Where to write; None: standard output.
    """

    def __init__(self, iterations: int, enabled: bool, console: Console | None = None) -> None:
        self.console = console or Console(soft_wrap=True, highlight=False, quiet=not enabled)
        if console is None and not self.console.is_terminal:
            self.console.width = 120  # a log file has no width; do not cut numbers to 80 columns
        self._live: Progress | None = None
        if enabled and self.console.is_terminal:
            self._live = Progress(
                TextColumn("iteration"),
                MofNCompleteColumn(),
                BarColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[news]}"),
                console=self.console,
            )
            self._task = self._live.add_task("train", total=iterations, news="")

    def __enter__(self) -> "Screen":
        """Begin the live line."""
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the live line, so that what follows is not drawn over."""
        if self._live is not None:
            self._live.stop()

    def begin(self, start: int) -> None:
        """The run begins after `start` iterations: those of before do not count for the speed."""
        if self._live is not None:
            self._live.reset(self._task, start=True, completed=start)

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(text, markup=False)

    def advance(self, t: int, loss: float) -> None:
        """After iteration t, with the mean minibatch loss of a worker. Live only."""
        if self._live is not None:
            self._live.update(self._task, completed=t, news=f"minibatch loss {loss:.4g}")

    def evaluation(self, row: Row) -> None:
        """One line for one evaluation; with the step-size cuts so far, where there were any."""
        cuts = f"  cuts {row['cuts_u']}, {row['cuts_z']}" if row["cuts_u"] + row["cuts_z"] else ""
        self.say(
            f"iteration {row['iteration']:>6}  epoch {row['epoch']:6.2f}  "
            f"train loss {row['train_loss']:.5g} error {row['train_error']:.2f} %  "
            f"test loss {row['test_loss']:.5g} error {row['test_error']:.2f} %  "
            f"coupling {row['coupling']:.3g}  {row['samples_per_s']:.0f} samples/s{cuts}"
        )
        if "stationarity" in row:
            found = row["stationarity"]
            self.say(
                f"    stationarity  |sum grad e f_j (u)| {found['envelope_gradient']:.3g} "
                f"± {found['accuracy']:.1g}  (5a) {found['consensus_residual']:.3g}  "
                f"(5b) {largest(found['worker_residual']):.3g}  "
                f"(9) {largest(found['translation_gap']):.3g}  in {found['seconds']:.1f} s"
            )

    def table(self, rows: list[Row], title: str) -> None:
        """The final table: some evaluations from first to last."""
        self.console.print(evaluation_table(rows, title))


def evaluation_table(rows: list[Row], title: str, most: int = 12) -> Table:
    """Evaluations as a table; of more than `most`, evenly chosen ones and the last."""
    table = Table(title=title)
    for column in COLUMNS:
        table.add_column(column.replace("_", " "), justify="right")
    stride = max(1, -(-len(rows) // most))
    chosen = rows[::-1][::stride][::-1]
    for row in chosen:
        table.add_row(*(format_cell(column, row[column]) for column in COLUMNS))
    return table


def format_cell(column: str, value: Any) -> str:
    """A number as its column shows it."""
    if value is None:
        return "overflow"
    if column == "iteration":
        return str(value)
    return f"{value:.2f}" if column in ("epoch", "train_error", "test_error") else f"{value:.5g}"


def largest(values: Iterable[float | None]) -> float:
    """The largest of them; nan if one is no number, which metrics write as null."""
    numbers = [math.nan if value is None else value for value in values]
    return max(numbers, key=lambda number: (math.isnan(number), number))
