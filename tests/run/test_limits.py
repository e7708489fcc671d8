"""Limits of the machine and of a job: what exceeds them, and the memory of control groups."""

import errno
import resource

import pytest
import torch

from consensus.comm import GroupError
from consensus.run import limits
from consensus.run.limits import MachineError, exceeded, machine_failures, memory_of

CPU = torch.device("cpu")


def test_an_allocation_that_fails_is_recognized():
    with (
        pytest.raises(
            MachineError, match=r"^out of memory \(4,000,000,000 MB more wanted\): fewer"
        ),
        machine_failures(),
    ):
        torch.empty(10**15)


@pytest.mark.parametrize(
    ("error", "start"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"),
            "out of GPU memory (2.00 GiB more wanted): fewer workers on a process",
        ),
        (RuntimeError("CUDA error: out of memory\nmore"), "out of GPU memory: fewer"),
        (MemoryError(), "out of memory: fewer"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory: fewer"),
        (OSError(errno.EMFILE, "Too many open files", "a"), "too many open files (a process may "),
        (RuntimeError("socket: Too many open files"), "too many open files (a process may open "),
        (RuntimeError("can't start new thread"), "no more threads (ulimit -u is "),
        (
            OSError(errno.ENOSPC, "No space left on device", "run/x"),
            "No space left on device for run/x: free some space, or choose another output.root",
        ),
    ],
)
def test_limits_that_are_exceeded(error, start):
    line = exceeded(error)
    assert line is not None
    assert line.startswith(start)
    assert "\n" not in line


@pytest.mark.parametrize(
    "error", [ValueError("x"), OSError(errno.EACCES, "no"), RuntimeError("a bug")]
)
def test_other_errors_stay(error):
    assert exceeded(error) is None
    with pytest.raises(type(error)), machine_failures():
        raise error


def test_errors_of_a_group_stay():
    with pytest.raises(GroupError, match=r"^rank 1: Too many open files$"), machine_failures():
        raise GroupError("rank 1: Too many open files")


@pytest.mark.parametrize(
    ("folder", "names"),
    [
        ("", ("memory.max", "memory.current", "inactive_file")),
        ("memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
    ],
)
def test_the_memory_of_a_control_group(monkeypatch, tmp_path, folder, names):
    monkeypatch.setattr(limits, "CGROUP", tmp_path)
    all_of_it = memory_of(CPU)
    assert list(limits.memory_limits()) == []
    (tmp_path / folder).mkdir(exist_ok=True)
    limit, use, cache = names
    (tmp_path / folder / use).write_text("1000000\n")
    (tmp_path / folder / "memory.stat").write_text(f"anon 7\n{cache} 400000\n")
    for no_limit in ("max\n", f"{2**62}\n"):
        (tmp_path / folder / limit).write_text(no_limit)
        assert memory_of(CPU) == all_of_it
    (tmp_path / folder / limit).write_text("3000000\n")
    assert memory_of(CPU) == 3_000_000
    assert list(limits.memory_limits()) == [(3_000_000, 600_000)]


def test_the_limit_of_the_address_space(monkeypatch, tmp_path):
    monkeypatch.setattr(limits, "CGROUP", tmp_path)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (5_000_000, 6_000_000))
    assert memory_of(CPU) == 5_000_000
