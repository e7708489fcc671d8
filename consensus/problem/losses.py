"""Losses by name, with the metrics that are reported beside them.

A loss maps the outputs of the model and the targets of B samples to B numbers. The run sums or
averages them (`algorithm.loss_reduction`); a sample of several positions or coordinates counts with
their mean, so that step sizes do not depend on their number. Users register their own:

    @LOSSES.register("huber")
    def huber(delta: float = 1.0) -> Loss:
        def function(outputs, targets):
            return huber_loss(outputs, targets, delta=delta, reduction="none").flatten(1).mean(1)
        return Loss(function, {"mae": Metric(lambda x, y: (x - y).abs().flatten(1).mean(1))})
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from consensus.problem.data import Dataset
from consensus.problem.samples import IGNORED, Tree, described, leaves
from consensus.registry import Registry

Values = Callable[[Any, Tree], Tensor]
"""Outputs of the model and targets of B samples -> (B,) numbers."""

GOALS = ("min", "max")


@dataclass(frozen=True)
class Metric:
    """A number per sample, whose mean over the samples is reported.

    Attributes:
        function: Outputs and targets -> (B,), without gradients.
        goal: "min" if lower is better, "max" if higher is.
    """

    function: Values
    goal: str = "min"

    def __post_init__(self) -> None:
        if self.goal not in GOALS:
            raise ValueError(f"`goal` is {self.goal!r}; allowed: {', '.join(GOALS)}")


@dataclass(frozen=True)
class Loss:
    """A loss and its metrics.

    Attributes:
        function: Outputs and targets -> (B,), differentiable.
        metrics: By name: the columns `train_NAME` and `test_NAME` of the metrics. The first decides
            which evaluation is the best; without one, the loss does.
        guess: The data set -> numbers of the best constant output: its mean "loss", and metrics.
            They tell runs that have diverged, or do not learn, from others.
        interval: The smallest and the largest target that is allowed; None: any.
    """

    function: Values
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    guess: Callable[[Dataset], Mapping[str, float]] = lambda dataset: {}
    interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if "loss" in self.metrics:
            raise ValueError("a metric is called `loss`; allowed: other names than the loss's own")

    @property
    def best(self) -> tuple[str, str]:
        """The name of the metric that decides which evaluation is the best, and its goal."""
        return next(((name, metric.goal) for name, metric in self.metrics.items()), ("loss", "min"))

    def __call__(self, outputs: Any, targets: Tree) -> Tensor:
        """The losses of B samples. (B,)."""
        return self.function(outputs, targets)

    def outside(self, targets: Tree) -> str | None:
        """The range of targets that are not all in the interval, as text; None if all are."""
        if self.interval is None:
            return None
        low, high = self.interval
        for x in leaves(targets):
            first, last = float(x.min()), float(x.max())
            if not (low <= first and last <= high):
                return f"go from {first:g} to {last:g}; allowed: {low:g} to {high:g}"
        return None


LOSSES: Registry[Loss] = Registry("loss", Loss)
"""The table of losses. A factory takes the options of its loss."""


# ---- classes


@LOSSES.register("cross_entropy")
def cross_entropy(label_smoothing: float = 0.0) -> Loss:
    """Softmax cross-entropy of classes, as in torch; its metric is the error in percent.

    Outputs (B, C) for targets (B,), or (B, C, ...) for targets (B, ...): int64 in [0, C) or
    `IGNORED`.
    """
    return _cross_entropy("cross_entropy", 1, label_smoothing)


@LOSSES.register("token_cross_entropy")
def token_cross_entropy(label_smoothing: float = 0.0) -> Loss:
    """`cross_entropy` of outputs (B, ..., C), as models of tokens return them."""
    return _cross_entropy("token_cross_entropy", -1, label_smoothing)


def _cross_entropy(name: str, class_axis: int, label_smoothing: float) -> Loss:
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"`label_smoothing` is {label_smoothing}; allowed: a number in [0, 1)")
    axes = "(B, C, ...)" if class_axis == 1 else "(B, ..., C)"

    def logits(outputs: Any, targets: Tree) -> Tensor:
        _require_tensors(outputs, targets)
        # Shapes do not tell (B, T, C) and (B, C, T) apart: C = T is possible.
        x = outputs.movedim(class_axis, 1) if outputs.ndim > 1 and class_axis != 1 else outputs
        fits = x.ndim > 1 and x.shape[:1] + x.shape[2:] == targets.shape
        if not fits or targets.is_floating_point():
            allowed = f"outputs {axes}, targets (B, ...) of whole numbers"
            other = "token_cross_entropy" if class_axis == 1 else "cross_entropy"
            if outputs.ndim > 2:
                allowed += f" ({other} takes the other order)"
            raise _mismatch(name, outputs, targets, allowed)
        return x  # type: ignore[no-any-return]

    def function(outputs: Any, targets: Tree) -> Tensor:
        losses = functional.cross_entropy(
            logits(outputs, targets), targets, reduction="none", label_smoothing=label_smoothing
        )
        return _mean_where_known(losses, targets)

    def error(outputs: Any, targets: Tree) -> Tensor:
        wrong = logits(outputs, targets).argmax(1) != targets
        return 100.0 * _mean_where_known(wrong.double(), targets)

    return Loss(function, {"error": Metric(error)}, _guess_of_classes)


def _mean_where_known(values: Tensor, targets: Tensor) -> Tensor:
    """The mean over the positions of each sample whose class is not IGNORED. (B, ...) -> (B,)."""
    if values.ndim == 1:
        return values
    known = targets != IGNORED
    return (values * known).flatten(1).sum(1) / known.flatten(1).sum(1).clamp(min=1)


def _guess_of_classes(dataset: Dataset) -> Mapping[str, float]:
    """Equal probabilities have the loss log C; the error is that of the most frequent class."""
    targets = dataset.test.targets
    if dataset.num_classes is None or dataset.labels is None or targets is None:
        return {}
    counts = torch.bincount(targets)
    error = 100.0 * (1.0 - float(counts.max()) / len(dataset.test))
    return {"loss": math.log(dataset.num_classes), "error": error}


@LOSSES.register("bce")
def bce() -> Loss:
    """Binary cross-entropy of logits, with targets from 0 to 1 in the shape of the outputs.

    Its metric is the error in percent: the part of the signs that differ from the targets.
    """

    def function(outputs: Any, targets: Tree) -> Tensor:
        _require_same_shape("bce", outputs, targets)
        losses = functional.binary_cross_entropy_with_logits(
            outputs, targets.to(outputs), reduction="none"
        )
        return _mean(losses)

    def error(outputs: Any, targets: Tree) -> Tensor:
        _require_same_shape("bce", outputs, targets)
        return 100.0 * _mean(((outputs > 0) != (targets > 0.5)).double())

    def guess(dataset: Dataset) -> Mapping[str, float]:
        return {"loss": math.log(2.0)}

    return Loss(function, {"error": Metric(error)}, guess, interval=(0.0, 1.0))


# ---- numbers


@LOSSES.register("mse")
def mse() -> Loss:
    """Squared error, the mean over the coordinates of a sample; targets in the outputs' shape.

    Its metrics are its mean, `mse`, and the mean absolute error, `mae`.
    """

    def squares(outputs: Any, targets: Tree) -> Tensor:
        _require_same_shape("mse", outputs, targets)
        return _mean((outputs - targets).square())

    def distances(outputs: Any, targets: Tree) -> Tensor:
        return _mean((outputs - targets).abs())

    def guess(dataset: Dataset) -> Mapping[str, float]:
        if dataset.test.targets is None:  # not listed
            return {}
        targets = dataset.test.targets.double()
        variance = float((targets - targets.mean(0)).square().mean())
        return {"loss": variance, "mse": variance}

    return Loss(squares, {"mse": Metric(squares), "mae": Metric(distances)}, guess)


def _mean(values: Tensor) -> Tensor:
    """The mean over the coordinates of each sample. (B, ...) -> (B,)."""
    return values if values.ndim == 1 else values.flatten(1).mean(1)


def _require_tensors(outputs: Any, targets: Tree) -> None:
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        raise _mismatch("this loss", outputs, targets, "a tensor of outputs and one of targets")


def _require_same_shape(name: str, outputs: Any, targets: Tree) -> None:
    # Shapes such as (B, 1) and (B,) would broadcast to (B, B).
    _require_tensors(outputs, targets)
    if outputs.shape != targets.shape:
        raise _mismatch(name, outputs, targets, "the same shape")


def _mismatch(name: str, outputs: Any, targets: Tree, allowed: str) -> ValueError:
    found = f"outputs {described(outputs)}, targets {described(targets)}"
    return ValueError(f"`loss` is {name} with {found}; allowed: {allowed}")
