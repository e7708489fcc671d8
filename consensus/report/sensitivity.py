"""The sensitivity to lam and eta: the column that decides over both, and its figure."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from consensus.records import number
from consensus.report.style import ENDINGS, finish_axis, new_figure, printable, save, title_of
from consensus.report.table1 import MSGD, Configuration, Record, best_mean, words

MOST_TICKS = 10


def sensitivity(record: Record) -> dict[float, dict[float, float | None]]:
    """For each eta, lam -> the best mean in the column that decides, None where nothing finished.

    Configurations without a finite lam > 0, such as uncoupled workers, are left out.
    """
    at: dict[tuple[float, float], list[Configuration]] = {}
    for c in record.configurations:
        eta, lam = number(c.config, "potential.eta"), number(c.config, "algorithm.lam")
        if math.isfinite(eta) and 0.0 < lam < math.inf:
            at.setdefault((eta, lam), []).append(c)
    found: dict[float, dict[float, float | None]] = {}
    for eta, lam in sorted(at):
        mean = best_mean(at[eta, lam], record.column)
        found.setdefault(eta, {})[lam] = mean.mean if mean else None
    return found


def draw_sensitivities(records: Sequence[Record], folder: Path) -> dict[str, str]:
    """Draw a sensitivity for each column that decides. Returns PNG -> caption."""
    captions = {}
    lines: dict[str, dict[str, dict[float, dict[float, float | None]]]] = {}
    for r in records:
        if r.name != MSGD and (found := sensitivity(r)):
            lines.setdefault(r.column, {})[r.label] = found
    for column, of_label in lines.items():
        places = {(e, lam) for of in of_label.values() for e, lams in of.items() for lam in lams}
        if len(places) > 1:
            name = "sensitivity" + f"_{column}" * (len(lines) > 1)
            draw_sensitivity(of_label, [folder / f"{name}.{e}" for e in ENDINGS], column)
            captions[f"{name}.png"] = (
                f"{words(column).capitalize()} of the last evaluation over lam, one line for each "
                "eta, the best over all other keys; a cross at the top where no run finished "
                "without diverging"
            )
    return captions


def draw_sensitivity(
    lines_of: Mapping[str, Mapping[float, Mapping[float, float | None]]],
    paths: Sequence[Path],
    column: str = "test_error",
) -> None:
    """The column that decides over lam, a panel for each potential and a line for each eta.

    None is a cross at the top: no run with this lam finished without diverging.
    """
    across = min(3, len(lines_of))
    down = -(-len(lines_of) // across)
    figure, axes = new_figure(down, across, 1.5 + 4 * across, 3.5 * down, sharex=True, sharey=True)
    lams = sorted({lam for lines in lines_of.values() for of in lines.values() for lam in of})
    etas = sorted({eta for lines in lines_of.values() for eta in lines})
    heights = [y for lines in lines_of.values() for of in lines.values() for y in of.values() if y]
    # Outliers would flatten the others.
    log = min(heights, default=0.0) > 0.0 and max(heights) > 10 * min(heights)
    for axis, (name, lines) in zip(axes.flat, lines_of.items(), strict=False):
        for eta, line in lines.items():
            i = etas.index(eta) % 10
            known = {lam: value for lam, value in line.items() if value is not None}
            x, y = list(known), list(known.values())
            axis.plot(x, y, marker="o", color=f"C{i}", label=f"eta = {eta:g}")
            crosses = [lam for lam, value in line.items() if value is None]
            height = [0.97 - 0.05 * i] * len(crosses)  # crosses of several eta stay apart
            top = axis.get_xaxis_transform()
            axis.plot(crosses, height, "x", color=f"C{i}", transform=top)
        axis.set_xscale("log")
        if len(lams) <= MOST_TICKS:  # the values that were tried, and no others
            axis.set_xticks(lams, [f"{lam:g}" for lam in lams])
            axis.minorticks_off()
        axis.tick_params(labelbottom=True)  # the panel below may be absent
        finish_axis(axis, printable(name), "lam", log, minor=True)
        axis.margins(y=0.15)  # room for the crosses
        axis.legend(fontsize="small")
    for axis in axes.flat[len(lines_of) :]:
        axis.remove()
    for axis in axes[:, 0]:
        axis.set_ylabel(title_of(column))
    save(figure, *paths)
