"""Communication: process groups, repeated sums, and the launch they belong to."""

from consensus.comm.group import Group, GroupError, PeerLostError, Pending, RepeatedSum, Solo
from consensus.comm.launch import Launch, LaunchError
from consensus.comm.members import LEAVING, LOST, PLANNED, Members, StoreLostError
from consensus.comm.process_group import (
    ProcessGroup,
    backends,
    choose_backend,
    may_share_memory,
    open_group,
)
from consensus.comm.rendezvous import Store, connect_to_launcher, read_text
from consensus.comm.sums import sent_sum
from consensus.comm.user_group import (
    group_inside,
    group_of_user,
    have_others_in_common,
    num_ranks,
    reshard,
)
from consensus.comm.view import View
from consensus.comm.view_group import ViewGroup, open_view

__all__ = [
    "LEAVING",
    "LOST",
    "PLANNED",
    "Group",
    "GroupError",
    "Launch",
    "LaunchError",
    "Members",
    "PeerLostError",
    "Pending",
    "ProcessGroup",
    "RepeatedSum",
    "Solo",
    "Store",
    "StoreLostError",
    "View",
    "ViewGroup",
    "backends",
    "choose_backend",
    "connect_to_launcher",
    "group_inside",
    "group_of_user",
    "have_others_in_common",
    "may_share_memory",
    "num_ranks",
    "open_group",
    "open_view",
    "read_text",
    "reshard",
    "sent_sum",
]
