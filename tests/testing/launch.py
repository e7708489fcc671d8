"""A launcher for tests: real ranks without torchrun, forked from fork_server.py in milliseconds.

`Ranks` replaces torchrun: it holds the store of the rendezvous on a port that the kernel chose,
sets the environment of each rank, and kills the processes that are left. Unlike torchrun it does
not end the others when a rank fails, as in a job over several nodes.
"""

import importlib
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.distributed import TCPStore

from consensus.run import trainer
from tests.testing import fork_server

PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

SHORT_PATIENCE_S = 0.5  # of consensus.train, instead of 5 s


class RanksError(AssertionError):
    """Ranks did not end in time; the message names them and quotes their output."""


class Ranks:
    """`size` processes on this machine, by default each `python -m consensus.train OVERRIDES`.

    A context manager, which kills all of them at its end.

    Args:
        size: Number of processes.
        overrides: The arguments of the command.
        cwd: Working directory, which receives two files of output for each rank.
        env: Changes to the environment of the ranks; PYTHONPATH is searched first. The checkout is
            on their path, so `plugins=[tests.testing.faults]` works.
        attempt: The number of torchrun's restarts before this start.
        module: Its function `main` is the command.

    No figure is drawn at the end of a run: that takes most of the CPU time of a small one, and the
    tests of figures and of the whole command under torchrun do it. A rank that leaves the report to
    another waits for torchrun's signal for a moment only, since none comes.

    Attributes:
        pids: The processes, by rank.
        port: Of the store.
    """

    def __init__(
        self,
        size: int,
        overrides: Sequence[str],
        cwd: Path,
        env: Mapping[str, str] | None = None,
        attempt: int = 0,
        module: str = "consensus.train",
    ) -> None:
        self.size, self.cwd, self.module = size, cwd, module
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.port = self._store.port
        self._processes: list[Any] = []
        kept = {
            name: value
            for name, value in os.environ.items()
            if name not in PLACE and not name.startswith("TORCHELASTIC_")
        }
        meeting = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store of this process outlives rank 0
            "TORCHELASTIC_RESTART_COUNT": str(attempt),
        }
        context = fork_server.context()
        try:
            for rank in range(size):
                place = {
                    "RANK": str(rank),
                    "WORLD_SIZE": str(size),
                    "LOCAL_RANK": str(rank),
                    "LOCAL_WORLD_SIZE": str(size),
                }
                environment = kept | {"OMP_NUM_THREADS": "1"} | meeting | place | dict(env or {})
                files = [self._file(rank, stream) for stream in ("out", "err")]
                process = context.Process(
                    target=_be_rank,
                    args=(module, self.arguments(rank, overrides), cwd, environment, files),
                    daemon=True,
                )
                process.start()
                self._processes.append(process)
        except BaseException:
            self.close()
            raise
        self.pids = [process.pid for process in self._processes]

    def arguments(self, rank: int, overrides: Sequence[str]) -> list[str]:
        """The arguments of a rank: the same for all."""
        del rank
        return list(overrides)

    def wait(self, timeout: float) -> list[int]:
        """Wait for all ranks. Returns the exit codes by rank; -9 is a SIGKILL.

        Raises:
            RanksError: If one has not ended after `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = self.codes
        if None in codes:
            late = [rank for rank, code in enumerate(codes) if code is None]
            said = "\n".join(f"rank {rank}: {self.err(rank)}" for rank in range(self.size))
            raise RanksError(f"ranks {late} have not ended in {timeout} s\n{said}")
        return [code for code in codes if code is not None]

    @property
    def codes(self) -> list[int | None]:
        """The exit codes by rank, None for a rank that runs."""
        return [process.exitcode for process in self._processes]

    @property
    def ended(self) -> bool:
        """Whether a rank has ended."""
        return bool(wait([process.sentinel for process in self._processes], timeout=0))

    def kill(self, rank: int) -> None:
        """Send SIGKILL to a rank, unless it has ended."""
        self._processes[rank].kill()

    def terminate(self, rank: int) -> None:
        """Send SIGTERM to a rank, unless it has ended."""
        self._processes[rank].terminate()

    def kill_all(self) -> None:
        """Send SIGKILL to every rank that runs."""
        for process in self._processes:
            process.kill()

    def out(self, rank: int) -> str:
        """The standard output of a rank."""
        return self._read(rank, "out")

    def err(self, rank: int) -> str:
        """The standard error of a rank."""
        return self._read(rank, "err")

    def lines(self, rank: int) -> list[str]:
        """The lines of the command itself on stderr."""
        lines = self.err(rank).splitlines()
        return [line for line in lines if line.startswith(f"{self.module}:")]

    def close(self) -> None:
        """Kill all ranks."""
        self.kill_all()
        for process in self._processes:
            process.join()
        del self._store

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _file(self, rank: int, stream: str) -> Path:
        return self.cwd / f"rank{rank}.{stream}"

    def _read(self, rank: int, stream: str) -> str:
        path = self._file(rank, stream)
        return path.read_text(errors="replace") if path.exists() else ""


def _be_rank(
    module: str, overrides: list[str], cwd: Path, environment: dict[str, str], files: list[Path]
) -> None:
    for number, path in enumerate(files, start=1):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.dup2(handle, number)
        os.close(handle)
    fork_server.check()
    threading.Thread(target=_end_with_the_tests, name="end-with-the-tests", daemon=True).start()
    torch.set_num_threads(1)
    os.environ.clear()
    os.environ |= environment
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    os.chdir(cwd)
    sys.argv = [module, *overrides]
    trainer.draw_pictures = lambda *_: None
    sys.modules["consensus.train"].PATIENCE_S = SHORT_PATIENCE_S
    importlib.import_module(module).main()


def _end_with_the_tests() -> None:
    tests = multiprocessing.parent_process()
    assert tests is not None
    tests.join()
    os._exit(1)
