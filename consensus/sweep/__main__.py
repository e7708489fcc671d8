"""Run a grid of configurations. `python -m consensus.sweep --help` describes the command.

With `sweep.engine=separate`, each configuration is a run of `consensus.train` in a process of its
own, or a SLURM job. With `sweep.engine=population`, they train together in this process.

Data flow: grid.py parses the command line into jobs, and earlier.py finds those that are done.
job.py runs the others in child processes, or population_trainer.py trains them; with
`sweep.halving` to one rung after another, after each of which halving.py decides which go on.
dashboard.py shows their status files. The report reads the files of the runs.
"""

import os
import sys

from consensus.startup import (
    announce,
    begin_imports,
    end_imports,
    interrupt_on_signals,
    protect_streams,
)

begin_imports(__name__, "consensus.sweep")  # the imports below take seconds

from consensus.help import answer_questions, page

answer_questions(__name__, "consensus.sweep")
announce(__name__, "consensus.sweep")

import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NoReturn

from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode

from consensus.comm import GroupError
from consensus.private_api import hydra_callbacks
from consensus.report.__main__ import report
from consensus.report.halving import HALVING, NO_NUMBER, Place, write_places
from consensus.run.checkpoint.reader import list_checkpoints
from consensus.run.checks import ConfigError, require
from consensus.run.compose import REFUSALS, composing, explain
from consensus.run.config import Config
from consensus.run.config_algorithm import ALONE
from consensus.run.overrides import override
from consensus.run.signals import RunStopped
from consensus.sweep.dashboard import Dashboard
from consensus.sweep.earlier import Found, find_earlier
from consensus.sweep.grid import Job, Sweep, check, read_sweep, register_sweep_schema
from consensus.sweep.halving import Candidate, Halving, Rung, has_diverged, kept_of, plan_halving
from consensus.sweep.job import run_here, run_job
from consensus.sweep.members import Member, Stage
from consensus.sweep.population_trainer import train_populations
from consensus.sweep.slurm_queue import cancel, jobs_in_queue


def main() -> None:
    """Entry of the command line."""
    os.environ["HYDRA_FULL_ERROR"] = "1"
    answer_questions("__main__", "consensus.sweep")
    protect_streams("consensus.sweep")
    end_imports()
    interrupt_on_signals()  # the runs write checkpoints and stop
    arguments = sys.argv[1:]
    if not arguments:
        print(page("sweep"), end="", file=sys.stderr)
        sys.exit(2)
    register_sweep_schema()
    cancelled: list[str] = []
    try:
        with composing("sweep", arguments) as (others, searched):
            sweep = read_sweep([text for text in others if text != "--dry-run"])
            check(sweep)
            require_launcher(sweep)
            halving = plan_halving(sweep)
            earlier = find_earlier(sweep)
            dashboard = Dashboard(sweep.path, earlier)
            if "--dry-run" in others:
                dashboard.list_runs(halving.stopped(sweep.path) if halving else {})
                for line in halving.lines() if halving else ():
                    dashboard.print(line)
                return
            require_no_jobs(sweep)
            with dashboard:
                try:
                    out = run(sweep, earlier, searched, dashboard, halving)
                except KeyboardInterrupt:
                    cancelled = jobs_in_queue(sweep.path)  # of this call, see require_no_jobs
                    cancel(cancelled)
                    raise
    except REFUSALS as error:
        leave(explain(error), 2)
    except (OSError, GroupError) as error:
        leave(str(error), 1)
    except RunStopped as stopped:
        leave(str(stopped), stopped.code)
    except KeyboardInterrupt:
        jobs = f", the jobs {', '.join(cancelled)} cancelled" if cancelled else ""
        leave(f"stopped{jobs}; the same command continues it", 130)
    if dashboard.number("done"):
        try:
            report([sweep.path], paths=dashboard.run_dirs(), damaged=dashboard.damaged())
        except (ValueError, OSError) as error:
            leave(f"no report: {error}", 1)
        except KeyboardInterrupt:
            leave("stopped in the report; the same command writes it", 130)
    states = [dashboard.statuses[job.name].state for job in sweep.jobs if job not in out]
    if missing := sum(state != "done" for state in states):
        leave(f"{missing} of {len(sweep.jobs)} runs are not done; see status.json in each", 1)


def run(
    sweep: Sweep,
    earlier: Mapping[Job, Found],
    searched: Sequence[str],
    dashboard: Dashboard,
    halving: Halving | None,
) -> set[Job]:
    """Run all jobs that are not done, with `searched` for each separate run.

    Returns the jobs that `halving` has stopped, those that diverged among them, but not those that
    failed. RunStopped if none can go on.
    """
    folder, say = sweep.path / "report", dashboard.print
    todo = [job for job, found in earlier.items() if found.state in ("new", "continues")]
    if halving is None:
        (folder / HALVING).unlink(missing_ok=True)
        train(sweep, earlier, earlier, todo, None, searched, say)
        return set()
    going: list[Candidate] = list(halving.candidates)
    places: list[Place] = []
    for rung in halving.rungs:
        jobs = [job for candidate in going for job in halving.jobs(candidate, rung)]
        name = f"rung {rung.number} of {len(halving.rungs)}, {rung.iterations:,} iterations"
        dashboard.begin_rung(name, jobs, rung.iterations, halving.after(rung))
        mine = [j for j in jobs if j in todo and not rung.is_over(sweep.path / j.name)]
        train(sweep, earlier, jobs, mine, rung, searched, say)
        rows = {job: rung.row(sweep.path / job.name) for job in jobs}
        found = halving.decide(rung, going, rows)
        dashboard.refresh()  # the lines of the runs come before that of the rung
        places += found
        write_places(places, folder)
        if all(place.decision == NO_NUMBER for place in found):
            column = f" in {halving.column}" if halving.column else ""
            raise RunStopped(f"{name}: no configuration has a number{column}", 1)
        if rung.keep is not None:
            kept = kept_of(going, found)
            say(f"{name}: {len(kept)} of {len(going)} configurations go on")
            going = kept
    left = set(sweep.jobs).difference(job for candidate in going for job in candidate.jobs)
    failed = {job for job in left if dashboard.statuses[job.name].state == "failed"}
    return left - {job for job in failed if not has_diverged(sweep.path / job.name)}


def train(
    sweep: Sweep,
    earlier: Mapping[Job, Found],
    going: Iterable[Job],
    todo: Sequence[Job],
    rung: Rung | None,
    searched: Sequence[str],
    say: Callable[[str], None],
) -> None:
    """Train the jobs `todo` to a rung, or to the end; `going` are all that come to it."""
    separate, stop_at = todo, rung.iterations if rung and rung.keep is not None else None
    if sweep.options.engine == "population":
        # A damaged run, and one with checkpoints of its own, is no part of a population.
        alone = {j for j, f in earlier.items() if f.state == "damaged" or has_checkpoints(sweep, j)}
        found = {job: member_of(sweep, job) for job in sweep.jobs if job not in alone}
        members = [member for member in found.values() if member is not None]
        names, missing = ({job.name for job in jobs} for jobs in (going, todo))
        stage = Stage(frozenset(names), frozenset(missing), stop_at)
        folder, gradients = sweep.path / ".population", sweep.options.gradients
        left = train_populations(members, folder, say, gradients, stage)
        separate = [job for job in todo if found.get(job) in (None, *left)]
    launch(sweep, separate, searched, say, stop_at)


def has_checkpoints(sweep: Sweep, job: Job) -> bool:
    """Whether a run has checkpoints in its directory, from which only a separate run continues."""
    return bool(list_checkpoints(sweep.path / job.name))


def can_be_member(config: Config) -> bool:
    """Whether a population can train it: explicit steps without optimizers of torch, coupled."""
    algorithm = config.algorithm
    explicit = algorithm.coupling == "explicit" and algorithm.u_update == "gradient"
    explicit = explicit and not isinstance(algorithm.outer, dict)
    explicit = explicit and algorithm.optimizer is None and algorithm.clip_grad_norm is None
    explicit = explicit and algorithm.on_nonfinite == "stop" and algorithm.delay == 0
    explicit = explicit and algorithm.step_every is None
    measured = config.stationarity.every is not None and config.coupled
    return algorithm.name not in ALONE and explicit and not measured


def member_of(sweep: Sweep, job: Job) -> Member | None:
    """A job as a member of a population; None: a separate run."""
    try:
        config = sweep.config(job)
    except ConfigError:  # conflicting values: the separate run reports them
        return None
    run_dir = sweep.path / job.name
    output = replace(config.output, run_dir=str(run_dir))
    config = replace(config, output=output, resume="auto")
    return Member(job.name, run_dir, config) if can_be_member(config) else None


def all_overrides(job: Job, folder: Path, stop_at: int | None) -> list[str]:
    """The overrides of a job, with those that the sweep adds."""
    own = [override("output.run_dir", str(folder / job.name)), "resume=auto"]
    return [*job.overrides, *own, *([f"output.stop_at={stop_at}"] if stop_at else [])]


def launch(
    sweep: Sweep,
    jobs: Sequence[Job],
    searched: Sequence[str],
    say: Callable[[str], None],
    stop_at: int | None,
) -> None:
    """Run jobs on this machine, or through the launcher of Hydra that the command line names."""
    if not jobs:
        return
    options = sweep.options
    runs = {job: all_overrides(job, sweep.path, stop_at) for job in jobs}
    if not any(text.startswith("hydra/launcher=") for text in sweep.launcher):
        here = {sweep.path / job.name: [*searched, *own] for job, own in runs.items()}
        run_here(here, options.processes, options.jobs, say)
        return
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None
    overrides = [override("hydra.sweep.dir", str(sweep.path)), "hydra.sweep.subdir=."]
    overrides += sweep.launcher
    config = hydra.compose_config(
        "train", overrides, RunMode.MULTIRUN, with_log_configuration=False
    )
    launcher = Plugins.instance().instantiate_launcher(
        hydra_context=HydraContext(hydra.config_loader, hydra_callbacks(config)),
        task_function=partial(run_job, processes=options.processes, searched=searched),
        config=config,
    )
    for result in launcher.launch(list(runs.values()), initial_job_idx=0):
        result.return_value  # noqa: B018  (raises the error of the task)


def require_launcher(sweep: Sweep) -> None:
    """Refuse a launcher that needs a package, or that cannot stop its runs with a checkpoint."""
    chosen = any(text.startswith("hydra/launcher=") for text in sweep.launcher)
    for text in sweep.launcher:
        key, _, launcher = text.partition("=")
        require(chosen, key, launcher, "with a launcher of Hydra, such as submitit_slurm")
        if key != "hydra/launcher":
            continue
        several = "without it sweep.jobs=N runs N at once, and stops them with a checkpoint"
        require(launcher != "joblib", key, launcher, several)
        if launcher.startswith("submitit"):
            names = ("hydra_plugins", "hydra_plugins.hydra_submitit_launcher")
            there = all(importlib.util.find_spec(module) is not None for module in names)
            allowed = "with the package: pip install hydra-submitit-launcher"
            require(there, key, launcher, allowed)


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
