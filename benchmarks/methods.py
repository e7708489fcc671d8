"""The training methods that benchmarks/compare.py compares, each one step at a time.

local           independent workers, no communication: the limit
plain loop      the same as a loop of torch, the basis of `Coupling` and of others' methods
consensus ...   Algorithm 1 with a potential and a period
coupling ...    `Coupling` in a plain loop
ddp             torch.nn.parallel.DistributedDataParallel
postlocal ...   torch's PostLocalSGD: PeriodicModelAverager with a period
naive           synchronous EASGD as it is usually written, one all-reduce per parameter tensor
others          benchmarks/peers.py
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks import peers
from benchmarks.harness import KAPPA, LAM, NU, SIGMA, TAU, Problem
from benchmarks.loops import Accelerate, Averager, Coupled, Loop, Method
from consensus import POTENTIALS, Layerwise
from consensus.algorithm import Msgd
from consensus.comm import Group, Pending, ProcessGroup, RepeatedSum, Solo
from consensus.worker import Worker

POTENTIALS_TIMED = ("quad", "cubic", "tan", "log", "tan_sep")


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
    """A group that counts the bytes sent and the seconds waited.

    With `sent`, sums do not use shared memory: "plain" is float32, "bf16" and "int8" are rounded,
    and "tree" has the fixed order of `deterministic=true`.
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

    def repeated_sum(self, numel: int, like: Tensor, exact: int = 0) -> RepeatedSum:
        if self._sent is None:
            return _TimedSum(self._group.repeated_sum(numel, like, exact), self)
        assert isinstance(self._group, ProcessGroup)
        where = self._group.handle, self._group.device, 600.0
        tree = self._sent == "tree"
        compress = None if self._sent in ("plain", "tree") else self._sent
        group = ProcessGroup(*where, shared_memory=False, compress=compress, tree=tree)
        return _TimedSum(group.repeated_sum(numel, like, exact), self)

    def min_(self, tensor: Tensor) -> Tensor:
        self.payload += tensor.nbytes
        with self.waiting():
            return self._group.min_(tensor)


class Local(Method):
    """Independent workers: momentum SGD without communication."""

    def __init__(self, problem: Problem, group: Group) -> None:
        oracle = problem.oracle([group.rank])
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
        self.group, self.sent = group, sent
        self.meter = Metered(group, sent)
        self.algorithm = problem.consensus(potential, [group.rank], self.meter, period=period)

    def step(self, t: int) -> None:
        self.algorithm.step(t)
        self.waited_s, self.payload = self.meter.waited_s, self.meter.payload

    def error(self) -> float | None:
        """The relative error of the next sum of forces against the same sum in float64."""
        if self.sent is None:
            return None
        worker, server = self.algorithm.worker, self.algorithm.server
        force = server.phi.grad(server.u - worker.z).sum(0)
        exact = self.group.sum_(force.double())
        repeated = self.meter.repeated_sum(len(force), force)
        repeated.message.copy_(force)
        found = repeated.start().wait()
        return float(torch.linalg.vector_norm(found - exact) / torch.linalg.vector_norm(exact))


class Ddp(Loop):
    """DistributedDataParallel."""

    def __init__(self, problem: Problem, group: Group) -> None:
        super().__init__(problem, group, period=1)
        self.model = DistributedDataParallel(self.module)


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


Make = Callable[[Problem, Group], Method]


def methods(others: bool = False) -> dict[str, Make]:
    """The constructors of all methods, by the name in the table; `others`: of packages too."""
    ours: dict[str, Make] = {}
    for period in (1, 10):
        for potential in POTENTIALS_TIMED if period == 1 else ("quad", "tan"):
            name = f"{potential}, period {period}"
            ours[f"consensus {name}"] = partial(OurConsensus, potential=potential, period=period)
    for period in (1, 10):
        for potential in ("quad", "tan"):
            name = f"coupling {potential}, period {period}"
            ours[name] = partial(Coupled, potential=potential, period=period)
    sent: dict[str, Make] = {
        name: partial(OurConsensus, potential="quad", period=1, sent=sent)
        for name, sent in (
            ("consensus quad over Gloo", "plain"),
            ("  the same in bf16", "bf16"),
            ("  in int8", "int8"),
            ("  in a fixed order", "tree"),
        )
    }
    theirs: dict[str, Make] = {"ddp": Ddp}
    kinds: dict[str, Callable[..., Method]] = {"postlocal": Averager}
    if others:
        kinds["accelerate local sgd"] = Accelerate
        kinds["torchft local sgd"] = partial(peers.Torchft, make=peers.local_sgd)
        kinds["torchft diloco"] = partial(peers.Torchft, make=peers.diloco)
    for kind, make in kinds.items():
        for period in (1, 10):
            theirs[f"{kind}, period {period}"] = partial(make, period=period)
    theirs["naive easgd"] = NaiveEasgd
    return {"local": Local, "plain loop": Loop} | ours | sent | theirs
