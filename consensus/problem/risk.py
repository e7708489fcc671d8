"""The empirical risk of a model as a function of flat parameter vectors, and its gradients.

# n parameters, K workers in this process, B samples in a minibatch, N samples
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from consensus.core.flat import FlatLayout
from consensus.problem.calls import (
    RunningBuffers,
    Views,
    call,
    draws_random_numbers,
    evaluation_mode,
    running_buffers,
)
from consensus.problem.data import Dataset
from consensus.problem.losses import LOSSES, Loss
from consensus.problem.minibatches import Minibatches
from consensus.problem.samples import Samples, Tree, map_tree
from consensus.problem.stored import AnySamples, ReadAhead, StoredSamples
from consensus.problem.streams import restored_generators, seed_all

Batch = tuple[Tree, Tree]
"""Inputs and targets (K, B, ...): one minibatch for each worker of the process."""

MAX_STREAMS = 32  # CUDA streams; a GPU runs no more kernels concurrently
AT_ONCE = 1000  # samples in one evaluation pass, at most
NUMBERS_AT_ONCE = 1 << 22  # inputs or outputs in one evaluation pass; they bound its memory


class Risk:
    """The loss of a model, as a function of its flattened trainable parameters.

    The model serves as a function of inputs (B, ...): its own trainable parameters are neither read
    nor written. Random layers, such as dropout, draw from the global generators. The reduction,
    "sum" or "mean", is over the samples of a minibatch; the step sizes of the paper belong to the
    sum.

    Attributes:
        layout: The positions of the parameters in the flat vectors.
        losses: The minibatch losses of the last `gradient`, detached and on the device. The next
            call overwrites them. (K,)
        buffers: The running buffers of u, for evaluations; by name.
        side_by_side: Whether `gradient` runs the workers on CUDA streams of their own, which become
            parallel branches in a CUDA graph. Requires a GPU.
        random_evaluation: Whether the model draws random numbers in evaluation mode too.
        low_precision: Whether passes compute in bfloat16 where torch.autocast does.
        at_once: Samples in one evaluation pass.
    """

    def __init__(
        self, model: nn.Module, reduction: Literal["sum", "mean"], loss: Loss | None = None
    ) -> None:
        if reduction not in ("sum", "mean"):
            raise ValueError(f"`algorithm.loss_reduction` is {reduction!r}; allowed: sum, mean")
        self.model = model
        self.layout = FlatLayout.trainable(model)
        self.reduction = reduction
        self.loss = LOSSES["cross_entropy"] if loss is None else loss
        self.losses = torch.empty(0)
        self.buffers: Views = {}
        self.side_by_side = self.random_evaluation = self.low_precision = False
        self.at_once = AT_ONCE
        self._streams: list[torch.cuda.Stream] = []

    def gradient(
        self,
        points: Tensor,
        inputs: Tree,
        targets: Tree,
        seeds: Sequence[int] | None = None,
        out: Tensor | None = None,
        running: RunningBuffers | None = None,
        resting: frozenset[int] = frozenset(),
    ) -> Tensor:
        """The gradient of each worker's minibatch loss at its own point: delta_j of line 5, (16).

        At points (K, n), for inputs and targets (K, B, ...), in `out` (K, n), which may be
        `points`. The seeds are those of the global generators, one for each worker; None leaves
        them alone. Passes update the `running` buffers of their workers. The workers are evaluated
        one by one and not by vmap. The bits of a worker's gradient then do not depend on the number
        of workers in its process. Workers k at rest have no pass, and no gradient.
        """
        gradients = self._allocate(points, out)
        passes = {}
        for k in range(len(points)):
            if k in resting:
                continue
            x, y = (map_tree(lambda rows: rows[k], part) for part in (inputs, targets))  # noqa: B023
            to = gradients[k], self.losses[k], (running, k) if running else None
            passes[k] = partial(self._backward, points[k], x, y, *to)
        if self.side_by_side and seeds is None:
            self._run_on_streams([*passes.values()])
            return gradients
        for k, run in passes.items():
            if seeds is not None:
                seed_all(seeds[k])
            run()
        return gradients

    def _allocate(self, points: Tensor, out: Tensor | None) -> Tensor:
        """Memory for the gradients (K, n); `losses` gets its size (K,)."""
        if self.losses.shape != (len(points),) or self.losses.device != points.device:
            self.losses = points.new_full((len(points),), torch.nan)
        return torch.empty_like(points) if out is None else out

    def _run_on_streams(self, passes: Sequence[Callable[[], None]]) -> None:
        """Launch the passes after the work of the current stream, which then waits for them."""
        current = torch.cuda.current_stream()
        while len(self._streams) < min(len(passes), MAX_STREAMS):
            self._streams.append(torch.cuda.Stream())
        streams = self._streams[: len(passes)]
        for i, stream in enumerate(streams):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                for run in passes[i :: len(streams)]:
                    run()
        for stream in streams:
            current.wait_stream(stream)

    def _backward(
        self,
        point: Tensor,
        inputs: Tree,
        targets: Tree,
        gradient: Tensor,
        loss: Tensor,
        running: tuple[RunningBuffers, int] | None,
    ) -> None:
        """Write the gradient (n,) and the loss () of one worker, whose running buffers change."""
        buffers: Views = {}
        if running:
            buffers = running[0].of(running[1])

        def value(views: Views) -> Tensor:
            views |= buffers
            found = self._loss(views, inputs, targets)
            if running:
                running[0].keep(running[1], views)
            return found

        found, parts = self._differentiate(point, value)
        torch.cat([part.reshape(-1) for part in parts], out=gradient)
        loss.copy_(found)

    def _differentiate(
        self, points: Tensor, function: Callable[[Views], Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Values (...) of a function of the parameters; the partial derivatives of their sum.

        The derivative by a parameter that the function does not use is 0.
        """
        # `data` and not `detach`: `detach` shares the version counter, so that writes to the rows
        # of other workers would count as writes to this row.
        views = self.layout.unflatten(points.data)
        leaves = [view.requires_grad_() for view in views.values()]
        with torch.enable_grad():
            values = function(views)
        # None is 1 for a single value; a tensor makes torch import sympy, in a second of each rank.
        weights = None if values.ndim == 0 else torch.ones_like(values)
        found = torch.autograd.grad(values, leaves, weights, materialize_grads=True)
        return values.detach(), found

    def _outputs(self, views: Views, inputs: Tree) -> Any:
        if not self.low_precision:
            return call(self.model, views, inputs)
        device = next(iter(views.values())).device.type
        with torch.autocast(device, dtype=torch.bfloat16):
            outputs = call(self.model, views, inputs)
        return map_tree(lambda x: x.float() if x.is_floating_point() else x, outputs)

    def _loss(self, views: Views, inputs: Tree, targets: Tree) -> Tensor:
        losses = self.loss(self._outputs(views, inputs), targets)
        return losses.sum() if self.reduction == "sum" else losses.mean()

    @torch.no_grad()
    def evaluate(self, point: Tensor, samples: AnySamples, chunk: int | None = None) -> Tensor:
        """The loss summed over all samples, and the sum of each metric. -> float64 (1 + metrics,).

        At a point (n,), `chunk` samples in one pass, in evaluation mode (no dropout). The call does
        not synchronize with the device.
        """
        total = torch.zeros(1 + len(self.loss.metrics), dtype=torch.float64, device=point.device)
        views = self.layout.unflatten(point) | self.buffers
        with self.in_evaluation_mode():
            for part in samples.split(chunk or self.at_once):
                outputs = in_double_precision(self._outputs(views, part.inputs))
                total += self.sums(outputs, part.targets)
        return total

    def sums(self, outputs: Any, targets: Tree) -> Tensor:
        """The sums of the loss and of the metrics over some samples. -> float64 (1 + metrics,)."""
        of_metrics = [metric.function for metric in self.loss.metrics.values()]
        every = [self.loss.function, *of_metrics]
        return torch.stack([function(outputs, targets).double().sum() for function in every])

    def evaluate_each(self, points: Tensor, samples: AnySamples) -> Tensor:
        """`evaluate` at several points. (K, n) -> float64 (K, 1 + metrics)."""
        return torch.stack([self.evaluate(point, samples) for point in points])

    def total(self, point: Tensor, samples: Samples) -> tuple[Tensor, Tensor]:
        """The loss (), float64, summed over all samples and its gradient (n,), without dropout.

        In float64 from the outputs on, as in `evaluate`: the gradient of a well-fitted sample is
        the small difference between a probability and 1.
        """

        def value(views: Views) -> Tensor:
            outputs = self._outputs(views | self.buffers, samples.inputs)
            return self.loss(in_double_precision(outputs), samples.targets).sum()

        with self.in_evaluation_mode():
            found, parts = self._differentiate(point, value)
        return found, torch.cat([part.reshape(-1) for part in parts])

    @contextmanager
    def in_evaluation_mode(self) -> Iterator[None]:
        """Context in which the model is in evaluation mode (no dropout).

        A model that is random in this mode too draws the same numbers in each context.
        """
        with evaluation_mode(self.model):
            if self.random_evaluation:
                with restored_generators(next(self.model.parameters()).device):
                    seed_all(0)
                    yield
            else:
                yield

    def state_dict(self, point: Tensor) -> dict[str, Tensor]:
        """The state_dict of the model with the parameters of a point (n,), on the CPU.

        Running buffers are those of `buffers`; frozen parameters and other buffers stay.
        """
        values = self.layout.unflatten(point) | self.buffers
        own = {id(x): name for name, x in self.model.named_parameters()}
        found = {}
        for name, x in self.model.state_dict(keep_vars=True).items():
            if isinstance(x, Tensor):  # not what `get_extra_state` returns
                x = values.get(own.get(id(x), name), x)  # a tied parameter has several names
                found[name] = x.detach().clone().cpu()
        return found


def in_double_precision(outputs: Any) -> Any:
    """The outputs of a model with floating point in float64.

    A well-fitted image has a loss near 1e-5, float32 rounds a loss below 6e-8 to 0, and the sum
    over a data set has up to 60,000 terms.
    """
    return map_tree(lambda x: x.double() if x.is_floating_point() else x, outputs)


class MinibatchRisk:
    """The stochastic gradients of the workers of one process: lines 4 and 5.

    There is a source of minibatches for each of the K workers, all with one batch size and with
    indices on the device of the data.

    Attributes:
        model_draws: Whether the model draws random numbers in a forward pass.
        running: The running buffers of the K workers.
        ahead: The reader of minibatches from storage; None if the samples are in memory.
        drawn: The samples that `draw` returns in place of new ones, if set. (K B,) int64
    """

    drawn: Tensor | None = None

    def __init__(self, risk: Risk, dataset: Dataset, minibatches: Sequence[Minibatches]) -> None:
        sizes = {source.batch_size for source in minibatches}
        assert len(sizes) == 1, f"the workers of a process need one batch size, not {sizes}"
        self.risk = risk
        self.dataset = dataset
        self.minibatches = tuple(minibatches)
        self.batch_size = sizes.pop()
        train = dataset.train
        self.ahead = ReadAhead(train, minibatches) if isinstance(train, StoredSamples) else None
        inputs = dataset.train[: self.batch_size].inputs
        self.model_draws = draws_random_numbers(risk.model, inputs)
        names = running_buffers(risk.model, inputs)
        self.running = RunningBuffers(risk.model, names, len(self.minibatches))
        risk.buffers = {name: rows[0].clone() for name, rows in self.running.rows.items()}
        with evaluation_mode(risk.model):
            risk.random_evaluation = draws_random_numbers(risk.model, inputs)

    @property
    def losses(self) -> Tensor:
        """The minibatch losses (K,) of the last `gradient`, on the device."""
        return self.risk.losses

    def state_dict(self) -> dict[str, Tensor]:
        """`position`, the number of minibatches of each worker, (K,) int64, CPU; running buffers.

        Permutations and dropout masks are functions of the positions.
        """
        position = torch.tensor([source.position for source in self.minibatches])
        return {"position": position} | self.running.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from copies of a `state_dict`."""
        for source, position in zip(self.minibatches, state["position"].tolist(), strict=True):
            source.position = position
        self.running.load_state_dict(state)

    def draw_indices(self, out: Tensor | None = None) -> Tensor:
        """The samples in the next minibatch of every worker. (K B,) int64."""
        return torch.cat([source.draw() for source in self.minibatches], out=out)

    def draw(self) -> Batch:
        """The next minibatch of every worker: inputs and targets (K, B, ...)."""
        if self.ahead is not None:
            return self._by_worker(self.ahead.draw())
        return self.gather(self.draw_indices() if self.drawn is None else self.drawn)

    def gather(self, index: Tensor) -> Batch:
        """The samples `index` (K B,) of all workers, in the shapes of `draw`."""
        return self._by_worker(self.dataset.train.select(index))

    def _by_worker(self, samples: Samples) -> Batch:
        found = samples.map(lambda x: x.view(-1, self.batch_size, *x.shape[1:]))
        return found.inputs, found.targets

    def total(self, point: Tensor, index: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        """`Risk.total` over the samples `index` (N,), `chunk` of them at once."""
        loss = torch.zeros((), dtype=torch.float64, device=point.device)
        gradient = torch.zeros_like(point)
        for part in self.dataset.train.split(chunk, index):
            value, found = self.risk.total(point, part)
            loss += value
            gradient += found
        return loss, gradient

    def gradient(self, points: Tensor, batch: Batch) -> Tensor:
        """The gradients (K, n) of the workers' minibatch losses at their points (K, n).

        The gradients overwrite the points, which saves the memory of one block.
        """
        seeds = [s.model_seed for s in self.minibatches] if self.model_draws else None
        return self.risk.gradient(points, *batch, seeds, points, self.running, self.resting())

    def resting(self) -> frozenset[int]:
        """The workers k that rest in the iteration of the last `draw`."""
        return frozenset(k for k, source in enumerate(self.minibatches) if source.rests)
