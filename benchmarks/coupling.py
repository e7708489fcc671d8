"""The overhead of `Coupling` on top of a plain PyTorch loop, beside other averaging of parameters.

Started as `scripts/bench coupling`, which starts itself under torchrun. Each method is the loop of
benchmarks/methods.py with one call after the optimizer step:

    coupling ...      `Coupling.step`; "late": `overlap=False`
    averager ...      torch's PeriodicModelAverager, as PostLocalSGD uses it after its warm-up
    local sgd ...     accelerate's LocalSGD; "like local sgd": a loop that does what it does

Data flow: each method is built once and then timed in turn with the plain loop, block after block;
every block starts at a barrier. A ratio compares two neighbouring blocks, so that other load of the
machine affects both; medians over the rounds are printed. The CPU time is that of all threads of a
process, without the waiting for another one but for the first 0.1 ms. Blocks take the mean over the
processes of the CPU time, and the wall time of the slowest process. "call" is the CPU time of the
call alone over that of the rest of its loop: the overhead less its effects on the caches.

Memory is counted in vectors of n parameters beyond model, gradient and optimizer: what the process
keeps, with its share of memory that all processes of the host share, and the most that a call holds
in addition. Operations are those of torch in one call.
"""

import gc
import importlib.util
import statistics
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import harness
from benchmarks.compare import WORKLOADS
from benchmarks.harness import CPU, Problem, table
from benchmarks.methods import Loop
from consensus import Coupling
from consensus.comm import Group, Launch, open_group

COLUMNS = {
    "workload": "<9", "method": "<32", "ms": ">8.2f", "CPU ms": ">8.2f", "wall / plain": ">13.3f",
    "CPU / plain": ">12.3f", "call": ">7.1%", "operations": ">11.1f", "vectors": ">8.2f",
    "in a call": ">10.2f",
}  # fmt: skip
PERIODS = (1, 10)
CALLS = 10  # divided by all periods


class Plain(Loop):
    """A loop without communication."""

    called_s = 0.0  # CPU time in `after`

    def step(self, t: int) -> None:
        self.train()
        started = time.process_time()
        self.after()
        self.called_s += time.process_time() - started

    def after(self) -> None:
        """The call of a method after the optimizer step; none for the plain loop."""

    def close(self) -> None:
        """Leave the group of the method, if it has one."""


class Coupled(Plain):
    """The loop with `Coupling`."""

    def __init__(self, problem: Problem, group: Group, options: dict[str, Any]) -> None:
        super().__init__(problem, group)
        self.coupling = Coupling(self.module, self.optimizer, **options)
        self.after, self.close = self.coupling.step, self.coupling.close


class Averager(Plain):
    """The loop with torch's PeriodicModelAverager."""

    def __init__(self, problem: Problem, group: Group, period: int) -> None:
        super().__init__(problem, group)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "When period is 1")  # torch recommends DDP then
            self.averager = PeriodicModelAverager(period=period, warmup_steps=0)

    def after(self) -> None:
        self.averager.average_parameters(self.module.parameters())


class LocalSgd(Plain):
    """Local SGD as accelerate does it: a barrier, and the mean of a copy of each parameter."""

    def __init__(self, problem: Problem, group: Group, period: int) -> None:
        super().__init__(problem, group)
        self.period, self.calls = period, 0

    def after(self) -> None:
        self.calls += 1
        if self.calls % self.period:
            return
        dist.barrier()
        for parameter in self.module.parameters():
            mean = parameter.data.clone()
            dist.all_reduce(mean)
            parameter.data = mean.div_(self.group.size)


class Accelerate(Plain):
    """The loop with accelerate's LocalSGD."""

    def __init__(self, problem: Problem, group: Group, period: int) -> None:
        super().__init__(problem, group)
        from accelerate import Accelerator
        from accelerate.local_sgd import LocalSGD

        self.model = Accelerator(cpu=True).prepare(self.module)
        self.local_sgd = LocalSGD(Accelerator(cpu=True), self.model, period)
        self.local_sgd.__enter__()
        self.after = self.local_sgd.step


def methods() -> dict[str, Callable[[Problem, Group], Plain]]:
    """The constructors of all methods, by the name in the table."""
    found: dict[str, Callable[[Problem, Group], Plain]] = {}
    for period in PERIODS:
        for potential in ("quad", "tan", "cubic", "tan_sep"):
            for overlap in (True, False):
                options = {"potential": potential, "period": period, "overlap": overlap}
                name = f"coupling {potential}, period {period}{'' if overlap else ', late'}"
                found[name] = lambda problem, group, own=options: Coupled(problem, group, own)
        found[f"averager, period {period}"] = lambda problem, group, period=period: Averager(
            problem, group, period
        )
        absent = importlib.util.find_spec("accelerate") is None
        kind, name = (LocalSgd, "like local sgd") if absent else (Accelerate, "local sgd")
        found[f"{name}, period {period}"] = lambda problem, group, kind=kind, period=period: kind(
            problem, group, period
        )
    return found


# ---- counting


