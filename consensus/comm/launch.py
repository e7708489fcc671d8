"""Launch: rank and size of this process, read from the environment."""

import os
import socket
from dataclasses import dataclass


class LaunchError(ValueError):
    """The environment does not describe a launch; the message names the variable."""


@dataclass(frozen=True)
class Launch:
    """Position of this process among those that torchrun started; one of one without torchrun.

    Attributes:
        rank: Rank of this process.
        size: Number of processes.
        local_rank: Rank of this process on its node.
        local_size: Number of processes on this node.
        restart: Number of restarts by torchrun so far (--max-restarts).
        name: Identifier of the launch, the same after a restart; "" without torchrun.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    restart: int = 0
    name: str = ""

    @classmethod
    def from_environment(cls) -> "Launch":
        """Read the variables that torchrun sets.

        Raises:
            LaunchError: If a variable is no whole number, a rank is not below its size, or there is
                more than one process and no rendezvous address.
        """
        size, local_size = _number("WORLD_SIZE", "1"), _number("LOCAL_WORLD_SIZE", "1")
        launch = cls(
            _number("RANK"),
            size,
            _number("LOCAL_RANK"),
            local_size,
            _number("TORCHELASTIC_RESTART_COUNT"),
            _launch_name(),
        )
        if launch.rank >= size:
            raise LaunchError(f"`RANK` is {launch.rank}; allowed: below WORLD_SIZE = {size}")
        if (local := launch.local_rank) >= local_size:
            allowed = f"below LOCAL_WORLD_SIZE = {local_size}"
            raise LaunchError(f"`LOCAL_RANK` is {local}; allowed: {allowed}")
        absent = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if size > 1 and absent:
            raise LaunchError(f"`{absent[0]}` is not set; with WORLD_SIZE > 1 start with torchrun")
        return launch

    def block(self, num_workers: int) -> range:
        """Indices j of the workers of this process, for M = num_workers, a multiple of `size`."""
        each = num_workers // self.size
        return range(self.rank * each, (self.rank + 1) * each)


def _number(name: str, default: str = "0") -> int:
    text = os.environ.get(name, default)
    if not text.isdecimal():
        raise LaunchError(f"`{name}` is {text}; allowed: a whole number, as torchrun sets")
    return int(text)


def _launch_name() -> str:
    """The --rdzv-id; without one the torchrun process itself, which survives its restarts."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    if name != "none":
        return name
    return f"{socket.gethostname()}:{os.getppid()}:{_start_time(os.getppid())}"


def _start_time(pid: int) -> str:
    """Start time of a process in clock ticks since boot; "" where there is no /proc."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
