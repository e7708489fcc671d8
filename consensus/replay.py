"""CUDA graphs of one process: an iteration is recorded once and then replayed.

`Replay` serves a run; a population uses `RecordedCalls` itself.

With a model as small as LeNet-5 an iteration is some hundred kernels of a few microseconds, and
Python takes ten times as long to launch them as they take to run. A replay launches all of them at
once. The numbers that differ between iterations lie in memory that the host fills before: the
indices of the minibatches, t, and the step sizes that follow a schedule.

The first iterations run eagerly, because libraries initialize themselves in them; recording
executes nothing. The workers' gradients become parallel branches of the graph. Both modes execute
the same operations, each worker's in the same order.
"""

import gc
import warnings
from collections import Counter
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from consensus.algorithm import Algorithm, Consensus
from consensus.delayed import DelayedConsensus
from consensus.problem import MinibatchRisk

Call = Callable[[], object]
Record = Callable[[Call], Call]
"""Records a function without running it; returns a function that replays it on the same memory."""

WARM_UP = 3  # eager calls of each kind before its recording


def obstacle_to_replay(algorithm: Algorithm, processes: int) -> str | None:
    """The reason why the steps of an algorithm cannot be replayed; None if they can."""
    if algorithm.u.device.type != "cuda":
        return "the device is no GPU"
    if processes > 1:
        return f"there are {processes} processes, and their messages are not recorded"
    if isinstance(algorithm, DelayedConsensus):
        return "with a delay an iteration ends a sum that another one has begun"
    if not algorithm.closed_form:
        return "a solver or an optimizer of torch reads numbers on the host"
    oracle = algorithm.worker.oracle
    if not isinstance(oracle, MinibatchRisk):
        return f"{type(oracle).__name__} does not provide the indices of its minibatches"
    if any(source.every > 1 for source in oracle.minibatches):
        return "some workers rest in some iterations"
    if oracle.ahead is not None:
        return "the samples are read from storage"
    if oracle.model_draws:
        return "the model draws random numbers, such as dropout"
    return None


def cuda_graph(step: Call) -> Call:
    """Record a step as a CUDA graph; RuntimeError if it holds what cannot be recorded.

    The step must read no device number on the host.
    """
    gc.collect()  # a tensor that is freed while recording could end the recording
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


class RecordedCalls:
    """Calls of a few kinds: the first of each kind run eagerly, the later ones are replayed.

    Args:
        record: Records a call; None: nothing is recorded.
        refused: Receives a line if a call cannot be recorded; then `record` becomes None.
    """

    def __init__(self, record: Record | None, refused: Callable[[str], None]) -> None:
        self.record, self._refused = record, refused
        self.forget()

    def forget(self) -> None:
        """Begin anew with each kind, since its memory has changed."""
        self._done: Counter[Hashable] = Counter()
        self._replays: dict[Hashable, Call] = {}

    def __call__(self, kind: Hashable, run: Call) -> None:
        """Run a call, or its replay."""
        if kind not in self._replays and self.record is not None:
            if self._done[kind] == WARM_UP:
                try:
                    self._replays[kind] = self.record(run)
                except RuntimeError as error:
                    cause = str(error).partition("\n")[0]
                    self._refused(f"CUDA graph capture failed ({cause}); running without it")
                    self.record = None
                    self._replays.clear()
            self._done[kind] += 1
        self._replays.get(kind, run)()


class Replay:
    """Calls of `Algorithm.step`, replayed from the fourth of each kind on.

    There are two kinds, iterations with and without coupling (`period`).

    Args:
        algorithm: One without an `obstacle_to_replay`.
        after: Called at the end of every iteration and recorded with it, with t as a number or an
            int64 tensor ().
        record: Records a step.
        refused: Receives a line if a step cannot be recorded, such as that of a model that reads a
            number on the host; the iterations then run eagerly.
        side_by_side: Whether the gradients of the workers are parallel branches of the graph.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        after: Callable[[int | Tensor], None] = lambda t: None,
        record: Record = cuda_graph,
        *,
        refused: Callable[[str], None] = warnings.warn,
        side_by_side: bool = True,
    ) -> None:
        oracle = algorithm.worker.oracle
        assert isinstance(oracle, MinibatchRisk), obstacle_to_replay(algorithm, 1)
        device = algorithm.u.device
        self.algorithm, self.oracle = algorithm, oracle
        self.after, self.record = after, record
        self.period = algorithm.period if isinstance(algorithm, Consensus) else 1
        oracle.risk.side_by_side = side_by_side and device.type == "cuda"
        size = len(oracle.minibatches) * oracle.batch_size
        self._index = torch.zeros(size, dtype=torch.int64, device=device)
        self._t = torch.zeros((), dtype=torch.int64, device=device)
        sizes = {name: getattr(algorithm, name, None) for name in ("tau", "sigma", "lam")}
        self._schedules = {name: size for name, size in sizes.items() if callable(size)}
        self._sizes = {
            name: torch.zeros((), dtype=torch.float64, device=device) for name in self._schedules
        }
        self._calls = RecordedCalls(self._record, refused)

    def step(self, t: int) -> None:
        """Iteration t."""
        if self._calls.record is None:
            self.algorithm.step(t)
            self.after(t)
            return
        self.oracle.draw_indices(out=self._index)
        self._t.fill_(t)
        for name, schedule in self._schedules.items():
            self._sizes[name].fill_(schedule(t))
        self._calls(t % self.period == 0, lambda: self._run(t))

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
        """Iteration t, with the minibatches and the scheduled sizes in the memory of `step`."""
        self.oracle.drawn = self._index
        vars(self.algorithm).update(self._sizes)
        try:
            self.algorithm.step(t)
            self.after(self._t)
        finally:
            self.oracle.drawn = None
            vars(self.algorithm).update(self._schedules)

    def _addresses(self) -> dict[str, int]:
        """The memory of the state, without that of the draws, which is made anew at each call."""
        state = self.algorithm.state_dict() | {"losses": self.oracle.losses}
        kept = {key: value for key, value in state.items() if not key.startswith("worker/oracle")}
        return {key: value.data_ptr() for key, value in kept.items()}
