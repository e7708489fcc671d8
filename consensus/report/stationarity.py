"""Measurements of stationarity: the numbers of a run, their table, a verdict, and a figure."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from consensus.records import (
    Row,
    diverged,
    has_converged,
    largest,
    number,
    text_table,
    to_accuracy,
)
from consensus.report.style import (
    FAINT,
    fit_axis,
    house_style,
    legend_below,
    panel_grid,
    save,
    series_style,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SAME = 1e-3  # largest |u - z_j| / |u| at which z_j counts as equal to u
AGREEING = 0.5  # least `agreement` at which the f_j count as pulling u the same way
MOST_NAMED = 8  # runs in a figure
NOT_ON_SCREEN = ("accuracy", "force")  # the screen is narrow; `verdict` contains the first


def measurements(rows: Sequence[Row]) -> list[Row]:
    """The rows that measured stationarity."""
    return [row for row in rows if row.get("stationarity")]


def measured(runs: Mapping[str, Sequence[Row]]) -> dict[str, list[Row]]:
    """Label -> measurements, of the runs that have some."""
    found = {label: measurements(rows) for label, rows in runs.items()}
    return {label: rows for label, rows in found.items() if rows}


def _scalar(key: str) -> Callable[[Row], float]:
    return lambda row: number(row["stationarity"], key)


def _largest(key: str) -> Callable[[Row], float]:
    return lambda row: largest(row["stationarity"][key])


def distance(row: Row) -> float:
    """max_j |u - z_j| / |u|."""
    gaps = row["stationarity"]["consensus_gap"]
    squares = [sum(math.nan if gap is None else gap**2 for gap in of_j) for of_j in gaps]
    u_norm = _scalar("u_norm")(row)
    return largest(squares) ** 0.5 / u_norm if u_norm != 0.0 else math.nan


def agreement(row: Row) -> float:
    """|sum_j grad e f_j (u)| / sum_j |grad e f_j (u)|.

    1 where all f_j pull u the same way, 0 where their pulls cancel.
    """
    gradients = row["stationarity"]["envelope_gradients"]
    total = sum(math.nan if g is None else g for g in gradients)
    return _scalar("envelope_gradient")(row) / total if total != 0.0 else 1.0


accuracy = _scalar("accuracy")

SERIES: tuple[tuple[str, str, Callable[[Row], float]], ...] = (
    ("|sum grad e f_j (u)|", r"$|\Sigma_j \nabla e f_j(u)|$", _scalar("envelope_gradient")),
    ("(5a)", r"(5a): $|\Sigma_j \nabla\phi(u - z_j)|\,/\,\lambda$", _scalar("consensus_residual")),
    (
        "(5b)",
        r"(5b): $\mathrm{max}_j\, |\nabla f_j(z_j) - \nabla\phi(u - z_j)/\lambda|$",
        _largest("worker_residual"),
    ),
    (
        "(9)",
        r"(9): $\mathrm{max}_j\, |\nabla\phi(u - z_j)/\lambda - \nabla e f_j(u)|$",
        _largest("translation_gap"),
    ),
    ("force", r"$\mathrm{max}_j\, |\nabla\phi(u - z_j)|\,/\,\lambda$", _largest("force")),
    ("|u - z_j| / |u|", r"$\mathrm{max}_j\, |u - z_j|\,/\,|u|$", distance),
)
"""Heading of the column, title of the panel, and the number."""


def stationarity_cells(runs: Mapping[str, Sequence[Row]]) -> list[list[str]]:
    """The last measurement of each run; the first row holds the headings.

    The envelope gradient of the first measurement stands beside that of the last. Where a phi-prox
    was above its tolerance, there is a column with the number of such measurements of each run.
    """
    (name, _, first), *others = SERIES
    cells = [["run", "iteration", f"{name}: first", "last", "accuracy", *(h for h, _, _ in others)]]
    for label, rows in runs.items():
        last = rows[-1]
        numbers = [first(rows[0]), first(last), accuracy(last), *(v(last) for _, _, v in others)]
        cells.append([label, str(last["iteration"]), *(f"{x:.2g}" for x in numbers)])
    short = [sum(not has_converged(r["stationarity"]) for r in rows) for rows in runs.values()]
    if any(short):
        cells[0].append("not converged")
        for row, count, rows in zip(cells[1:], short, runs.values(), strict=True):
            row.append(f"{count} of {len(rows)}")
    return cells


def stationarity_table(runs: Mapping[str, Sequence[Row]], screen: int = 80) -> Table:
    """`stationarity_cells` for the screen, without some columns."""
    cells = stationarity_cells(runs)
    shown = [i for i, heading in enumerate(cells[0]) if heading not in NOT_ON_SCREEN]
    return text_table(
        "stationarity: the last measurement of each run",
        [[row[i] for i in shown] for row in cells],
        left=("run",),
        screen=screen,
    )


def verdict(rows: Sequence[Row]) -> str:
    """A sentence on whether all z_j become u, as for equal f_j (Corollary 5.1).

    They do if all f_j pull u the same way, and the pull vanishes.
    """
    last = rows[-1]
    apart = f"|u - z_j| is up to {distance(last):.1e} of |u|"
    fallen = _change(rows)
    if math.isnan(agreement(last)) or math.isnan(distance(last)):
        return f"whether u = z_j is not known, a number is not finite; {fallen}"
    if agreement(last) < AGREEING:
        pull = f"|grad e f_j (u)| is up to {_largest('envelope_gradients')(last):.2g}"
        return f"u is not z_j: {apart}, since the f_j pull u apart: {pull}; {fallen}"
    if distance(last) <= SAME:
        return f"u = z_j: {apart}, and all f_j pull u the same way; {fallen}"
    return f"u is not z_j yet: {apart}, but all f_j pull u the same way; {fallen}"


def _change(rows: Sequence[Row]) -> str:
    """The envelope gradient of the first and the last measurement, if they can be told apart."""
    name, _, value = SERIES[0]
    first, last = value(rows[0]), value(rows[-1])
    remark = "" if has_converged(rows[0]["stationarity"]) else " (not converged)"
    known = f"({to_accuracy(rows[-1]['stationarity'])})"
    if len(rows) == 1:
        return f"{name} is {last:.2g} {known}"
    if abs(first - last) <= accuracy(rows[0]) + accuracy(rows[-1]):
        return f"{name} has not changed by more than its accuracy: {last:.2g} {known}"
    texts = ((f"{first:.{digits}g}", f"{last:.{digits}g}") for digits in range(2, 17))
    before, after = next((pair for pair in texts if pair[0] != pair[1]), (f"{first:.2g}",) * 2)
    return f"{name} from {before}{remark} to {after} {known}"


@house_style()
def draw_stationarity(runs: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Draw the measurements of labelled runs over iterations; each row must have one.

    One measurement of each run is a point over the name of the number. Of more than `MOST_NAMED`
    runs, those of least, median and largest envelope gradient are drawn in colour.
    """
    others: list[Sequence[Row]] = []
    chosen = dict(runs)
    if len(runs) > MOST_NAMED:
        others = list(runs.values())
        order = sorted(runs, key=lambda label: SERIES[0][2](runs[label][-1]))
        chosen = {label: runs[label] for label in (order[0], order[len(order) // 2], order[-1])}
    draw = _draw_points if all(len(rows) == 1 for rows in runs.values()) else _draw_panels
    figure, lines = draw(list(chosen.values()), others)
    if len(runs) > 1:
        legend_below(figure, lines, list(chosen))
    save(figure, path)


def _draw_panels(
    runs: Sequence[Sequence[Row]], others: Sequence[Sequence[Row]]
) -> tuple["Figure", list[Any]]:
    """A panel for each of `SERIES`, over iterations."""
    figure, axes = panel_grid(len(SERIES), sharex=True)
    for axis, (_, title, value) in zip(axes, SERIES, strict=True):
        lines, heights = [], []
        for i, rows in enumerate([*others, *runs]):
            style = FAINT if i < len(others) else series_style(i - len(others))
            x = [row["iteration"] for row in rows]
            # A number of a diverged run would take the axis of all others to its magnitude.
            y = [math.nan if diverged(row) else value(row) for row in rows]
            lines += axis.plot(x, y, **style)
            heights += y
            if axis is axes[0] and i >= len(others):
                bars = [accuracy(row) for row in rows]
                axis.errorbar(x, y, yerr=bars, fmt="none", color=style["color"])
        axis.set_title(title, loc="left")
        axis.set_xlabel("iteration" if axis in axes[-2:] else "")
        fit_axis(axis, heights, log=True)
    return figure, lines[len(others) :]


def _draw_points(
    runs: Sequence[Sequence[Row]], others: Sequence[Sequence[Row]]
) -> tuple["Figure", list[Any]]:
    """One panel, with a point of each run for each of `SERIES`, from the top."""
    figure, (axis,) = panel_grid(1, height=2.4)
    places, lines, found = range(len(SERIES)), [], []
    for i, (row,) in enumerate([*others, *runs]):
        named = i >= len(others)
        style = series_style(i - len(others)) if named else FAINT
        x = [math.nan if diverged(row) else value(row) for _, _, value in SERIES]
        apart = 0.08 * (i - len(others)) * named  # equal numbers of several runs are all seen
        points: Any = {"marker": "o", **style, "linestyle": "none"}
        lines += axis.plot(x, [place + apart for place in places], **points)
        found += x
        if named:
            axis.errorbar(x[:1], [apart], xerr=[accuracy(row)], color=style["color"])
    fit_axis(axis, found, log=True, along="x")
    axis.set_yticks(places, [title for _, title, _ in SERIES])
    axis.invert_yaxis()
    axis.set_xlabel("the only measurement")
    return figure, lines[len(others) :]
