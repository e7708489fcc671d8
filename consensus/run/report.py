"""Figures and tables from metrics files alone."""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from consensus.run.metrics import Row
from consensus.run.progress import COLUMNS, format_cell

PANELS = (
    ("objective", "objective"),
    ("train_loss", "train loss (sum)"),
    ("train_error", "train error (%)"),
    ("test_error", "test error (%)"),
)


def read_metrics(run_dir: Path) -> list[Row]:
    """The evaluations of a run.

    Raises:
        ValueError: If there is no metrics.jsonl, it is empty, or a line of it is damaged.
    """
    path = run_dir / "metrics.jsonl"
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise ValueError(f"{run_dir} holds no readable metrics.jsonl ({error.strerror})") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        missing = [key for key in COLUMNS if not isinstance(row, dict) or key not in row]
        if missing:
            raise ValueError(f"{path}, line {number} lacks {', '.join(missing)}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no evaluation yet")
    return rows


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """The run directories among the paths and directly below them.

    Raises:
        ValueError: If a path neither is nor holds a run.
    """
    runs: list[Path] = []
    for path in paths:
        inside = sorted(metrics.parent for metrics in path.glob("*/metrics.jsonl"))
        found = [path] if (path / "metrics.jsonl").exists() else inside
        if not found:
            raise ValueError(f"{path} is no run directory and holds none (no metrics.jsonl)")
        runs += [run for run in found if run not in runs]
    return runs


def draw(runs: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Draw objective, train loss and the two errors over iterations, one line a run.

    Args:
        runs: Label -> evaluations.
        path: Of the figure; the ending says which format.
    """
    # Imported where it is used: it takes most of a second that the ranks above 0 need not spend.
    # `Figure` instead of pyplot: no window system, no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    for axis, (key, title) in zip(axes.flat, PANELS, strict=True):
        for rows in runs.values():
            values = [float("nan") if row[key] is None else row[key] for row in rows]
            iterations = [row["iteration"] for row in rows]
            axis.plot(iterations, values, marker=".", label="run")
        positive = any((row[key] or 0) > 0 for rows in runs.values() for row in rows)
        if key in ("objective", "train_loss") and positive:
            axis.set_yscale("log")
        axis.set_title(title)
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("iteration")
    # Set afterwards: a label that begins with `_` is left out, and one with `$` read as a formula.
    for text, label in zip(axes[0][0].legend().get_texts(), runs, strict=True):
        text.set_parse_math(False)
        text.set_text("".join(c if c.isprintable() else ascii(c)[1:-1] for c in label))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # draws a box
        figure.savefig(path, dpi=150)


def comparison_table(runs: Mapping[str, Sequence[Row]]) -> Table:
    """The last evaluation of each run."""
    table = Table(title="last evaluation of each run")
    longest = max(map(len, runs), default=0)
    table.add_column("run", overflow="fold", min_width=min(longest, 16))  # names must stay apart
    for column in COLUMNS:
        table.add_column(column.replace("_", " "), justify="right")
    for label, rows in runs.items():
        cells = [format_cell(column, rows[-1][column]) for column in COLUMNS]
        table.add_row(label, *cells)
    return table
