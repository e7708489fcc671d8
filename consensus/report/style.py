"""The style of all figures of a report: sizes, axes, colours and files.

matplotlib is imported where a figure is made: the import takes most of a second, which the ranks
above 0 do not spend. `Figure` instead of pyplot needs no window system and no global state.
"""

import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from consensus.records import Row, diverged, is_percent, set_and_metric
from consensus.report.table1 import MSGD, PAPER_ORDER, words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

ENDINGS = ("png", "pdf")

Series = Callable[[Row], float]


def new_figure(rows: int, columns: int, width: float, height: float, **options: Any) -> Any:
    """A figure and its array of axes."""
    # Nothing here opens a window, and MPLBACKEND may name a backend that only a notebook has: the
    # first import of matplotlib would fail.
    chosen = os.environ.pop("MPLBACKEND", None)
    try:
        from matplotlib.figure import Figure
    finally:
        if chosen is not None:
            os.environ["MPLBACKEND"] = chosen

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def finish_axis(axis: "Axes", title: str, xlabel: str, log: bool, minor: bool = False) -> None:
    """Set the scale, the title, the label and the grid of an axis."""
    if log:
        axis.set_yscale("log")
    axis.set_title(title, parse_math=False)
    axis.set_xlabel(xlabel)
    axis.grid(alpha=0.3, which="both" if minor else "major")


def name_lines(legend: "Legend", labels: Iterable[str]) -> None:
    """Set the names of the lines of a legend, each of which was drawn with some label."""
    # Set afterwards: matplotlib leaves out labels that begin with `_` and parses those with `$`.
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_parse_math(False)
        text.set_text(printable(label))


def printable(label: str) -> str:
    """A label with escapes in place of the characters that no font draws."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in label)


def save(figure: "Figure", *paths: Path) -> None:
    """Write a figure; the ending of a path selects the format."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # draws a box
        for path in paths:
            figure.savefig(path, dpi=150)


def title_of(column: str) -> str:
    """The title of the panel of a column, with its unit."""
    unit = " (sum)" if set_and_metric(column)[1] == "loss" else " (%)" * is_percent(column)
    return words(column) + unit


def is_logarithmic(column: str) -> bool:
    """Whether the panel of a column has a logarithmic axis, if its numbers are positive."""
    return set_and_metric(column)[1] in ("objective", "loss")


def draw_lines(
    axis: "Axes", runs: Mapping[str, Sequence[Row]], value: Series, spread: Series | None = None
) -> bool:
    """Draw a value of each run, with error bars if it has a spread. Returns whether one is > 0."""
    positive = False
    for rows in runs.values():
        x = [row["iteration"] for row in rows]
        # A number of a diverged run would take the axis of all others to its magnitude.
        y = [math.nan if diverged(row) else value(row) for row in rows]
        positive |= any(height > 0 for height in y)
        (line,) = axis.plot(x, y, ".-", label="run")
        if spread is not None:
            bars = [spread(row) for row in rows]
            axis.errorbar(x, y, yerr=bars, fmt="none", color=line.get_color(), capsize=2)
    return positive


def line_style(name: str, i: int) -> dict[str, str]:
    """The same colour for the same potential in every figure; mSGD is dashed and black.

    A potential that is not in the paper has the style of its place i in the figure.
    """
    if name == MSGD:
        return {"color": "black", "linestyle": "--"}
    if name in PAPER_ORDER:
        return {"color": f"C{PAPER_ORDER.index(name)}", "linestyle": "-"}
    return {"color": f"C{6 + i % 4}", "linestyle": ("-.", ":")[i // 4 % 2]}
