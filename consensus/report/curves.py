"""Curves: a column of the evaluations of several seeds, as a mean in a band."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from consensus.records import Row, diverged, number
from consensus.report.style import (
    FAINT,
    MOST_MARKERS,
    Style,
    axis_label,
    fit_axis,
    is_logarithmic,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """The evaluations of each seed of a configuration, under the name of a line in a legend."""

    label: str
    seeds: Sequence[Sequence[Row]]
    style: Style
    column: str | None = None  # None: that of the panel

    @property
    def wild(self) -> bool:
        """Whether a seed has diverged: its numbers may have any magnitude before that."""
        return any(diverged(rows[-1]) for rows in self.seeds)


def mean_and_spread(
    seeds: Sequence[Sequence[Row]], over: str, key: str
) -> tuple[Vector, Vector, Vector | None]:
    """`over`, and mean and sample standard deviation of a column over seeds; None for one seed.

    Each is (T,), at the iterations that all seeds have; nan where a number is not finite. `over` is
    a mean as well.
    """
    by_iteration = [{row["iteration"]: row for row in rows} for rows in seeds]
    common = sorted(set.intersection(*map(set, by_iteration)))
    rows = [[of_seed[t] for t in common] for of_seed in by_iteration]

    def values(column: str) -> Vector:
        found = [[number(row, column) for row in of_seed] for of_seed in rows]
        return np.array(found, dtype=np.float64).reshape(len(rows), len(common))

    y = values(key)
    # A number of a diverged run would take the axis of all others to its magnitude.
    y[[[diverged(row) for row in of_seed] for of_seed in rows]] = np.nan
    return values(over).mean(0), y.mean(0), y.std(0, ddof=1) if len(rows) > 1 else None


def draw_curves(
    axis: "Axes",
    curves: Sequence[Curve],
    over: str,
    key: str,
    others: Iterable[Sequence[Row]] = (),
) -> list[Any]:
    """Draw a column of each curve, and thin lines of other runs. Returns the lines of the curves.

    The axis ends at the numbers of the curves that have not diverged, if there are some.
    """
    lines, heights, widths = [], [], []
    thin = [mean_and_spread([rows], over, key)[:2] for rows in others]
    for x, y in thin:
        axis.plot(x, y, zorder=1, **FAINT)
    clip = any(curve.wild for curve in curves) and not all(curve.wild for curve in curves)
    for curve in curves:
        x, mean, std = mean_and_spread(curve.seeds, over, curve.column or key)
        lines += axis.plot(x, mean, markevery=-(-len(x) // MOST_MARKERS) or 1, **curve.style)
        if not (clip and curve.wild):
            heights += mean.tolist()
            widths += x.tolist()
        if std is not None:
            low = mean - std
            if is_logarithmic(key) and not np.isnan(mean).all():
                low = np.where(low > 0, low, np.nanmin(mean))  # a band to below 0 ends there
            colour = curve.style["color"]
            axis.fill_between(x, low, mean + std, color=colour, alpha=0.2, linewidth=0)
    heights += [height for _, y in thin for height in y.tolist()]
    fit_axis(axis, heights, is_logarithmic(key), clip)
    axis.set_ylabel(axis_label(key))
    axis.set_xlabel(axis_label(over))
    if any(width > 0 for width in widths):
        axis.set_xlim(left=0.0)
    return lines
