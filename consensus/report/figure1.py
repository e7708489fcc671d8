"""The figures of Table 1: Figure 1, and the comparison of methods per epoch and per second."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from consensus.records import Row, number
from consensus.report.runs import panels
from consensus.report.sensitivity import draw_sensitivities
from consensus.report.style import (
    ENDINGS,
    finish_axis,
    is_logarithmic,
    line_style,
    name_lines,
    new_figure,
    save,
    title_of,
)
from consensus.report.table1 import (
    MSGD,
    Configuration,
    Record,
    of_held_out,
    of_several_methods,
    words,
)

SPEED = ("epoch", "wall_s")
MOST_MARKERS = 30  # a line with more evaluations needs no markers


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
    figure, axes = new_figure(2, len(shown), 4 * len(shown), 7)
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
            finish_axis(axis, title_of(key), label, log=is_logarithmic(key) and positive)
    name_lines(axes[0][-1].legend(), curves)
    save(figure, *paths)


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
