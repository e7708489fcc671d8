"""The gradients of many configurations: one forward and backward pass for many models.

Batching is faster where the operations of one model are too small to fill the device, or shorter
than the time that Python takes to launch them. `torch.vmap` batches the operations. It changes the
order of summation: results agree with `Risk` up to rounding, and their last bits depend on the
number of models in a pass.

Every model has convolution filters of its own. A batched convolution is either a grouped
convolution, as `vmap` generates it, or one matrix product per model, whose rows are the windows of
the images. Which of the two is faster depends on the library. With torch's defaults on a GPU,
convolutions may round their factors to TF32 and matrix products do not.

`PopulationRisk.draw` copies the indices of the next minibatches to static memory on the device, and
`gradient` gathers the samples by them. A CUDA graph can therefore record `gradient`.

# n parameters, K models, B samples in a minibatch; S configurations, A active, M workers each
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.functional import pad
from torch.overrides import TorchFunctionMode

from consensus.problem.calls import RunningBuffers, Views
from consensus.problem.data import Dataset
from consensus.problem.losses import Loss
from consensus.problem.minibatches import Minibatches
from consensus.problem.risk import MinibatchRisk, Risk, in_double_precision
from consensus.problem.samples import Tree, leaves, map_tree
from consensus.problem.stored import AnySamples

WAYS = ("one_by_one", "grouped", "products")
"""One model per pass; or many, with grouped convolutions or with convolutions as matrix products.

