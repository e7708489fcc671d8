"""The empirical risk of a model as a function of flat parameter vectors, and its gradients.

# n parameters, K workers in this process, B samples in a minibatch, N images
"""

from collections.abc import Iterator, Sequence
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
from consensus.problem.passes import OneAfterAnother, Streams, Threads
from consensus.problem.streams import draws_random_numbers, stream_seed

Batch = tuple[Tensor, Tensor]
"""Images (K, B, 1, 28, 28) and labels (K, B): one minibatch for each worker of the process."""


class Risk:
    """The cross-entropy of a model, as a function of its flattened parameters.

    The model serves as a function only: its own parameters are neither read nor written.

    Args:
        model: Maps images (B, 1, 28, 28) to logits (B, classes). What is random in it, such as
            dropout, draws from torch's global generator; see `gradient`.
        reduction: "sum" or "mean" over the samples of a minibatch. The paper's step sizes belong
            to the sum.

    Attributes:
        model: As given.
        layout: Where its parameters are in the flat vectors.
        losses: The minibatch losses of the last `gradient`, detached and on the device; the next
            call overwrites them. (K,)
        side_by_side: On a GPU, put each worker's pass on a stream of its own. On a CPU, the
            environment says whether passes run in threads (`passes.Threads`).

    Raises:
        ValueError: If the reduction is neither, or the model cannot be flattened.
    """

    def __init__(self, model: nn.Module, reduction: Literal["sum", "mean"]) -> None:
        if reduction not in ("sum", "mean"):
            raise ValueError(f"`algorithm.loss_reduction` is {reduction!r}; allowed: sum, mean")
        self.model = model
        self.layout = FlatLayout.of(model)
        self.reduction = reduction
        self.losses = torch.empty(0)
        self.side_by_side = False
        self._in_order = OneAfterAnother(model)
        self._in_streams = Streams(model)
        self._in_threads = Threads(model)

    def gradient(
        self,
        points: Tensor,
        images: Tensor,
        labels: Tensor,
        seeds: Sequence[int] | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """The gradient of each worker's minibatch loss at its own point, `delta` of line 5.

        Worker by worker rather than batched by vmap, so that the bits of a worker's gradient do
        not depend on how many workers share its process.

        Args:
            points: (K, n)
            images: (K, B, 1, 28, 28)
            labels: (K, B) int64
            seeds: For torch's global generators, one for each worker's pass through a model that
                draws random numbers; None leaves the generators alone.
            out: Where the gradients go, if given; may be `points`. (K, n)

        Returns:
            (K, n)
        """
        gradients = torch.empty_like(points) if out is None else out
        if self.losses.shape != (len(points),) or self.losses.device != points.device:
            self.losses = points.new_empty(len(points))
        rows = zip(points, images, labels, gradients, self.losses, strict=True)
        passes = [partial(self._backward, *row) for row in rows]
        if seeds is not None:
            for seed, run in zip(seeds, passes, strict=True):
                torch.manual_seed(seed)
                run(self.model)
        elif points.device.type == "cpu":
            self._in_threads(passes)
        elif self.side_by_side:
            self._in_streams(passes)
        else:
            self._in_order(passes)
        return gradients

    def _backward(
        self,
        point: Tensor,
        images: Tensor,
        labels: Tensor,
        gradient: Tensor,
        loss: Tensor,
        model: nn.Module,
    ) -> None:
        """The gradient (n,) and the loss () of one worker, into the memory given."""
        # `data`, since `detach` would count writes to the rows of other workers as to this one's.
        views = self.layout.unflatten(point.data)
        leaves = [view.requires_grad_() for view in views.values()]
        with torch.enable_grad():
            logits = functional_call(model, views, (images,))
            value = cross_entropy(logits, labels, reduction=self.reduction)
        found = torch.autograd.grad(value, leaves)
        torch.cat([part.reshape(-1) for part in found], out=gradient)
        loss.copy_(value.detach())

    @torch.no_grad()
    def evaluate(self, point: Tensor, images: Tensor, labels: Tensor, chunk: int = 1000) -> Tensor:
        """The loss summed over all images, and the number of wrong predictions.

        Without synchronizing with the device: the caller decides when to read the numbers. The
        model is in evaluation mode meanwhile (dropout is off).

        Args:
            point: (n,)
            images: (N, 1, 28, 28)
            labels: (N,) int64
            chunk: The number of images evaluated at once, which bounds the memory.

        Returns:
            (2,) float64
        """
        total = torch.zeros(2, dtype=torch.float64, device=point.device)
        views = self.layout.unflatten(point)
        with self.in_evaluation_mode():
            for x, y in zip(torch.split(images, chunk), torch.split(labels, chunk), strict=True):
                logits = functional_call(self.model, views, (x,))
                # In float64 from the logits on: a well-fitted image has a loss near 1e-5, and
                # float32 cannot tell a loss below 6e-8 from zero. There are 60,000 of them.
                loss = cross_entropy(logits.double(), y, reduction="sum")
                total += torch.stack([loss, (logits.argmax(1) != y).sum().double()])
        return total

    def total(self, point: Tensor, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss summed over all images, and its gradient. In evaluation mode.

        All at once: the caller bounds the memory.

        Args:
            point: (n,)
            images: (N, 1, 28, 28)
            labels: (N,) int64

        Returns:
            () float64, (n,)
        """
        views = self.layout.unflatten(point.detach())
        leaves = [view.requires_grad_() for view in views.values()]
        with self.in_evaluation_mode(), torch.enable_grad():
            logits = functional_call(self.model, views, (images,))
            # In float64 as in `evaluate`: where an image is well fitted, its gradient is the small
            # difference between a probability and 1.
            value = cross_entropy(logits.double(), labels, reduction="sum")
        found = torch.autograd.grad(value, leaves)
        return value.detach(), torch.cat([part.reshape(-1) for part in found])

    def evaluate_each(
        self, points: Tensor, images: Tensor, labels: Tensor, chunk: int = 1000
    ) -> Tensor:
        """`evaluate` of each of several points. (K, n) -> float64 (K, 2)."""
        return torch.stack([self.evaluate(point, images, labels, chunk) for point in points])

    @contextmanager
    def in_evaluation_mode(self) -> Iterator[None]:
        """Dropout is off inside."""
        training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)


class MinibatchRisk:
    """The stochastic gradients of the workers of one process: lines 4 and 5.

    Args:
        risk: What is minimized.
        dataset: Its training images are drawn from.
        minibatches: One for each of the K workers of this process, with one batch size, and with
            indices on the device of the data.

    Attributes:
        model_draws: Whether the model draws random numbers in a forward pass.
    """

    def __init__(self, risk: Risk, dataset: Dataset, minibatches: Sequence[Minibatches]) -> None:
        sizes = {source.batch_size for source in minibatches}
        assert len(sizes) == 1, f"the workers of a process need one batch size, not {sizes}"
        self.risk = risk
        self.dataset = dataset
        self.minibatches = tuple(minibatches)
        self.batch_size = sizes.pop()
        self.model_draws = draws_random_numbers(risk.model, dataset.train_images[: self.batch_size])

    @property
    def losses(self) -> Tensor:
        """The minibatch losses (K,) of the last `gradient`, on the device."""
        return self.risk.losses

    def state_dict(self) -> dict[str, Tensor]:
        """The `position` of each worker: how many minibatches it has drawn. (K,) int64, CPU."""
        return {"position": torch.tensor([source.position for source in self.minibatches])}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue after that many draws: shuffles and dropout are functions of the position."""
        for source, position in zip(self.minibatches, state["position"].tolist(), strict=True):
            source.position = position

    def draw(self) -> Batch:
        """The next minibatch of every worker: images (K, B, 1, 28, 28), labels (K, B)."""
        return self.gather(torch.cat([source.draw() for source in self.minibatches]))

    def gather(self, index: Tensor) -> Batch:
        """The samples `index` (K B,), at once for all workers, as `draw` returns them."""
        shape = (len(index) // self.batch_size, self.batch_size)
        images = self.dataset.train_images.index_select(0, index)
        labels = self.dataset.train_labels.index_select(0, index)
        return images.view(*shape, *images.shape[1:]), labels.view(shape)

    def total(self, point: Tensor, index: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        """The loss summed over the samples `index` (N,), chunk by chunk, and its gradient.

        What a model draws at random is left out (evaluation mode).

        Returns:
            () float64, (n,)
        """
        loss = torch.zeros((), dtype=torch.float64, device=point.device)
        gradient = torch.zeros_like(point)
        for part in index.split(chunk) if len(index) else ():
            images = self.dataset.train_images.index_select(0, part)
            value, found = self.risk.total(point, images, self.dataset.train_labels[part])
            loss += value
            gradient += found
        return loss, gradient

    def gradient(self, points: Tensor, batch: Batch) -> Tensor:
        """The gradients (K, n) of the workers' minibatch losses at their points (K, n).

        In the memory of the points, each of which has served when its gradient is there: a large
        vector less.
        """
        seeds = None
        if self.model_draws:  # a function of (seed, worker, draw), in every layout and on resume
            sources = self.minibatches
            seeds = [stream_seed(s.seed, "model", s.worker, s.position) for s in sources]
        return self.risk.gradient(points, *batch, seeds=seeds, out=points)
