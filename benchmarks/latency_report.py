"""The plan, the expected times, the tables and the figure of benchmarks/latency.py."""

import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import BATCH
from consensus.report.style import BLACK, house_style, new_figure, series_style
from consensus.run.health import HealthCheck

SEGMENTS = 2  # that count, of each latency in each run


@dataclass(frozen=True)
class Plan:
    """The settings of the benchmark.

    Attributes:
        latencies: One way. Milliseconds.
        periods: Values of H.
        rounds: Runs of each.
        hosts: With one process each.
        loss: The probability that a packet is lost.
        potential: By name.
        seed: Of the runs, and of the losses.
        delay: Iterations by which sums are late, where the period is longer.
        least_segment: The smallest E.
    """

    latencies: tuple[float, ...]
    periods: tuple[int, ...]
    rounds: int
    hosts: int
    loss: float
    potential: str
    seed: int
    delay: int = 0
    least_segment: int = 64

    @property
    def segment(self) -> int:
        """E, a multiple of all periods. Iterations."""
        return math.lcm(*self.periods) * -(-self.least_segment // math.lcm(*self.periods))

    def delay_of(self, period: int) -> int:
        """The delay of the run with this period."""
        return min(self.delay, period - 1)

    @property
    def iterations(self) -> int:
        """The iterations of a run."""
        return self.segment * (1 + len(self.latencies) * (1 + SEGMENTS))

    def overrides(self, period: int, run_dir: Path) -> list[str]:
        """The overrides of the run with this period."""
        return [
            *("device=cpu", f"seed={self.seed}", f"workers={self.hosts}"),
            *(f"potential={self.potential}", f"algorithm.period={period}"),
            f"algorithm.delay={self.delay_of(period)}",
            *(f"algorithm.batch_size={BATCH}", f"algorithm.iterations={self.iterations}"),
            *(f"output.run_dir={run_dir}", f"output.eval_every={self.segment}"),
            *(f"output.log_every={self.segment}", "output.checkpoint_every=null"),
            "output.tensorboard=false",
        ]


@dataclass
class Costs:
    """The times of the collectives at one latency. Seconds.

    Attributes:
        total: a, the sum of line 3.
        minimum: m.
        gather: b.
    """

    total: float
    minimum: float
    gather: float

    def expected(
        self, alone: float, period: int, share: float, segment: int, delay: int = 0
    ) -> float:
        """Seconds of one iteration, where a minimum follows this share of the sums.

        Args:
            alone: g.
            period: H.
            share: q.
            segment: E.
            delay: d.
        """
        t = alone + (max(0.0, self.total - (1 + delay) * alone) + share * self.minimum) / period
        each_second = 0.0 if delay else t / HealthCheck.CHECK_EVERY_S  # else nobody waits for it
        return t + self.gather * max(1.0 / segment, each_second)


@dataclass
class Row:
    """The measurements at one latency and one period.

    Attributes:
        latency: One way. Milliseconds.
        period: H.
        samples: One iteration, for each segment. Seconds.
        expected: Seconds.
    """

    latency: float
    period: int
    samples: list[float]
    expected: float

    @property
    def seconds(self) -> float:
        """Of one iteration."""
        return statistics.median(self.samples)


@dataclass
class Run:
    """The results of the runs of one period, which do not depend on the network.

    Attributes:
        period: H.
        test_error: Of u after the last iteration. Percent.
        digest: Of the same u.
        share: q, of the sums that are followed by a minimum.
    """

    period: int
    test_error: float
    digest: str
    share: float


@dataclass
class Found:
    """All results.

    Attributes:
        plan: The settings.
        floors: By "bridge" and "switch": seconds of a round trip, bytes per second.
        costs: By latency, medians over rounds.
        rows: By latency and period.
        runs: By period.
    """

    plan: Plan
    floors: dict[str, tuple[float, float]]
    costs: dict[float, Costs]
    rows: list[Row]
    runs: list[Run]


# ---- output


def tables(found: Found) -> str:
    """The results as Markdown tables."""
    plan = found.plan
    lines = ["| | round trip, ms | TCP, MB/s |", "| --- | --- | --- |"]
    lines += [
        f"| {name} | {1e3 * s:.3f} | {b / 1e6:.0f} |" for name, (s, b) in found.floors.items()
    ]
    lines += ["", "| latency, ms | sum of line 3, ms | minimum, ms | gather, ms |"]
    lines += ["| --- | --- | --- | --- |"]
    for latency, costs in found.costs.items():
        parts = (costs.total, costs.minimum, costs.gather)
        lines.append(f"| {latency:g} | {' | '.join(f'{1e3 * part:.1f}' for part in parts)} |")
    heads = " | ".join(f"{latency:g} ms" for latency in plan.latencies)
    late = f", sums up to {plan.delay} late" if plan.delay else ""
    lines += ["", f"| period{late} | {heads} | minima | test error |"]
    lines += ["| --- " * (3 + len(plan.latencies)) + "|"]
    for run in found.runs:
        own = [row for row in found.rows if row.period == run.period]
        cells = " | ".join(f"{1e3 * row.seconds:.1f} ({1e3 * row.expected:.1f})" for row in own)
        end = f"{100 * run.share:.0f} % | {run.test_error:.2f} %"
        lines.append(f"| {run.period} | {cells} | {end} |")
    return "\n".join(lines)


def content(found: Found) -> dict[str, Any]:
    """All results, for a JSON file."""
    about = {"environment": harness.environment(), "iterations": found.plan.iterations}
    return asdict(found) | about


@house_style()
def draw(found: Found, path: str) -> None:
    """Draw measured times and expected curves over the period, and the test error over it."""
    plan = found.plan
    figure, panels = new_figure(2, 1, height=4.8, height_ratios=(3, 2))
    times, errors = panels[:, 0]
    for i, latency in enumerate(plan.latencies):
        own = [row for row in found.rows if row.latency == latency]
        color, marker = (series_style(i)[key] for key in ("color", "marker"))
        style = {"color": color, "marker": marker, "label": f"{latency:g} ms"}
        harness.plot_medians(times, plan.periods, [row.samples for row in own], **style)
        expected = [1e3 * row.expected for row in own]
        times.plot(plan.periods, expected, "--", color=color, linewidth=1)
    loss = f", {100 * plan.loss:g} % lost" if plan.loss else ""
    late = f", delay {plan.delay}" if plan.delay else ""
    times.set_title(
        f"LeNet-5, {plan.potential}, {plan.hosts} hosts{loss}{late}: dashed as expected"
    )
    times.legend(title="latency, one way")
    errors.plot(plan.periods, [run.test_error for run in found.runs], "o-", color=BLACK)
    errors.set_title(f"The same number of iterations, {plan.iterations}")
    errors.set_ylabel("test error (%)")
    for axes in (times, errors):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(plan.periods, [str(H) for H in plan.periods])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}" if axes is errors else "")
        axes.set_xlabel("period H, iterations to a communication")
    figure.savefig(path, dpi=150)