Checkpoints hold the index of a name: append new names.
"""

SAMPLES_AT_ONCE = 16_000  # in one evaluation pass, over all models; it bounds the memory
SIZES = (8, 32, 128, 512)  # the numbers of models per pass that `fastest_way` measures
LARGEST = 1 << 26  # coordinates in one pass; larger passes are no faster

Call = Callable[[], object]


class BatchedRisk(Risk):
    """`Risk` of a model without random numbers, with the gradients of all workers in one pass."""

    def __init__(
        self,
        model: nn.Module,
        reduction: Literal["sum", "mean"],
        convolutions: Literal["grouped", "products"],
        loss: Loss | None = None,
    ) -> None:
        super().__init__(model, reduction, loss)
        self.convolutions = convolutions

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
        """As `Risk.gradient`: (K, n), (K, B, ...), (K, B, ...) -> (K, n)."""
        assert seeds is None, "a batched pass cannot seed the models one by one"
        assert not running, "a batched pass cannot change buffers"
        assert not resting, "a batched pass has a gradient for each model"
        gradients = self._allocate(points, out)
        losses, parts = self._differentiate(
            points, lambda views: self._batched(self._loss, (0, 0, 0), views, inputs, targets)
        )
        torch.cat([part.reshape(len(part), -1) for part in parts], 1, out=gradients)
        self.losses.copy_(losses)
        return gradients

    @torch.no_grad()
    def evaluate_each(self, points: Tensor, samples: AnySamples) -> Tensor:
        """As `Risk.evaluate_each`, with one pass for all points."""
        chunk = min(self.at_once, max(1, SAMPLES_AT_ONCE // len(points)))
        views = self.layout.unflatten(points)
        total = torch.zeros(
            len(points), 1 + len(self.loss.metrics), dtype=torch.float64, device=points.device
        )

        def sums(views: Views, inputs: Tree, targets: Tree) -> Tensor:
            return self.sums(in_double_precision(self._outputs(views, inputs)), targets)

        with self.in_evaluation_mode():
            for part in samples.split(chunk):
                total += self._batched(sums, (0, None, None), views, part.inputs, part.targets)
        return total

    def _batched(
        self, function: Callable[..., Tensor], axes: tuple[int | None, ...], *arguments: Any
    ) -> Tensor:
        """`vmap` of a function of one model, called with arguments that are stacked along axes."""
        products = self.convolutions == "products"
        with ConvolutionsAsProducts() if products else nullcontext():
            return vmap(function, in_dims=axes)(*arguments)


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


@dataclass(frozen=True)
class Way:
    """A method of computing the gradients of many models."""

    name: str = "one_by_one"  # an entry of WAYS
    at_once: int = 1  # the number of models per pass

    def __post_init__(self) -> None:
        if self.name not in WAYS or self.at_once < 1:
            raise ValueError(
                f"`name` is {self.name} and `at_once` is {self.at_once}; allowed: "
                f"{', '.join(WAYS)}, and a number >= 1"
            )

    def __str__(self) -> str:
        return self.name if self.name == "one_by_one" else f"{self.name}, {self.at_once} at once"


class PopulationRisk:
    """The gradients of the workers of many configurations: lines 4 and 5.

    Configurations with the same seed share their minibatches, which equal those of separate runs:
    `seeds` has a seed of each configuration, `minibatches` the sources of the M workers of a seed.
    `way` may be changed until `gradient` is recorded. Models that draw random numbers are always
    evaluated one by one.
    """

    def __init__(
        self,
        risk: Risk,
        dataset: Dataset,
        seeds: Sequence[int],
        minibatches: Mapping[int, Sequence[Minibatches]],
        way: Way = Way(),
    ) -> None:
        self.seeds = tuple(seeds)
        self.sources = {seed: tuple(minibatches[seed]) for seed in dict.fromkeys(seeds)}
        every = [source for sources in self.sources.values() for source in sources]
        self._all = MinibatchRisk(risk, dataset, every)
        self.model_draws = self._all.model_draws
        self.risk = risk
        self.way = way
        self._risks = {
            "one_by_one": risk,
            "grouped": BatchedRisk(risk.model, risk.reduction, "grouped", risk.loss),
            "products": BatchedRisk(risk.model, risk.reduction, "products", risk.loss),
        }
        for other in self._risks.values():
            other.at_once, other.low_precision = risk.at_once, risk.low_precision
        self.select(torch.arange(len(self.seeds)))

    def select(self, active: Tensor) -> None:
        """Set the active configurations. (A,) int64."""
        self._own = [self.seeds[i] for i in active.tolist()]
        self._drawing = list(dict.fromkeys(self._own))
        device = next(leaves(self._all.dataset.train.inputs)).device
        rows = [self._drawing.index(seed) for seed in self._own]
        self._rows = torch.tensor(rows, dtype=torch.int64, device=device)
        number = sum(len(self.sources[seed]) for seed in self._drawing)
        self._index = torch.zeros(number * self._all.batch_size, dtype=torch.int64, device=device)
        self._random: list[int] | None = None

    def draw(self) -> None:
        """Line 4: draw the next minibatch of every worker of the active configurations."""
        sources = [source for seed in self._drawing for source in self.sources[seed]]
        if not sources:
            return
        torch.cat([source.draw() for source in sources], out=self._index)
        if self.model_draws:
            own = [source for seed in self._own for source in self.sources[seed]]
            self._random = [source.model_seed for source in own]

    def gradient(self, points: Tensor) -> Tensor:
        """Line 5, (16): the gradients (A M, n) at the points (A M, n), which they overwrite."""
        index = self._index.view(len(self._drawing), -1).index_select(0, self._rows)  # (A, M B)
        batch = self._all.gather(index.view(-1))
        if self.model_draws or self.way.name == "one_by_one":
            return self.risk.gradient(points, *batch, seeds=self._random, out=points)
        for start in range(0, len(points), self.way.at_once):
            some = slice(start, start + self.way.at_once)
            inputs, targets = (map_tree(lambda x: x[some], tree) for tree in batch)  # noqa: B023
            self._risks[self.way.name].gradient(points[some], inputs, targets, out=points[some])
        return points

    def evaluate(self, points: Tensor, samples: AnySamples) -> Tensor:
        """`Risk.evaluate` at several points. (A, n) -> float64 (A, 1 + metrics)."""
        risk = self.risk if self.model_draws else self._risks[self.way.name]
        parts = torch.split(points, self.way.at_once)
        return torch.cat([risk.evaluate_each(some, samples) for some in parts])

    def fastest_way(
        self,
        points: Tensor,
        names: Sequence[str] = WAYS,
        record: Callable[[Call], Call] | None = None,
    ) -> Way:
        """Measure the methods `names` on samples of the data; return the fastest per model.

        At the points (K, n) of all workers, called as `record` will record `gradient`, if at all.
        Repeated measurements may differ. No minibatch is drawn. ValueError if all candidates fail:
        `vmap` may not support the model, or the memory may be too small.
        """
        if self.model_draws or set(names) == {"one_by_one"}:
            return Way()
        number, data = len(points), self._all.dataset
        seconds: dict[Way, float] = {}
        errors: list[str] = []
        for way in _candidates(number, points.shape[1], names):
            some = points[: max(way.at_once, min(number, SIZES[0]))]
            index = torch.arange(len(some) * self._all.batch_size, device=points.device)
            batch = self._all.gather(index.remainder_(len(data.train)))
            try:
                limit = 3.0 * min(seconds.values(), default=float("inf")) * len(some)
                one = _seconds_of(self._risks[way.name], some, *batch, limit, record)
                seconds[way] = one / len(some)
            except RuntimeError as error:  # includes out of memory
                errors.append(str(error).strip().partition("\n")[0])
            if errors and points.device.type == "cuda":
                torch.cuda.empty_cache()  # not inside `except`, where the traceback holds tensors
        if not seconds:
            raise ValueError(errors[0] if errors else "the models are too large")
        return min(seconds, key=seconds.__getitem__)

    def state_dict(self) -> dict[str, Tensor]:
        """The number of draws of each worker and seed, (seeds, M) int64; and the method.

        The method is part of the state because another one gives other last bits.
        """
        rows = [[source.position for source in sources] for sources in self.sources.values()]
        way = [WAYS.index(self.way.name), self.way.at_once]
        return {"position": torch.tensor(rows), "way": torch.tensor(way)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the positions and the method."""
        for sources, row in zip(self.sources.values(), state["position"].tolist(), strict=True):
            for source, position in zip(sources, row, strict=True):
                source.position = position
        name, at_once = state["way"].tolist()
        self.way = Way(WAYS[name], at_once)


def _candidates(number: int, n: int, names: Sequence[str]) -> list[Way]:
    """The methods to measure for `number` models of n coordinates."""
    sizes = [size for size in SIZES if size < number] + [min(number, SIZES[-1])]
    found = [Way()] if "one_by_one" in names else []  # first: it sets the time limit of the rest
    for name in (name for name in names if name != "one_by_one"):
        found += [Way(name, size) for size in sizes if size * n <= LARGEST]
    return found


def _seconds_of(
    risk: Risk,
    points: Tensor,
    inputs: Tree,
    targets: Tree,
    limit: float,
    record: Callable[[Call], Call] | None,
) -> float:
    """The least time of three calls after a warm-up; of one call, if it exceeds the limit."""
    out = torch.empty_like(points)  # outlives the recorded call
    call: Call = partial(risk.gradient, points, inputs, targets, out=out)

    def seconds() -> float:
        began = time.perf_counter()
        call()
        if points.device.type == "cuda":
            torch.cuda.synchronize(points.device)
        return time.perf_counter() - began

    seconds()
    if record is not None:
        seconds()
        call = record(call)
    least = seconds()
    return least if least > limit else min(least, seconds(), seconds())
