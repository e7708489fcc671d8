"""The group of a user who has opened torch.distributed: default group, process group or mesh."""

from typing import Any

import torch
import torch.distributed as dist

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
        ValueError: If `group` is something else, or a group without this process.
    """
    handle = _handle(group)
    if handle is None or handle.size() == 1:
        return Solo(device)
    return open_like(handle, device, timeout_s, shared_memory=available())


def _handle(group: Any) -> dist.ProcessGroup | None:
    if group is None:
        ready = dist.is_available() and dist.is_initialized()
        return dist.group.WORLD if ready else None
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
