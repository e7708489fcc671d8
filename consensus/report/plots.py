"""All figures of a report.

matplotlib is imported where a figure is made: the import takes most of a second, which the ranks
above 0 do not spend. `Figure` instead of pyplot needs no window system and no global state.
"""

import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from consensus.records import Row, diverged, is_percent, number, set_and_metric
from consensus.report.runs import panels
from consensus.report.stationarity import SERIES, accuracy
from consensus.report.table1 import (
    MSGD,
    PAPER_ORDER,
    Configuration,
    Record,
    of_held_out,
    of_several_methods,
    sensitivity,
    words,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

SPEED = ("epoch", "wall_s")
MOST_IN_LEGEND = 20  # more names would cover the panel
MOST_IN_SMALL_LEGEND = 10
MOST_MARKERS = 30  # a line with more evaluations needs no markers
MOST_TICKS = 10
ENDINGS = ("png", "pdf")

Series = Callable[[Row], float]


def _figure(rows: int, columns: int, width: float, height: float, **options: Any) -> Any:
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


def _style(axis: "Axes", title: str, xlabel: str, log: bool, minor: bool = False) -> None:
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


def _write(figure: "Figure", *paths: Path) -> None:
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


# ---- runs


def draw_convergence(runs: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Draw the columns of `panels` of labelled runs over iterations."""
    named = len(runs) <= MOST_IN_LEGEND
    below = named and (len(runs) > 4 or max(map(len, runs), default=0) > 40)
    shown = panels(runs.values())
    across = -(-len(shown) // 2)
    height = 7 + (0.1 * len(runs) if below else 0)
    figure, axes = _figure(2, across, 5 * across, height, sharex=True)
    from matplotlib import colormaps

    colors = [colormaps["tab20"](i) for i in range(20)]
    for i, (axis, key) in enumerate(zip(axes.flat, shown, strict=False)):
        if len(runs) > 10:  # matplotlib's own colors begin again after ten
            axis.set_prop_cycle(color=colors)
        positive = _draw_lines(axis, runs, partial(number, key=key))
        lowest = i + across >= len(shown)  # of its column
        _style(axis, title_of(key), "iteration" if lowest else "", is_logarithmic(key) and positive)
        axis.tick_params(labelbottom=lowest)
    for axis in axes.flat[len(shown) :]:
        axis.remove()
    if below:
        lines = axes[0][0].lines
        name_lines(figure.legend(handles=lines, loc="outside lower center", ncols=2), runs)
    elif named:
        name_lines(axes[0][0].legend(), runs)
    _write(figure, path)


def draw_stationarity(runs: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Draw the measurements of labelled runs over iterations; each row must have one."""
    figure, axes = _figure(2, 3, 13, 7, sharex=True)
    for axis, (_, title, value) in zip(axes.flat, SERIES, strict=True):
        spread = accuracy if axis is axes[0][0] else None
        positive = _draw_lines(axis, runs, value, spread)
        _style(axis, title, "iteration" if axis in axes[1] else "", log=positive, minor=True)
    if 1 < len(runs) <= MOST_IN_SMALL_LEGEND:
        name_lines(axes[0][0].legend(fontsize="small"), runs)
    _write(figure, path)


def _draw_lines(
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


# ---- Table 1


def draw_table1(records: Sequence[Record], folder: Path) -> dict[str, str]:
    """Draw Figure 1, and the sensitivity if lam or eta varies. Returns PNG -> caption."""
    captions = {}
    several = of_several_methods(records)
    for suffix, title, best in figure1_groups(records):
        name = f"figure1{suffix}"
        column, highest = next(iter(best.values())).criterion
        curves = {
            potential: [run.rows for run in configuration.kept.values()]
            for potential, configuration in best.items()
        }
        draw_figure1(curves, [folder / f"{name}.{ending}" for ending in ENDINGS])
        captions[f"{name}.png"] = (
            f"Figure 1{title}: of each potential the configuration best in final "
            f"{words(column, highest)}{of_held_out(column)}; with several seeds their mean, in a "
            "band of one sample standard deviation"
        )
        if several:
            name = f"methods{suffix}"
            draw_figure1(curves, [folder / f"{name}.{ending}" for ending in ENDINGS], over=SPEED)
            captions[f"{name}.png"] = (
                f"The same runs{title} over the passes of a worker over its data, and over the "
                "seconds of a run, with its evaluations"
            )
    return captions | _draw_sensitivities(records, folder)


def _draw_sensitivities(records: Sequence[Record], folder: Path) -> dict[str, str]:
    """Draw a sensitivity for each column that decides. Returns PNG -> caption."""
    captions = {}
    lines: dict[str, dict[str, dict[float, dict[float, float | None]]]] = {}
    for r in records:
        if r.name != MSGD and (found := sensitivity(r)):
            lines.setdefault(r.column, {})[r.label] = found
    for column, of_label in lines.items():
        places = {(e, lam) for of in of_label.values() for e, lams in of.items() for lam in lams}
        if len(places) > 1:
            name = "sensitivity" + f"_{column}" * (len(lines) > 1)
            draw_sensitivity(of_label, [folder / f"{name}.{e}" for e in ENDINGS], column)
            captions[f"{name}.png"] = (
                f"{words(column).capitalize()} of the last evaluation over lam, one line for each "
                "eta, the best over all other keys; a cross at the top where no run finished "
                "without diverging"
            )
    return captions


def figure1_groups(records: Sequence[Record]) -> list[tuple[str, str, dict[str, Configuration]]]:
    """The contents of each Figure 1: one for each problem and each M, with mSGD in all of them.

    Each is the end of its file name and of its title, empty for a single figure, and potential ->
    the best configuration. A group without a finished run is left out.
    """
    groups: dict[tuple[tuple[str, ...], Any], dict[str, list[Configuration]]] = {}
    for r in records:  # mSGD is the last of its problem
        finished = [c for c in r.configurations if c.kept]
        if r.name != MSGD:
            for c in finished:
                group = groups.setdefault((r.problem, c.config.get("workers")), {})
                group.setdefault(r.name, []).append(c)
        elif finished:
            of_problem = [key for key in groups if key[0] == r.problem]
            for key in of_problem or [(r.problem, None)]:
                groups.setdefault(key, {})[MSGD] = finished
    problems = {problem for problem, _ in groups}
    found = []
    for (problem, m), of_name in sorted(groups.items(), key=lambda g: (g[0][0], g[0][1] or 0)):
        words = list(problem) if len(problems) > 1 else []
        suffix = "".join("_" + re.sub(r"\W+", "-", word) for word in words)
        title = f" ({', '.join(words)})" if words else ""
        if len({other_m for other, other_m in groups if other == problem}) > 1:
            m_text = "unknown" if m is None else str(m)
            suffix, title = f"{suffix}_M{m_text}", f"{title}, M = {m_text}"
        best = {name: min(of, key=Configuration.sort_key) for name, of in of_name.items()}
        found.append((suffix, title, best))
    return found


def draw_figure1(
    curves: Mapping[str, Sequence[Sequence[Row]]],
    paths: Sequence[Path],
    over: Sequence[str] = ("iteration", "epoch"),
) -> None:
    """Figure 1: the columns of `panels`, over two columns of the evaluations.

    A curve is the evaluations of each seed, drawn as their mean, with a band of one sample standard
    deviation around it. The paths select the formats.
    """
    shown = panels(rows for seeds in curves.values() for rows in seeds)
    figure, axes = _figure(2, len(shown), 4 * len(shown), 7)
    for j, key in enumerate(shown):
        for axis, along in zip(axes[:, j], over, strict=True):
            positive = False
            for i, (name, seeds) in enumerate(curves.items()):
                x, mean, std = curve(seeds, along, key)
                positive |= bool((mean[np.isfinite(x)] > 0).any())
                style = line_style(name, i)
                marker = "." if len(x) <= MOST_MARKERS else None
                axis.plot(x, mean, marker=marker, label="run", **style)
                if std is not None:
                    low = mean - std
                    if is_logarithmic(key):  # a band to below 0 ends at the lowest mean instead
                        low = np.where(low > 0, low, np.nanmin(mean))
                    colour = style["color"]
                    axis.fill_between(x, low, mean + std, color=colour, alpha=0.2, linewidth=0)
            label = "seconds" if along == "wall_s" else along
            _style(axis, title_of(key), label, log=is_logarithmic(key) and positive)
    name_lines(axes[0][-1].legend(), curves)
    _write(figure, *paths)


Vector = NDArray[np.float64]


def curve(
    seeds: Sequence[Sequence[Row]], over: str, key: str
) -> tuple[Vector, Vector, Vector | None]:
    """`over`, and mean and sample standard deviation of a column over seeds; None for one seed.

    Each is (T,), at the iterations that all seeds have; nan where a number is not finite.
    """
    by_iteration = [{row["iteration"]: row for row in rows} for rows in seeds]
    common = sorted(set.intersection(*map(set, by_iteration)))
    rows = [[of_seed[t] for t in common] for of_seed in by_iteration]
    x = np.array([number(row, over) for row in rows[0]], dtype=np.float64)
    values = np.array([[number(row, key) for row in of_seed] for of_seed in rows], dtype=np.float64)
    return x, values.mean(0), values.std(0, ddof=1) if len(rows) > 1 else None


def line_style(name: str, i: int) -> dict[str, str]:
    """The same colour for the same potential in every figure; mSGD is dashed and black.

    A potential that is not in the paper has the style of its place i in the figure.
    """
    if name == MSGD:
        return {"color": "black", "linestyle": "--"}
    if name in PAPER_ORDER:
        return {"color": f"C{PAPER_ORDER.index(name)}", "linestyle": "-"}
    return {"color": f"C{6 + i % 4}", "linestyle": ("-.", ":")[i // 4 % 2]}


def draw_sensitivity(
    lines_of: Mapping[str, Mapping[float, Mapping[float, float | None]]],
    paths: Sequence[Path],
    column: str = "test_error",
) -> None:
    """The column that decides over lam, a panel for each potential and a line for each eta.

    None is a cross at the top: no run with this lam finished without diverging.
    """
    across = min(3, len(lines_of))
    down = -(-len(lines_of) // across)
    figure, axes = _figure(down, across, 1.5 + 4 * across, 3.5 * down, sharex=True, sharey=True)
    lams = sorted({lam for lines in lines_of.values() for of in lines.values() for lam in of})
    etas = sorted({eta for lines in lines_of.values() for eta in lines})
    heights = [y for lines in lines_of.values() for of in lines.values() for y in of.values() if y]
    # Outliers would flatten the others.
    log = min(heights, default=0.0) > 0.0 and max(heights) > 10 * min(heights)
    for axis, (name, lines) in zip(axes.flat, lines_of.items(), strict=False):
        for eta, line in lines.items():
            i = etas.index(eta) % 10
            known = {lam: value for lam, value in line.items() if value is not None}
            x, y = list(known), list(known.values())
            axis.plot(x, y, marker="o", color=f"C{i}", label=f"eta = {eta:g}")
            crosses = [lam for lam, value in line.items() if value is None]
            height = [0.97 - 0.05 * i] * len(crosses)  # crosses of several eta stay apart
            top = axis.get_xaxis_transform()
            axis.plot(crosses, height, "x", color=f"C{i}", transform=top)
        axis.set_xscale("log")
        if len(lams) <= MOST_TICKS:  # the values that were tried, and no others
            axis.set_xticks(lams, [f"{lam:g}" for lam in lams])
            axis.minorticks_off()
        axis.tick_params(labelbottom=True)  # the panel below may be absent
        _style(axis, printable(name), "lam", log, minor=True)
        axis.margins(y=0.15)  # room for the crosses
        axis.legend(fontsize="small")
    for axis in axes.flat[len(lines_of) :]:
        axis.remove()
    for axis in axes[:, 0]:
        axis.set_ylabel(title_of(column))
    _write(figure, *paths)
