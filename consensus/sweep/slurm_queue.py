"""The SLURM jobs of a sweep, submitted by `hydra/launcher=submitit_slurm`.

submitit makes a folder `.submitit/NUMBER` in the sweep directory for each job. A sweep that is
stopped cancels its jobs, whose runs then write checkpoints. The jobs of a killed sweep continue;
the next call must not start the same runs a second time.
"""

import getpass
import subprocess
from pathlib import Path


def jobs_in_queue(folder: Path) -> list[str]:
    """The numbers of the pending and running SLURM jobs of the sweep in this directory, sorted."""
    own = {path.name.partition("_")[0] for path in (folder / ".submitit").glob("*")}
    if not own:
        return []
    return sorted(own & set(_slurm("squeue", "-h", "-u", getpass.getuser(), "-o", "%F").split()))


def cancel(jobs: list[str]) -> None:
    """Cancel SLURM jobs."""
    if jobs:
        _slurm("scancel", *jobs)


def _slurm(*command: str) -> str:
    """The output of a SLURM command; empty if there is no SLURM, or it does not respond in 30 s."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout
