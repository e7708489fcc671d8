"""One training step, by consensus and by what people would use instead, side by side.

Run by scripts/bench under torchrun. On the same model, minibatches and processes:

    local           independent workers, no communication: the limit
    consensus ...   Algorithm 1 with a potential and a period
    ddp             torch.nn.parallel.DistributedDataParallel
    postlocal ...   torch's PostLocalSGD: PeriodicModelAverager with a period
    naive           synchronous EASGD as it is usually written, one all-reduce per parameter tensor

Data flow: rounds; in each, every method in turn is built afresh, warmed up, and timed over a block
of steps that starts at a barrier. A block takes as long as its slowest rank. A ratio compares two
blocks of one round, so that what the machine does otherwise strikes both; medians over the rounds
are printed. Memory is the growth of the process while a method is built and steps, sampled in the
first round; it holds what torch imports for that method then.
"""

import argparse
import gc
import json
import statistics
import threading
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from consensus import POTENTIALS, Layerwise
from consensus.algorithm import Consensus, Msgd
from consensus.comm import Group, Launch, Pending, RepeatedSum, Solo, open_group, sent_sum
from consensus.problem import Dataset, Minibatches, MinibatchRisk, Risk, build_model
from consensus.server import Server
from consensus.worker import Worker

SIGMA, TAU, LAM, KAPPA, NU, BATCH = 1e-4, 1e-4, 0.1, 0.9, 1e-4, 20
WORKLOADS: dict[str, tuple[str, dict[str, object]]] = {
    "lenet5": ("lenet5", {}),
    "mlp1m": ("mlp", {"hidden": [800, 450]}),
    "mlp10m": ("mlp", {"hidden": [2800, 2700]}),
    "mlp100m": ("mlp", {"hidden": [8192, 8192, 3072]}),
}
POTENTIALS_TIMED = ("quad", "cubic", "tan", "log", "tan_sep")


# ---- what is timed


class Method(ABC):
    """A way to train. `step(t)` is iteration t on this rank.

    Attributes:
        waited_s: Seconds in which this rank waited for others; None where torch hides it.
        payload: Bytes that this rank has handed to collectives.
    """

    waited_s: float | None = None
    payload = 0

    @abstractmethod
    def step(self, t: int) -> None: ...

    def error(self) -> float | None:
        """The relative error of its sums, in the Euclidean norm, where they are sent by us."""
        return None


class _Timed(Pending):
    def __init__(self, pending: Pending, meter: "Metered") -> None:
        self._pending, self._meter = pending, meter

    def wait(self) -> Tensor:
        with self._meter.waiting():
            return self._pending.wait()


class _TimedSum(RepeatedSum):
    def __init__(self, repeated: RepeatedSum, meter: "Metered") -> None:
        self._repeated, self._meter = repeated, meter

    @property
    def message(self) -> Tensor:
        return self._repeated.message

    def start(self) -> Pending:
        self._meter.payload += self._repeated.num_bytes
        return _Timed(self._repeated.start(), self._meter)


class Metered:
    """A group that counts what is sent and for how long it is waited.

    With `sent`, sums do not use shared memory: "plain" as they are, "bf16" compressed.
    """

    def __init__(self, group: Group, sent: str | None = None) -> None:
        self._group = group
        self._sent = sent
        self.waited_s, self.payload = 0.0, 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._group, name)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.waited_s += time.perf_counter() - started

    def repeated_sum(self, numel: int, like: Tensor) -> RepeatedSum:
        if self._sent is None:
            return _TimedSum(self._group.repeated_sum(numel, like), self)
        compress = None if self._sent == "plain" else self._sent
        return _TimedSum(sent_sum(self._group, numel, like, compress), self)

    def min_(self, tensor: Tensor) -> Tensor:
        self.payload += tensor.nbytes
        with self.waiting():
            return self._group.min_(tensor)


