"""The empirical risk of a model as a function of flat parameter vectors, and its gradients.

# n parameters, K workers in this process, B samples in a minibatch, N images
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from consensus.core.flat import FlatLayout
from consensus.problem.data import Dataset
from consensus.problem.minibatches import Minibatches
from consensus.problem.streams import draws_random_numbers, restored_generators, seed_all

Batch = tuple[Tensor, Tensor]
"""Images (K, B, 1, 28, 28) and labels (K, B): one minibatch for each worker of the process."""

Views = dict[str, Tensor]
"""The parameters of a model by name, as views of a flat vector."""

MAX_STREAMS = 32  # CUDA streams; a GPU runs no more kernels concurrently


class Risk:
    """The cross-entropy of a model, as a function of its flattened parameters.

    The model serves as a function of images (B, 1, 28, 28) with logits (B, classes): its own
    parameters are neither read nor written. Random layers, such as dropout, draw from the global
    generators. The reduction, "sum" or "mean", is over the samples of a minibatch; the step
    sizes of the paper belong to the sum.

    Attributes:
        layout: The positions of the parameters in the flat vectors.
        losses: The minibatch losses of the last `gradient`, detached and on the device. The next
            call overwrites them. (K,)
        side_by_side: Whether `gradient` runs the workers on CUDA streams of their own, which become
            parallel branches in a CUDA graph. Requires a GPU.
        random_evaluation: Whether the model draws random numbers in evaluation mode too.
    """

    def __init__(self, model: nn.Module, reduction: Literal["sum", "mean"]) -> None:
        if reduction not in ("sum", "mean"):
            raise ValueError(f"`algorithm.loss_reduction` is {reduction!r}; allowed: sum, mean")
        self.model = model
        self.layout = FlatLayout.of(model)
        self.reduction = reduction
        self.losses = torch.empty(0)
        self.side_by_side = self.random_evaluation = False
        self._streams: list[torch.cuda.Stream] = []

    def gradient(
        self,
        points: Tensor,
        images: Tensor,
        labels: Tensor,
        seeds: Sequence[int] | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """The gradient of each worker's minibatch loss at its own point: delta_j of line 5, (16).

        At points (K, n), for images (K, B, 1, 28, 28) and labels (K, B), in `out` (K, n), which may
        be `points`. The seeds are those of the global generators, one for each worker; None leaves
        them alone. The workers are evaluated one by one and not by vmap. The bits of a
        worker's gradient then do not depend on the number of workers in its process.
        """
        gradients = self._allocate(points, out)
        rows = zip(points, images, labels, gradients, self.losses, strict=True)
        passes = [partial(self._backward, *row) for row in rows]
        if self.side_by_side and seeds is None:
            self._run_on_streams(passes)
            return gradients
        for k, run in enumerate(passes):
            if seeds is not None:
                seed_all(seeds[k])
            run()
        return gradients

    def _allocate(self, points: Tensor, out: Tensor | None) -> Tensor:
        """Memory for the gradients (K, n); `losses` gets its size (K,)."""
        if self.losses.shape != (len(points),) or self.losses.device != points.device:
            self.losses = points.new_empty(len(points))
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
        self, point: Tensor, images: Tensor, labels: Tensor, gradient: Tensor, loss: Tensor
    ) -> None:
        """Write the gradient (n,) and the loss () of one worker."""
        found, parts = self._differentiate(point, lambda views: self._loss(views, images, labels))
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
        return values.detach(), torch.autograd.grad(
            values, leaves, torch.ones_like(values), materialize_grads=True
        )

    def _logits(self, views: Views, images: Tensor) -> Tensor:
        logits: Tensor = functional_call(self.model, views, (images,))
        return logits

    def _loss(self, views: Views, images: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(self._logits(views, images), labels, reduction=self.reduction)

    @torch.no_grad()
    def evaluate(self, point: Tensor, images: Tensor, labels: Tensor, chunk: int = 1000) -> Tensor:
        """The loss summed over all images, and the number of wrong predictions. -> float64 (2,).

        At a point (n,) for images (N, 1, 28, 28), `chunk` of them in one pass, in evaluation mode
        (no dropout). The call does not synchronize with the device.
        """
        total = torch.zeros(2, dtype=torch.float64, device=point.device)
        views = self.layout.unflatten(point)
        with self.in_evaluation_mode():
            for x, y in zip(torch.split(images, chunk), torch.split(labels, chunk), strict=True):
                logits = self._logits(views, x)
                # float64 from the logits on: a well-fitted image has a loss near 1e-5, float32
                # rounds a loss below 6e-8 to 0, and the sum has up to 60,000 terms.
                loss = cross_entropy(logits.double(), y, reduction="sum")
                total += torch.stack([loss, (logits.argmax(1) != y).sum().double()])
        return total

    def evaluate_each(self, points: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """`evaluate` at several points. (K, n) -> float64 (K, 2)."""
        return torch.stack([self.evaluate(point, images, labels) for point in points])

    def total(self, point: Tensor, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss (), float64, summed over all images and its gradient (n,), in evaluation mode.

        In float64 from the logits on, as in `evaluate`: the gradient of a well-fitted image is the
        small difference between a probability and 1.
        """

        def value(views: Views) -> Tensor:
            return cross_entropy(self._logits(views, images).double(), labels, reduction="sum")

        with self.in_evaluation_mode():
            found, parts = self._differentiate(point, value)
        return found, torch.cat([part.reshape(-1) for part in parts])

    @contextmanager
    def in_evaluation_mode(self) -> Iterator[None]:
        """Context in which the model is in evaluation mode (no dropout).

        A model that is random in this mode too draws the same numbers in each context.
        """
        training = self.model.training
        self.model.eval()
        try:
            if self.random_evaluation:
                with restored_generators(next(self.model.parameters()).device):
                    seed_all(0)
                    yield
            else:
                yield
        finally:
            self.model.train(training)


