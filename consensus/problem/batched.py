"""The passes of K models as one pass: each operation once, on the tensors of all of them.

Where one worker's operations are too small to fill the device, or a model is so small that Python
takes longer to call an operation than the device to do it, many models at once are faster.
`torch.vmap` turns the operations of one model into those of all; sums are then taken in another
order, so that results agree with `Risk` up to rounding only, and their last bits depend on how many
models a pass has.

Convolutions have filters of their own in every model. There are two ways to do them at once: as one
grouped convolution, which is what `vmap` makes of them, or as a product of matrices for each model,
a row of which is the part of an image under the filter. Libraries are fast in one or the other. On
a GPU torch's defaults let convolutions round their factors to TF32, and products of matrices not.

# n parameters, K models, B samples in a minibatch
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.functional import cross_entropy, pad
from torch.overrides import TorchFunctionMode

from consensus.problem.risk import Risk

Convolutions = Literal["grouped", "products"]

IMAGES_AT_ONCE = 16_000
"""In an evaluation, over all models of a pass: bounds the memory."""


class BatchedRisk(Risk):
    """`Risk`, with the gradients of all models from one pass.

    Args:
        model: As in `Risk`; draws no random numbers in training.
        reduction: As in `Risk`.
        convolutions: How those with filters of their own in each model are done.
    """

    def __init__(
        self, model: nn.Module, reduction: Literal["sum", "mean"], convolutions: Convolutions
    ) -> None:
        super().__init__(model, reduction)
        self.convolutions = convolutions

    def gradient(
        self,
        points: Tensor,
        images: Tensor,
        labels: Tensor,
        seeds: Sequence[int] | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """As `Risk.gradient`: (K, n), (K, B, 1, 28, 28), (K, B) -> (K, n)."""
        assert seeds is None, "a pass of several models draws no random numbers of one"
        # `data`: the points are memory that the caller writes to.
        views = self.layout.unflatten(points.data)
        leaves = [view.requires_grad_() for view in views.values()]
        with torch.enable_grad():
            losses = self._at_once(self._loss, (0, 0, 0))(views, images, labels)
            total = losses.sum()
        found = torch.autograd.grad(total, leaves)
        gradients = torch.empty_like(points) if out is None else out
        torch.cat([part.flatten(1) for part in found], 1, out=gradients)
        if self.losses.shape != losses.shape or self.losses.device != losses.device:
            self.losses = torch.empty_like(losses)
        self.losses.copy_(losses.detach())
        return gradients

    @torch.no_grad()
    def evaluate_each(
        self, points: Tensor, images: Tensor, labels: Tensor, chunk: int = 1000
    ) -> Tensor:
        """As `Risk.evaluate_each`, of all points in one pass. (K, n) -> float64 (K, 2)."""
        chunk = min(chunk, max(1, IMAGES_AT_ONCE // len(points)))
        views = self.layout.unflatten(points)
        logits_of_each = self._at_once(self._logits_at, (0, None))
        total = torch.zeros(len(points), 2, dtype=torch.float64, device=points.device)
        with self.in_evaluation_mode():
            for x, y in zip(torch.split(images, chunk), torch.split(labels, chunk), strict=True):
                logits = logits_of_each(views, x)  # (K, chunk, classes)
                every = y.expand(len(points), -1)
                losses = cross_entropy(logits.double().mT, every, reduction="none")
                wrong = (logits.argmax(-1) != every).sum(1)
                total += torch.stack([losses.sum(1), wrong.double()], 1)
        return total

    def _at_once(self, function: Callable[..., Tensor], axes: tuple[int | None, ...]) -> Any:
        batched = vmap(function, in_dims=axes)

        def call(*arguments: Any) -> Tensor:
            products = self.convolutions == "products"
            with ConvolutionsAsProducts() if products else nullcontext():
                return batched(*arguments)

        return call

    def _logits_at(self, views: Mapping[str, Tensor], images: Tensor) -> Tensor:
        logits: Tensor = functional_call(self.model, dict(views), (images,))
        return logits

    def _loss(self, views: Mapping[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(self._logits_at(views, images), labels, reduction=self.reduction)


class ConvolutionsAsProducts(TorchFunctionMode):
    """Inside of it a convolution over images is a product of matrices, equal up to rounding."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Calls `func`, or `convolve` in its place."""
        kwargs = kwargs or {}
        return (convolve if func is torch.conv2d else func)(*args, **kwargs)


def convolve(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """`torch.conv2d` (B, C, H, W) -> (B, O, H', W'), by one product of matrices.

    The rows (B H' W') are the windows of the images, the columns (O) the filters. What does not
    come as such a product, filters with holes or in groups, is left to torch.
    """
    if isinstance(padding, str) or groups != 1 or input.ndim != 4 or _pair(dilation) != (1, 1):
        return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
    (down, across), (above, beside) = _pair(stride), _pair(padding)
    if above or beside:
        input = pad(input, (beside, beside, above, above))
    filters, _, height, width = weight.shape
    windows = input.unfold(2, height, down).unfold(3, width, across)  # (B, C, H', W', h, w)
    batch, _, rows, columns = windows.shape[:4]
    matrix = windows.permute(0, 2, 3, 1, 4, 5).reshape(batch * rows * columns, -1)
    product = matrix @ weight.reshape(filters, -1).t()
    if bias is not None:
        product = product + bias
    return product.view(batch, rows, columns, filters).permute(0, 3, 1, 2)


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[-1]))
