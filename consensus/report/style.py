"""The style of all figures: sizes, colours, dashes, axes and files.

matplotlib is imported where a figure is made: the import takes most of a second, which the ranks
above 0 do not spend. `Figure` instead of pyplot needs no window system.
"""

import math
import os
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from consensus.records import is_percent, set_and_metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

WIDTH = 5.5  # inches: the text width of a page, or half a page on a screen
PANEL = 1.75  # inches: the height of a panel
ACROSS = 2  # panels in a row
MOST_MARKERS = 15  # on a line
NARROW = 5.0  # a range of numbers below this factor has a linear axis

_RC: Any = {
    "font.size": 8.0,
    "axes.titlesize": 8.0,
    "axes.labelsize": 8.0,
    "legend.fontsize": 7.0,
    "figure.labelsize": 8.0,
    "figure.titlesize": 8.0,
    "xtick.labelsize": 7.0,
    "ytick.labelsize": 7.0,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.0,
    "errorbar.capsize": 2.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.handlelength": 2.8,  # so that a whole period of each dash is seen
    "pdf.fonttype": 42,  # TrueType: journals refuse type 3
    "axes.formatter.useoffset": False,
}

# Okabe and Ito (2008), without their yellow, which is too light for a line.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILLION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
COLOURS = (BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY, BLACK)
DASHES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", ">", "<")
Style = dict[str, Any]
"""Keyword arguments of `Axes.plot`."""

FAINT: Style = {"color": "0.6", "linewidth": 0.5, "alpha": 0.6}
"""The style of lines that only show a range."""


def _style(color: str, linestyle: str, marker: str) -> Style:
    return {"color": color, "linestyle": linestyle, "marker": marker}


STYLES: Mapping[str, Style] = {
    "quad": _style(BLUE, "-", "o"),
    "cubic": _style(ORANGE, "--", "s"),
    "tan": _style(GREEN, "-.", "^"),
    "tan_sep": _style(SKY, ":", "v"),
    "log": _style(VERMILLION, "--", "D"),
    "log_sep": _style(PURPLE, "-.", "P"),
    "power": _style(BLUE, ":", "X"),
    "pseudo_huber": _style(ORANGE, "-.", ">"),
    "huber": _style(VERMILLION, ":", "X"),
    "log_cosh": _style(GREEN, ":", "<"),
    "scaled_quad": _style(SKY, "--", "s"),
    "EASGD": _style(PURPLE, "-", "s"),
    "local SGD": _style(VERMILLION, "-", "^"),
    "FedProx": _style(GREEN, "-", "D"),
    "Lookahead": _style(ORANGE, "-", "v"),
    "DiLoCo": _style(SKY, "-", "P"),
    "DDP": _style(BLACK, "-", "X"),
    "mSGD": _style(BLACK, "--", ">"),
}
"""The colour, dash and marker of a potential or a method in every figure."""

SETS: Mapping[str, Style] = {
    "objective": _style(BLACK, ":", "D"),
    "train": _style(BLUE, "-", "o"),
    "validation": _style(GREEN, "-.", "^"),
    "test": _style(VERMILLION, "--", "s"),
}
"""The style of the objective, and of a set of samples, in the figure of one run."""


def series_style(i: int) -> Style:
    """The style of the i-th line of a figure whose lines have no style of their own.

    The first 28 differ in colour or dash.
    """
    return _style(COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)], MARKERS[i % len(MARKERS)])


_TAKEN = {(style["color"], style["linestyle"]) for style in STYLES.values()}
_FREE = [s for s in map(series_style, range(28)) if (s["color"], s["linestyle"]) not in _TAKEN]


def styles(names: Iterable[str]) -> dict[str, Style]:
    """The style of each potential or method.

    A name that is not in `STYLES` has one that depends on the name, in every figure the same unless
    two such names coincide.
    """
    found: dict[str, Style] = {}
    for name in names:
        first = zlib.crc32(name.encode())
        places = [_FREE[(first + i) % len(_FREE)] for i in range(len(_FREE))]
        free = [style for style in places if style not in found.values()]
        found[name] = STYLES.get(name) or (free or places)[0]
    return found


@contextmanager
def house_style() -> Iterator[None]:
    """The settings of matplotlib in which a figure is made and written. Also a decorator."""
    # Nothing here opens a window, and MPLBACKEND may name a backend that only a notebook has: the
    # first import of matplotlib would fail.
    chosen = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib.figure
    finally:
        if chosen is not None:
            os.environ["MPLBACKEND"] = chosen
    with matplotlib.rc_context(_RC):
        yield


