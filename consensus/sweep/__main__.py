"""Run a grid of configurations: python -m consensus.sweep grid=NAME KEY=VALUE[,VALUE ...] ...

With `sweep.engine=separate`, each configuration is a run of `consensus.train` in a process of its
own. Hydra's launchers start the runs: in sequence (basic), several at once (`sweep.jobs=N`,
joblib), or as an array of SLURM jobs (`hydra/launcher=submitit_slurm`). With
`sweep.engine=population`, they train together in this process.

Data flow: grid.py parses the command line into jobs. A launcher calls job.py for each, or
population_trainer.py trains them. dashboard.py shows their status files. The report reads the files
of the runs.
"""

import os
import sys

from consensus.startup import answer_signals, interrupt_on_signals, protect_streams

answer_signals(__name__, "consensus.sweep")  # the imports below take seconds

import importlib.util
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode

from consensus.comm import GroupError
from consensus.private_api import hydra_callbacks
from consensus.report.__main__ import report
from consensus.run.checks import ConfigError, require
from consensus.run.compose import REFUSALS, config_dir, explain, register_schema, to_config
from consensus.run.config import Config
from consensus.run.overrides import override
from consensus.sweep.dashboard import Dashboard
from consensus.sweep.grid import Job, Sweep, check, read_sweep, register_sweep_schema
from consensus.sweep.job import run_job
from consensus.sweep.population_trainer import Member, train_populations
from consensus.sweep.slurm_queue import cancel, jobs_in_queue


def main() -> None:
    """The command line. Exit codes: 0 all done, 1 some failed, 2 refused, 130 stopped."""
    os.environ["HYDRA_FULL_ERROR"] = "1"
    protect_streams("consensus.sweep")
    interrupt_on_signals()  # the runs write checkpoints and stop
    register_schema()
    register_sweep_schema()
    cancelled: list[str] = []
    try:
        with initialize_config_dir(config_dir(), version_base="1.3", job_name="sweep"):
            if "--help" in sys.argv or "-h" in sys.argv:
                print(__doc__)
                return
            sweep = read_sweep(sys.argv[1:])
            check(sweep)
            require_launcher(sweep)
            require_no_jobs(sweep)
            with Dashboard(sweep.path, sweep.jobs) as dashboard:
                try:
                    run(sweep, dashboard)
                except KeyboardInterrupt:
                    cancelled = jobs_in_queue(sweep.path)  # of this call, see require_no_jobs
                    cancel(cancelled)
                    raise
    except REFUSALS as error:
        leave(explain(error), 2)
    except (OSError, GroupError) as error:
        leave(str(error), 1)
    except KeyboardInterrupt:
        jobs = f", the jobs {', '.join(cancelled)} cancelled" if cancelled else ""
        leave(f"stopped{jobs}; the same command continues it", 130)
    if dashboard.number("done"):
        try:
            report([sweep.path])
        except (ValueError, OSError) as error:
            leave(f"no report: {error}", 1)
    if failed := len(sweep.jobs) - dashboard.number("done"):
        leave(f"{failed} of {len(sweep.jobs)} runs are not done; see status.json in each", 1)


def run(sweep: Sweep, dashboard: Dashboard) -> None:
    """Run all jobs that are not done."""
    separate = list(sweep.jobs)
    if sweep.options.engine == "population":
        found = {job: member_of(job, sweep.path) for job in sweep.jobs}
        separate = [job for job, member in found.items() if member is None]
        members = [member for member in found.values() if member is not None]
        folder = sweep.path / ".population"
        train_populations(members, folder, dashboard.print, sweep.options.gradients)
    launch(sweep, separate)


def can_be_member(config: Config) -> bool:
    """Whether a population can train it: explicit steps of u and z_j, no mSGD, no measurements."""
    algorithm = config.algorithm
    explicit = algorithm.coupling == "explicit" and algorithm.u_update == "gradient"
    explicit = explicit and not isinstance(algorithm.outer, dict)
    measured = config.stationarity.every is not None and config.coupled
    return algorithm.name != "msgd" and explicit and not measured


def member_of(job: Job, folder: Path) -> Member | None:
    """A job as a member of a population; None: a separate run."""
    try:
        config = to_config(compose("train", overrides=all_overrides(job, folder)))
    except ConfigError:  # conflicting values: the separate run reports them
        return None
    return Member(job.name, folder / job.name, config) if can_be_member(config) else None


def all_overrides(job: Job, folder: Path) -> list[str]:
    """The overrides of a job, with those that the sweep adds."""
    return [*job.overrides, override("output.run_dir", str(folder / job.name)), "resume=auto"]


def launch(sweep: Sweep, jobs: Sequence[Job]) -> None:
    """Run the jobs that are not done through Hydra's launcher."""
    left = [
        all_overrides(job, sweep.path)
        for job in jobs
        if not (sweep.path / job.name / "summary.json").exists()
    ]
    if not left:
        return
    options = sweep.options
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None
    overrides = [override("hydra.sweep.dir", str(sweep.path)), "hydra.sweep.subdir=."]
    overrides += launcher_overrides(sweep)
    config = hydra.compose_config(
        "train", overrides, RunMode.MULTIRUN, with_log_configuration=False
    )
    launcher = Plugins.instance().instantiate_launcher(
        hydra_context=HydraContext(hydra.config_loader, hydra_callbacks(config)),
        task_function=partial(run_job, processes=options.processes, jobs=options.jobs),
        config=config,
    )
    for result in launcher.launch(left, initial_job_idx=0):
        result.return_value  # noqa: B018  (raises the error of the task)


def launcher_overrides(sweep: Sweep) -> list[str]:
    """The overrides for Hydra: joblib if `sweep.jobs` > 1 and no launcher is chosen."""
    own = list(sweep.launcher)
    if sweep.options.jobs > 1 and not any(text.startswith("hydra/launcher=") for text in own):
        own[:0] = ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={sweep.options.jobs}"]
    return own


def require_launcher(sweep: Sweep) -> None:
    """Refuse a launcher whose plugin is not installed; the message names the package."""
    for text in launcher_overrides(sweep):
        name = text.partition("=")[2].partition("_")[0]
        if text.startswith("hydra/launcher=") and name in ("joblib", "submitit"):
            names = ("hydra_plugins", f"hydra_plugins.hydra_{name}_launcher")
            chosen = ("hydra/launcher", name)
            if name == "joblib" and not sweep.launcher:
                chosen = ("sweep.jobs", str(sweep.options.jobs))
            require(
                all(importlib.util.find_spec(module) is not None for module in names),
                *chosen,
                f"1, or with the package hydra-{name}-launcher: pip install hydra-{name}-launcher",
            )


def require_no_jobs(sweep: Sweep) -> None:
    """Refuse to start while SLURM jobs of an earlier call are pending or running."""
    if jobs := jobs_in_queue(sweep.path):
        raise ConfigError(
            f"the jobs {', '.join(jobs)} of {sweep.path} are still in the queue: wait for them, or"
            f" `scancel {' '.join(jobs)}`; then the same command continues"
        )


def leave(message: str, code: int) -> NoReturn:
    """Exit with one line on standard error."""
    print(f"consensus.sweep: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
