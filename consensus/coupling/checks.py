"""Checks of the arguments of `Coupling`: each problem is one sentence, raised by all ranks."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from consensus.comm import Group
from consensus.core.potentials import POTENTIALS, Potential

BUFFERS = ("local", "mean")


def check_settings(numbers: Mapping[str, float], period: int, buffers: str) -> None:
    """Raise a ValueError if `eta`, `pull`, `local_pull` or `outer` is out of its range."""
    for name, value in numbers.items():
        if not isinstance(value, int | float):
            raise ValueError(f"`{name}` is {value}; allowed: a number")
        if name == "eta" and not 0.0 < value < math.inf:
            raise ValueError(f"`eta` is {value}; allowed: a finite number > 0")
        if name == "outer" and not 0.0 <= value < math.inf:
            raise ValueError(f"`outer` is {value}; allowed: a finite number >= 0")
        if name.endswith("pull") and not 0.0 <= value <= 1.0:
            raise ValueError(f"`{name}` is {value}; allowed: a number from 0 to 1")
    if not isinstance(period, int) or period < 1:
        raise ValueError(f"`period` is {period}; allowed: a whole number >= 1")
    if buffers not in BUFFERS:
        raise ValueError(f"`buffers` is {buffers}; allowed: {', '.join(BUFFERS)}")


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


def make_potential(potential: str | Potential, options: Mapping[str, Any] | None) -> Potential:
    """A potential from its name and options, or as given."""
    if isinstance(potential, str):
        return POTENTIALS.make(potential, **(options or {}))
    if not isinstance(potential, Potential):
        raise ValueError(f"`potential` is {potential!r}; allowed: a name or a Potential")
    if options:
        raise ValueError(f"`options` is {options}; allowed: none with a Potential")
    return potential


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
