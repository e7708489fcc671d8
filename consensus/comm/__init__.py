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
from consensus.comm.user_group import (
    group_inside,
    group_of_user,
    have_others_in_common,
    num_ranks,
    reshard,
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
    "group_inside",
    "group_of_user",
    "have_others_in_common",
    "may_share_memory",
    "num_ranks",
    "open_group",
    "reshard",
    "sent_sum",
]
