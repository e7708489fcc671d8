"""Communication: the only package that imports torch.distributed."""

from consensus.comm.process_group import (
    Group,
    GroupError,
    Launch,
    LaunchError,
    PeerLostError,
    Pending,
    ProcessGroup,
    RepeatedSum,
    Solo,
    backends,
    choose_backend,
    may_share_memory,
    open_group,
    sent_sum,
)

__all__ = [
    "Group",
    "GroupError",
    "Launch",
    "LaunchError",
    "PeerLostError",
    "Pending",
    "ProcessGroup",
    "RepeatedSum",
    "Solo",
    "backends",
    "choose_backend",
    "may_share_memory",
    "open_group",
    "sent_sum",
]
