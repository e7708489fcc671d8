"""How the time of one iteration of Algorithm 1 grows, beside the law that it should follow.

Run by scripts/bench_scaling. One thread in each process; c cores; four panels:

    n          coordinates, on a quadratic whose gradient costs one pass    a + b n, a + p copy(n)
    workers    M workers in one process, LeNet-5, batch 20                  a + b M
    processes  P processes of one worker each, LeNet-5                      t(1) max(1, P / c)
    period     H iterations from one communication to the next,             a + b / H
               two processes, LeNet-5

A pass over memory costs what `copy` takes, which copies one vector of n: its b is another one where
the vectors fit into a cache, so the same is said in passes p as well. What the processes take
beyond their law is communication, waiting for one another, and cores that are shared unevenly; to
tell them apart, `alone` never communicates.

Data flow: a panel is a list of points, a point is something that steps. All points are visited in
turn, there and back, again and again, so that what the machine does otherwise strikes all; a visit
warms up and times a block of steps, which takes as long as its slowest rank. A point is the median
of its visits. One plain python runs everything: panels of one process itself, the others in ranks
that it starts by torch.distributed.run and that answer through a file. Where ranks have worked
together, their replicas of u are compared, bit for bit, before their times count.

# n coordinates, K workers to a process
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor

from consensus import POTENTIALS, Layerwise
from consensus.algorithm import Consensus
from consensus.comm import Group, Launch, Solo, open_group
from consensus.problem import Dataset, Minibatches, MinibatchRisk, Risk, build_model
from consensus.server import Server, digest
from consensus.worker import Worker

PANELS = ("n", "workers", "processes", "period")
SIGMA, TAU, LAM, KAPPA, NU, BATCH = 1e-4, 1e-4, 0.1, 0.9, 1e-4, 20
TIMEOUT_S = 120.0

WARM_UP = 2  # steps: the first one touches memory and fills caches, the second tells the duration
VECTORS = 7  # of n, alive at once: u, the message, z, v, scratch, gradient, and a temporary
DIGEST_BYTES = 512 << 20  # at most, for what it computes with, and what the allocator keeps of it
PROCESS_BYTES = 512 << 20  # of a process that has imported torch
PROCESSES_OF_PERIOD = 2


@dataclass(frozen=True)
class Plan:
    """What is measured.

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


# ---- what is timed


class Subject(Protocol):
    """Something that steps: an algorithm, or what it is compared with."""

    @property
    def cuts(self) -> Tensor:
        """How often a line search has cut a step. int64."""

    def step(self, t: int) -> None:
        """Iteration t on this rank."""

    def verify(self) -> int:
        """Check what must hold on all ranks, and return the digest of what was computed."""


class Quadratic:
    """The oracle of f(z) = (c / 2) |z|^2: one pass over memory, so that the step is measured."""

    CURVATURE = 0.5  # c

    def __init__(self) -> None:
        self._gradient: Tensor | None = None

    def draw(self) -> None:
        """There is nothing to draw."""

    def gradient(self, points: Tensor, batch: None) -> Tensor:
        """The gradient c z, in memory that the next call overwrites. (K, n) -> (K, n)."""
        del batch
        if self._gradient is None:
            self._gradient = torch.empty_like(points)
        return torch.mul(points, self.CURVATURE, out=self._gradient)

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Nothing."""


def on_quadratic(potential: str, n: int) -> Consensus:
    """One worker on a quadratic, well inside every domain: |u| = 1 and |u - z| = 0.1.

    So the line search finds at once that it need not cut, as in nearly all iterations of a
    training; and no number is so small that the processor would slow down.
    """
    u = torch.rand(n, generator=torch.Generator().manual_seed(0)).sub_(0.5)
    u /= torch.linalg.vector_norm(u)
    phi = Layerwise(POTENTIALS[potential], thirds(n))
    worker = Worker((1.1 * u).unsqueeze(0), Quadratic(), phi, kappa=KAPPA, nu=NU)
    return Consensus(Server(u, phi, Solo()), worker, tau=TAU, sigma=SIGMA, lam=LAM)


def thirds(n: int) -> list[tuple[int, int]]:
    """Three layers of about equal size, as many as LeNet-5 has."""
    ends = [0, n // 3, 2 * n // 3, n]
    return list(pairwise(ends))


def on_lenet5(potential: str, workers: Iterable[int], group: Group, period: int = 1) -> Consensus:
    """LeNet-5 on random images, the same on every rank; these workers in this process."""
    random = torch.Generator().manual_seed(0)
    images = torch.rand(1000, 1, 28, 28, generator=random)
    labels = torch.randint(10, (1000,), generator=random)
    dataset = Dataset(images, labels, images[:1], labels[:1], num_classes=10)
    risk = Risk(build_model("lenet5", 0, torch.float32, num_classes=10), "sum")
    everything = torch.arange(len(labels))
    minibatches = [Minibatches(everything, BATCH, seed=0, worker=j) for j in workers]
    u = risk.layout.flatten(risk.model)
    phi = Layerwise(POTENTIALS[potential], risk.layout.layers)
    worker = Worker(
        u.repeat(len(minibatches), 1),
        MinibatchRisk(risk, dataset, minibatches),
        phi,
        kappa=KAPPA,
        nu=NU,
    )
    return Consensus(Server(u, phi, group), worker, tau=TAU, sigma=SIGMA, lam=LAM, period=period)


class Alone:
    """The iterations between two communications of an algorithm, for ever."""

    def __init__(self, algorithm: Consensus) -> None:
        self._algorithm = algorithm

    @property
    def cuts(self) -> Tensor:
        """Of the algorithm. int64 (2,)."""
        return self._algorithm.cuts

    def step(self, t: int) -> None:
        """Lines 4 to 6 without the coupling."""
        self._algorithm.step_alone(t)

    def verify(self) -> int:
        """That u stands still alike on all ranks."""
        return self._algorithm.verify()


class Copy:
    """A pass over memory: n numbers are read and n are written.

    From one vector to the next, in a ring of as many as an iteration works on: so they are in the
    cache, or not, as those are.
    """

    LENGTH = 6  # u, the message, z, v, the scratch and the gradient

    def __init__(self, n: int) -> None:
        self._ring = [torch.full((n,), float(i)) for i in range(self.LENGTH)]

    @property
    def cuts(self) -> Tensor:
        """None. int64 ()."""
        return torch.zeros((), dtype=torch.int64)

    def step(self, t: int) -> None:
        """One vector onto the next."""
        self._ring[(t + 1) % self.LENGTH].copy_(self._ring[t % self.LENGTH])

    def verify(self) -> int:
        """The digest of a vector that was copied."""
        return int(digest(self._ring[0]))


# ---- how it is timed


@dataclass(frozen=True)
class Point:
    """A place on a panel.

    Attributes:
        panel: One of PANELS.
        series: What is drawn as one curve: a potential, `copy` or `alone`.
        x: n, M, P or H.
        make: Builds it.
        multiple: Steps of a block are a multiple of it, so that a period fits.
        keep: Whether it stays in memory from one visit to the next.
    """

    panel: str
    series: str
    x: int
    make: Callable[[], Subject]
    multiple: int = 1
    keep: bool = True


@dataclass
class Row:
    """What was measured at a point.

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


