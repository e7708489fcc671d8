"""Figure 1 of the paper, and how the test error depends on lam and eta."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from consensus.records import Row, number
from consensus.report.runs import PANELS, name_lines, printable, write_figure
from consensus.report.table1 import MSGD, PAPER_ORDER

LOGARITHMIC = ("objective", "train_loss")
MOST_MARKERS = 30  # above so many evaluations a line needs no markers
MOST_TICKS = 10


def draw_figure1(curves: Mapping[str, Sequence[Sequence[Row]]], paths: Sequence[Path]) -> None:
    """Figure 1: objective, train loss and the two errors, over iterations and over epochs.

    Several seeds are drawn as their mean, with a band of one sample standard deviation around it.

    Args:
        curves: Potential or mSGD -> the evaluations of each seed.
        paths: Where to write it; the endings say which formats.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 7), layout="constrained")
    axes = figure.subplots(2, len(PANELS))
    for column, (key, title) in enumerate(PANELS):
        for row, over in enumerate(("iteration", "epoch")):
            axis = axes[row][column]
            positive = False
            for i, (name, seeds) in enumerate(curves.items()):
                x, mean, std = curve(seeds, over, key)
                positive |= bool((mean > 0).any())
                style = line_style(name, i)
                marker = "." if len(x) <= MOST_MARKERS else None
                axis.plot(x, mean, marker=marker, label="run", **style)
                if std is not None:
                    low = mean - std
                    if key in LOGARITHMIC:  # a band to below 0 ends at the lowest mean instead
                        low = np.where(low > 0, low, np.nanmin(mean))
                    axis.fill_between(
                        x, low, mean + std, color=style["color"], alpha=0.2, linewidth=0
                    )
            if key in LOGARITHMIC and positive:
                axis.set_yscale("log")
            axis.set_title(title)
            axis.set_xlabel(over)
            axis.grid(alpha=0.3)
    name_lines(axes[0][-1].legend(), curves)
    for path in paths:
        write_figure(figure, path)


def curve(
    seeds: Sequence[Sequence[Row]], over: str, key: str
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64] | None]:
    """What is drawn of a configuration.

    Args:
        seeds: The evaluations of each of S seeds.
        over: `iteration` or `epoch`.
        key: Of a number in a row; nan where it overflowed.

    Returns:
        The T places on the axis, the mean over seeds and the sample standard deviation (None for
        one seed), each (T,), at the iterations that all seeds have.
    """
    by_iteration = [{row["iteration"]: row for row in rows} for rows in seeds]
    common = sorted(set.intersection(*map(set, by_iteration)))
    rows = [[of_seed[t] for t in common] for of_seed in by_iteration]
    x = np.array([number(row, over) for row in rows[0]], dtype=float)
    values = np.array([[number(row, key) for row in of_seed] for of_seed in rows], dtype=float)
    return x, values.mean(0), values.std(0, ddof=1) if len(rows) > 1 else None


def line_style(name: str, number: int) -> dict[str, str]:
    """The same colour for the same potential in every figure; mSGD is dashed and black.

    Args:
        name: The potential, or mSGD.
        number: Its place in the figure, which chooses where the paper has no such potential.
    """
    if name == MSGD:
        return {"color": "black", "linestyle": "--"}
    if name in PAPER_ORDER:
        return {"color": f"C{PAPER_ORDER.index(name)}", "linestyle": "-"}
    return {"color": f"C{6 + number % 4}", "linestyle": ("-.", ":")[number // 4 % 2]}


def draw_sensitivity(
    panels: Mapping[str, Mapping[float, Mapping[float, float | None]]], paths: Sequence[Path]
) -> None:
    """Test error over lam, a panel for each potential and a line for each eta.

    A cross at the top stands where no run finished without diverging.

    Args:
        panels: Potential -> eta -> lam -> test error in percent, None for a cross.
        paths: Where to write it; the endings say which formats.
    """
    from matplotlib.figure import Figure

    across = min(3, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(1.5 + 4 * across, 3.5 * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    lams = sorted({lam for lines in panels.values() for of in lines.values() for lam in of})
    etas = sorted({eta for lines in panels.values() for eta in lines})
    errors = [e for lines in panels.values() for of in lines.values() for e in of.values() if e]
    for axis, (name, lines) in zip(axes.flat, panels.items(), strict=False):
        for eta, line in lines.items():
            colour = f"C{etas.index(eta) % 10}"
            known = [(lam, error) for lam, error in line.items() if error is not None]
            axis.plot(
                [lam for lam, _ in known],
                [error for _, error in known],
                marker="o",
                color=colour,
                label=f"eta = {eta:g}",
            )
            crosses = [lam for lam, error in line.items() if error is None]
            height = 0.97 - 0.05 * (etas.index(eta) % 10)  # of several eta they would coincide
            axis.plot(
                crosses,
                [height] * len(crosses),
                marker="x",
                linestyle="",
                color=colour,
                transform=axis.get_xaxis_transform(),
            )
        axis.set_xscale("log")
        if len(lams) <= MOST_TICKS:  # the values that were tried, and no others
            axis.set_xticks(lams, [f"{lam:g}" for lam in lams])
            axis.minorticks_off()
        axis.tick_params(labelbottom=True)  # the panel below may be absent
        if errors and max(errors) > 10 * min(errors):  # what did not learn would flatten the rest
            axis.set_yscale("log")
        axis.set_title(printable(name), parse_math=False)
        axis.set_xlabel("lam")
        axis.margins(y=0.15)  # room for the crosses
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize="small")
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis in axes[:, 0]:
        axis.set_ylabel("test error (%)")
    for path in paths:
        write_figure(figure, path)
