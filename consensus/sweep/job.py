"""One run of a sweep: a process of its own, and a file that says what became of it.

The task that Hydra's launchers call, in this process (basic), in one of several (joblib) or in a
job of a cluster (submitit). It starts `consensus.train`, under torchrun where a run has several
processes, and never raises what the run did wrong: a failed run is a row, not the end of a sweep.

Files: `status.json` and `output.txt` (what the run said) in the directory of the run. A run that
has its summary is finished and is not started again; every other is started with `resume=auto`.
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

STATES = ("waiting", "running", "done", "stopped", "failed")
"""waiting: not begun; stopped: begun, and left or killed with something to continue from."""


@dataclass(frozen=True)
class Status:
    """What is known of a run.

    Attributes:
        state: One of STATES.
        pid: Of the process that runs it.
        host: The machine of that process.
        seconds: That it took, the last time.
        code: Its exit code, None while it runs.
        message: Its last line, if it failed.
    """

    state: str = "waiting"
    pid: int | None = None
    host: str = ""
    seconds: float = 0.0
    code: int | None = None
    message: str = ""

    @classmethod
    def read(cls, run_dir: Path) -> "Status":
        """The status of a run directory, which need not exist."""
        status = cls._written(run_dir)
        if status.state == "running" and status.alive():
            return status
        if (run_dir / "summary.json").exists():
            return replace(status, state="done")
        if status.state in ("running", "done"):  # killed with the sweep; or its summary removed
            return replace(status, state="stopped")
        return status

    def alive(self) -> bool:
        """Whether the process that runs it is there, as far as this machine can know."""
        if self.host != socket.gethostname() or self.pid is None:
            return self.pid is not None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True

    @classmethod
    def _written(cls, run_dir: Path) -> "Status":
        try:
            return cls(**json.loads((run_dir / "status.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return cls()

    def write(self, run_dir: Path) -> None:
        """Replace the status of a run directory."""
        write_whole(run_dir / "status.json", json.dumps(asdict(self)).encode() + b"\n")


def run_cell(cfg: DictConfig, *, processes: int, jobs: int) -> dict[str, Any]:
    """Run one configuration to its end.

    Args:
        cfg: Of the run, with `output.run_dir`.
        processes: Of the run.
        jobs: That run at once on this machine.

    Returns:
        Its `Status`, as a dictionary.
    """
    run_dir = Path(cfg.output.run_dir)
    before = Status.read(run_dir)
    if before.state == "done":
        return asdict(before)
    overrides = list(HydraConfig.get().overrides.task)
    run_dir.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with a_gpu(run_dir.parent, jobs) as gpu, (run_dir / "output.txt").open("wb") as output:
        child = subprocess.Popen(
            command(processes, overrides),
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment(processes, jobs) | gpu,
            start_new_session=True,  # Ctrl+C reaches the sweep, which asks its runs to stop
        )
        Status("running", os.getpid(), socket.gethostname()).write(run_dir)
        try:
            code = child.wait()
        except BaseException:
            stop(child)
            seconds = time.monotonic() - started
            Status("stopped", seconds=seconds, code=child.returncode).write(run_dir)
            raise
    seconds = time.monotonic() - started
    if code == 0:
        status = Status("done", seconds=seconds, code=code)
    elif code == TRY_AGAIN:  # by a cluster, which signals all processes of a job
        status = Status("stopped", seconds=seconds, code=code)
    else:
        message = last_words((run_dir / "output.txt").read_text(errors="replace"))
        status = Status("failed", seconds=seconds, code=code, message=message)
    status.write(run_dir)
    return asdict(status)


def command(processes: int, overrides: list[str]) -> list[str]:
    """What starts a run."""
    program = ["-m", "consensus.train", *overrides]
    if processes == 1:
        return [sys.executable, *program]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, *torchrun, *program]


def environment(processes: int, jobs: int) -> dict[str, str]:
    """That of this process, less what belongs to a launch around it; the cores are shared out."""
    theirs = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    own = {
        key: value
        for key, value in os.environ.items()
        if key not in theirs and not key.startswith("TORCHELASTIC_")
    }
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    of_job = os.environ.get("SLURM_CPUS_PER_TASK", "")  # not every cluster binds a job to its cores
    if of_job.isdecimal():
        cores, jobs = int(of_job), 1
    own.setdefault("OMP_NUM_THREADS", str(max(1, (cores or 1) // (processes * jobs))))
    return own


@contextmanager
def a_gpu(folder: Path, jobs: int) -> Iterator[dict[str, str]]:
    """One GPU for each of several runs at once, as an environment; a run alone sees all of them.

    The locks of files in the folder say which are taken, and a process that dies lets go of its.
    """
    names = gpus() if jobs > 1 else []
    if not names:
        yield {}
        return
    slot = None
    while slot is None:
        for i in range(jobs):  # where there are more runs than GPUs, they share them evenly
            file = (folder / f".slot-{i}").open("a")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
            else:
                slot = file
                break
        else:
            time.sleep(0.1)
    with slot:
        yield {"CUDA_VISIBLE_DEVICES": names[i % len(names)]}


def gpus() -> list[str]:
    """The GPUs that this process sees, by what CUDA_VISIBLE_DEVICES calls them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    import torch  # not needed otherwise, and takes seconds

    return [str(i) for i in range(torch.cuda.device_count())]


def stop(child: "subprocess.Popen[bytes]", patience_s: float = 60.0) -> None:
    """Ask a run to write a checkpoint and leave; end it if it does not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            child.wait(patience_s)
            return
    child.wait()


def last_words(output: str) -> str:
    """The line in which a run says why it failed."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    own = [line for line in lines if line.startswith("consensus.train: ")]
    return (own or lines or [""])[-1].removeprefix("consensus.train: ")
