"""What earlier calls of a sweep left: which runs are done, which continue, and which are new.

A run in a directory of the sweep counts only if it is the run that the command means: its config
is compared, not its name.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from consensus.comm import Launch
from consensus.records import last_row, read_rows
from consensus.run.checkpoint.reader import list_checkpoints
from consensus.run.checkpoint.resume import differing, find_origin, state_of
from consensus.run.checks import ConfigError
from consensus.run.compose import REFUSALS
from consensus.run.config import Config
from consensus.run.plan import count_workers
from consensus.stored_config import read_config
from consensus.sweep.grid import Job, Sweep
from consensus.sweep.job import summary_of

_PLACE = {"output.root", "output.run_dir", "output.name", "data.root", "device", "resume"}
_PLACE |= {"output.checkpoint_every", "output.keep_checkpoints", "output.log_every"}
_PLACE |= {
    "output.tensorboard",
    "output.figures",
    "output.stop_at",
    "cuda_graph",
    "plugins",
    "data.loader_workers",
}
"""Keys, beside the section `group`, that say where and how a run is computed, and not what."""


@dataclass(frozen=True)
class Found:
    """What there is of a run: new, continues, done, or damaged (it cannot be read)."""

    state: str
    iterations: int | None = None  # that the command means; None for a new run
    done: int = 0  # iterations, as far as its evaluations tell
    problem: str = ""  # of a damaged run


def find_earlier(sweep: Sweep) -> dict[Job, Found]:
    """What there is of each run. ConfigError if a directory holds another run than is meant."""
    return {job: _find(sweep, job) for job in sweep.jobs}


def _find(sweep: Sweep, job: Job) -> Found:
    run_dir = sweep.path / job.name
    try:
        if state_of(run_dir) is None:
            return Found("new")
        before = read_config(run_dir / "config.yaml")
        if "algorithm" not in before:
            raise ValueError("it holds no config")
    except (OSError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        return _damaged(run_dir, f"{run_dir / 'config.yaml'} cannot be read ({cause})")
    summary, checkpoints = summary_of(run_dir), list_checkpoints(run_dir)
    if summary is None and (run_dir / "summary.json").exists() and not checkpoints:
        return _damaged(run_dir, f"{run_dir / 'summary.json'} cannot be read")
    try:
        config = sweep.config(job)
        config = replace(config, output=replace(config.output, run_dir=str(run_dir)), resume="auto")
        launch = Launch(size=sweep.options.processes)
        num_workers = count_workers(config, launch)
    except REFUSALS:  # values of several keys that conflict: the run reports them
        return Found("new")
    wanted = config.algorithm.iterations
    more = summary is None or (summary.get("iteration", 0) < wanted and checkpoints)
    if summary is not None and not more:
        for key, old, new in _differences(before, summary, config, num_workers):
            where = f"as in {run_dir}, which is finished; or another sweep.dir"
            raise ConfigError(f"`{key}` is {new}; allowed: {old}, {where}")
        try:
            read_rows(run_dir)  # a report without them would be one of fewer runs
        except ValueError as error:
            return _damaged(run_dir, str(error))
        return Found("done", wanted, wanted)
    try:
        find_origin(config, launch, num_workers)
    except ConfigError as error:
        raise ConfigError(f"{error}; or another sweep.dir") from error
    last = last_row(run_dir)
    return Found("continues", wanted, last["iteration"] if last else 0)


def _damaged(run_dir: Path, problem: str) -> Found:
    return Found("damaged", problem=f"{problem}; remove {run_dir} to run it again")


def _differences(
    before: Any, summary: dict[str, Any], config: Config, num_workers: int
) -> Iterator[tuple[str, Any, Any]]:
    """Key, old and new value of each difference between a finished run and the one that is meant.

    The numbers of workers and of iterations are those of the run, whatever its config left open.
    """
    for key, old, new in differing(before, config):
        own = key in ("workers", "algorithm.iterations")
        if not own and key not in _PLACE and not key.startswith("group."):
            yield key, old, new
    done, wanted = summary.get("iteration"), config.algorithm.iterations
    if done != wanted:
        yield "algorithm.iterations", done, wanted
    workers = summary.get("environment", {}).get("workers", num_workers)
    if workers != num_workers:
        yield "workers", workers, num_workers
