"""Communication: process groups, repeated sums, and the launch they belong to."""

from consensus.comm.group import Group, GroupError, PeerLostError, Pending, RepeatedSum, Solo
from consensus.comm.launch import Launch, LaunchError
from consensus.comm.process_group import (
    ProcessGroup,
    backends,
    choose_backend,
    may_share_memory,
    open_group,
)
from consensus.comm.sums import sent_sum

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