class Problem:
    """Model and random data, the same on every rank; minibatches of this rank's worker."""

    def __init__(self, workload: str, launch: Launch) -> None:
        self.name, self.options = WORKLOADS[workload]
        self.rank = launch.rank
        random = torch.Generator().manual_seed(0)
        images = torch.rand(1000, 1, 28, 28, generator=random)
        labels = torch.randint(10, (1000,), generator=random)
        self.dataset = Dataset(images, labels, images[:1], labels[:1], num_classes=10)

    def model(self) -> nn.Module:
        return build_model(self.name, 0, torch.float32, num_classes=10, **self.options)

    def minibatches(self) -> Minibatches:
        everything = torch.arange(len(self.dataset.train_labels))
        return Minibatches(everything, BATCH, seed=0, worker=self.rank)

    def oracle(self) -> MinibatchRisk:
        return MinibatchRisk(Risk(self.model(), "sum"), self.dataset, [self.minibatches()])


class Local(Method):
    """A worker alone."""

    def __init__(self, problem: Problem, group: Group) -> None:
        del group
        oracle = problem.oracle()
        z = oracle.risk.layout.flatten(oracle.risk.model).unsqueeze(0)
        phi = Layerwise(POTENTIALS["quad"], oracle.risk.layout.layers)
        self.algorithm = Msgd(Worker(z, oracle, phi, kappa=KAPPA, nu=NU), Solo(), sigma=SIGMA)
        self.waited_s = 0.0

    def step(self, t: int) -> None:
        self.algorithm.step(t)


class OurConsensus(Method):
    """Algorithm 1."""

    def __init__(
        self,
        problem: Problem,
        group: Group,
        potential: str,
        period: int,
        sent: str | None = None,
    ) -> None:
        oracle = problem.oracle()
        layout = oracle.risk.layout
        u = layout.flatten(oracle.risk.model)
        phi = Layerwise(POTENTIALS[potential], layout.layers, eta=1.0)
        self.group, self.sent = group, sent
        self.meter = Metered(group, sent)
        self.algorithm = Consensus(
            Server(u, phi, self.meter),
            Worker(u.unsqueeze(0), oracle, phi, kappa=KAPPA, nu=NU),
            tau=TAU,
            sigma=SIGMA,
            lam=LAM,
            period=period,
        )

    def step(self, t: int) -> None:
        self.algorithm.step(t)
        self.waited_s, self.payload = self.meter.waited_s, self.meter.payload

    def error(self) -> float | None:
        """Of the next sum of forces, against the same sum in float64."""
        if self.sent is None:
            return None
        worker, server = self.algorithm.worker, self.algorithm.server
        force = server.phi.grad(server.u - worker.z).sum(0)
        exact = self.group.sum_(force.double())
        repeated = self.meter.repeated_sum(len(force), force)
        repeated.message.copy_(force)
        found = repeated.start().wait()
        return float(torch.linalg.vector_norm(found - exact) / torch.linalg.vector_norm(exact))


class Loop(Method):
    """A training loop as usually written."""

    def __init__(self, problem: Problem, group: Group) -> None:
        self.group = group
        self.dataset, self.minibatches = problem.dataset, problem.minibatches()
        self.module = problem.model()
        self.model: nn.Module = self.module
        self.optimizer = torch.optim.SGD(
            self.module.parameters(), SIGMA, momentum=KAPPA, weight_decay=NU, nesterov=True
        )
        self.bytes = sum(p.nbytes for p in self.module.parameters())

    def train(self) -> None:
        index = self.minibatches.draw()
        images, labels = self.dataset.train_images[index], self.dataset.train_labels[index]
        self.optimizer.zero_grad()
        cross_entropy(self.model(images), labels, reduction="sum").backward()
        self.optimizer.step()


class Ddp(Loop):
    """DistributedDataParallel."""

    def __init__(self, problem: Problem, group: Group) -> None:
        super().__init__(problem, group)
        self.model = DistributedDataParallel(self.module)

    def step(self, t: int) -> None:
        self.train()
        self.payload += self.bytes


