"""Groups of a user who has opened torch.distributed: default group, process group or mesh.

And the groups inside a model: of fully_shard (FSDP2), whose parameters are DTensors, and of
DistributedDataParallel.
"""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from consensus.comm.group import Group, Solo
from consensus.comm.process_group import open_like
from consensus.comm.shared_memory import available


def num_ranks(group: Any = None) -> int:
    """Number of processes of a user's group, see `group_of_user`."""
    handle = _handle(group)
    return 1 if handle is None else handle.size()


def group_of_user(group: Any, device: torch.device, timeout_s: float) -> Group:
    """A new group of the same ranks, so that its collectives never mix with the user's.

    A collective. `close` destroys the new group only. On the CPU it is Gloo, elsewhere it has the
    backend of the given group. See `ProcessGroup.side` for groups of a part of the ranks.

    Args:
        group: A process group of torch, a device mesh with one dimension, or None for the default
            group, or for this process alone where torch.distributed is not initialized.
        device: Device of the tensors that will be reduced.
        timeout_s: Longest wait for a peer, in seconds.

    Raises:
        ValueError: If `group` is something else, or a group without this process; or None without
            a default group, in a process of several that torchrun has started.
    """
    handle = _handle(group)
    if handle is None or handle.size() == 1:
        return Solo(device)
    return open_like(handle, device, timeout_s, shared_memory=available())


def group_inside(model: nn.Module) -> dist.ProcessGroup | None:
    """The processes that hold one copy of a model in shards, or train it together, if any."""
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            return module.process_group
    meshes = (own.device_mesh for own in model.parameters() if hasattr(own, "device_mesh"))
    return next((mesh.get_group() for mesh in meshes if mesh.ndim == 1), None)


def have_others_in_common(group: Any, inside: dist.ProcessGroup | None) -> bool:
    """Whether a user's group and one inside a model have more than this process in common."""
    handle = _handle(group)
    if handle is None or inside is None:
        return False
    ranks = (set(dist.get_process_group_ranks(own)) for own in (handle, inside))
    return len(set.intersection(*ranks)) > 1


def reshard(model: nn.Module) -> None:
    """Free the gathered parameters of fully_shard, so that the next use gathers the shards.

    The root keeps them after a forward pass, and after writes to the shards they would be old.
    """
    if any(hasattr(module, "reshard") for module in model.modules()):
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _handle(group: Any) -> dist.ProcessGroup | None:
    if group is None:
        if dist.is_available() and dist.is_initialized():
            return dist.group.WORLD
        size = os.environ.get("WORLD_SIZE", "1")
        if size != "1":  # of torchrun: each process would train by itself, and none would notice
            raise ValueError(
                f"`group` is None, and this is one of {size} processes (WORLD_SIZE) that have no "
                "process group; allowed: None after torch.distributed.init_process_group()"
            )
        return None
    if hasattr(group, "get_group"):
        if group.ndim != 1:
            raise ValueError(
                f"`group` is a mesh of {group.ndim} dimensions; allowed: one of them, mesh[NAME]"
            )
        group = group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"`group` is {group}; allowed: None, a process group or device mesh of this process"
        )
    return group
