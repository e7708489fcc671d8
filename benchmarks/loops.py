"""Plain PyTorch training loops with a call after the optimizer step: Coupling, and its peers.

coupling ...      `consensus.Coupling`
averager ...      torch's PeriodicModelAverager, as PostLocalSGD uses it after its warm-up
local sgd ...     accelerate's LocalSGD; "like local sgd": what it does
"""

import time
import warnings
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.nn.functional import cross_entropy

from benchmarks.harness import KAPPA, NU, SIGMA, Problem
from consensus import Coupling
from consensus.comm import Group


class Method(ABC):
    """A training method; `step(t)` is iteration t on this rank.

    Attributes:
        waited_s: Seconds in which this rank waited for others; None where torch hides them.
        payload: Bytes that this rank has passed to collectives.
    """

    waited_s: float | None = None
    payload: float = 0

    @abstractmethod
    def step(self, t: int) -> None: ...

    def error(self) -> float | None:
        """The relative error of the sums in the Euclidean norm; None where torch sends them."""
        return None

    def close(self) -> None:  # noqa: B027
        """Leave what the method has joined; a collective."""


class Loop(Method):
    """A training loop without communication.

    Args:
        problem: The model and the images.
        group: The processes.
        period: Iterations from one communication to the next, for `payload`; None: there is none.

    Attributes:
        called_s: CPU time in `after`.
        bytes: Of the parameters.
    """

    called_s = 0.0

    def __init__(self, problem: Problem, group: Group, period: int | None = None) -> None:
        self.group, self.period = group, period
        self.dataset, (self.minibatches,) = problem.dataset, problem.minibatches([group.rank])
        self.module = problem.model()
        self.model: nn.Module = self.module
        self.optimizer = torch.optim.SGD(
            self.module.parameters(), SIGMA, momentum=KAPPA, weight_decay=NU, nesterov=True
        )
        self.bytes = sum(p.nbytes for p in self.module.parameters())

    def train(self) -> None:
        """A minibatch: gradient and optimizer step."""
        index = self.minibatches.draw()
        batch = self.dataset.train.select(index)
        self.optimizer.zero_grad()
        cross_entropy(self.model(batch.inputs), batch.targets, reduction="sum").backward()
        self.optimizer.step()

    def after(self) -> None:
        """The call of the method after the optimizer step; none for the plain loop."""

    def step(self, t: int) -> None:
        self.train()
        started = time.process_time()
        self.after()
        self.called_s += time.process_time() - started
        if self.period is not None and (t + 1) % self.period == 0:
            self.payload += self.bytes


class Coupled(Loop):
    """The loop with `Coupling`."""

    def __init__(self, problem: Problem, group: Group, **options: Any) -> None:
        super().__init__(problem, group, options["period"])
        self.coupling = Coupling(self.module, self.optimizer, **options)
        self.bytes = sum(part._server.sum.num_bytes for part in self.coupling._parts)
        self.after, self.close = self.coupling.step, self.coupling.close


class Averager(Loop):
    """The loop with torch's PeriodicModelAverager, whose first call communicates."""

    def __init__(self, problem: Problem, group: Group, period: int) -> None:
        super().__init__(problem, group, period)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "When period is 1")  # torch recommends DDP then
            self.averager = PeriodicModelAverager(period=period, warmup_steps=0)
        self.waited_s = 0.0

    def after(self) -> None:
        started = time.perf_counter()
        self.averager.average_parameters(self.module.parameters())
        assert self.waited_s is not None
        self.waited_s += time.perf_counter() - started


class LikeLocalSgd(Loop):
    """Local SGD as accelerate does it: a barrier, and the mean of a copy of each parameter."""

    def __init__(self, problem: Problem, group: Group, period: int) -> None:
        super().__init__(problem, group, period)
        self.calls = 0

    def after(self) -> None:
        self.calls += 1
        assert self.period is not None
        if self.calls % self.period:
            return
        dist.barrier()
        for parameter in self.module.parameters():
            mean = parameter.data.clone()
            dist.all_reduce(mean)
            parameter.data = mean.div_(self.group.size)


class Accelerate(Loop):
    """The loop with accelerate's LocalSGD."""

    def __init__(self, problem: Problem, group: Group, period: int) -> None:
        super().__init__(problem, group, period)
        from accelerate import Accelerator
        from accelerate.local_sgd import LocalSGD

        accelerator = Accelerator(cpu=True)
        self.model = accelerator.prepare(self.module)
        self.local_sgd = LocalSGD(accelerator, self.model, period)
        assert accelerator.num_processes == group.size, "accelerate sees no torchrun"
        self.local_sgd.__enter__()
        self.after = self.local_sgd.step
