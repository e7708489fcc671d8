"""A job: one run of a sweep in a child process, and its status file.

`run_here` runs jobs on this machine, several at once. `run_job` is the task of Hydra's launchers,
for example in the jobs of a cluster (submitit). Both start `consensus.train`, under torchrun if the
run has several processes. A failed run sets its status and raises nothing, so that the sweep
continues.

The directory of the run gets `status.json` and `output.txt`, the output of the run. Runs are
started with `resume=auto`. A child process gets SIGTERM when the sweep ends, however it ends, so
that no run outlives its sweep.
"""

import ctypes
import fcntl
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from consensus.atomic_files import write_whole
from consensus.run.checkpoint.directory import LOCK
from consensus.run.checks import require
from consensus.run.signals import TRY_AGAIN

LOOK_EVERY_S = 0.05
OTHER_FILES = 100  # that the sweep may have open beside the locks of a population
PATIENCE_S = 60.0  # for a run to write its checkpoint and end

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1  # of prctl(2), which Linux alone has


@dataclass(frozen=True)
class Status:
    """The status of a run: waiting, running, done, stopped or failed.

    waiting: not started; stopped: started, and then stopped or killed; it can be continued. A run
    that `output.stop_at` has stopped, at a rung of `sweep.halving`, has the exit code 0.
    """

    state: str = "waiting"
    pid: int | None = None  # the process that runs it
    host: str = ""  # the machine of that process
    seconds: float = 0.0  # of its last execution
    code: int | None = None  # the exit code; None while it runs
    message: str = ""  # the error message, if it failed
    began: int | None = None  # start of the process in clock ticks; another one may get its number

    @classmethod
    def running(cls) -> "Status":
        """The status of a run that this process runs."""
        return cls("running", os.getpid(), socket.gethostname(), began=_start_of(os.getpid()))

    @classmethod
    def read(cls, run_dir: Path, iterations: int = 0) -> "Status":
        """Read the status of a run directory, which need not exist.

        A run is done once it has finished that many iterations.
        """
        try:
            status = cls(**json.loads((run_dir / "status.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            status = cls()
        if status.state == "running" and status.alive():
            return status
        if finished(run_dir, iterations):
            return replace(status, state="done")
        if status.state in ("running", "done"):  # killed, or its summary was removed
            return replace(status, state="stopped")
        return status

    def alive(self) -> bool:
        """Whether its process runs. On another machine a process is assumed to run."""
        if self.pid is None or self.host != socket.gethostname():
            return self.pid is not None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except (PermissionError, OverflowError):  # it belongs to another user
            pass
        began = _start_of(self.pid)
        return began != _ENDED and (None in (began, self.began) or began == self.began)

    def write(self, run_dir: Path) -> None:
        """Write the status to a run directory."""
        write_whole(run_dir / "status.json", json.dumps(asdict(self)).encode() + b"\n")


_ENDED = -1


def _start_of(pid: int) -> int | None:
    """The start of a process in clock ticks since boot; _ENDED for a zombie, None if unknown."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
        state, *numbers = stat.rpartition(")")[2].split()
        return _ENDED if state in "ZX" else int(numbers[18])
    except (OSError, ValueError, IndexError):  # no Linux, or hidden
        return None


def summary_of(run_dir: Path) -> dict[str, Any] | None:
    """The summary.json of a finished run; None if there is none, or it cannot be read."""
    try:
        summary = json.loads((run_dir / "summary.json").read_bytes())
    except (OSError, ValueError):
        return None
    return summary if isinstance(summary, dict) else None


def finished(run_dir: Path, iterations: int) -> bool:
    """Whether a run has finished that many iterations."""
    summary = summary_of(run_dir)
    return summary is not None and summary.get("iteration", 0) >= iterations


class Child:
    """One run in a child process. An OSError if it cannot be started or its files not written.

    Its directory is made. A run that was left by a killed sweep may still write its checkpoint
    there; whoever starts the next one waits for `in_use`.
    """

    def __init__(
        self, run_dir: Path, arguments: Sequence[str], processes: int, env: Mapping[str, str]
    ) -> None:
        self.run_dir = run_dir
        self._started = time.monotonic()
        run_dir.mkdir(parents=True, exist_ok=True)
        Status.running().write(run_dir)  # first: a full disk then starts nothing
        with (run_dir / "output.txt").open("wb") as output:
            self.process = subprocess.Popen(
                command(processes, list(arguments)),
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=dict(env),
                start_new_session=True,  # Ctrl+C reaches the sweep only, which stops its runs
                preexec_fn=partial(_end_with, os.getpid()),
            )

    def poll(self) -> Status | None:
        """Its status once it has ended, which is written as well; None while it runs."""
        code = self.process.poll()
        if code is None:
            return None
        # TRY_AGAIN: a cluster signals all processes of a job, including the run.
        state = {0: "done", TRY_AGAIN: "stopped"}.get(code, "failed")
        if state == "done" and summary_of(self.run_dir) is None:  # by output.stop_at
            state = "stopped"
        message = ""
        if state == "failed":
            message = error_line((self.run_dir / "output.txt").read_text(errors="replace"))
        seconds = time.monotonic() - self._started
        status = Status(state, seconds=seconds, code=code, message=message)
        try:
            status.write(self.run_dir)
        except OSError:
            if code != 0:  # a complete run is recognized by its summary
                raise
        return status

    def was_stopped(self) -> None:
        """Write the status of a run that `stop` has ended."""
        seconds = time.monotonic() - self._started
        status = Status("stopped", seconds=seconds, code=self.process.returncode)
        with suppress(OSError):  # a full disk
            status.write(self.run_dir)


def _end_with(parent: int) -> None:
    """In a new process: SIGTERM when the thread that started it ends, killed or not."""
    if hasattr(_LIBC, "prctl"):
        _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
        if os.getppid() != parent:  # it ended before
            os.kill(os.getpid(), signal.SIGTERM)


def stop(children: Sequence[Child], patience_s: float = PATIENCE_S) -> None:
    """Send SIGTERM to all, so that they write checkpoints; after `patience_s`, SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + patience_s
        for child in children:
            if child.process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(child.process.pid, number)
        for child in children:
            with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
                child.process.wait(max(0.0, deadline - time.monotonic()))
    for child in children:
        child.was_stopped()


def run_here(
    runs: Mapping[Path, Sequence[str]],
    processes: int,
    at_once: int,
    say: Callable[[str], None],
) -> None:
    """Run jobs on this machine: directory -> arguments of the run. `say` prints a line.

    At an exception, such as KeyboardInterrupt, the runs are stopped with a checkpoint. A run that
    cannot be started or watched costs a line, and the others go on.
    """
    gpus = visible_gpus() if at_once > 1 else []
    env = environment(processes, at_once)
    waiting, running = list(runs.items())[::-1], dict[int, Child]()
    patience = time.monotonic() + PATIENCE_S  # for what a killed sweep has left
    try:
        while waiting or running:
            for slot in range(at_once):
                try:
                    if slot in running and running[slot].poll() is not None:
                        del running[slot]
                    if slot in running or not waiting:
                        continue
                    run_dir, arguments = waiting[-1]
                    if time.monotonic() < patience and in_use(run_dir):
                        waiting.insert(0, waiting.pop())
                        continue
                    waiting.pop()
                    # A single run sees all GPUs, several share them evenly.
                    gpu = {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {}
                    running[slot] = Child(run_dir, arguments, processes, env | gpu)
                except OSError as error:
                    ended = running.pop(slot, None)
                    _cannot(ended.run_dir if ended else run_dir, error, say)
            time.sleep(LOOK_EVERY_S)
    except BaseException:
        stop(list(running.values()))
        raise


def _cannot(run_dir: Path, error: OSError, say: Callable[[str], None]) -> None:
    """Record that a run could not be started or watched, or print it, where nothing is written."""
    message = f"{error.strerror}: {error.filename}" if error.filename else str(error)
    try:
        Status("failed", message=message).write(run_dir)
    except OSError:
        say(f" failed  {run_dir.name}  {message}")


def in_use(run_dir: Path) -> bool:
    """Whether a process holds the lock of a run directory."""
    try:
        with (run_dir / LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock file, or a file system without locks
        pass
    return False


def run_job(cfg: DictConfig, *, processes: int, searched: Sequence[str]) -> dict[str, Any]:
    """A task of Hydra: run one configuration to its end. Returns its `Status`, as a dictionary.

    `searched` are the arguments that name further folders of YAML files.
    """
    run_dir, iterations = Path(cfg.output.run_dir), int(cfg.algorithm.iterations)
    before = Status.read(run_dir, iterations)
    if before.state == "done":  # a cluster may start a job again
        return asdict(before)
    arguments = [*searched, *HydraConfig.get().overrides.task]
    child = Child(run_dir, arguments, processes, environment(processes, 1))
    try:
        while (status := child.poll()) is None:
            time.sleep(LOOK_EVERY_S)
    except BaseException:
        stop([child])
        raise
    return asdict(status)


def command(processes: int, overrides: list[str]) -> list[str]:
    """The command line of a run."""
    program = ["-m", "consensus.train", *overrides]
    if processes == 1:
        return [sys.executable, *program]
    # The ranks meet at the loopback address: the name of the machine need not resolve.
    here = ["--standalone", "--local-addr=127.0.0.1"]
    torchrun = ["-m", "torch.distributed.run", *here, f"--nproc-per-node={processes}"]
    return [sys.executable, *torchrun, *program]


def environment(processes: int, jobs: int) -> dict[str, str]:
    """Child environment: torchrun variables removed, CPU threads divided between runs."""
    launch = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    own = {
        key: value
        for key, value in os.environ.items()
        if key not in launch and not key.startswith("TORCHELASTIC_")
    }
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    of_job = os.environ.get("SLURM_CPUS_PER_TASK", "")  # not all clusters bind a job to its cores
    if of_job.isdecimal():
        cores, jobs = int(of_job), 1
    own.setdefault("OMP_NUM_THREADS", str(max(1, (cores or 1) // (processes * jobs))))
    return own


def visible_gpus() -> list[str]:
    """The GPUs of this process, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    import torch  # a local import: it takes seconds

    return [str(i) for i in range(torch.cuda.device_count())]


def allow_open_files(runs: int) -> None:
    """Raise the limit of open files for the locks of a population; ConfigError if it is too low."""
    wanted = runs + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or wanted <= soft:
        return
    most = wanted if hard == resource.RLIM_INFINITY else hard
    allowed = (
        f"separate here, or the limit `ulimit -Hn` at {wanted} or more: {runs} runs at once keep a "
        f"file open each, and this process may have {hard}"
    )
    require(wanted <= most, "sweep.engine", "population", allowed)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def error_line(output: str) -> str:
    """The error message of a failed run: its last line `consensus.train: ...`, else its last."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    own = [line for line in lines if line.startswith("consensus.train: ")]
    return (own or lines or [""])[-1].removeprefix("consensus.train: ")