class PostLocal(Loop):
    """PostLocalSGD after its warm-up."""

    def __init__(self, problem: Problem, group: Group, period: int) -> None:
        super().__init__(problem, group)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "When period is 1")  # it says: take DDP
            self.averager = PeriodicModelAverager(period=period, warmup_steps=0)
        self.waited_s = 0.0

    def step(self, t: int) -> None:
        self.train()
        self.payload += self.bytes * (self.averager.step % self.averager.period == 0)
        started = time.perf_counter()
        self.averager.average_parameters(self.module.parameters())
        assert self.waited_s is not None
        self.waited_s += time.perf_counter() - started


class NaiveEasgd(Loop):
    """Synchronous EASGD with a centre copy, parameter by parameter."""

    def __init__(self, problem: Problem, group: Group) -> None:
        super().__init__(problem, group)
        self.centre = [p.detach().clone() for p in self.module.parameters()]
        self.waited_s = 0.0

    @torch.no_grad()
    def pull(self) -> None:
        for p, centre in zip(self.module.parameters(), self.centre, strict=True):
            difference = p - centre
            total = difference.clone()
            started = time.perf_counter()
            dist.all_reduce(total)
            assert self.waited_s is not None
            self.waited_s += time.perf_counter() - started
            centre += 2 * TAU / LAM * total
            p -= 2 * SIGMA / LAM * difference

    def step(self, t: int) -> None:
        self.pull()
        self.train()
        self.payload += self.bytes


def methods() -> dict[str, Callable[[Problem, Group], Method]]:
    """By the name in the table."""
    ours: dict[str, Callable[[Problem, Group], Method]] = {
        f"consensus {potential}, period {period}": (
            lambda problem, group, potential=potential, period=period: OurConsensus(
                problem, group, potential, period
            )
        )
        for period in (1, 10)
        for potential in (POTENTIALS_TIMED if period == 1 else ("quad", "tan"))
    }
    peers: dict[str, Callable[[Problem, Group], Method]] = {
        "ddp": Ddp,
        "postlocal, period 1": lambda problem, group: PostLocal(problem, group, 1),
        "postlocal, period 10": lambda problem, group: PostLocal(problem, group, 10),
        "naive easgd": NaiveEasgd,
    }
    sent: dict[str, Callable[[Problem, Group], Method]] = {
        name: lambda problem, group, sent=sent: OurConsensus(problem, group, "quad", 1, sent)
        for name, sent in (("consensus quad over Gloo", "plain"), ("  the same in bf16", "bf16"))
    }
    return {"local": Local} | ours | sent | peers


# ---- how it is timed


@dataclass
class Block:
    """One method in one round."""

    seconds: float  # of one step, on the slowest rank
    waited_s: float  # of one step, NaN if unknown
    payload: float  # bytes of one step
    memory: int  # bytes
    error: float | None  # of sums, on rank 0


class Memory:
    """The largest growth of this process while the context is open, sampled. Bytes."""

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
    memory = 0
    if sample:  # the sampler costs time: not while it counts
        with Memory() as watched:
            method = make()
            for t in range(2):
                method.step(t)
        memory = watched.peak
    else:
        method = make()
        for t in range(2):
            method.step(t)
    for t in range(2, 10):
        if steps >= 10:
            method.step(t)
    waited, payload = method.waited_s, method.payload
    group.barrier()
    started = time.perf_counter()
    for t in range(10, 10 + steps):
        method.step(t)
    mine = (time.perf_counter() - started) / steps
    wait = float("nan") if waited is None or method.waited_s is None else method.waited_s - waited
    numbers = torch.tensor(
        [mine, wait / steps, (method.payload - payload) / steps, memory], dtype=torch.float64
    )
    seconds, waited_s, sent, peak = group.gather(numbers).amax(0).tolist()
    return Block(seconds, waited_s, sent, int(peak), method.error() if sample else None)


@dataclass
class Row:
    """What is printed of one method on one workload."""

    workload: str
    method: str
    parameters: int
    processes: int
    ms: float
    ratio_to_local: float
    samples_per_s: float
    bytes_per_iteration: float
    waiting: float | None
    peak_mib: float
    error: float | None
    rounds: int