def measure(points: Sequence[Point], group: Group, repetitions: int, seconds: float) -> list[Row]:
    """Visit all points `repetitions` times, in turn, there and back; a collective.

    Args:
        points: What is measured, alike on all ranks.
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
                duration = timed(subject, range(t, t + 1), group)
            if not row.steps:
                row.steps = block_length(duration, seconds, point.multiple)
            block = range(point.multiple, point.multiple + row.steps)
            row.samples.append(timed(subject, block, group))
            if repetition == repetitions - 1:
                row.cuts = int(subject.cuts.sum())
                row.digest = subject.verify()
            del subject  # before the next one is built: there may be room for one only
    return rows


def timed(subject: Subject, iterations: range, group: Group) -> float:
    """One step, the mean over these iterations, on the slowest rank. Seconds; a collective."""
    group.barrier()
    started = perf_counter()
    for t in iterations:
        subject.step(t)
    mine = (perf_counter() - started) / len(iterations)
    return float(group.gather(torch.tensor([mine], dtype=torch.float64)).amax())


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
    """The rows of these panels, and what was left out, one sentence each."""
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
    """Those values that need no more memory than there is, and a sentence for each other.

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
    """What a process grows by that steps on n coordinates in float32."""
    return DIGEST_BYTES + 4 * VECTORS * n


def available_memory(meminfo: Path = Path("/proc/meminfo")) -> float:
    """Memory that can be had without swapping, inf where the system does not tell. Bytes."""
    if not meminfo.exists():
        return float("inf")
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return 1024 * int(fields["MemAvailable"].split()[0])


def num_cores() -> int:
    """c, the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# ---- ranks


def in_processes(num_processes: int, panels: Sequence[str], plan: Plan) -> list[Row]:
    """What these panels want of so many processes, in ranks that are started for it.

    Raises:
        SystemExit: If they fail; what they say is on stderr.
    """
    with tempfile.TemporaryDirectory() as folder:
        job, answer = Path(folder, "job.json"), Path(folder, "rows.json")
        job.write_text(json.dumps({"panels": panels, "plan": asdict(plan), "answer": str(answer)}))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={num_processes}", __file__, "--child", str(job)]
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
        if done.returncode:
            names = " and ".join(panels)
            raise SystemExit(f"scripts/bench_scaling: {num_processes} ranks failed in {names}")
        return [Row(**row) for row in json.loads(answer.read_text())]


def serve(job_file: str) -> None:
    """A rank: measure what the file says; rank 0 writes the rows."""
    job = json.loads(Path(job_file).read_text())
    plan = Plan(**job["plan"])
    group = open_group(Launch.from_environment(), "gloo", torch.device("cpu"), TIMEOUT_S)
    try:
        points: list[Point] = []
        if "processes" in job["panels"]:
            points += points_of_processes(group)
        if "period" in job["panels"]:
            points += points_of_period(plan.periods, group)
        rows = measure(points, group, plan.repetitions, plan.seconds)
        if group.rank == 0:
            Path(job["answer"]).write_text(json.dumps([asdict(row) for row in rows]))
        group.barrier()
    finally:
        group.close()


# ---- the laws


@dataclass(frozen=True)
class Law(ABC):
    """The time that a series should take.

    Attributes:
        panel: Where.
        series: Whose.
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
    """a + p copy(n): the caches make a copy faster or slower, and all the rest with it.

    Attributes:
        a: Seconds.
        passes: p.
        copies: What a copy of n numbers was measured to take, n -> seconds.
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
    """t(1) max(1, P / c): processes that compute alike and never wait, on c cores.

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
    """What the time is linear in: 1 / H, and x otherwise."""
    return 1.0 / x if panel == "period" else float(x)