def new_figure(
    rows: int, columns: int, height: float | None = None, **options: Any
) -> tuple["Figure", Any]:
    """A figure of the width of a column of text, and its array of axes (rows, columns)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height or PANEL * rows + 0.4), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def panel_grid(count: int, **options: Any) -> tuple["Figure", list["Axes"]]:
    """A figure and its panels, two in a row; the last panel of each column comes last."""
    across = min(ACROSS, count)
    figure, axes = new_figure(-(-count // across), across, **options)
    for axis in axes.flat[count:]:
        axis.remove()
    return figure, list(axes.flat[:count])


def save(figure: "Figure", path: Path) -> None:
    """Write a figure to the path, whose ending selects the format, and as PDF beside it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # draws a box
        for each in dict.fromkeys((path, path.with_suffix(".pdf"))):
            # The time of writing is left out: the same runs give the same file.
            bare: Any = {"metadata": {"CreationDate": None}} if each.suffix == ".pdf" else {}
            figure.savefig(each, dpi=200, **bare)


# ---- axes


def axis_label(column: str) -> str:
    """The label of an axis over a column, with its unit."""
    metric = set_and_metric(column)[1]
    of_time = {"iteration": "iteration", "epoch": "epochs of a worker", "wall_s": "wall time (s)"}
    if column in of_time:
        return of_time[column]
    unit = "%" if is_percent(column) else "sum" if metric in ("objective", "loss") else "mean"
    return f"{column.replace('_', ' ')} ({unit})"


def is_logarithmic(column: str) -> bool:
    """Whether the panel of a column has a logarithmic axis, if its numbers are positive."""
    return set_and_metric(column)[1] in ("objective", "loss", "error")


def fit_axis(
    axes: "Axes", values: Iterable[float], log: bool, clip: bool = False, along: str = "y"
) -> None:
    """Choose the scale, the ends and the ticks of an axis for numbers on it.

    It is logarithmic if `log`, and the numbers are positive and span a factor of `NARROW`. Numbers
    that are 0 have an axis that begins there. `clip` ends the axis at the numbers, whatever else is
    drawn.
    """
    found = [value for value in values if math.isfinite(value)]
    if not found:
        return
    low, high = min(found), max(found)
    axis = axes.yaxis if along == "y" else axes.xaxis
    set_limits: Any = axes.set_ylim if along == "y" else axes.set_xlim
    if log and low > 0.0 and high >= NARROW * low:
        (axes.set_yscale if along == "y" else axes.set_xscale)("log")
        _log_ticks(axis, high / low)
        if clip:
            set_limits(low / (high / low) ** 0.05, high * (high / low) ** 0.05)
        return
    margin = 0.05 * (high - low)
    if low == high == 0.0:
        set_limits(0.0, 1.0)
    elif clip and low < high:
        set_limits(low - margin, high + margin)
    if along == "y" and 0.0 <= low < 0.5 * high:
        set_limits(0.0)


def _log_ticks(axis: "Axis", ratio: float) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    subs = (1.0,) if ratio > 1e3 else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: power(value)))
    axis.set_minor_locator(NullLocator())


def power(value: float) -> str:
    """A number at a logarithmic axis: 0.05, 200, and a power of ten where it has many digits."""
    if value <= 0.0 or 1e-3 <= value < 1e5:
        return f"{value:g}"
    exponent = math.floor(math.log10(value) + 1e-9)
    digit = value / 10.0**exponent
    of = "" if math.isclose(digit, 1.0) else rf"{digit:g}\cdot"
    return f"${of}10^{{{exponent}}}$"


# ---- legends


def name_lines(legend: "Legend", labels: Iterable[str]) -> None:
    """Set the names of the lines of a legend, each of which was drawn with some label."""
    # Set afterwards: matplotlib leaves out labels that begin with `_` and parses those with `$`.
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_parse_math(False)
        text.set_text(printable(label))


def legend_below(figure: "Figure", lines: Sequence[Any], labels: Sequence[str]) -> None:
    """A legend below all panels, in as many columns as the longest name leaves."""
    longest = max(map(len, labels), default=0)
    columns = max(1, min(len(labels), 4, 90 // (longest + 8)))
    legend = figure.legend(lines, ["line"] * len(lines), loc="outside lower center", ncols=columns)
    name_lines(legend, [label if len(label) <= 80 else f"{label[:79]}…" for label in labels])


def key_of(style: Style) -> Any:
    """A line for a legend, which is drawn nowhere else."""
    from matplotlib.lines import Line2D

    return Line2D([], [], **style)


def printable(label: str) -> str:
    """A label with escapes in place of the characters that no font draws."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in label)
