"""The jobs of a sweep in SLURM's queue, where `hydra/launcher=submitit_slurm` put them.

submitit makes a folder for each job below `.submitit` of the sweep, named after its number. A sweep
that is stopped cancels its jobs; each asks its run for a checkpoint. One that was killed could not,
and its jobs go on: the next must not start the same runs beside them.
"""

import getpass
import subprocess
from pathlib import Path


def jobs_in_queue(folder: Path) -> list[str]:
    """The numbers of the jobs of the sweep in this directory that wait or run, in order."""
    own = {path.name.partition("_")[0] for path in (folder / ".submitit").glob("*")}
    if not own:
        return []
    return sorted(own & set(_slurm("squeue", "-h", "-u", getpass.getuser(), "-o", "%F").split()))


def cancel(jobs: list[str]) -> None:
    """Have SLURM stop these jobs and their tasks."""
    if jobs:
        _slurm("scancel", *jobs)


def _slurm(*command: str) -> str:
    """What a command of SLURM prints; nothing where there is no SLURM, or it does not answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout
