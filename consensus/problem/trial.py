"""A trial of a user's model and loss on a few samples, before a run starts."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from consensus.problem.calls import buffers_of, call, evaluation_mode
from consensus.problem.losses import Loss
from consensus.problem.risk import in_double_precision
from consensus.problem.samples import Samples, described, leaves, map_tree
from consensus.problem.streams import restored_generators, seed_all


@dataclass(frozen=True)
class Trial:
    """What a trial has found out."""

    outputs: str  # description of the outputs
    unused: tuple[str, ...]  # trainable parameters that the loss of the samples does not depend on
    numbers: int  # of one sample, in the inputs or in the outputs


def try_model(model: nn.Module, loss: Loss, samples: Samples, num_classes: int | None) -> Trial:
    """One forward and backward pass for a few samples, in both modes; see `Raises`.

    The model keeps its mode, its buffers and its parameters, and the generators their states.

    Raises:
        ValueError: If the model cannot be trained: the loss takes other outputs, is no number per
            sample, or does not depend on the parameters; a gradient is sparse; the model changes
            its inputs; or the seeds of the global generators do not determine the random numbers.
    """
    with evaluation_mode(model), torch.no_grad():
        first, second = (_outputs(model, samples) for _ in range(2))
        _require_equal(first, second, "in evaluation mode")
    outputs, second = (_outputs(model, samples) for _ in range(2))
    _require_equal(outputs, second, "in training mode")
    for found in (in_double_precision(first), outputs):  # as evaluations and gradients take them
        losses = _losses(loss, found, samples, num_classes)
    if not losses.requires_grad:
        raise ValueError("its loss does not depend on its parameters")
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(losses.sum(), list(trainable.values()), allow_unused=True)
    named = dict(zip(trainable, gradients, strict=True))
    if sparse := [name for name, g in named.items() if g is not None and g.is_sparse]:
        allowed = "dense gradients, as of nn.Embedding(sparse=False)"
        raise ValueError(
            f"the gradient of its parameter `{sparse[0]}` is sparse; allowed: {allowed}"
        )
    unused = [name for name, g in named.items() if g is None]
    numbers = max(x.numel() for tree in (samples.inputs, outputs) for x in leaves(tree))
    return Trial(described(outputs), tuple(unused), numbers // len(samples))


def try_evaluation(model: nn.Module, loss: Loss, samples: Samples, num_classes: int | None) -> None:
    """One evaluation of a few samples, on which it fails if it would fail on their set."""
    with evaluation_mode(model), torch.no_grad():
        _losses(loss, in_double_precision(_outputs(model, samples)), samples, num_classes)


def _losses(loss: Loss, outputs: Any, samples: Samples, num_classes: int | None) -> Tensor:
    """The loss of each sample, after checks of it and of the metrics."""
    _require_classes(outputs, samples, num_classes)
    losses = loss(outputs, samples.targets)
    _require_values("loss", losses, len(samples))
    for name, metric in loss.metrics.items():
        found = metric.function(outputs, samples.targets)
        _require_values(f"metric `{name}`", found, len(samples))
    return losses


def _outputs(model: nn.Module, samples: Samples) -> Any:
    given = map_tree(torch.clone, samples.inputs)
    with restored_generators(next(samples.tensors()).device):
        seed_all(0)
        found = call(model, buffers_of(model), given)
    for x, before in zip(leaves(given), leaves(samples.inputs), strict=True):
        if not torch.equal(x.nan_to_num(), before.nan_to_num()):
            allowed = "operations that return new tensors: others would change the samples"
            raise ValueError(f"it changes its inputs in place; allowed: {allowed}")
    return found


def _require_equal(first: Any, second: Any, where: str) -> None:
    for x, y in zip(leaves(first), leaves(second), strict=True):
        if not isinstance(x, Tensor):
            raise ValueError(f"its outputs are {described(first)}; allowed: tensors")
        # A GPU may add in another order.
        tolerance = 0.0 if x.device.type == "cpu" else 1e-3
        if not torch.allclose(x.detach(), y.detach(), tolerance, tolerance, equal_nan=True):
            raise ValueError(
                f"it draws random numbers that no seed determines, {where}: draw from the global"
                " generator of torch, NumPy or Python"
            )


def _require_classes(outputs: Any, samples: Samples, num_classes: int | None) -> None:
    """Refuse logits of another number of classes where targets are classes (B,)."""
    targets = samples.targets
    if num_classes is None or not isinstance(targets, Tensor) or targets.ndim != 1:
        return
    if targets.is_floating_point():
        return
    wanted = (len(samples), num_classes)
    if not isinstance(outputs, Tensor) or outputs.shape != wanted:
        # Without the type, which is that of the trial.
        found = tuple(outputs.shape) if isinstance(outputs, Tensor) else described(outputs)
        raise ValueError(f"it turns {len(samples)} samples into {found}, not {wanted}")


def _require_values(what: str, values: Any, count: int) -> None:
    if not isinstance(values, Tensor) or values.shape != (count,):
        found = described(values)
        raise ValueError(f"the {what} of {count} samples is {found}; allowed: a tensor ({count},)")