class MinibatchRisk:
    """The stochastic gradients of the workers of one process: lines 4 and 5.

    There is a source of minibatches for each of the K workers, all with one batch size and with
    indices on the device of the data.

    Attributes:
        model_draws: Whether the model draws random numbers in a forward pass.
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
        images = dataset.train_images[: self.batch_size]
        self.model_draws = draws_random_numbers(risk.model, images)
        with risk.in_evaluation_mode():
            random_evaluation = draws_random_numbers(risk.model, images)
        risk.random_evaluation = random_evaluation

    @property
    def losses(self) -> Tensor:
        """The minibatch losses (K,) of the last `gradient`, on the device."""
        return self.risk.losses

    def state_dict(self) -> dict[str, Tensor]:
        """The number of minibatches that each worker has drawn: `position`, (K,) int64, CPU."""
        return {"position": torch.tensor([source.position for source in self.minibatches])}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the positions. Permutations and dropout masks are functions of them."""
        for source, position in zip(self.minibatches, state["position"].tolist(), strict=True):
            source.position = position

    def draw_indices(self, out: Tensor | None = None) -> Tensor:
        """The samples in the next minibatch of every worker. (K B,) int64."""
        return torch.cat([source.draw() for source in self.minibatches], out=out)

    def draw(self) -> Batch:
        """The next minibatch of every worker: images (K, B, 1, 28, 28), labels (K, B)."""
        return self.gather(self.draw_indices() if self.drawn is None else self.drawn)

    def gather(self, index: Tensor) -> Batch:
        """The samples `index` (K B,) of all workers, in the shapes of `draw`."""
        shape = (len(index) // self.batch_size, self.batch_size)
        images = self.dataset.train_images.index_select(0, index)
        labels = self.dataset.train_labels.index_select(0, index)
        return images.view(*shape, *images.shape[1:]), labels.view(shape)

    def total(self, point: Tensor, index: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        """`Risk.total` over the samples `index` (N,), `chunk` of them at once."""
        loss = torch.zeros((), dtype=torch.float64, device=point.device)
        gradient = torch.zeros_like(point)
        for part in torch.split(index, chunk) if len(index) else ():
            images = self.dataset.train_images.index_select(0, part)
            value, found = self.risk.total(point, images, self.dataset.train_labels[part])
            loss += value
            gradient += found
        return loss, gradient

    def gradient(self, points: Tensor, batch: Batch) -> Tensor:
        """The gradients (K, n) of the workers' minibatch losses at their points (K, n).

        The gradients overwrite the points, which saves the memory of one block.
        """
        seeds = [s.model_seed for s in self.minibatches] if self.model_draws else None
        return self.risk.gradient(points, *batch, seeds=seeds, out=points)
