"""What measurements of stationarity say: a figure, a table, and a sentence for each run."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from rich.table import Table

from consensus.run.metrics import Row
from consensus.run.report import name_lines, write_figure

SAME = 1e-3
"""The part of |u| by which a z_j may differ from u and count as one with it."""

MOST_IN_LEGEND = 12


def measurements(rows: Sequence[Row]) -> list[Row]:
    """The rows of a run at which its stationarity was measured, to the end."""
    return [row for row in rows if row.get("stationarity")]


def measured(runs: Mapping[str, Sequence[Row]]) -> dict[str, list[Row]]:
    """Label -> measurements, of the runs that have some."""
    found = {label: measurements(rows) for label, rows in runs.items()}
    return {label: rows for label, rows in found.items() if rows}


def _largest(key: str) -> Callable[[Row], float]:
    return lambda row: _max(map(_number, row["stationarity"][key]))


def _scalar(key: str) -> Callable[[Row], float]:
    return lambda row: _number(row["stationarity"][key])


def _number(value: float | None) -> float:
    return float("nan") if value is None else value  # JSON has no inf


def _max(values: Iterable[float]) -> float:
    return max(values, key=lambda value: (math.isnan(value), value))  # as `max` alone does not


def distance(row: Row) -> float:
    """max_j |u - z_j| / |u|."""
    found = row["stationarity"]
    squares = [sum(_number(gap) ** 2 for gap in worker) for worker in found["consensus_gap"]]
    u_norm = _number(found["u_norm"])
    return _max(squares) ** 0.5 / u_norm if u_norm != 0.0 else float("nan")


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
            axis.plot(
                [row["iteration"] for row in rows], [value(row) for row in rows], ".-", label="run"
            )
        if any(value(row) > 0 for rows in runs.values() for row in rows):
            axis.set_yscale("log")
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
    (first_heading, _, first), *others = SERIES
    cells = [["run", "iteration", f"{first_heading}: first", "last", *(h for h, _, _ in others)]]
    for label, rows in runs.items():
        numbers = [first(rows[0]), first(rows[-1]), *(value(rows[-1]) for _, _, value in others)]
        cells.append([label, str(rows[-1]["iteration"]), *(f"{number:.3g}" for number in numbers)])
    return cells


def stationarity_table(runs: Mapping[str, Sequence[Row]]) -> Table:
    """The same for the screen."""
    headings, *rows = stationarity_cells(runs)
    table = Table(title="stationarity: the last measurement of each run")
    table.add_column(headings[0], overflow="fold")
    for heading in headings[1:]:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def verdict(rows: Sequence[Row]) -> str:
    """Whether the copies have become one, as where all f_j are one function (Corollary 5.1).

    Else forces hold them apart, and u is stationary where those balance.
    """
    last = rows[-1]
    apart, force = distance(last), _largest("force")(last)
    fallen = f"|sum grad e f_j (u)| from {SERIES[0][2](rows[0]):.2g} to {SERIES[0][2](last):.2g}"
    if apart <= SAME:
        return f"u = z_j: |u - z_j| is at most {apart:.1e} of |u|; {fallen}"
    balance = _scalar("consensus_residual")(last)
    return (
        f"u is not z_j: |u - z_j| is up to {apart:.1e} of |u|, by forces of up to {force:.2g} "
        f"whose sum is {balance:.2g}; {fallen}"
    )
