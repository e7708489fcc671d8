"""Continuing a run: the choice of its origin, the checks on it, and the return to a checkpoint.

Before the group opens, every rank makes the same decision from the config, the launch and the files
(`find_origin`): whether the run starts or continues. A wrong request is refused there, with exit
code 2. After the group has opened, `resume` restores the state.

A run continues in its own directory with `resume=auto`, or if torchrun restarts the same launch.
With `resume=PATH` a new run starts from a checkpoint of another run.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from consensus.algorithm import Algorithm
from consensus.comm import Group, GroupError, Launch
from consensus.core.potentials import POTENTIALS
from consensus.core.schedules import SCHEDULES
from consensus.problem import DATASETS, LOSSES, MODELS
from consensus.records import Row, rows_until
from consensus.registry import Registry
from consensus.repeatable import begin_at_consensus
from consensus.run.checkpoint.directory import LOCK, MARKS, Origin, RunDirectory, lock_holder
from consensus.run.checkpoint.manifest import DamagedError, Manifest, as_hex
from consensus.run.checkpoint.reader import (
    FOLDER,
    candidates,
    choose,
    inspect,
    list_checkpoints,
    load,
)
from consensus.run.checks import ConfigError, require
from consensus.run.config import RESUME, Config
from consensus.stored_config import plain, read_config

_FREE = {"output", "group", "device", "deterministic", "cuda_graph", "resume", "plugins"}
_FREE |= {"workers", "stationarity", "data.root", "data.loader_workers", "algorithm.iterations"}
"""Sections and keys that may differ between a run and its continuation."""

CLOCKS_S = 60.0  # by which the clocks of a node and of a file system may differ

_TABLES: dict[str, Registry[Any]] = {
    "potential": POTENTIALS,
    "model": MODELS,
    "data": DATASETS,
    "loss": LOSSES,
    **{f"algorithm.schedule.{name}": SCHEDULES for name in ("tau", "sigma", "lam")},
}


def find_origin(config: Config, launch: Launch, num_workers: int) -> Origin:
    """The run directory, and the run or checkpoint to continue from.

    ConfigError if the directory holds another run or one that may not be continued like this, or
    `resume` names no checkpoint.
    """
    run_dir = None if config.output.run_dir is None else Path(config.output.run_dir)
    usable = run_dir is None or not run_dir.exists() or run_dir.is_dir()
    allowed = "a directory, or a path where none exists yet"
    require(usable, "output.run_dir", run_dir, allowed)
    again = _restarted(config, launch, run_dir)
    if again is not None or config.resume == "auto":
        own = again or run_dir
        assert own is not None  # config.py refuses resume=auto without a directory
        if state_of(own) is not None:
            _require_continuable(own, config, num_workers)
            return Origin(own, own)
        run_dir = own
    if run_dir is not None:
        name = state_of(run_dir)
        run = f"{'a finished' if name == 'summary.json' else 'an unfinished'} run ({name})"
        allowed = f"an empty or new directory; this one holds {run}; resume=auto continues it"
        require(name is None, "output.run_dir", run_dir, allowed)
    if config.resume in RESUME:
        return Origin(run_dir)
    source = Path(config.resume)
    allowed = "never, auto, or the path of a checkpoint or of a run that has one"
    require(bool(candidates(source)), "resume", source, allowed)
    _require_fitting(source, config, num_workers)
    return Origin(run_dir, source)


def state_of(run_dir: Path) -> str | None:
    """The file that shows that a directory holds a run; None if it holds none."""
    for name in MARKS:
        if (run_dir / name).exists():
            return name
    return "checkpoints" if list_checkpoints(run_dir) else None


def _restarted(config: Config, launch: Launch, run_dir: Path | None) -> Path | None:
    """The directory of this launch from before torchrun restarted it; None if there is none."""
    if launch.restart == 0:
        return None
    if run_dir is not None:
        return run_dir if _is_of(run_dir / LOCK, launch) else None
    locks = Path(config.output.root).glob(f"*/{LOCK}")
    for lock in sorted(locks, reverse=True):  # names begin with their date
        if _is_of(lock, launch):
            return lock.parent
    return None


def _is_of(lock: Path, launch: Launch) -> bool:
    """Whether this launch wrote a lock file: a --rdzv-id may be that of an earlier launch."""
    try:
        recent = lock.stat().st_mtime > launch.started - CLOCKS_S
    except OSError:
        return False
    return recent and lock_holder(lock).get("launch") == launch.name


def _require_continuable(run_dir: Path, config: Config, num_workers: int) -> None:
    """Refuse to continue another run, or a finished one without checkpoints."""
    if list_checkpoints(run_dir):
        _require_fitting(run_dir, config, num_workers)
        return
    allowed = f"never, in a new directory: {run_dir} holds a finished run without checkpoints"
    require(state_of(run_dir) != "summary.json", "resume", "auto", allowed)
    try:  # there is nothing to load, but only the same run may replace its metrics
        before = read_config(run_dir / "config.yaml")
    except (OSError, ValueError):  # the run was killed before it wrote the file
        return
    require_same(before, config, run_dir)


def _require_fitting(source: Path, config: Config, num_workers: int) -> None:
    """Refuse a source whose newest readable checkpoint has another run or a later format."""
    for checkpoint in candidates(source):
        try:
            manifest, before = inspect(checkpoint)
        except DamagedError:
            continue  # `choose` reports it
        require_same(before, config, checkpoint)
        workers, done = manifest.num_workers, manifest.iteration
        allowed = f"{workers}, as in {checkpoint} (on any number of processes dividing it)"
        known = config.group.elastic or workers == num_workers
        require(known, "workers", num_workers, allowed)
        iterations = config.algorithm.iterations
        allowed = f"at least {done}, which {checkpoint} has done"
        require(iterations >= done, "algorithm.iterations", iterations, allowed)
        return


def require_same(before: Any, config: Config, where: Path | str) -> None:
    """Refuse all keys and options that differ from the start of the run, in one line."""
    told = [
        f"`{key}` is {new}; allowed: {old}"
        for key, old, new in differing(before, config)
        if not {key, key.partition(".")[0]} & _FREE
    ]
    if told:
        raise ConfigError(f"{'; '.join(told)}, as in {where} (a run is continued as it began)")


def differing(before: Any, config: Config) -> Iterator[tuple[str, Any, Any]]:
    """Key, old and new value of each setting that differs; `before` is a config as plain data.

    A key that no class had at that time is free, and so is an option with the value of its default.
    """
    old = flat(_with_defaults(before))
    new = flat(_with_defaults(plain(config)))
    for key in {**new, **old}:
        known, (owner, option, _) = key in old and key in new, key.partition(".options.")
        same = known and old[key] == new[key]
        other = option and old.get(f"{owner}.name") != new.get(f"{owner}.name")  # says enough
        if not (same or other) and (known or option):
            yield key, old.get(key, "no such option"), new.get(key, "absent")


def _with_defaults(config: Any) -> Any:
    """A config as nested dicts, with the default of every option that it does not set."""
    if not isinstance(config, dict):
        return config
    filled = {key: _with_defaults(value) for key, value in config.items()}
    for path, table in _TABLES.items():
        node: Any = filled
        for part in path.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        if isinstance(node, dict) and isinstance(node.get("options"), dict):
            name = node.get("name")
            known = table.options(str(name)) if name in table else {}
            known = {k: list(v) if isinstance(v, tuple) else v for k, v in known.items()}
            node["options"] = {**known, **node["options"]}
    return filled


def flat(node: Any, path: str = "") -> dict[str, Any]:
    """Dotted key -> value; an empty dictionary is a value, and {optimizer: NAME, ...} is one."""
    if not isinstance(node, dict) or not node or isinstance(node.get("optimizer"), str):
        return {path: node}
    return {
        key: value
        for name, child in node.items()
        for key, value in flat(child, f"{path}.{name}" if path else str(name)).items()
    }


@dataclass(frozen=True)
class Resumed:
    """The history of a run before its first iteration here."""

    iteration: int = 0  # iterations done
    rows: list[Row] = field(default_factory=list)  # the evaluations up to there
    best: dict[str, float] | None = None  # iteration and test error of the best evaluation
    seconds: float = 0.0  # of training so far
    absent: tuple[int, ...] = ()  # workers of this process that begin at u: it has no state of them


def resume(
    directory: RunDirectory,
    algorithm: Algorithm,
    workers: Sequence[int],
    iterations: int,
    say: Callable[[str], None],
    elastic: bool = False,
) -> Resumed:
    """Load the newest intact checkpoint of the origin into the algorithm. A collective.

    Checkpoints beyond it are set aside in the run directory. A run that grew to `iterations` is no
    longer finished. In an elastic run, workers that the checkpoint lacks begin at u. GroupError on
    every rank, if there are checkpoints and none of them is intact, or the files cannot be changed.
    """
    origin, group, source = directory.origin, directory.group, directory.origin.source
    if source is None:
        return Resumed()
    paths = candidates(source) if group.rank == 0 else []
    path = choose(paths, group, say)
    if path is None:
        # A run that was killed before its first checkpoint starts again. Damaged checkpoints are
        # not overwritten: that decision is left to the user.
        damaged = f"no checkpoint in {source} can be read: begin again in a new directory"
        group.raise_together(damaged if group.share(bool(paths)) else None)
        say(f"no checkpoint in {source} yet: begins again at iteration 0")
        resumed = Resumed()
    else:
        manifest, absent = _restore(path, algorithm, workers, group, elastic)
        resumed = Resumed(manifest.iteration, [], manifest.best, manifest.wall_s, absent)
        say(f"continues {path} at iteration {resumed.iteration:,}")
    t, rows = resumed.iteration, []
    with directory.writing():
        if group.rank == 0:
            if path is not None:
                rows = rows_until(path.parent.parent if source == path else source, t, say)
            if origin.continues:
                set_aside(directory.path, t)
                if t < iterations:
                    (directory.path / "summary.json").unlink(missing_ok=True)
    group.raise_together(directory.problem)
    return replace(resumed, rows=group.share(rows))


def _restore(
    path: Path, algorithm: Algorithm, workers: Sequence[int], group: Group, elastic: bool
) -> tuple[Manifest, tuple[int, ...]]:
    """Load a checkpoint that `choose` has verified, and compare the digest of u.

    Returns its manifest and the workers that begin at u.
    """
    manifest, problem = Manifest.read(path), None
    held = manifest.tensors
    absent = tuple(j for j in workers if elastic and f"worker/{j}/z" not in held)
    try:
        state = load(path, algorithm.state_dict(), workers, absent)
    except GroupError as error:
        problem = str(error)
    group.raise_together(problem)
    for j in absent:
        begin_at_consensus(state, workers.index(j), manifest.iteration)
    algorithm.load_state_dict(state)
    found = as_hex(algorithm.verify())
    wrong = f"checkpoint {path}: u has the digest {found} instead of {manifest.digest}"
    group.raise_together(None if found == manifest.digest else wrong)
    return manifest, absent


def remove_incomplete(run_dir: Path) -> None:
    """Remove what is left of checkpoints that were being written or removed."""
    for path in (run_dir / FOLDER).glob(".*"):
        if path.name.endswith((".tmp", ".gone")):
            shutil.rmtree(path, ignore_errors=True)


def set_aside(run_dir: Path, iteration: int) -> None:
    """Remove incomplete checkpoints, and rename those beyond an iteration.

    A run that went back to an earlier checkpoint must not find the later, damaged one again.
    """
    remove_incomplete(run_dir)
    for path in list_checkpoints(run_dir):
        if int(path.name) > iteration:
            aside = path.with_name(f"{path.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
