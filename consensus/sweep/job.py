"""A job: one run of a sweep in a child process, and its status file.

`run_job` is the task of Hydra's launchers: in this process (basic), in worker processes (joblib) or
in jobs of a cluster (submitit). It starts `consensus.train`, under torchrun if the run has several
processes. A failed run sets its status and raises nothing, so that the sweep continues.

The directory of the run gets `status.json` and `output.txt`, the output of the run. A run that has
its summary is complete and is not started again. Others are started with `resume=auto`.
"""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from consensus.atomic_files import write_whole
from consensus.run.signals import TRY_AGAIN


@dataclass(frozen=True)
class Status:
    """The status of a run: waiting, running, done, stopped or failed.

    waiting: not started; stopped: started, and then stopped or killed; it can be continued.
    """

    state: str = "waiting"
    pid: int | None = None  # the process that runs it
    host: str = ""  # the machine of that process
    seconds: float = 0.0  # of its last execution
    code: int | None = None  # the exit code; None while it runs
    message: str = ""  # the error message, if it failed

    @classmethod
    def read(cls, run_dir: Path) -> "Status":
        """Read the status of a run directory, which need not exist."""
        try:
            status = cls(**json.loads((run_dir / "status.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            status = cls()
        if status.state == "running" and status.alive():
            return status
        if (run_dir / "summary.json").exists():
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
        except PermissionError:  # it belongs to another user
            pass
        return True

    def write(self, run_dir: Path) -> None:
        """Write the status to a run directory."""
        write_whole(run_dir / "status.json", json.dumps(asdict(self)).encode() + b"\n")


def run_job(cfg: DictConfig, *, processes: int, jobs: int) -> dict[str, Any]:
    """Run one configuration in so many processes to its end. Returns its `Status`, as a dictionary.

    `jobs` is the number of jobs that run at once on this machine.
    """
    run_dir = Path(cfg.output.run_dir)
    before = Status.read(run_dir)
    if before.state == "done":
        return asdict(before)
    overrides = list(HydraConfig.get().overrides.task)
    run_dir.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with reserved_gpu(run_dir.parent, jobs) as gpu, (run_dir / "output.txt").open("wb") as output:
        child = subprocess.Popen(
            command(processes, overrides),
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment(processes, jobs) | gpu,
            start_new_session=True,  # Ctrl+C reaches the sweep only, which stops its runs
        )
        Status("running", os.getpid(), socket.gethostname()).write(run_dir)
        try:
            code = child.wait()
        except BaseException:
            stop(child)
            seconds = time.monotonic() - started
            Status("stopped", seconds=seconds, code=child.returncode).write(run_dir)
            raise
    # TRY_AGAIN: a cluster signals all processes of a job, including the run.
    state = {0: "done", TRY_AGAIN: "stopped"}.get(code, "failed")
    message = ""
    if state == "failed":
        message = error_line((run_dir / "output.txt").read_text(errors="replace"))
    status = Status(state, seconds=time.monotonic() - started, code=code, message=message)
    status.write(run_dir)
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


@contextmanager
def reserved_gpu(folder: Path, jobs: int) -> Iterator[dict[str, str]]:
    """Reserve a GPU for one of several concurrent runs; yields CUDA_VISIBLE_DEVICES.

    A single run sees all GPUs. File locks in the folder mark the reserved slots; the kernel
    releases the lock of a process that dies. More jobs than GPUs share them evenly.
    """
    names = visible_gpus() if jobs > 1 else []
    if not names:
        yield {}
        return
    while True:
        for i in range(jobs):
            with (folder / f".slot-{i}").open("a") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                yield {"CUDA_VISIBLE_DEVICES": names[i % len(names)]}
                return
        time.sleep(0.1)


def visible_gpus() -> list[str]:
    """The GPUs of this process, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    import torch  # a local import: it takes seconds

    return [str(i) for i in range(torch.cuda.device_count())]


def stop(child: "subprocess.Popen[bytes]", patience_s: float = 60.0) -> None:
    """Send SIGTERM, so that the run writes a checkpoint; after `patience_s`, SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            child.wait(patience_s)
            return
    child.wait()


def error_line(output: str) -> str:
    """The error message of a failed run: its last line `consensus.train: ...`, else its last."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    own = [line for line in lines if line.startswith("consensus.train: ")]
    return (own or lines or [""])[-1].removeprefix("consensus.train: ")