class Count(TorchDispatchMode):
    """Counts operations while it is active, and the bytes that they have allocated, at the most."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.most = self._bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        given = {_place(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for new in tree_leaves(result):
            if isinstance(new, Tensor) and _place(new) not in given:
                self._bytes += new.nbytes
                self.most = max(self.most, self._bytes)
                weakref.finalize(new, self._free, new.nbytes)
        return result

    def _free(self, nbytes: int) -> None:
        self._bytes -= nbytes


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def storages(share: float) -> dict[int, float]:
    """Bytes of the storages of all tensors of this process; those of a mapped file by a share."""
    gc.collect()
    found = {}
    for tensor in gc.get_objects():
        # By its type: `isinstance` asks deprecated objects for their class, and they warn.
        # A subclass, such as the fake tensors of torch's tracing, may have no storage of its own.
        if type(tensor) in (Tensor, Parameter) and tensor.device.type == "cpu":
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes() * (share if storage.filename else 1.0)
    return found


def vectors_kept(make: Callable[[], Plain], n: int, share: float) -> tuple[Plain, float]:
    """A method after some iterations, and the n-vectors that it keeps beside those of its loop."""
    known = set(storages(share))
    method = make()
    for t in range(CALLS):
        method.step(t)
    own = list(method.module.parameters())
    own += [p.grad for p in own if p.grad is not None]
    own += [x for s in method.optimizer.state.values() for x in s.values()]
    known |= {tensor.untyped_storage().data_ptr() for tensor in own}
    kept = sum(size for place, size in storages(share).items() if place not in known)
    return method, kept / (n * own[0].element_size())


# ---- timing


@dataclass
class Row:
    """The measurements of one method on one workload."""

    workload: str
    method: str
    parameters: int
    processes: int
    ms: float
    cpu_ms: float
    wall_ratio: float
    cpu_ratio: float
    call: float  # CPU time of the call over that of the rest of the loop
    operations: float  # of a call, the mean over the largest period
    vectors: float
    temporary: float  # vectors, the most
    rounds: int

    def cells(self) -> tuple[object, ...]:
        """By COLUMNS."""
        times = (self.ms, self.cpu_ms, self.wall_ratio, self.cpu_ratio, self.call)
        counts = (self.operations, self.vectors, self.temporary)
        return self.workload, self.method, *times, *counts


def block(method: Plain, calls: int, group: Group) -> tuple[float, float, float]:
    """Seconds of an iteration: of the slowest process, of the CPU, of the CPU in the call.

    A collective.
    """
    group.barrier()
    method.called_s = 0.0
    wall, cpu = time.perf_counter(), time.process_time()
    for t in range(calls):
        method.step(t)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    own = torch.tensor([wall, cpu, method.called_s], dtype=torch.float64)
    every = group.gather(own) / calls
    return float(every[:, 0].amax()), float(every[:, 1].mean()), float(every[:, 2].mean())


def measure(
    workload: str, names: Sequence[str], group: Group, rounds: int, seconds: float
) -> list[Row]:
    """The plain loop and the methods of these names on one workload, in turn."""
    problem = Problem(*WORKLOADS[workload])
    plain = Plain(problem, group)
    parameters = sum(p.numel() for p in plain.module.parameters())
    first = [block(plain, CALLS, group) for _ in range(2)]
    calls = CALLS * max(1, round(min(500.0, seconds / first[-1][0]) / CALLS))
    rows, makers = [], methods()
    for name in names:
        make = makers[name]
        method, kept = vectors_kept(
            lambda make=make: make(problem, group), parameters, 1 / group.size
        )
        pairs = [(block(plain, calls, group), block(method, calls, group)) for _ in range(rounds)]
        count = Count()
        for _ in range(CALLS):
            method.train()
            with count:
                method.after()
        method.close()
        rows.append(
            Row(
                workload=workload,
                method=name,
                parameters=parameters,
                processes=group.size,
                ms=1e3 * statistics.median(b[0] for _, b in pairs),
                cpu_ms=1e3 * statistics.median(b[1] for _, b in pairs),
                wall_ratio=statistics.median(b[0] / a[0] for a, b in pairs),
                cpu_ratio=statistics.median(b[1] / a[1] for a, b in pairs),
                call=statistics.median(b[2] / (b[1] - b[2]) for _, b in pairs),
                operations=count.operations / CALLS,
                vectors=kept,
                temporary=count.most / (parameters * problem.dtype.itemsize),
                rounds=rounds,
            )
        )
        if group.rank == 0 and len(names) > 1:
            head, line = table(COLUMNS, [rows[-1].cells()]).splitlines()
            print(line if len(rows) > 1 else f"{head}\n{line}", flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, start the ranks, measure, print, write."""
    parser = harness.parser("coupling", quick="LeNet-5 alone, few rounds")
    parser.add_argument("--processes", type=int, default=2, help="with one thread each")
    workloads = ["lenet5", "mlp10m"]
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=workloads)
    parser.add_argument("--methods", nargs="+", metavar="TEXT", help="those whose name has a TEXT")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.5, help="of a block, about")
    options = parser.parse_args(arguments)
    harness.start_ranks("coupling", options.processes, arguments)
    if options.quick:
        options.workloads, options.rounds, options.seconds = ["lenet5"], 3, 0.2
    names = [n for n in methods() if any(text in n for text in options.methods or [""])]
    if not names:
        parser.error(f"`--methods` is {' '.join(options.methods)}; no name has it")
    group = open_group(Launch.from_environment(), "gloo", CPU, 600.0)
    rows: list[Row] = []
    for workload in options.workloads:
        rows += measure(workload, names, group, options.rounds, options.seconds)
    if group.rank == 0:
        harness.write_json(options.json, {"environment": harness.environment(), "rows": rows})
    group.barrier()
    group.close()


if __name__ == "__main__":
    main()
