"""Checks of the model and optimizer of a `Coupling`: each problem is one sentence."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from consensus.comm import PeerLostError, group_inside, have_others_in_common
from consensus.core.flat import local
from consensus.coupling.part import Part
from consensus.coupling.processes import Processes


def check_model(model: nn.Module, optimizer: Optimizer, group: Any) -> None:
    """Raise a ValueError if the parameters of a model cannot be coupled over a group."""
    if not isinstance(optimizer, Optimizer):
        kind = type(optimizer).__name__
        raise ValueError(f"`optimizer` is a {kind}; allowed: an optimizer of torch")
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise ValueError("`model` has FullyShardedDataParallel modules; allowed: fully_shard")
    if have_others_in_common(group, group_inside(model)):
        raise ValueError(
            "`model` is wrapped in DistributedDataParallel or fully_shard over processes of "
            "`group`, which makes their copies equal; allowed: a `group` with one process of each "
            "worker, as mesh[NAME], or the module inside, `model.module`"
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
        if not local(parameter).detach().isfinite().all():
            raise ValueError(f"parameter `{name}` has numbers that are not finite; allowed: none")
    _check_shards(trainable)
    for kind in ("dtype", "device"):
        found = sorted({str(getattr(parameter, kind)) for parameter in trainable.values()})
        if len(found) > 1:
            raise ValueError(f"the parameters have the {kind}s {', '.join(found)}; allowed: one")


def check_finite(parts: Sequence[Part], calls: int) -> None:
    """Raise a RuntimeError if u is not finite after so many calls of `step`."""
    if not all(bool(part.u.sum().isfinite()) for part in parts):
        raise RuntimeError(
            f"u is not finite after {calls} calls of `step`, because the parameters of a process "
            "were not; remedies: a smaller learning rate, or no optimizer step where a gradient is "
            "not finite"
        )


def check_replicas(processes: Processes, parts: Sequence[Part], calls: int) -> None:
    """Raise a RuntimeError on all processes unless u, and what moves it, are equal. A collective.

    A schedule of an outer optimizer may have used numbers of one process.
    """
    # Sums of the bits modulo 2^32 or 2^64 have no order. A digest takes 300 times as long.
    kinds = {4: torch.int32, 8: torch.int64}
    sums = []
    for part in parts:
        kind = kinds[part.u.element_size()]
        sums.append(int(part.u.view(kind).sum(dtype=kind)))
    outers = describe_optimizers([part.outer for part in parts if part.outer is not None])
    try:
        processes.require_equal({"outer": outers}, {"u": tuple(sums)})
    except ValueError as error:
        raise RuntimeError(f"after {calls} calls of `step`: {error}") from error


@contextmanager
def warning_of_a_lost_sum(calls: int) -> Iterator[None]:
    """Context in which a lost peer is a warning: nobody needs the sum any more."""
    try:
        yield
    except PeerLostError as error:
        warnings.warn(
            f"{error}; after {calls} calls of `step` another process is gone: u differs between "
            "processes that have not called `step` equally often",
            RuntimeWarning,
            stacklevel=4,
        )


def describe_optimizers(optimizers: Sequence[Optimizer]) -> str:
    """The classes and options of optimizers."""
    return ", ".join(map(describe_optimizer, optimizers))


def describe_optimizer(optimizer: Optimizer) -> str:
    """The class of an optimizer, and the options of each of its parameter groups."""
    options = (
        ", ".join(f"{key}={value}" for key, value in group.items() if key != "params")
        for group in optimizer.param_groups
    )
    return f"{type(optimizer).__name__}({'; '.join(options)})"


class Watch:
    """Detection of changes of a coupled model: other parameters, types, devices, or frozen ones."""

    def __init__(self, model: nn.Module) -> None:
        self._seen = [
            (
                owner._parameters,
                name,
                own,
                (own.dtype, own.device, own.requires_grad),
                f"{path}.{name}" if path else name,
            )
            for path, owner in model.named_modules()
            for name, own in owner.named_parameters(recurse=False)
        ]

    def check(self) -> None:
        """Raise a RuntimeError that names the first change."""
        for places, name, own, kind, path in self._seen:
            if places.get(name) is not own:
                change = "replaced by another"
            elif (own.dtype, own.device, own.requires_grad) == kind:
                continue
            else:
                then = " on ".join(map(str, kind[:2])) + (", frozen" if not kind[2] else "")
                change = f"changed; it was {then}"
            raise RuntimeError(
                f"parameter `{path}` was {change}; make a new Coupling after such a change"
            )


def _problem_of(parameter: nn.Parameter) -> str:
    if nn.parameter.is_lazy(parameter):
        return "not initialized (lazy)"
    if parameter.is_meta:
        return "on the meta device"
    if parameter.layout != torch.strided:
        return "sparse"
    return "" if parameter.is_floating_point() else f"of type {parameter.dtype}"


def _check_shards(parameters: Mapping[str, Any]) -> None:
    """Raise a ValueError unless all or none are sharded, over one dimension of one mesh."""
    sharded = {name: own for name, own in parameters.items() if hasattr(own, "placements")}
    for name, own in sharded.items():
        mesh = own.device_mesh
        if mesh.ndim != 1 or not own.placements[0].is_shard():
            raise ValueError(
                f"parameter `{name}` is placed as {own.placements} on a mesh of {mesh.ndim} "
                "dimensions; allowed: shards over one dimension, fully_shard(model, "
                "mesh=mesh[NAME]), where two dimensions (HSDP) would average over workers"
            )
        if mesh != next(iter(sharded.values())).device_mesh:
            raise ValueError(
                f"parameter `{name}` is sharded over other processes; allowed: one mesh"
            )
    if sharded and (whole := [name for name in parameters if name not in sharded]):
        raise ValueError(f"parameter `{whole[0]}` is not sharded; allowed: all parameters or none")
