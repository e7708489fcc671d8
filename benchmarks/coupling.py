"""The overhead of `Coupling` on top of a plain PyTorch loop, beside other averaging of parameters.

Started as `scripts/bench coupling`, which starts itself under torchrun. Each method is the loop of
benchmarks/loops.py with one call after the optimizer step:

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
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import harness
from benchmarks.compare import WORKLOADS
from benchmarks.harness import CPU, Problem, table
from benchmarks.loops import Accelerate, Averager, Coupled, LikeLocalSgd, Loop
from consensus.comm import Group, Launch, open_group

COLUMNS = {
    "workload": "<9", "method": "<32", "ms": ">8.2f", "CPU ms": ">8.2f", "wall / plain": ">13.3f",
    "CPU / plain": ">12.3f", "call": ">7.1%", "operations": ">11.1f", "vectors": ">8.2f",
    "in a call": ">10.2f",
}  # fmt: skip
PERIODS = (1, 10)
CALLS = 10  # divided by all periods


def methods() -> dict[str, Callable[[Problem, Group], Loop]]:
    """The constructors of all methods, by the name in the table."""
    found: dict[str, Callable[[Problem, Group], Loop]] = {}
    absent = importlib.util.find_spec("accelerate") is None
    kind, name = (LikeLocalSgd, "like local sgd") if absent else (Accelerate, "local sgd")
    for period in PERIODS:
        for potential in ("quad", "tan", "cubic", "tan_sep"):
            for overlap in (True, False):
                options = {"potential": potential, "period": period, "overlap": overlap}
                late = "" if overlap else ", late"
                found[f"coupling {potential}, period {period}{late}"] = partial(Coupled, **options)
        found[f"averager, period {period}"] = partial(Averager, period=period)
        found[f"{name}, period {period}"] = partial(kind, period=period)
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


def vectors_kept(make: Callable[[], Loop], n: int, share: float) -> tuple[Loop, float]:
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


def block(method: Loop, calls: int, group: Group) -> tuple[float, float, float]:
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
    plain = Loop(problem, group)
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
    harness.add_methods(parser)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.5, help="of a block, about")
    options = parser.parse_args(arguments)
    harness.start_ranks("coupling", options.processes, arguments)
    if options.quick:
        options.workloads, options.rounds, options.seconds = ["lenet5"], 3, 0.2
    names = harness.chosen(methods(), options)
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
