"""Launch: rank and size of this process, read from the environment."""

import os
import socket
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

# Numbers of tasks of one parallel start: srun (not SLURM_NTASKS, which an allocation has as well),
# Open MPI, MPICH and its relatives, MVAPICH.
_TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


class LaunchError(ValueError):
    """The environment does not describe a launch; the message names the variable."""


@dataclass(frozen=True)
class Launch:
    """Position of this process among those that torchrun started; one of one without torchrun."""

    rank: int = 0
    size: int = 1  # number of processes
    local_rank: int = 0  # on this node, as is `local_size`
    local_size: int = 1
    restart: int = 0  # number of restarts by torchrun so far (--max-restarts)
    name: str = ""  # of the launch, the same after a restart; "" without torchrun
    started: float = field(default=0.0, compare=False)  # Unix time of its torchrun; 0: unknown

    @classmethod
    def from_environment(cls) -> "Launch":
        """Read the variables that torchrun sets.

        LaunchError if they contradict each other, or there are none in a job of several tasks.
        """
        _refuse_tasks_without_ranks()
        rank, size = _place("")
        local_rank, local_size = _place("LOCAL_")
        restart = _number("TORCHELASTIC_RESTART_COUNT")
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if size > 1 and name not in os.environ:
                raise LaunchError(f"`{name}` is not set; with WORLD_SIZE > 1 start with torchrun")
        return cls(rank, size, local_rank, local_size, restart, _launch_name(), _started())

    def command(self) -> str:
        """The command that starts as many processes of consensus.train, without its arguments."""
        if self.size == 1:
            return "python -m consensus.train"
        if self.size == self.local_size:
            return f"torchrun --standalone --nproc-per-node={self.size} -m consensus.train"
        return f"the launch of {self.size} processes, with"

    def block(self, num_workers: int) -> range:
        """Indices j of the workers of this process, for M = num_workers, a multiple of `size`."""
        each = num_workers // self.size
        return range(self.rank * each, (self.rank + 1) * each)


def _refuse_tasks_without_ranks() -> None:
    """Refuse `srun python` and `mpirun python`: each task would be a run of its own, unremarked."""
    if "WORLD_SIZE" in os.environ:
        return
    for name in _TASKS:
        if (count := os.environ.get(name, "")).isdecimal() and int(count) > 1:
            raise LaunchError(
                f"`{name}` is {count} and `WORLD_SIZE` is not set; allowed: one torchrun on each "
                "node, as launch/slurm.sbatch starts it; or WORLD_SIZE=1, where each task is to be "
                "a run of its own"
            )


def _place(prefix: str) -> tuple[int, int]:
    rank, size = _number(f"{prefix}RANK"), _number(f"{prefix}WORLD_SIZE", "1")
    if rank >= size:
        raise LaunchError(f"`{prefix}RANK` is {rank}; allowed: below {prefix}WORLD_SIZE = {size}")
    return rank, size


def _number(name: str, default: str = "0") -> int:
    text = os.environ.get(name, default)
    if not text.isdecimal():
        raise LaunchError(f"`{name}` is {text}; allowed: a whole number, as torchrun sets")
    return int(text)


def _started() -> float:
    """The Unix time at which the parent, which is torchrun, started; 0 where there is no /proc."""
    with suppress(OSError, IndexError, ValueError, StopIteration):
        ticks = int(stat_of(os.getppid())[19])
        lines = Path("/proc/stat").read_text().splitlines()
        boot = next(int(line.split()[1]) for line in lines if line.startswith("btime "))
        return boot + ticks / os.sysconf("SC_CLK_TCK")
    return 0.0


def stat_of(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name of the program."""
    return Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()


def _launch_name() -> str:
    """The --rdzv-id; without one the torchrun process itself, which survives its restarts."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    if name != "none":
        return name
    parent, started = os.getppid(), ""  # in clock ticks since boot; "" where there is no /proc
    with suppress(OSError, IndexError):
        started = stat_of(parent)[19]
    return f"{socket.gethostname()}:{parent}:{started}"
