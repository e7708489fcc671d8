"""Vectorized risk: one forward and backward pass for K models.

Batching is faster where the operations of one model are too small to fill the device, or shorter
than the time that Python takes to launch them. `torch.vmap` batches the operations. It changes the
order of summation: results agree with `Risk` up to rounding, and their last bits depend on the
number of models in a pass.

Every model has convolution filters of its own. A batched convolution is either a grouped
convolution, as `vmap` generates it, or one matrix product per model, whose rows are the windows of
the images. Which of the two is faster depends on the library. With torch's defaults on a GPU,
convolutions may round their factors to TF32 and matrix products do not.

# n parameters, K models, B samples in a minibatch
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.functional import cross_entropy, pad
from torch.overrides import TorchFunctionMode

from consensus.problem.risk import Risk

Convolutions = Literal["grouped", "products"]

IMAGES_AT_ONCE = 16_000
"""The number of images in one evaluation pass, over all models. It bounds the memory."""


class BatchedRisk(Risk):
    """`Risk` whose gradients come from one pass over all models.

    Args:
        model: As in `Risk`; draws no random numbers in training.
        reduction: As in `Risk`.
        convolutions: The implementation of batched convolutions.
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
        assert seeds is None, "a batched pass cannot seed the models one by one"
        gradients = self._allocate(points, out)
        losses, parts = self._differentiate(
            points, lambda views: self._vmap(self._loss, (0, 0, 0))(views, images, labels)
        )
        torch.cat([part.flatten(1) for part in parts], 1, out=gradients)
        self.losses.copy_(losses)
        return gradients

    @torch.no_grad()
    def evaluate_each(
        self, points: Tensor, images: Tensor, labels: Tensor, chunk: int = 1000
    ) -> Tensor:
        """As `Risk.evaluate_each`, with one pass for all points. (K, n) -> float64 (K, 2)."""
        chunk = min(chunk, max(1, IMAGES_AT_ONCE // len(points)))
        views = self.layout.unflatten(points)
        batched = self._vmap(self._logits, (0, None))
        total = torch.zeros(len(points), 2, dtype=torch.float64, device=points.device)
        with self.in_evaluation_mode():
            for x, y in zip(torch.split(images, chunk), torch.split(labels, chunk), strict=True):
                logits = batched(views, x)  # (K, chunk, classes)
                every = y.expand(len(points), -1)
                losses = cross_entropy(logits.double().mT, every, reduction="none")
                wrong = (logits.argmax(-1) != every).sum(1)
                total += torch.stack([losses.sum(1), wrong.double()], 1)
        return total

    def _vmap(self, function: Callable[..., Tensor], axes: tuple[int | None, ...]) -> Any:
        batched = vmap(function, in_dims=axes)

        def call(*arguments: Any) -> Tensor:
            products = self.convolutions == "products"
            with ConvolutionsAsProducts() if products else nullcontext():
                return batched(*arguments)

        return call


class ConvolutionsAsProducts(TorchFunctionMode):
    """Context that replaces `torch.conv2d` by `convolve`, which is equal up to rounding."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`, or `convolve` in place of `torch.conv2d`."""
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
    """`torch.conv2d` by one matrix product. (B, C, H, W) -> (B, O, H', W').

    The rows (B H' W') are the windows of the images, the columns (O) the filters. Dilated, grouped
    and "same"-padded convolutions are passed on to torch.
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