def compare(workload: str, launch: Launch, group: Group, rounds: int, seconds: float) -> list[Row]:
    """All methods on one workload, interleaved."""
    problem = Problem(workload, launch)
    parameters = sum(p.numel() for p in problem.model().parameters())
    table = methods()
    first = block(lambda: Local(problem, group), 2, group, sample=False)
    steps = int(min(200, max(2, seconds / first.seconds)))
    steps = steps // 10 * 10 if steps >= 10 else steps
    found: dict[str, list[Block]] = {name: [] for name in table}
    for i in range(rounds):
        for name, make in table.items():
            # One step in ten communicates: of fewer steps a period of 10 would show none or all.
            n = max(10, steps) if name.endswith("period 10") else steps
            found[name].append(
                block(lambda make=make: make(problem, group), n, group, sample=i == 0)
            )
            gc.collect()
    rows = []
    for name, blocks in found.items():
        ratios = [b.seconds / a.seconds for a, b in zip(found["local"], blocks, strict=True)]
        ms = 1e3 * statistics.median(b.seconds for b in blocks)
        wait = statistics.median(b.waited_s / b.seconds for b in blocks)
        rows.append(
            Row(
                workload,
                name,
                parameters,
                launch.size,
                ms,
                statistics.median(ratios),
                launch.size * BATCH * 1e3 / ms,
                blocks[0].payload,
                None if wait != wait else wait,
                blocks[0].memory / 2**20,
                blocks[0].error,
                rounds,
            )
        )
    return rows


def show(rows: list[Row]) -> None:
    head = f"{'workload':9} {'method':26} {'ms':>9} {'/ local':>8} {'samples/s':>10} {'sent':>10}"
    print(f"{head} {'waiting':>8} {'memory':>10} {'error':>8}")
    for row in rows:
        wait = "" if row.waiting is None else f"{100 * row.waiting:.0f} %"
        error = "" if row.error is None else f"{row.error:.1e}"
        print(
            f"{row.workload:9} {row.method:26} {row.ms:9.2f} {row.ratio_to_local:8.2f} "
            f"{row.samples_per_s:10.0f} {row.bytes_per_iteration / 2**20:6.2f} MiB "
            f"{wait:>8} {row.peak_mib:6.0f} MiB {error:>8}".rstrip(),
            flush=True,
        )


def draw(rows: list[Row], path: str) -> None:
    """Bars: how many times the local step each method takes, one panel per workload."""
    from matplotlib.figure import Figure

    workloads = list(dict.fromkeys(row.workload for row in rows))
    figure = Figure(figsize=(5 * len(workloads), 4.5), layout="constrained")
    for axes, workload in zip(
        figure.subplots(1, len(workloads), squeeze=False)[0], workloads, strict=True
    ):
        own = [row for row in rows if row.workload == workload][::-1]
        colors = ["C0" if row.method.startswith("consensus") else "C7" for row in own]
        bars = axes.barh(
            [row.method for row in own], [row.ratio_to_local for row in own], color=colors
        )
        axes.bar_label(bars, fmt="%.2f", padding=2)
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set_title(f"{workload}, n = {own[0].parameters:,}, {own[0].processes} processes")
        axes.set_xlabel("step time / step time of independent workers")
        axes.margins(x=0.12)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench")
    parser.add_argument("--quick", action="store_true", help="LeNet-5 alone, few rounds")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a block, about")
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    parser.add_argument("--plot", metavar="FILE", help="draw the ratios (PNG, PDF, SVG)")
    options = parser.parse_args()
    if options.quick:
        options.workloads, options.rounds, options.seconds = ["lenet5"], 5, 0.5
    launch = Launch.from_environment()
    group = open_group(launch, "gloo", torch.device("cpu"), 600.0)
    rows: list[Row] = []
    for workload in options.workloads:
        new = compare(workload, launch, group, options.rounds, options.seconds)
        rows += new
        if launch.rank == 0:
            show(new)
    if launch.rank == 0:
        environment = {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "device": "cpu",
        }
        if options.json:
            content = {"environment": environment, "rows": [asdict(row) for row in rows]}
            Path(options.json).write_text(json.dumps(content, indent=2) + "\n")
        if options.plot:
            draw(rows, options.plot)
    group.barrier()
    group.close()


if __name__ == "__main__":
    main()
