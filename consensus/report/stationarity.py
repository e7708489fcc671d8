"""What measurements of stationarity say: a figure, a table, and a sentence for each run."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.table import Table

from consensus.records import Row, largest
from consensus.report.runs import name_lines, write_figure

SAME = 1e-3
"""The part of |u| by which a z_j may differ from u and count as one with it."""

AGREEING = 0.5
"""From here on the f_j pull u the same way, see `agreement`."""

MOST_IN_LEGEND = 10


def measurements(rows: Sequence[Row]) -> list[Row]:
    """The rows of a run at which its stationarity was measured, to the end."""
    return [row for row in rows if row.get("stationarity")]


def measured(runs: Mapping[str, Sequence[Row]]) -> dict[str, list[Row]]:
    """Label -> measurements, of the runs that have some."""
    found = {label: measurements(rows) for label, rows in runs.items()}
    return {label: rows for label, rows in found.items() if rows}


def _largest(key: str) -> Callable[[Row], float]:
    return lambda row: largest(row["stationarity"][key])


def _scalar(key: str) -> Callable[[Row], float]:
    return lambda row: largest([row["stationarity"][key]])


def distance(row: Row) -> float:
    """max_j |u - z_j| / |u|."""
    found = row["stationarity"]
    squares = [
        sum(math.nan if gap is None else gap**2 for gap in gaps) for gaps in found["consensus_gap"]
    ]
    u_norm = _scalar("u_norm")(row)
    return largest(squares) ** 0.5 / u_norm if u_norm != 0.0 else math.nan


def agreement(row: Row) -> float:
    """|sum_j grad e f_j (u)| over the sum of the |grad e f_j (u)|.

    1 where all f_j pull u the same way, 0 where they pull it apart and are in balance.
    """
    found = row["stationarity"]
    total = sum(math.nan if g is None else g for g in found["envelope_gradients"])
    return _scalar("envelope_gradient")(row) / total if total != 0.0 else 1.0


SERIES: tuple[tuple[str, str, Callable[[Row], float]], ...] = (
    ("|sum grad e f_j (u)|", "|sum over j of grad e f_j (u)|", _scalar("envelope_gradient")),
    ("(5a)", "(5a): |sum of the forces|", _scalar("consensus_residual")),
    ("(5b)", "(5b): |grad f_j (z_j) - force|, largest", _largest("worker_residual")),
    ("(9)", "(9): |force - grad e f_j (u)|, largest", _largest("translation_gap")),
    ("force", "|force of a worker|, largest", _largest("force")),
    ("|u - z_j| / |u|", "|u - z_j| / |u|, largest", distance),
)
"""Heading of a column, title of a panel, and what stands there."""


def draw_stationarity(runs: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Draw how the measurements fall, one line a run.

    Args:
        runs: Label -> rows with measurements.
        path: Of the figure; the ending says which format.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True)
    for axis, (_, title, value) in zip(axes.flat, SERIES, strict=True):
        for rows in runs.values():
            x, y = [row["iteration"] for row in rows], [value(row) for row in rows]
            (line,) = axis.plot(x, y, ".-", label="run")
            if axis is axes[0][0]:  # how exactly it is known
                spread = [_scalar("accuracy")(row) for row in rows]
                axis.errorbar(x, y, yerr=spread, fmt="none", color=line.get_color(), capsize=2)
        if any(value(row) > 0 for rows in runs.values() for row in rows):
            axis.set_yscale("log", nonpositive="clip")
        axis.set_title(title, parse_math=False)
        axis.grid(alpha=0.3, which="both")
    for axis in axes[1]:
        axis.set_xlabel("iteration")
    if 1 < len(runs) <= MOST_IN_LEGEND:
        name_lines(axes[0][0].legend(fontsize="small"), runs)
    write_figure(figure, path)


def stationarity_cells(runs: Mapping[str, Sequence[Row]]) -> list[list[str]]:
    """A table whose first row are the headings: the last measurement of each run.

    The envelope gradient also at the first one, since how far it has fallen is what counts.
    """
    (name, _, first), *others = SERIES
    cells = [["run", "iteration", f"{name}: first", "last", "±", *(h for h, _, _ in others)]]
    for label, rows in runs.items():
        last = rows[-1]
        numbers = [first(rows[0]), first(last), _scalar("accuracy")(last)]
        numbers += [value(last) for _, _, value in others]
        cells.append([label, str(last["iteration"]), *(f"{number:.2g}" for number in numbers)])
    return cells


NOT_ON_SCREEN = ("±", "force")  # a screen is narrow, and `verdict` says the first


def stationarity_table(runs: Mapping[str, Sequence[Row]]) -> Table:
    """The same for the screen, without some columns."""
    headings, *rows = stationarity_cells(runs)
    shown = [i for i, heading in enumerate(headings) if heading not in NOT_ON_SCREEN]
    table = Table(title="stationarity: the last measurement of each run")
    table.add_column(headings[0], overflow="fold")
    for i in shown[1:]:
        table.add_column(headings[i], justify="right", min_width=7)
    for row in rows:
        table.add_row(*(row[i] for i in shown))
    return table


def verdict(rows: Sequence[Row]) -> str:
    """Whether the copies become one, as where all f_j are one function (Corollary 5.1).

    That depends on how the f_j pull at u: all the same way, down to nothing, or against each other.
    """
    last = rows[-1]
    apart = f"|u - z_j| is up to {distance(last):.1e} of |u|"
    value = SERIES[0][2]
    fallen = f"|sum grad e f_j (u)| from {value(rows[0]):.2g} to {value(last):.2g}"
    fallen += f" ± {_scalar('accuracy')(last):.1g}"
    if math.isnan(agreement(last)) or math.isnan(distance(last)):
        return f"whether u = z_j is not known, a number is not finite; {fallen}"
    if agreement(last) < AGREEING:
        pull = _largest("envelope_gradients")(last)
        return (
            f"u is not z_j: {apart}, since the f_j pull u apart: |grad e f_j (u)| is up to "
            f"{pull:.2g}; {fallen}"
        )
    if distance(last) <= SAME:
        return f"u = z_j: {apart}, and all f_j pull u the same way; {fallen}"
    return f"u is not z_j yet: {apart}, but all f_j pull u the same way; {fallen}"
