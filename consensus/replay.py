"""Iterations of one process on a GPU, recorded once as a CUDA graph and replayed.

`Replay` is for a run; a population records itself, by `Kinds`.

With a model as small as LeNet-5 an iteration is some hundred kernels of a few microseconds, and
Python takes ten times as long to launch them as they take to run. A replay launches them all at
once. What differs from one iteration to the next lies in memory that the host fills before: the
indices of the minibatches, t, and the step sizes that follow a schedule.

The first iterations run as they are, since libraries set themselves up in them; recording runs
nothing. The workers' gradients become branches of the graph, which run side by side. So the same
operations happen in both ways to run, each worker's in the same order.
"""

import gc
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from consensus.algorithm import Algorithm, Consensus
from consensus.problem import Batch, MinibatchRisk

Call = Callable[[], object]
Record = Callable[[Call], Call]
"""Takes a function without running it, and returns what does the same on the same memory."""

WARM_UP = 3
"""Iterations of each kind that run as they are."""


def why_not(algorithm: Algorithm, processes: int) -> str | None:
    """What stands in the way of replaying its steps; None if nothing does."""
    if algorithm.u.device.type != "cuda":
        return "the device is no GPU"
    if processes > 1:
        return f"there are {processes} processes, and their messages are not recorded"
    if not algorithm.explicit:
        return "its equations are solved until numbers on the host say so"
    oracle = algorithm.worker.oracle
    if not isinstance(oracle, MinibatchRisk):
        return f"{type(oracle).__name__} does not say which samples a minibatch has"
    if oracle.model_draws:
        return "the model draws random numbers (dropout)"
    return None


def cuda_graph(step: Call) -> Call:
    """Record a step that reads no number of the device on the host; what is replayed is one launch.

    Raises:
        RuntimeError: If the step does something that cannot be recorded.
    """
    gc.collect()  # a tensor that is freed while recording could end the recording
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


class Kinds:
    """Calls of a few kinds that are run at first, then recorded, and replayed from then on.

    Args:
        record: What records a call; None: nothing is recorded.
        refused: Gets a line if a call cannot be recorded; all then run as they are.

    Attributes:
        plain: Whether nothing is recorded.
    """

    def __init__(self, record: Record | None, refused: Callable[[str], None]) -> None:
        self._record = record
        self._refused = refused
        self.plain = record is None
        self._done: dict[Hashable, int] = {}
        self._replays: dict[Hashable, Call] = {}

    def __call__(self, kind: Hashable, run: Call) -> None:
        """Run a call, or replay what it does."""
        if kind not in self._replays and not self.plain:
            done = self._done.setdefault(kind, 0)
            self._done[kind] += 1
            if done == WARM_UP:
                self._keep(kind, run)
        self._replays.get(kind, run)()

    def _keep(self, kind: Hashable, run: Call) -> None:
        assert self._record is not None
        try:
            self._replays[kind] = self._record(run)
        except RuntimeError as error:
            first_line = str(error).partition("\n")[0]
            self._refused(f"cuda_graph: an iteration cannot be recorded ({first_line}); none is")
            self.plain = True
            self._replays.clear()


class Replay:
    """Calls of `Algorithm.step`, replayed from the fourth of each kind on.

    There are two kinds, iterations with and without coupling (`period`).

    Args:
        algorithm: For which `why_not` has no answer.
        after: Belongs to every iteration and is recorded with it; gets t, a number or an int64
            tensor ().
        record: What records a step.
        refused: Gets a line if a step cannot be recorded, as with a model that reads a number on
            the host; the iterations then run as they are.
        side_by_side: Whether the gradients of the workers are branches of the graph.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        after: Callable[[int | Tensor], None] | None = None,
        record: Record = cuda_graph,
        *,
        refused: Callable[[str], None] = warnings.warn,
        side_by_side: bool = True,
    ) -> None:
        oracle = algorithm.worker.oracle
        assert isinstance(oracle, MinibatchRisk), why_not(algorithm, 1)
        device = algorithm.u.device
        self.algorithm = algorithm
        self.oracle = oracle
        self.after = after
        self.record = record
        self.period = algorithm.period if isinstance(algorithm, Consensus) else 1
        oracle.risk.side_by_side = side_by_side and device.type == "cuda"
        size = len(oracle.minibatches) * oracle.batch_size
        self._index = torch.zeros(size, dtype=torch.int64, device=device)
        self._t = torch.zeros((), dtype=torch.int64, device=device)
        self._schedules: dict[str, Callable[[int], Any]] = {}
        for name in ("tau", "sigma", "lam"):
            size_of_step = getattr(algorithm, name, None)
            if callable(size_of_step):
                self._schedules[name] = size_of_step
        self._sizes = {
            name: torch.zeros((), dtype=torch.float64, device=device) for name in self._schedules
        }
        self._kinds = Kinds(self._record, refused)

    def step(self, t: int) -> None:
        """Iteration t."""
        if self._kinds.plain:
            self.algorithm.step(t)
            if self.after is not None:
                self.after(t)
            return
        torch.cat([source.draw() for source in self.oracle.minibatches], out=self._index)
        self._t.fill_(t)
        for name, schedule in self._schedules.items():
            self._sizes[name].fill_(schedule(t))
        self._kinds(t % self.period == 0, lambda: self._run(t))

    def _record(self, run: Call) -> Call:
        before = self._addresses()
        try:
            replay = self.record(run)
        except RuntimeError:
            self.oracle.risk.side_by_side = False
            raise
        assert self._addresses() == before, "the step moved its state to other memory"
        return replay

    def _run(self, t: int) -> None:
        with self._from_memory():
            self.algorithm.step(t)
            if self.after is not None:
                self.after(self._t)

    @contextmanager
    def _from_memory(self) -> Iterator[None]:
        """Have the algorithm read its minibatches and scheduled sizes where `step` puts them."""
        worker = self.algorithm.worker
        worker.oracle = _Resident(self.oracle, self._index)
        for name, size in self._sizes.items():
            setattr(self.algorithm, name, size)
        try:
            yield
        finally:
            worker.oracle = self.oracle
            for name, schedule in self._schedules.items():
                setattr(self.algorithm, name, schedule)

    def _addresses(self) -> dict[str, int]:
        state = self.algorithm.state_dict() | {"losses": self.oracle.losses}
        return {key: value.data_ptr() for key, value in state.items() if not key.startswith(_DRAWN)}


_DRAWN = "worker/oracle"
"""What an oracle says of its draws is made anew each time it is asked."""


class _Resident:
    """An oracle whose minibatches are what the buffer says."""

    def __init__(self, oracle: MinibatchRisk, index: Tensor) -> None:
        self._oracle, self._index = oracle, index

    def draw(self) -> Batch:
        return self._oracle.gather(self._index)

    def gradient(self, points: Tensor, batch: Batch) -> Tensor:
        return self._oracle.gradient(points, batch)

    def state_dict(self) -> dict[str, Tensor]:
        return self._oracle.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._oracle.load_state_dict(state)
