"""The laws of benchmarks/scaling.py: rows, fits, the table and the figure."""

import statistics
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from benchmarks.harness import environment, num_cores, plot_medians, table
from consensus.report.style import STYLES, house_style, new_figure

PANELS = ("n", "workers", "processes", "period")
LETTERS = {"n": "n", "workers": "M", "processes": "P", "period": "H"}
COLUMNS = {
    "panel": "<10", "series": "<8", "": ">15", "ms": ">10.3f", "law": ">10.3f", "/ law": ">6.2f",
    " ": "<",
}  # fmt: skip


@dataclass
class Row:
    """The measurements at a point.

    Attributes:
        panel: Of the point.
        series: Of the point.
        x: Of the point.
        samples: One step on the slowest rank, for each visit. Seconds.
        steps: Of a block.
        cuts: How often a line search of rank 0 cut a step.
        digest: Of u at the end, on all ranks alike.
    """

    panel: str
    series: str
    x: int
    samples: list[float] = field(default_factory=list)
    steps: int = 0
    cuts: int = 0
    digest: int = 0

    @property
    def seconds(self) -> float:
        """Of one step."""
        return statistics.median(self.samples)


# ---- the laws


@dataclass(frozen=True)
class Law(ABC):
    """The expected time of a series.

    Attributes:
        panel: Of the series.
        series: By name.
    """

    panel: str
    series: str

    @abstractmethod
    def at(self, x: float) -> float:
        """Seconds of one step."""

    @abstractmethod
    def __str__(self) -> str: ...


@dataclass(frozen=True)
class Line(Law):
    """a + b x, or a + b / H.

    Attributes:
        a: Seconds.
        b: Seconds per coordinate, per worker, per communication.
    """

    a: float
    b: float

    def at(self, x: float) -> float:
        """Seconds of one step."""
        return self.a + self.b * regressor(self.panel, x)

    def __str__(self) -> str:
        start = f"{1e3 * self.a:.3g} ms"
        if self.panel == "period":
            return f"{start} + {1e3 * self.b:.3g} ms / H"
        if self.panel == "workers":
            return f"{start} + {1e3 * self.b:.3g} ms M"
        return f"{start} + {1e9 * self.b:.3g} ns n"


@dataclass(frozen=True)
class Passes(Law):
    """a + p copy(n): caches change the time of a copy and of a step alike.

    Attributes:
        a: Seconds.
        passes: p.
        copies: The measured time of a copy of n numbers, n -> seconds.
    """

    a: float
    passes: float
    copies: dict[int, float]

    def at(self, x: float) -> float:
        """Seconds of one step, at an n that was measured."""
        return self.a + self.passes * self.copies[int(x)]

    def __str__(self) -> str:
        return f"{1e3 * self.a:.3g} ms + {self.passes:.1f} copies"


@dataclass(frozen=True)
class SharedCores(Law):
    """t(1) max(1, P / c): identical processes without waiting, on c cores.

    Attributes:
        t1: Of one process. Seconds.
        cores: c.
    """

    t1: float
    cores: int

    def at(self, x: float) -> float:
        """Seconds of one step."""
        return self.t1 * max(1.0, x / self.cores)

    def __str__(self) -> str:
        return f"{1e3 * self.t1:.3g} ms max(1, P / {self.cores})"


def regressor(panel: str, x: float) -> float:
    """The variable of the linear law: 1 / H for the period, otherwise x."""
    return 1.0 / x if panel == "period" else float(x)


def fit(xs: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """The a and b that minimize sum_i ((a + b x_i) / t_i - 1)^2.

    The error is relative, since the times range over decades. With an absolute error the largest n
    alone would determine both.

    Args:
        xs: At least two different ones.
        seconds: t_i > 0.
    """
    x = torch.tensor(xs, dtype=torch.float64)
    t = torch.tensor(seconds, dtype=torch.float64)
    unit = x.abs().amax()  # of the same size as 1, for the condition of the system
    system = torch.stack([1.0 / t, x / unit / t], 1)
    a, b = torch.linalg.lstsq(system, torch.ones_like(t).unsqueeze(1)).solution.flatten().tolist()
    return a, b / unit.item()


def laws_of(rows: Sequence[Row], cores: int) -> list[Law]:
    """The laws of each series with enough points for a fit; `Passes` comes after `Line`."""
    laws: list[Law] = []
    copies = {row.x: row.seconds for row in rows if row.series == "copy"}
    for (panel, series), own in by_series(rows).items():
        if panel == "processes":
            laws += [SharedCores(panel, series, row.seconds, cores) for row in own if row.x == 1]
        elif len({row.x for row in own}) >= 2:
            seconds = [row.seconds for row in own]
            laws.append(Line(panel, series, *fit([regressor(panel, r.x) for r in own], seconds)))
            if panel == "n" and series != "copy":
                a, passes = fit([copies[row.x] for row in own], seconds)
                laws.append(Passes(panel, series, a, passes, copies))
    return laws


def by_series(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """The rows of each (panel, series)."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row.panel, row.series), []).append(row)
    return found


def deviation(law: Law, rows: Iterable[Row]) -> float:
    """The largest |t / law - 1| of its series."""
    own = [row for row in rows if (row.panel, row.series) == (law.panel, law.series)]
    return max(abs(row.seconds / law.at(row.x) - 1.0) for row in own)


# ---- output


def show(rows: Sequence[Row], laws: Sequence[Law]) -> None:
    """Print a table of the points, each beside its first law, and then the laws."""
    law_of = {(law.panel, law.series): law for law in reversed(laws)}
    copies = {row.x: row.seconds for row in rows if row.series == "copy"}
    cells = []
    for row in rows:
        law = law_of.get((row.panel, row.series))
        expected = (None, None) if law is None else (law.at(row.x), row.seconds / law.at(row.x))
        ms = None if expected[0] is None else 1e3 * expected[0]
        x = f"{LETTERS[row.panel]} = {row.x:,}"
        times = (1e3 * row.seconds, ms, expected[1])
        cells.append((row.panel, row.series, x, *times, f" {remark(row, law, copies)}"))
    print(table(COLUMNS, cells))
    for law in laws:
        off = 100 * deviation(law, rows)
        print(f"law: {law.panel:10} {law.series:8} {law}, at most {off:.0f} % off", flush=True)


def remark(row: Row, law: Law | None, copies: dict[int, float]) -> str:
    """The time of a point in the unit of its panel."""
    if row.panel == "n":
        passes = f", {row.seconds / copies[row.x]:.1f} copies" if row.series != "copy" else ""
        return f"{1e9 * row.seconds / row.x:.2f} ns a coordinate{passes}"
    if row.panel == "workers":
        return f"{1e3 * row.seconds / row.x:.3f} ms a worker"
    if row.panel == "processes" and law is not None:
        return f"{1e3 * (row.seconds - law.at(row.x)):+.3f} ms beyond the law"
    return ""


def content(rows: Sequence[Row], laws: Sequence[Law], left_out: Sequence[str]) -> dict[str, Any]:
    """All results, for a JSON file."""
    return {
        "environment": environment(),
        "rows": [asdict(row) | {"ms": 1e3 * row.seconds} for row in rows],
        "laws": [
            asdict(law) | {"formula": str(law), "deviation": deviation(law, rows)} for law in laws
        ],
        "left_out": list(left_out),
    }


@house_style()
def draw(rows: Sequence[Row], laws: Sequence[Law], path: str) -> None:
    """Draw a figure of the measured panels: points are medians, curves are laws."""
    panels = [panel for panel in PANELS if any(row.panel == panel for row in rows)]
    figure, found = new_figure(len(panels), 1, height=2.6 * len(panels))
    for axes, panel in zip(found[:, 0], panels, strict=True):
        draw_panel(axes, panel, rows, laws)
    figure.savefig(path, dpi=150)


def draw_panel(axes: Any, panel: str, rows: Sequence[Row], laws: Sequence[Law]) -> None:
    """Draw each series of a panel with its range over the visits, and its laws as curves."""
    titles = {
        "n": "One worker, closed-form gradient",
        "workers": "Workers in one process, LeNet-5",
        "processes": f"Processes on {num_cores()} cores, LeNet-5",
        "period": "Period, two processes, LeNet-5",
    }
    labels = {
        "n": "n, coordinates",
        "workers": "M, workers",
        "processes": "P, processes",
        "period": "H, iterations to a communication",
    }
    grey = {"color": "0.4", "marker": "X"}
    for (where, series), own in by_series(rows).items():
        if where != panel:
            continue
        look = STYLES.get(series, grey)  # copies, and workers alone
        color = look["color"]
        own = sorted(own, key=lambda row: row.x)
        xs = [row.x for row in own]
        its_laws = [law for law in laws if (law.panel, law.series) == (panel, series)]
        label = f"{series}: {', '.join(map(str, its_laws))}" if its_laws else series
        samples = [row.samples for row in own]
        plot_medians(axes, xs, samples, color=color, marker=look["marker"], label=label)
        for law in its_laws:
            measured_only = isinstance(law, Passes)
            grid = [xs[0] * (xs[-1] / xs[0]) ** (i / 200) for i in range(201)]
            curve = [float(x) for x in xs] if measured_only else grid
            style = ":" if measured_only else "--"
            axes.plot(curve, [1e3 * law.at(x) for x in curve], style, color=color, linewidth=1)
    if panel == "n":
        axes.set_xscale("log")
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0.0)
    if panel in ("processes", "period"):
        ticks = sorted({row.x for row in rows if row.panel == panel})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(x) for x in ticks])
    axes.set_title(titles[panel])
    axes.set_xlabel(labels[panel])
    axes.legend(loc="lower left" if panel == "period" else "best")
