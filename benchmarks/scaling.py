"""The time of one iteration of Algorithm 1 over its size, beside the expected laws.

Started as `scripts/bench scaling`. One thread in each process; c cores; four panels:

    n          coordinates, on a quadratic whose gradient costs one pass    a + b n, a + p copy(n)
    workers    M workers in one process, LeNet-5, batch 20                  a + b M
    processes  P processes of one worker each, LeNet-5                      t(1) max(1, P / c)
    period     H iterations from one communication to the next,             a + b / H
               two processes, LeNet-5

The time of a pass over memory is measured by the series `copy`, which copies one vector of n
coordinates. Its b is smaller where the vectors fit into a cache, so times are given in passes p as
well. Processes take longer than their law by communication, by waiting for one another, and by
cores that are shared unevenly. The series `alone` never communicates and separates these causes.

Data flow: a panel is a list of points, and a point builds a subject that steps. All points are
visited in turn, there and back, repeatedly, so that other load of the machine affects all of them.
A visit warms up and times a block of steps, which takes as long as its slowest rank. A point is the
median of its visits. One plain python process runs everything: panels of one process itself, the
others in ranks that it starts by torch.distributed.run and that return their rows in a file. The
replicas of u on all ranks are compared, bit for bit, before their times count.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks import harness
from benchmarks.harness import CPU, TIMEOUT_S, slowest_s
from benchmarks.scaling_laws import PANELS, Row, content, draw, laws_of, show
from benchmarks.scaling_subjects import Alone, Copy, Subject, on_lenet5, on_quadratic
from consensus.comm import Group, Launch, Solo, open_group

WARM_UP = 2  # steps: the first one touches memory and fills caches, the second tells the duration
VECTORS = 7  # of n, alive at once: u, the message, z, v, scratch, gradient, and a temporary
DIGEST_BYTES = 512 << 20  # at most, for what it computes with, and what the allocator keeps of it
PROCESS_BYTES = 512 << 20  # of a process that has imported torch
PROCESSES_OF_PERIOD = 2


@dataclass(frozen=True)
class Plan:
    """Points of the measurement.

    Attributes:
        sizes: Values of n.
        workers: Values of M.
        processes: Values of P; the law needs 1.
        periods: Values of H.
        repetitions: Visits of a point; of `processes`, in one start of the ranks.
        starts: How often the ranks of `processes` are started.
        seconds: Of a block, about.
    """

    sizes: tuple[int, ...]
    workers: tuple[int, ...]
    processes: tuple[int, ...]
    periods: tuple[int, ...]
    repetitions: int
    starts: int
    seconds: float


FULL = Plan(
    sizes=(*(m * 10**k for k in range(4, 8) for m in (1, 3)), 10**8),
    workers=(2, 4, 8, 16, 32, 64),
    processes=(1, 2, 4, 8),
    periods=(1, 2, 4, 8, 16, 32, 64),
    repetitions=5,
    starts=3,
    seconds=0.4,
)
QUICK = Plan(
    sizes=(10**4, 10**5, 10**6),
    workers=(2, 4),
    processes=(1, 2),
    periods=(1, 2, 4),
    repetitions=3,
    starts=1,
    seconds=0.02,
)


# ---- timing


@dataclass(frozen=True)
class Point:
    """A place on a panel.

    Attributes:
        panel: One of PANELS.
        series: The name of a curve: a potential, `copy` or `alone`.
        x: n, M, P or H.
        make: Builds the subject.
        multiple: The steps of a block are a multiple of it, so that whole periods fit.
        keep: Whether the subject stays in memory between visits.
    """

    panel: str
    series: str
    x: int
    make: Callable[[], Subject]
    multiple: int = 1
    keep: bool = True


def measure(points: Sequence[Point], group: Group, repetitions: int, seconds: float) -> list[Row]:
    """Visit all points `repetitions` times, in turn, there and back; a collective.

    Args:
        points: The points, the same on all ranks.
        group: The ranks that step together.
        repetitions: Visits of each point.
        seconds: Of a block, about.

    Raises:
        GroupError: If the ranks do not hold the same u at the end, on every rank.
    """
    rows = [Row(point.panel, point.series, point.x) for point in points]
    kept: dict[int, Subject] = {}
    for repetition in range(repetitions):
        there = range(len(points))
        for i in there if repetition % 2 == 0 else reversed(there):
            point, row = points[i], rows[i]
            subject = kept[i] if i in kept else point.make()
            if point.keep:
                kept[i] = subject
            for t in range(WARM_UP):
                duration = slowest_s(subject.step, range(t, t + 1), group)
            if not row.steps:
                row.steps = block_length(duration, seconds, point.multiple)
            block = range(point.multiple, point.multiple + row.steps)
            row.samples.append(slowest_s(subject.step, block, group))
            if repetition == repetitions - 1:
                row.cuts = int(subject.cuts.sum())
                row.digest = subject.verify()
            del subject  # before the next one is built: there may be room for one only
    return rows


def block_length(duration: float, seconds: float, multiple: int) -> int:
    """Steps that take about `seconds`, at least one; rounded up to a multiple."""
    steps = max(1, round(seconds / duration))
    return -(-steps // multiple) * multiple


# ---- the four panels


def points_of_n(sizes: Iterable[int]) -> list[Point]:
    """One worker on a quadratic, and a copy of one vector."""
    points = []
    for n in sizes:
        points.append(Point("n", "copy", n, partial(Copy, n), keep=False))
        for name in ("quad", "tan", "tan_sep"):
            points.append(Point("n", name, n, partial(on_quadratic, name, n), keep=False))
    return points


def points_of_workers(numbers: Iterable[int]) -> list[Point]:
    """M workers of LeNet-5 in this process."""
    return [
        Point("workers", name, m, partial(on_lenet5, name, range(m), Solo()))
        for m in numbers
        for name in ("quad", "tan")
    ]


def points_of_processes(group: Group) -> list[Point]:
    """One worker of LeNet-5 in each of these processes, for one P."""
    j = [group.rank]
    return [
        Point("processes", "alone", group.size, lambda: Alone(on_lenet5("quad", j, group))),
        Point("processes", "quad", group.size, partial(on_lenet5, "quad", j, group)),
        Point("processes", "tan", group.size, partial(on_lenet5, "tan", j, group)),
    ]


def points_of_period(periods: Iterable[int], group: Group) -> list[Point]:
    """One worker of LeNet-5 in each of these processes, H iterations to a communication."""
    j = [group.rank]
    return [
        Point("period", name, h, partial(on_lenet5, name, j, group, h), multiple=h)
        for h in periods
        for name in ("quad", "tan")
    ]


def measure_all(plan: Plan, panels: Sequence[str]) -> tuple[list[Row], list[str]]:
    """The rows of these panels, and one sentence for each point that was left out."""
    rows: list[Row] = []
    left_out: list[str] = []
    if "n" in panels:
        sizes, left_out = affordable("n", plan.sizes, bytes_of_size)
        rows += measure(points_of_n(sizes), Solo(), plan.repetitions, plan.seconds)
    if "workers" in panels:
        rows += measure(points_of_workers(plan.workers), Solo(), plan.repetitions, plan.seconds)
    jobs: dict[int, list[str]] = {}  # by number of processes: ranks that run serve both panels
    if "processes" in panels:
        jobs = {p: ["processes"] for p in plan.processes}
    if "period" in panels:
        jobs.setdefault(PROCESSES_OF_PERIOD, []).append("period")
    numbers, large = affordable("P", jobs, lambda p: PROCESS_BYTES * p)
    starts = [in_processes(p, jobs[p], plan) for _ in range(plan.starts) for p in numbers]
    found = joined(row for start in starts for row in start)
    rows += sorted(found, key=lambda row: PANELS.index(row.panel))
    return rows, left_out + large


def joined(rows: Iterable[Row]) -> list[Row]:
    """One row for each point, with the samples of all starts."""
    found: dict[tuple[str, str, int], Row] = {}
    for row in rows:
        first = found.setdefault((row.panel, row.series, row.x), row)
        if first is not row:
            first.samples += row.samples
            first.cuts += row.cuts
            first.digest = row.digest
    return list(found.values())


def affordable(
    name: str, values: Iterable[int], needed: Callable[[int], int]
) -> tuple[list[int], list[str]]:
    """The values for which the memory suffices, and a sentence for each other value.

    Args:
        name: Of the values.
        values: Of n or P.
        needed: value -> bytes.
    """
    there = available_memory()
    values = list(values)
    large = [value for value in values if needed(value) > there]
    sentences = [
        f"{name} = {value:,} is left out: it needs {needed(value) / 2**30:.1f} GiB of memory, "
        f"{there / 2**30:.1f} GiB are available"
        for value in large
    ]
    return [value for value in values if value not in large], sentences


def bytes_of_size(n: int) -> int:
    """The growth of a process that steps on n coordinates in float32. Bytes."""
    return DIGEST_BYTES + 4 * VECTORS * n


def available_memory(meminfo: Path = Path("/proc/meminfo")) -> float:
    """Memory available without swapping, inf where the system does not report it. Bytes."""
    if not meminfo.exists():
        return float("inf")
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return 1024 * int(fields["MemAvailable"].split()[0])


# ---- ranks


def in_processes(num_processes: int, panels: Sequence[str], plan: Plan) -> list[Row]:
    """The rows of these panels for a number of processes, measured in ranks that this starts.

    Raises:
        SystemExit: If the ranks fail; their messages are on stderr.
    """
    with tempfile.TemporaryDirectory() as folder:
        job, answer = Path(folder, "job.json"), Path(folder, "rows.json")
        job.write_text(json.dumps({"panels": panels, "plan": asdict(plan), "answer": str(answer)}))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [
            f"--nproc-per-node={num_processes}",
            "-m",
            "benchmarks.scaling",
            "--child",
            str(job),
        ]
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
        if done.returncode:
            names = " and ".join(panels)
            raise SystemExit(f"scripts/bench scaling: {num_processes} ranks failed in {names}")
        return [Row(**row) for row in json.loads(answer.read_text())]


def serve(job_file: str) -> None:
    """One rank: measure the points of the job file; rank 0 writes the rows."""
    job = json.loads(Path(job_file).read_text())
    group = open_group(Launch.from_environment(), "gloo", CPU, TIMEOUT_S)
    try:
        rows = rows_of_ranks(job["panels"], Plan(**job["plan"]), group)
        if group.rank == 0:
            Path(job["answer"]).write_text(json.dumps([asdict(row) for row in rows]))
        group.barrier()
    finally:
        group.close()


def rows_of_ranks(panels: Sequence[str], plan: Plan, group: Group) -> list[Row]:
    """The rows of the panels `processes` and `period` on the ranks of a group; a collective."""
    points: list[Point] = []
    if "processes" in panels:
        points += points_of_processes(group)
    if "period" in panels:
        points += points_of_period(plan.periods, group)
    return measure(points, group, plan.repetitions, plan.seconds)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, measure, print, write."""
    parser = harness.parser("scaling", quick="few and small points", plot=True)
    parser.add_argument("--panels", nargs="+", choices=PANELS, default=list(PANELS))
    parser.add_argument("--child", metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.child:
        return serve(options.child)
    chosen = [panel for panel in PANELS if panel in options.panels]
    rows, left_out = measure_all(QUICK if options.quick else FULL, chosen)
    laws = laws_of(rows, harness.num_cores())
    show(rows, laws)
    print("\n".join(left_out), end="\n" if left_out else "")
    harness.write_json(options.json, content(rows, laws, left_out))
    if options.plot:
        draw(rows, laws, options.plot)
    return None


if __name__ == "__main__":
    main()
