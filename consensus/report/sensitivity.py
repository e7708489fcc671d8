"""The sensitivity to hyperparameters: the column that decides over each, and its figures."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from consensus.records import number
from consensus.report.style import (
    ACROSS,
    Style,
    axis_label,
    fit_axis,
    house_style,
    key_of,
    legend_below,
    panel_grid,
    printable,
    save,
    series_style,
    styles,
)
from consensus.report.table1 import MSGD, Configuration, Mean, Record, best_mean, words

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LAM, ETA = "algorithm.lam", "potential.eta"
MOST_TICKS = 8

Line = Mapping[float, Mean | None]
"""Value of a key -> the best mean, None where no run finished without diverging."""


def sensitivity(record: Record, key: str, at: Mapping[str, float] | None = None) -> Line:
    """The best mean in the column that decides for each value of a key, over all other keys.

    Only configurations with the values `at` count, and a finite number at the key. A lam of
    momentum SGD, or one that is not > 0, has no effect and is left out, with its eta.
    """
    of_value: dict[float, list[Configuration]] = {}
    for c in record.configurations:
        coupled = record.name != MSGD and number(c.config, LAM) not in (0.0, math.inf)
        value = number(c.config, key)
        fits = all(number(c.config, other) == wanted for other, wanted in (at or {}).items())
        if math.isfinite(value) and fits and (coupled or key not in (LAM, ETA)):
            of_value.setdefault(value, []).append(c)
    return {value: best_mean(of_value[value], record.column) for value in sorted(of_value)}


def varying_numbers(records: Sequence[Record]) -> dict[str, list[str]]:
    """Each key with several numbers within a record -> the keys that vary with it."""
    found: dict[tuple[int, ...], list[str]] = {}
    for key in records[0].chosen:
        if any(len(sensitivity(record, key)) > 1 for record in records):
            values = [number(c.config, key) for r in records for c in r.configurations]
            known = [repr(value) for value in values]
            found.setdefault(tuple(map(known.index, known)), []).append(key)
    return {first: others for first, *others in found.values()}


def draw_sensitivities(records: Sequence[Record], folder: Path) -> dict[str, str]:
    """Draw the sensitivities for each column that decides. Returns PNG -> caption."""
    captions = {}
    of_column: dict[str, list[Record]] = {}
    for r in records:
        of_column.setdefault(r.column, []).append(r)
    varied = {column: varying_numbers(of) for column, of in of_column.items()}
    for column, keys in varied.items():
        of = of_column[column]
        end = f"_{column}" * (sum(map(bool, varied.values())) > 1)
        about = f"{words(column).capitalize()} of the last evaluation"
        best = (
            "the best over all other keys, with one sample standard deviation over its seeds; a "
            "cross at the top where no run finished without diverging"
        )
        if keys:
            draw_sensitivity(of, keys, folder / f"sensitivity{end}.png")
            captions[f"sensitivity{end}.png"] = f"{about} over each number that varies, {best}"
        if LAM in keys and ETA in keys:
            draw_lam_and_eta(of, folder / f"lam_eta{end}.png")
            captions[f"lam_eta{end}.png"] = f"{about} over lam, one line for each eta, {best}"
    return captions


@house_style()
def draw_sensitivity(
    records: Sequence[Record], keys: Mapping[str, Sequence[str]], path: Path
) -> None:
    """A panel for each key, named with those that vary with it, and a line for each record."""
    style = styles(r.name for r in records)
    looks = [style[r.name] for r in records]
    if len(style) < len(records):  # one potential on several problems
        looks = list(map(series_style, range(len(records))))
    figure, axes = panel_grid(len(keys), sharey=True)
    heights: list[float] = []
    for axis, (key, others) in zip(axes, keys.items(), strict=True):
        of_record = [sensitivity(r, key) for r in records]
        chosen = [line if len(line) > 1 else {} for line in of_record]
        heights += _draw_panel(axis, list(zip(chosen, looks, strict=True)))
        axis.set_xlabel(" = ".join([key, *others]), parse_math=False)
    _label(axes, heights, records[0].column)
    legend_below(figure, [key_of(look) for look in looks], [r.label for r in records])
    save(figure, path)


@house_style()
def draw_lam_and_eta(records: Sequence[Record], path: Path) -> None:
    """Over lam, with a panel for each record and a line for each eta."""
    shown = [r for r in records if sensitivity(r, LAM)]
    etas = sorted({eta for r in shown for eta in sensitivity(r, ETA)})
    looks = list(map(series_style, range(len(etas))))
    figure, axes = panel_grid(len(shown), sharex=True, sharey=True)
    heights: list[float] = []
    for axis, record in zip(axes, shown, strict=True):
        lines = [sensitivity(record, LAM, {ETA: eta}) for eta in etas]
        heights += _draw_panel(axis, list(zip(lines, looks, strict=True)))
        axis.set_title(printable(record.label), parse_math=False)
        axis.set_xlabel(r"$\lambda$")
        axis.tick_params(labelbottom=True)  # the panel below may be absent
    _label(axes, heights, records[0].column)
    legend_below(figure, [key_of(look) for look in looks], [f"η = {eta:g}" for eta in etas])
    save(figure, path)


def _draw_panel(axis: "Axes", lines: Sequence[tuple[Line, Style]]) -> list[float]:
    """Draw lines with bars, and crosses at the top where one has no number. Returns the heights."""
    heights = []
    for i, (line, style) in enumerate(lines):
        known = [(value, mean) for value, mean in line.items() if mean is not None]
        x, y = [value for value, _ in known], [mean.mean for _, mean in known]
        bars = [mean.std or 0.0 for _, mean in known]
        if x:
            axis.errorbar(x, y, yerr=bars, elinewidth=0.8, **style)
        heights += y
        crosses = [value for value, mean in line.items() if mean is None]
        places = [0.97 - 0.05 * (i % 10)] * len(crosses)  # crosses of several lines stay apart
        top = axis.get_xaxis_transform()
        axis.plot(crosses, places, "x", color=style["color"], markersize=5.0, transform=top)
    values = sorted({value for line, _ in lines for value in line})
    fit_axis(axis, values, log=True, along="x")
    if len(values) <= MOST_TICKS:  # the values that were tried, and no others
        axis.set_xticks(values, [f"{value:g}" for value in values])
    return heights


def _label(axes: Sequence["Axes"], heights: Sequence[float], column: str) -> None:
    """Scale and label the axis of the numbers, which all panels share."""
    # Outliers would flatten the others.
    far = min(heights, default=0.0) > 0.0 and max(heights) > 10 * min(heights)
    for axis in axes:
        axis.margins(y=0.15)  # room for the crosses
    for axis in axes[::ACROSS]:
        axis.set_ylabel(axis_label(column))
    fit_axis(axes[0], heights, log=far)
