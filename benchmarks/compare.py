"""One training step by consensus and by other methods, side by side.

Started as `scripts/bench compare`, which starts itself under torchrun. All methods of
benchmarks/methods.py train the same model on the same minibatches and processes.

Data flow: in each round every method in turn is built afresh, warmed up, and timed over a block of
steps that starts at a barrier. A block takes as long as its slowest rank. A ratio compares two
blocks of one round, so that other load of the machine affects both; medians over the rounds are
printed. CPU time is that of all threads of a process, the mean over the processes: with other load
on the cores it varies less than the time of a step. Memory is the growth of the process while a
method is built and steps, sampled in the first round. It includes the modules that torch imports
for the method.
"""

import gc
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import harness
from benchmarks.harness import BATCH, CPU, Problem, slowest_s, table
from benchmarks.loops import Method
from benchmarks.methods import Local, Make, methods
from benchmarks.peers import require
from consensus.comm import Group, Launch, open_group
from consensus.report.style import BLUE, SKY, house_style, new_figure

WORKLOADS: dict[str, tuple[str, dict[str, object]]] = {
    "lenet5": ("lenet5", {}),
    "mlp1m": ("mlp", {"hidden": [800, 450]}),
    "mlp10m": ("mlp", {"hidden": [2800, 2700]}),
    "mlp100m": ("mlp", {"hidden": [8192, 8192, 3072]}),
}
COLUMNS = {
    "workload": "<9", "method": "<31", "ms": ">9.2f", "/ local": ">8.2f",
    "CPU ms": ">8.2f", "CPU / local": ">12.2f", "samples/s": ">10.0f",
    "MiB sent": ">9.2f", "waiting": ">8.0%", "MiB memory": ">11.0f", "error": ">8.1e",
}  # fmt: skip


@dataclass
class Block:
    """One method in one round."""

    seconds: float  # of one step, on the slowest rank
    cpu_s: float  # of one step and all threads of a process, the mean over the processes
    waited_s: float  # of one step, NaN if unknown
    payload: float  # bytes of one step
    memory: int  # bytes
    error: float | None  # of sums, on rank 0


class Memory:
    """The largest growth of this process while the context is open, in bytes, by sampling."""

    EVERY_S = 0.002

    def __enter__(self) -> "Memory":
        gc.collect()
        self._before, self.peak = self._resident(), 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(self.EVERY_S):
            self.peak = max(self.peak, self._resident() - self._before)

    @staticmethod
    def _resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def block(make: Callable[[], Method], steps: int, group: Group, sample: bool) -> Block:
    """Build a method, warm it up, time `steps` of it. A period of 10 divides warm-up and steps."""

    def started() -> Method:
        method = make()
        for t in range(2):
            method.step(t)
        return method

    memory = 0
    if sample:  # before the timing, since the sampler costs time
        with Memory() as watched:
            method = started()
        memory = watched.peak
    else:
        method = started()
    for t in range(2, 10):
        if steps >= 10:
            method.step(t)
    waited, payload = method.waited_s, method.payload
    cpu = time.process_time()
    seconds = slowest_s(method.step, range(10, 10 + steps), group)
    cpu_s = (time.process_time() - cpu) / steps
    wait = float("nan") if waited is None or method.waited_s is None else method.waited_s - waited
    sent = method.payload - payload
    numbers = torch.tensor([wait / steps, sent / steps, memory, cpu_s], dtype=torch.float64)
    every = group.gather(numbers)
    waited_s, sent, peak, _ = every.amax(0).tolist()
    cpu_s = float(every[:, 3].mean())
    error = method.error() if sample else None
    method.close()
    return Block(seconds, cpu_s, waited_s, sent, int(peak), error)


@dataclass
class Row:
    """The measurements of one method on one workload."""

    workload: str
    method: str
    parameters: int
    processes: int
    ms: float
    ratio_to_local: float
    cpu_ms: float
    cpu_ratio: float
    samples_per_s: float
    bytes_per_iteration: float
    waiting: float | None
    peak_mib: float
    error: float | None
    rounds: int

    def cells(self) -> tuple[object, ...]:
        """By COLUMNS."""
        sent = self.bytes_per_iteration / 2**20
        times = (self.ms, self.ratio_to_local, self.cpu_ms, self.cpu_ratio)
        rates = (*times, self.samples_per_s, sent)
        return self.workload, self.method, *rates, self.waiting, self.peak_mib, self.error


