"""Figures over iterations: of one run, and of many."""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from consensus.records import Row, diverged, number, set_and_metric
from consensus.report.curves import Curve, draw_curves
from consensus.report.runs import Run, panels
from consensus.report.style import (
    SETS,
    axis_label,
    house_style,
    legend_below,
    panel_grid,
    printable,
    save,
    series_style,
    styles,
)
from consensus.report.table1 import group_seeds, method_or_potential, table1

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_CURVES = 8  # of more, some are drawn in colour and the others are thin


@house_style()
def draw_run(
    rows: Sequence[Row], path: Path, title: str = "", checkpoints: Sequence[int] = ()
) -> None:
    """Draw one run: objective and train loss, and the metric that decides on each set of samples.

    Marks show the evaluations before which step sizes were cut, and the iterations of checkpoints.
    """
    shown = panels([rows])
    sums = [key for key in shown if key in ("objective", "train_loss")]
    metrics = [key for key in shown if key not in sums]
    figure, axes = panel_grid(2 if metrics else 1, height=2.4)
    legend: dict[str, Any] = {}
    for axis, keys in zip(axes, (sums, metrics), strict=False):
        names = [set_and_metric(key)[0] or key for key in keys]
        drawn = [
            Curve(name, [rows], SETS[name], key) for name, key in zip(names, keys, strict=True)
        ]
        lines = draw_curves(axis, drawn, "iteration", keys[0])
        legend |= dict(zip(names, lines, strict=True))
        label = axis_label(keys[-1])  # without the name of the set, where there are several
        axis.set_ylabel("sum over the train set" if keys is sums else label.partition(" ")[2])
        marks = _marks(axis, rows, checkpoints)
    legend |= marks
    figure.suptitle(printable(title), parse_math=False)
    legend_below(figure, list(legend.values()), list(legend))
    save(figure, path)


def _marks(axis: "Axes", rows: Sequence[Row], checkpoints: Sequence[int]) -> dict[str, Any]:
    """Marks of cuts at the top and of checkpoints at the bottom. Returns names -> lines."""
    places: dict[str, Sequence[int]] = {}
    for name, key in (("cuts of the step of u", "cuts_u"), ("cuts of steps of z", "cuts_z")):
        counts = pairwise([0.0, *(number(row, key) for row in rows)])
        places[name] = [
            row["iteration"]
            for row, (before, after) in zip(rows, counts, strict=True)
            if after > before
        ]
    places["checkpoint"] = checkpoints
    looks = (("v", 1.03, "0.2"), ("v", 1.09, "0.6"), ("|", 0.05, "0.2"))
    found = {}
    for (name, at), (marker, height, colour) in zip(places.items(), looks, strict=True):
        if at:
            (found[name],) = axis.plot(
                at,
                [height] * len(at),
                marker,
                color=colour,
                markersize=8.0 if marker == "|" else 3.0,
                markeredgewidth=1.4,
                transform=axis.get_xaxis_transform(),
                clip_on=False,
            )
    return found


@house_style()
def draw_convergence(
    runs: Mapping[str, Sequence[Row]], path: Path, configured: Sequence[Run] = ()
) -> None:
    """Draw the columns of `panels` of labelled runs over iterations.

    Seeds of one configuration are one curve, where the runs are `configured`. Of more than
    `MOST_CURVES`, the best of each potential and method is drawn in colour, or without configs the
    runs of least, median and largest objective; the others that have not diverged are thin.
    """
    curves = _all_curves(runs, configured)
    others: list[Sequence[Row]] = []
    note = ""
    wild = sum(diverged(rows[-1]) for rows in runs.values())
    if len(curves) > MOST_CURVES:
        curves = _representatives(runs, configured)
        others = [rows for rows in runs.values() if not diverged(rows[-1])]
        note = f"{len(runs)} runs (thin)"
        note += ", the best of each in colour" if configured else ""
    if wild:
        how = "not shown" if others else "cut off at the range of the others"
        note += f"{', ' if note else ''}{wild} diverged ({how})"
    figure, axes = panel_grid(len(shown := panels(runs.values())))
    lines: list[Any] = []
    for axis, key in zip(axes, shown, strict=True):
        lines = draw_curves(axis, curves, "iteration", key, others)
    figure.suptitle(note)
    legend_below(figure, lines, [curve.label for curve in curves])
    save(figure, path)


def _all_curves(runs: Mapping[str, Sequence[Row]], configured: Sequence[Run]) -> list[Curve]:
    """A curve for each configuration, or for each run without a config."""
    groups = group_seeds(run for run in configured if run.rows)
    known = {run.label for group in groups for run in group.runs}
    found: dict[str, list[Sequence[Row]]] = {}
    for group in groups:
        fine = [run for run in group.runs if run.status != "diverged"] or group.runs
        found[_label(fine)] = [run.rows for run in fine]
    names = [method_or_potential(group.runs[0]) for group in groups]
    found |= {label: [rows] for label, rows in runs.items() if label not in known}
    looks = list(map(series_style, range(len(found))))
    if len(set(names)) == len(found):  # each is a potential or a method of its own
        looks = list(styles(names).values())
    curves = zip(found.items(), looks, strict=True)
    return [Curve(label, seeds, style) for (label, seeds), style in curves]


def _label(seeds: Sequence[Run]) -> str:
    """The label of the first of some runs, without its seed if there are several."""
    if len(seeds) == 1:
        return seeds[0].label
    first = re.sub(r"(^|,)seed=[^,/]*", "", seeds[0].label).strip(",") or seeds[0].label
    return f"{first} ({len(seeds)} seeds)"


def _representatives(runs: Mapping[str, Sequence[Row]], configured: Sequence[Run]) -> list[Curve]:
    """The best of each potential and method, or the least, median and largest objective."""
    found = [(r, b) for r in table1(configured) if (b := r.best)] if configured else []
    if found:
        style = styles(record.name for record, _ in found)
        return [
            Curve(record.label, [run.rows for run in best.kept.values()], style[record.name])
            for record, best in found
        ]
    fine = {label: rows for label, rows in runs.items() if not diverged(rows[-1])} or runs
    order = sorted(fine, key=lambda label: number(fine[label][-1], "objective"))
    chosen = dict.fromkeys(order[i] for i in (0, len(order) // 2, -1))
    return [Curve(label, [fine[label]], series_style(i)) for i, label in enumerate(chosen)]
