"""Limits of the machine: memory of a job, and failures that exceed one, as lines with a remedy."""

import errno
import os
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from consensus.comm import GroupError

CGROUP = Path("/sys/fs/cgroup")

LESS = "fewer workers on a process, or a smaller model or algorithm.batch_size"


class MachineError(RuntimeError):
    """A limit of the machine or of the job is exceeded; the message names it and a remedy."""


@contextmanager
def machine_failures() -> Iterator[None]:
    """Raise the failures that `exceeded` recognizes as MachineError."""
    try:
        yield
    except (GroupError, MachineError):
        raise  # they are one line already
    except Exception as error:
        if text := exceeded(error):
            raise MachineError(text) from error
        raise


def exceeded(error: BaseException) -> str | None:
    """The line about a limit that an error shows to be exceeded; None for other errors."""
    text, number = str(error), getattr(error, "errno", None)
    if isinstance(error, torch.OutOfMemoryError) or "CUDA error: out of memory" in text:
        wanted = re.search(r"Tried to allocate ([\d.]+ \w+)", text)
        return f"out of GPU memory{_more(wanted and wanted[1])}: {LESS}; nvidia-smi lists others"
    allocation = re.search(r"can't allocate memory: you tried to allocate (\d+) bytes", text)
    if allocation or isinstance(error, MemoryError) or number == errno.ENOMEM:
        wanted_bytes = f"{int(allocation[1]) / 1e6:,.0f} MB" if allocation else None
        return f"out of memory{_more(wanted_bytes)}: {LESS}, or a higher limit of the job"
    if number in (errno.EMFILE, errno.ENFILE) or "Too many open files" in text:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        remedy = f"`ulimit -n {hard}` before the start" if soft < hard else "a higher hard limit"
        return f"too many open files (a process may open {soft}): {remedy}"
    if "can't start new thread" in text:
        soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
        return f"no more threads (ulimit -u is {soft}): fewer processes, or a higher limit"
    if number in (errno.ENOSPC, errno.EDQUOT):
        where = f" for {name}" if (name := getattr(error, "filename", None)) else ""
        return f"{os.strerror(number)}{where}: free some space, or choose another output.root"
    return None


def _more(wanted: str | None) -> str:
    return f" ({wanted} more wanted)" if wanted else ""


def memory_of(device: torch.device) -> int:
    """The memory of a device in bytes. Of the CPU: that which this process may use."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    own = [limit for limit, _ in memory_limits()]
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if address_space != resource.RLIM_INFINITY:
        own.append(address_space)
    return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *own])


def memory_limits() -> Iterator[tuple[int, int]]:
    """The limit and the use, in bytes, of each control group of this process that has a limit.

    Of version 1 or 2. The page cache does not count: it is released when memory is needed.
    """
    versions = (
        (control_groups(), "memory.max", "memory.current", "inactive_file"),
        (
            control_groups("memory"),
            *("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
    )
    for folders, of_limit, of_use, cache in versions:
        for folder in folders:
            with suppress(OSError, ValueError):  # no limit there
                limit = int((folder / of_limit).read_text())
                used = int((folder / of_use).read_text())
                lines = map(str.split, (folder / "memory.stat").read_text().splitlines())
                yield limit, used - sum(int(value) for key, value in lines if key == cache)


def control_groups(controller: str = "") -> list[Path]:
    """The control groups of this process, from its own upwards.

    Of version 2; of version 1 those of a controller, such as memory.
    """
    own = ""
    with suppress(OSError, StopIteration):
        lines = (x.split(":", 2) for x in Path("/proc/self/cgroup").read_text().splitlines())
        own = next(path for _, names, path in lines if controller in names.split(",")).strip("/")
    top = CGROUP / controller
    path = top / own
    return [folder for folder in (path, *path.parents) if folder.is_relative_to(top)]