def compare(
    workload: str, makers: Mapping[str, Make], group: Group, rounds: int, seconds: float
) -> list[Row]:
    """Methods, "local" among them, on one workload, interleaved."""
    problem = Problem(*WORKLOADS[workload])
    parameters = sum(p.numel() for p in problem.model().parameters())
    first = block(lambda: Local(problem, group), 2, group, sample=False)
    steps = int(min(200, max(2, seconds / first.seconds)))
    steps = steps // 10 * 10 if steps >= 10 else steps
    found: dict[str, list[Block]] = {name: [] for name in makers}
    for i in range(rounds):
        for name, make in makers.items():
            # One step in ten communicates: of fewer steps a period of 10 would show none or all.
            n = max(10, steps) if name.endswith("period 10") else steps
            made = block(lambda make=make: make(problem, group), n, group, sample=i == 0)
            found[name].append(made)
            gc.collect()
    rows = []
    for name, blocks in found.items():
        pairs = list(zip(found["local"], blocks, strict=True))
        ms = 1e3 * statistics.median(b.seconds for b in blocks)
        wait = statistics.median(b.waited_s / b.seconds for b in blocks)
        rows.append(
            Row(
                workload=workload,
                method=name,
                parameters=parameters,
                processes=group.size,
                ms=ms,
                ratio_to_local=statistics.median(b.seconds / a.seconds for a, b in pairs),
                cpu_ms=1e3 * statistics.median(b.cpu_s for b in blocks),
                cpu_ratio=statistics.median(b.cpu_s / a.cpu_s for a, b in pairs),
                samples_per_s=group.size * BATCH * 1e3 / ms,
                bytes_per_iteration=blocks[0].payload,
                waiting=None if wait != wait else wait,
                peak_mib=blocks[0].memory / 2**20,
                error=blocks[0].error,
                rounds=rounds,
            )
        )
    return rows


@house_style()
def draw(rows: list[Row], path: str) -> None:
    """Draw the ratio to the local step as bars, one panel per workload."""
    workloads = list(dict.fromkeys(row.workload for row in rows))
    figure, panels = new_figure(len(workloads), 1, height=2.6 * len(workloads))
    for axes, workload in zip(panels[:, 0], workloads, strict=True):
        own = [row for row in rows if row.workload == workload][::-1]
        colors = [BLUE if row.method.startswith("consensus") else SKY for row in own]
        bars = axes.barh(
            [row.method for row in own], [row.ratio_to_local for row in own], color=colors
        )
        axes.bar_label(bars, fmt="%.2f", padding=2)
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set_title(f"{workload}, n = {own[0].parameters:,}, {own[0].processes} processes")
        axes.set_xlabel("step time / step time of independent workers")
        axes.margins(x=0.12)
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, start the ranks, measure, print, write."""
    parser = harness.parser("compare", quick="LeNet-5 alone, few rounds", plot=True)
    parser.add_argument("--processes", type=int, default=2, help="with one thread each")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a block, about")
    harness.add_methods(parser)
    parser.add_argument("--peers", action="store_true", help="accelerate's and torchft's as well")
    options = parser.parse_args(arguments)
    if options.peers:
        require()
    makers = methods(options.peers)
    names = harness.chosen(makers, options)
    makers = {name: make for name, make in makers.items() if name in ("local", *names)}
    harness.start_ranks("compare", options.processes, arguments)
    if options.quick:
        options.workloads, options.rounds, options.seconds = ["lenet5"], 5, 0.5
    group = open_group(Launch.from_environment(), "gloo", CPU, 600.0)
    rows: list[Row] = []
    for workload in options.workloads:
        new = compare(workload, makers, group, options.rounds, options.seconds)
        rows += new
        if group.rank == 0:
            print(table(COLUMNS, [row.cells() for row in new]), flush=True)
    if group.rank == 0:
        harness.write_json(options.json, {"environment": harness.environment(), "rows": rows})
        if options.plot:
            draw(rows, options.plot)
    group.barrier()
    group.close()


if __name__ == "__main__":
    main()
