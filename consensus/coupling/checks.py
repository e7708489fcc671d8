"""Checks of the model and optimizer of a `Coupling`: each problem is one sentence."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from consensus.comm import Group


def check_model(model: nn.Module, optimizer: Optimizer) -> None:
    """Raise a ValueError if the parameters of a model cannot be coupled."""
    if any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules()):
        raise ValueError(
            "`model` is wrapped in DistributedDataParallel, which makes all copies equal; "
            "allowed: the module inside, `model.module`"
        )
    named = dict(model.named_parameters())
    own = {id(parameter) for parameter in named.values()}
    given = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if strangers := sum(id(parameter) not in own for parameter in given):
        raise ValueError(
            f"`optimizer` has {strangers} parameters that are not the model's; allowed: an "
            "optimizer made of model.parameters() as they are now"
        )
    trainable = {name: p for name, p in named.items() if p.requires_grad}
    for name, parameter in trainable.items():
        if problem := _problem_of(parameter):
            raise ValueError(f"parameter `{name}` is {problem}; allowed: dense real parameters")
    for kind in ("dtype", "device"):
        found = sorted({str(getattr(parameter, kind)) for parameter in trainable.values()})
        if len(found) > 1:
            raise ValueError(f"the parameters have the {kind}s {', '.join(found)}; allowed: one")


class Watch:
    """What may not change while a model is coupled: its parameters, their types and devices."""

    def __init__(self, model: nn.Module) -> None:
        self._seen = [
            (owner, name, f"{path}.{name}" if path else name, own)
            for path, owner in model.named_modules()
            for name, own in owner.named_parameters(recurse=False)
        ]
        self._kinds = [(own.dtype, own.device, own.requires_grad) for *_, own in self._seen]

    def check(self) -> None:
        """Raise a RuntimeError that names the first change."""
        for (owner, name, path, own), kind in zip(self._seen, self._kinds, strict=True):
            now = (own.dtype, own.device, own.requires_grad)
            change = ""
            if getattr(owner, name, None) is not own:
                change = "replaced by another"
            elif now != kind:
                then = " on ".join(map(str, kind[:2])) + (", frozen" if not kind[2] else "")
                change = f"changed; it was {then}"
            if change:
                raise RuntimeError(
                    f"parameter `{path}` was {change}; make a new Coupling after such a change"
                )


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter that has one; else the CPU."""
    devices = (parameter.device for parameter in model.parameters() if not parameter.is_meta)
    return next(devices, torch.device("cpu"))


def _problem_of(parameter: nn.Parameter) -> str:
    if nn.parameter.is_lazy(parameter):
        return "not initialized (lazy)"
    if parameter.is_meta:
        return "on the meta device"
    if hasattr(parameter, "placements"):
        return "sharded (a DTensor)"
    if parameter.layout != torch.strided:
        return "sparse"
    return "" if parameter.is_floating_point() else f"of type {parameter.dtype}"


def require_equal(group: Group, values: Mapping[str, Any]) -> None:
    """Raise a ValueError on all ranks unless all have the same values. A collective."""
    first, *others = group.gather_objects(dict(values))
    for rank, own in enumerate(others, start=1):
        for key, value in first.items():
            if own[key] != value:
                shown = f" ({own[key]}, {value})" if isinstance(value, str | int | float) else ""
                raise ValueError(
                    f"`{key}` on rank {rank} differs from rank 0{shown}; allowed: the same on all"
                )
