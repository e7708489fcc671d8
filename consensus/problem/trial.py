"""A trial of a user's model: its logits and its randomness, in both modes, before a run starts."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from consensus.problem.streams import restored_generators, seed_all


def require_logits(model: nn.Module, images: Tensor, labels: Tensor, num_classes: int) -> None:
    """Refuse a model that cannot be trained, for a few images (B, 1, 28, 28) and labels (B,).

    ValueError unless a pass in either mode turns them into logits (B, num_classes) which depend on
    the parameters, and the seeds of the global generators determine all its random numbers. The
    model keeps its mode, and the generators their states.
    """
    training = model.training
    try:
        for mode in (False, True):
            model.train(mode)
            first, second = (_logits(model, images, labels, num_classes, mode) for _ in range(2))
            # A GPU may add in another order.
            rtol = 0.0 if images.device.type == "cpu" else 1e-3
            if not torch.allclose(first, second, rtol=rtol, atol=rtol, equal_nan=True):
                raise ValueError(
                    "it draws random numbers that no seed determines, in a pass"
                    f"{_of(mode)}: draw from the global generator of torch, NumPy or Python"
                )
    finally:
        model.train(training)


def _logits(
    model: nn.Module, images: Tensor, labels: Tensor, num_classes: int, training: bool
) -> Tensor:
    wanted = (len(images), num_classes)
    with restored_generators(images.device), torch.set_grad_enabled(training):
        seed_all(0)
        logits = model(images)
        if not isinstance(logits, Tensor) or logits.shape != wanted:
            images_ = "1 image" if len(images) == 1 else f"{len(images)} images"
            found = _description(logits)
            raise ValueError(f"it turns {images_} into {found}, not logits {wanted}{_of(training)}")
        if training:
            if not logits.requires_grad:
                raise ValueError("its logits do not depend on its parameters")
            loss = cross_entropy(logits, labels)
            torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        return logits.detach()


def _of(training: bool) -> str:
    return " in training mode" if training else ""


def _description(value: Any) -> str:
    """The type of a result of a model: its shape, keys or length."""
    if isinstance(value, Tensor):
        return str(tuple(value.shape))
    name = type(value).__name__
    if isinstance(value, dict):
        return f"a {name} with {', '.join(map(str, value)) or 'no keys'}"
    return f"a {name} of {len(value)}" if isinstance(value, tuple | list) else f"a {name}"
