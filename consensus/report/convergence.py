"""The figure of runs over iterations."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from consensus.records import Row, number
from consensus.report.runs import panels
from consensus.report.style import (
    draw_lines,
    finish_axis,
    is_logarithmic,
    name_lines,
    new_figure,
    save,
    title_of,
)

MOST_IN_LEGEND = 20  # more names would cover the panel


def draw_convergence(runs: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Draw the columns of `panels` of labelled runs over iterations."""
    named = len(runs) <= MOST_IN_LEGEND
    below = named and (len(runs) > 4 or max(map(len, runs), default=0) > 40)
    shown = panels(runs.values())
    across = -(-len(shown) // 2)
    height = 7 + (0.1 * len(runs) if below else 0)
    figure, axes = new_figure(2, across, 5 * across, height, sharex=True)
    from matplotlib import colormaps

    colors = [colormaps["tab20"](i) for i in range(20)]
    for i, (axis, key) in enumerate(zip(axes.flat, shown, strict=False)):
        if len(runs) > 10:  # matplotlib's own colors begin again after ten
            axis.set_prop_cycle(color=colors)
        positive = draw_lines(axis, runs, partial(number, key=key))
        lowest = i + across >= len(shown)  # of its column
        finish_axis(
            axis, title_of(key), "iteration" if lowest else "", is_logarithmic(key) and positive
        )
        axis.tick_params(labelbottom=lowest)
    for axis in axes.flat[len(shown) :]:
        axis.remove()
    if below:
        lines = axes[0][0].lines
        name_lines(figure.legend(handles=lines, loc="outside lower center", ncols=2), runs)
    elif named:
        name_lines(axes[0][0].legend(), runs)
    save(figure, path)