def fit(xs: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """The a and b that minimize sum_i ((a + b x_i) / t_i - 1)^2.

    In relative error, since the times range over decades: otherwise the largest n alone would
    determine both.

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
    """The laws of each series with points enough to tell them; `Passes` comes after `Line`."""
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


# ---- what is shown


LETTERS = {"n": "n", "workers": "M", "processes": "P", "period": "H"}


def show(rows: Sequence[Row], laws: Sequence[Law]) -> None:
    """A table: each point beside its first law, and then the laws."""
    law_of = {(law.panel, law.series): law for law in reversed(laws)}
    copies = {row.x: row.seconds for row in rows if row.series == "copy"}
    print(f"{'panel':10} {'series':8} {'':>15} {'ms':>10} {'law':>10} {'/ law':>6}")
    for row in rows:
        law = law_of.get((row.panel, row.series))
        expected = f"{'':>10} {'':>6}"
        if law is not None:
            expected = f"{1e3 * law.at(row.x):10.3f} {row.seconds / law.at(row.x):6.2f}"
        x = f"{LETTERS[row.panel]} = {row.x:,}"
        print(
            f"{row.panel:10} {row.series:8} {x:>15} {1e3 * row.seconds:10.3f} {expected}  "
            f"{remark(row, law, copies)}".rstrip()
        )
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
    """All that was found, for a JSON file."""
    environment = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": num_cores(),
        "device": "cpu",
    }
    return {
        "environment": environment,
        "rows": [asdict(row) | {"ms": 1e3 * row.seconds} for row in rows],
        "laws": [
            asdict(law) | {"formula": str(law), "deviation": deviation(law, rows)} for law in laws
        ],
        "left_out": list(left_out),
    }


def draw(rows: Sequence[Row], laws: Sequence[Law], path: str) -> None:
    """One figure, a panel for each that was measured: points are medians, curves are laws."""
    from matplotlib.figure import Figure

    panels = [panel for panel in PANELS if any(row.panel == panel for row in rows)]
    columns = min(2, len(panels))
    figure = Figure(figsize=(6.5 * columns, 4.5 * -(-len(panels) // columns)), layout="constrained")
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(-(-len(panels) // columns), columns, i + 1)
        draw_panel(axes, panel, rows, laws)
    figure.savefig(path)


def draw_panel(axes: Any, panel: str, rows: Sequence[Row], laws: Sequence[Law]) -> None:
    """Every series of a panel with its range over the visits, and its law as a curve."""
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
    colors = {"copy": "C7", "alone": "C7", "quad": "C0", "tan": "C1", "tan_sep": "C2"}
    for (where, series), own in by_series(rows).items():
        if where != panel:
            continue
        color = colors[series]
        own = sorted(own, key=lambda row: row.x)
        xs, ms = [row.x for row in own], [1e3 * row.seconds for row in own]
        below = [m - 1e3 * min(row.samples) for m, row in zip(ms, own, strict=True)]
        above = [1e3 * max(row.samples) - m for m, row in zip(ms, own, strict=True)]
        its_laws = [law for law in laws if (law.panel, law.series) == (panel, series)]
        label = f"{series}: {', '.join(map(str, its_laws))}" if its_laws else series
        axes.errorbar(xs, ms, (below, above), fmt="o", color=color, markersize=4, label=label)
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
    axes.set_ylabel("ms for one iteration, median and range")
    axes.legend(fontsize="small", loc="lower left" if panel == "period" else "best")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="scripts/bench_scaling")
    parser.add_argument("--panels", nargs="+", choices=PANELS, default=list(PANELS))
    parser.add_argument("--quick", action="store_true", help="few and small points")
    parser.add_argument("--json", metavar="FILE", help="write what was found there")
    parser.add_argument("--plot", metavar="FILE", help="draw it there (PNG, PDF, SVG)")
    parser.add_argument("--child", metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.child:
        return serve(options.child)
    chosen = [panel for panel in PANELS if panel in options.panels]
    rows, left_out = measure_all(QUICK if options.quick else FULL, chosen)
    laws = laws_of(rows, num_cores())
    show(rows, laws)
    print("\n".join(left_out), end="\n" if left_out else "")
    if options.json:
        text = json.dumps(content(rows, laws, left_out), indent=2)
        Path(options.json).write_text(text + "\n")
    if options.plot:
        draw(rows, laws, options.plot)
    return None


if __name__ == "__main__":
    main()
