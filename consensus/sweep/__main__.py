"""Entry that runs a grid: python -m consensus.sweep grid=NAME KEY=VALUE[,VALUE ...] ...

An ordinary process. Every configuration of the grid is a run of `consensus.train` in a process of
its own, started through one of Hydra's launchers: one after another (basic), several at once
(`sweep.jobs=N`, joblib), or as an array of SLURM jobs (`hydra/launcher=submitit_slurm`).

Or, with `sweep.engine=population`, together in this process.

Data flow: grid.py reads the command line into cells; a launcher calls cell.py for each, or
together.py trains them; board.py follows their files on the screen; report draws the whole from the
same files.
"""

import importlib.util
import os
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NoReturn

from hydra import compose, initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.types import HydraContext, RunMode

from consensus.comm import GroupError
from consensus.report.__main__ import report
from consensus.run.checks import ConfigError, require
from consensus.run.compose import REFUSALS, config_dir, explain, register_schema, to_config
from consensus.run.config import Config
from consensus.sweep.dashboard import Board
from consensus.sweep.grid import Cell, Sweep, check, read_sweep, register_sweep_schema
from consensus.sweep.job import run_cell
from consensus.sweep.population_trainer import Member, train_together
from consensus.sweep.slurm_queue import cancel, jobs_in_queue


def main() -> None:
    """Entry of the command line. Exit codes: 0 all done, 1 some failed, 2 refused, 130 stopped."""
    os.environ["HYDRA_FULL_ERROR"] = "1"
    signal.signal(signal.SIGTERM, interrupt)
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
            with Board(sweep.path, sweep.cells) as board:
                try:
                    run(sweep, board)
                except KeyboardInterrupt:
                    cancelled = jobs_in_queue(sweep.path)  # of this call: there were none before
                    cancel(cancelled)
                    raise
    except REFUSALS as error:
        leave(explain(error), 2)
    except (OSError, GroupError) as error:
        leave(str(error), 1)
    except KeyboardInterrupt:
        jobs = f", the jobs {', '.join(cancelled)} cancelled" if cancelled else ""
        leave(f"stopped{jobs}; the same command continues it", 130)
    if board.number("done"):
        try:
            report([sweep.path])
        except (ValueError, OSError) as error:
            leave(f"no report: {error}", 1)
    failed = len(sweep.cells) - board.number("done")
    if failed:
        leave(f"{failed} of {len(sweep.cells)} runs are not done; status.json in each says why", 1)


def run(sweep: Sweep, board: Board) -> None:
    """All cells that are not done."""
    alone, together = list(sweep.cells), []
    if sweep.options.engine == "population":
        alone = []
        for cell in sweep.cells:
            try:
                member = member_of(cell, sweep.path)
            except ConfigError:  # of values that do not fit each other: the run itself refuses them
                alone.append(cell)
                continue
            if not can_be_member(member.config):
                alone.append(cell)
            else:
                together.append(member)
        train_together(together, sweep.path / ".population", board.say, sweep.options.gradients)
    launch(sweep, alone)


def can_be_member(config: Config) -> bool:
    """Whether a population can train it.

    mSGD has no u, no block solves equations, and stationarity is measured by the trainer.
    """
    algorithm = config.algorithm
    explicit = algorithm.coupling == "explicit" and algorithm.u_update == "gradient"
    measured = config.stationarity.every is not None and config.coupled
    return algorithm.name != "msgd" and explicit and not measured


def member_of(cell: Cell, folder: Path) -> Member:
    """A cell with its config, for the population engine."""
    own = own_overrides(cell, folder)
    config = to_config(compose("train", overrides=[*cell.overrides, *own]))
    return Member(cell.name, folder / cell.name, config)


def own_overrides(cell: Cell, folder: Path) -> list[str]:
    """What the sweep says to each of its runs."""
    return [f"output.run_dir={quoted(str(folder / cell.name))}", "resume=auto"]


def launch(sweep: Sweep, cells: Sequence[Cell]) -> None:
    """Give the cells that are not done to Hydra's launcher, and wait for it."""
    jobs = [
        [*cell.overrides, *own_overrides(cell, sweep.path)]
        for cell in cells
        if not (sweep.path / cell.name / "summary.json").exists()
    ]
    if not jobs:
        return
    options = sweep.options
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None
    overrides = [
        f"hydra.sweep.dir={quoted(str(sweep.path))}",
        "hydra.sweep.subdir=.",
        *launcher_overrides(sweep),
    ]
    config = hydra.compose_config(
        "train", overrides, RunMode.MULTIRUN, with_log_configuration=False
    )
    launcher = Plugins.instance().instantiate_launcher(
        hydra_context=HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks(config)),
        task_function=partial(run_cell, processes=options.processes, jobs=options.jobs),
        config=config,
    )
    results: list[JobReturn] = list(launcher.launch(jobs, initial_job_idx=0))
    for result in results:
        result.return_value  # noqa: B018  (raises what the task raised)


def launcher_overrides(sweep: Sweep) -> list[str]:
    """Hydra's own overrides; several runs at once are joblib's, unless another is named."""
    own = list(sweep.launcher)
    if sweep.options.jobs > 1 and not any(text.startswith("hydra/launcher=") for text in own):
        own[:0] = ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={sweep.options.jobs}"]
    return own


def require_launcher(sweep: Sweep) -> None:
    """Refuse a launcher whose plugin is not installed, naming its package."""
    for text in launcher_overrides(sweep):
        name = text.partition("=")[2].partition("_")[0]
        plugin = f"hydra_plugins.hydra_{name}_launcher"
        if text.startswith("hydra/launcher=") and name in ("joblib", "submitit"):
            require(
                importlib.util.find_spec("hydra_plugins") is not None
                and importlib.util.find_spec(plugin) is not None,
                "sweep.jobs" if name == "joblib" and not sweep.launcher else "hydra/launcher",
                sweep.options.jobs if name == "joblib" and not sweep.launcher else name,
                f"1, or with the package hydra-{name}-launcher: pip install hydra-{name}-launcher",
            )


def require_no_jobs(sweep: Sweep) -> None:
    """Refuse to start runs that jobs of an earlier call are still to do."""
    jobs = jobs_in_queue(sweep.path)
    if jobs:
        raise ConfigError(
            f"the jobs {', '.join(jobs)} of {sweep.path} are still in the queue: wait for them, or"
            f" `scancel {' '.join(jobs)}`; then the same command continues"
        )


def quoted(text: str) -> str:
    """A text as a value of Hydra's grammar."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM is Ctrl+C: the runs are asked to stop."""
    raise KeyboardInterrupt


def leave(message: str, code: int) -> NoReturn:
    """End with one line."""
    print(f"consensus.sweep: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
