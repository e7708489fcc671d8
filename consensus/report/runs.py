"""Reading runs, and the figure and the table of their evaluations, from metrics files alone."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from consensus.records import METRICS, Row, cells, headings, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

PANELS = (
    ("objective", "objective"),
    ("train_loss", "train loss (sum)"),
    ("train_error", "train error (%)"),
    ("test_error", "test error (%)"),
)
MOST_IN_LEGEND = 20  # more names than that would cover the panel


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """The run directories among the paths and, sorted, at any depth below them.

    Nothing is looked for inside a run directory or in `checkpoints`.

    Raises:
        ValueError: If a path neither is nor holds a run.
    """
    runs: list[Path] = []
    for path in paths:
        found = _runs_in(path)
        if not found:
            raise ValueError(f"{path} is no run directory and holds none (no metrics.jsonl)")
        runs += [run for run in found if run not in runs]
    return runs


def is_run(path: Path) -> bool:
    """Whether a path is a run directory."""
    return (path / METRICS).exists()


def _runs_in(path: Path) -> list[Path]:
    if is_run(path):
        return [path]
    if not path.is_dir():
        return []
    # A link counts only if it is a run itself: links to folders may go round in circles.
    inside = [p for p in sorted(path.iterdir()) if p.name != "checkpoints"]
    return [run for p in inside if is_run(p) or not p.is_symlink() for run in _runs_in(p)]


def draw(runs: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Draw objective, train loss and the two errors over iterations, one line a run.

    Args:
        runs: Label -> evaluations.
        path: Of the figure; the ending says which format.
    """
    # Imported where it is used: it takes most of a second that the ranks above 0 need not spend.
    # `Figure` instead of pyplot: no window system, no global state.
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    named, tab20 = len(runs) <= MOST_IN_LEGEND, colormaps["tab20"]
    below = named and (len(runs) > 4 or max(map(len, runs), default=0) > 40)
    figure = Figure(figsize=(10, 7 + (0.1 * len(runs) if below else 0)), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    for axis, (key, title) in zip(axes.flat, PANELS, strict=True):
        if len(runs) > 10:  # matplotlib's own colors begin again after ten
            axis.set_prop_cycle(color=[tab20(i) for i in range(20)])
        for rows in runs.values():
            values = [number(row, key) for row in rows]
            iterations = [row["iteration"] for row in rows]
            axis.plot(iterations, values, marker=".", label="run")
        positive = any(number(row, key) > 0 for rows in runs.values() for row in rows)
        if key in ("objective", "train_loss") and positive:
            axis.set_yscale("log")
        axis.set_title(title)
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("iteration")
    if below:
        lines = axes[0][0].lines
        name_lines(figure.legend(handles=lines, loc="outside lower center", ncols=2), runs)
    elif named:
        name_lines(axes[0][0].legend(), runs)
    write_figure(figure, path)


def name_lines(legend: "Legend", labels: Iterable[str]) -> None:
    """Name the lines of a legend, each of which was drawn with some label, in their order."""
    # Set afterwards: a label that begins with `_` is left out, and one with `$` read as a formula.
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_parse_math(False)
        text.set_text(printable(label))


def printable(label: str) -> str:
    """A label without the characters that no font draws."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in label)


def write_figure(figure: "Figure", path: Path) -> None:
    """Write a figure; the ending of the path says which format."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # draws a box
        figure.savefig(path, dpi=150)


def comparison_table(runs: Mapping[str, Sequence[Row]]) -> Table:
    """The last evaluation of each run."""
    table = Table(title="last evaluation of each run")
    longest = max(map(len, runs), default=0)
    table.add_column("run", overflow="fold", min_width=min(longest, 16))  # names must stay apart
    for column in headings():
        table.add_column(column, justify="right")
    for label, rows in runs.items():
        table.add_row(label, *cells(rows[-1]))
    return table
