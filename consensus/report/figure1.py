"""The figures of Table 1: Figure 1, and the comparison of methods per epoch and per second."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from consensus.report.curves import Curve, draw_curves
from consensus.report.runs import panels
from consensus.report.sensitivity import draw_sensitivities
from consensus.report.style import house_style, legend_below, new_figure, panel_grid, save, styles
from consensus.report.table1 import (
    MSGD,
    Configuration,
    Record,
    of_held_out,
    of_several_methods,
    words,
)

SPEED = ("epoch", "wall_s")


def draw_table1(records: Sequence[Record], folder: Path) -> dict[str, str]:
    """Draw Figure 1, and the sensitivity if lam or eta varies. Returns PNG -> caption."""
    captions = {}
    several = of_several_methods(records)
    for suffix, title, best in figure1_groups(records):
        name = f"figure1{suffix}"
        column, highest = next(iter(best.values())).criterion
        style = styles(best)
        curves = [
            Curve(potential, [run.rows for run in configuration.kept.values()], style[potential])
            for potential, configuration in best.items()
        ]
        draw_figure1(curves, folder / f"{name}.png")
        captions[f"{name}.png"] = (
            f"Figure 1{title}: of each potential the configuration best in final "
            f"{words(column, highest)}{of_held_out(column)}; with several seeds their mean, in a "
            "band of one sample standard deviation"
        )
        if several:
            name = f"methods{suffix}"
            draw_methods(curves, folder / f"{name}.png")
            captions[f"{name}.png"] = (
                f"The same runs{title} over the passes of a worker over its data, and over the "
                "seconds of a run, with its evaluations, the mean over the seeds"
            )
    return captions | draw_sensitivities(records, folder)


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


@house_style()
def draw_figure1(curves: Sequence[Curve], path: Path) -> None:
    """Figure 1: the columns of `panels` over iterations.

    A curve is the mean over its seeds, in a band of one sample standard deviation.
    """
    shown = panels(rows for curve in curves for rows in curve.seeds)
    figure, axes = panel_grid(len(shown))
    for axis, key in zip(axes, shown, strict=True):
        lines = draw_curves(axis, curves, "iteration", key)
    legend_below(figure, lines, [curve.label for curve in curves])
    save(figure, path)


@house_style()
def draw_methods(curves: Sequence[Curve], path: Path) -> None:
    """The train loss, and the last of `panels`, per epoch and per second."""
    shown = panels(rows for curve in curves for rows in curve.seeds)
    figure, axes = new_figure(2, len(SPEED), sharey="row")
    for row, key in zip(axes, ("train_loss", shown[-1]), strict=True):
        for axis, over in zip(row, SPEED, strict=True):
            lines = draw_curves(axis, curves, over, key)
        row[1].set_ylabel("")
    legend_below(figure, lines, [curve.label for curve in curves])
    save(figure, path)
