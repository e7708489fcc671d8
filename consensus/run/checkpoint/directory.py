"""One run, one directory: where a run writes, from where it continues, and the lock on it.

Before the group opens every rank decides alike, from the config, the launch and the files, whether
the run begins or continues (`find_origin`); what is wrong is refused there, exit code 2. Then rank
0 makes the directory and locks it (`RunDirectory`); nobody else changes anything in it.

A run continues from its own directory if `resume=auto` says so, or if torchrun has started the
same launch again; it begins anew, from a checkpoint of another run, with `resume=PATH`.
"""

import fcntl
import json
import os
import socket
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from omegaconf import OmegaConf

from consensus.atomic_files import write_whole
from consensus.comm import Group, GroupError, Launch
from consensus.run.checkpoint.manifest import DamagedError
from consensus.run.checkpoint.reader import candidates, inspect, list_checkpoints
from consensus.run.config import RESUME, Config, require

LOCK = ".lock"

# What may differ between a run and its continuation: where it runs, what it leaves, how long it is.
_FREE = (
    "output",
    "group",
    "device",
    "deterministic",
    "cuda_graph",
    "resume",
    "plugins",
    "workers",
    "stationarity",
)
_FREE_KEYS = ("data.root", "algorithm.iterations")


@dataclass(frozen=True)
class Origin:
    """Where a run begins.

    Attributes:
        run_dir: Where it writes, if that is known before the group opens.
        source: The run or the checkpoint it continues from; None: from the start.
    """

    run_dir: Path | None = None
    source: Path | None = None

    @property
    def continues(self) -> bool:
        """Whether this is the run that its directory already holds."""
        return self.source is not None and self.source == self.run_dir


def find_origin(config: Config, launch: Launch, num_workers: int) -> Origin:
    """Where this run writes and from where it continues.

    Raises:
        ConfigError: If the directory holds another run or one that may not be continued like this,
            or `resume` names no checkpoint.
    """
    run_dir = None if config.output.run_dir is None else Path(config.output.run_dir)
    require(
        run_dir is None or not run_dir.exists() or run_dir.is_dir(),
        "output.run_dir",
        run_dir,
        "a directory, or a path where none exists yet",
    )
    again = _started_again(config, launch, run_dir)
    if again is not None or config.resume == "auto":
        own = again or run_dir
        assert own is not None  # config.py refuses resume=auto without a directory
        if state_of(own) is not None:
            _require_continuable(own, config, num_workers)
            return Origin(own, own)
        run_dir = own
    if run_dir is not None:
        _require_unused(run_dir)
    if config.resume in RESUME:
        return Origin(run_dir)
    source = Path(config.resume)
    require(
        bool(candidates(source)),
        "resume",
        source,
        "never, auto, or the path of a checkpoint or of a run that has one",
    )
    _require_fitting(source, config, num_workers)
    return Origin(run_dir, source)


def state_of(run_dir: Path) -> str | None:
    """The file that shows that a directory holds a run; None if it holds none."""
    for name in ("summary.json", "metrics.jsonl"):
        if (run_dir / name).exists():
            return name
    return "checkpoints" if list_checkpoints(run_dir) else None


def _require_unused(run_dir: Path) -> None:
    name = state_of(run_dir)
    kind = "a finished" if name == "summary.json" else "an unfinished"
    require(
        name is None,
        "output.run_dir",
        run_dir,
        f"an empty or new directory; this one holds {kind} run ({name}); resume=auto continues it",
    )


def _require_continuable(run_dir: Path, config: Config, num_workers: int) -> None:
    """Refuse to continue what is finished without checkpoints, or was another run."""
    if list_checkpoints(run_dir):
        return _require_fitting(run_dir, config, num_workers)
    require(
        state_of(run_dir) != "summary.json",
        "resume",
        "auto",
        f"never, in a new directory: {run_dir} holds a finished run without checkpoints",
    )
    try:  # nothing to load, but its metrics will be replaced: by the same run only
        before = OmegaConf.to_container(OmegaConf.load(run_dir / "config.yaml"))
    except Exception:  # killed before it was written
        return None
    if isinstance(before, dict):
        _require_same({str(k): v for k, v in before.items()}, config, run_dir)
    return None


def _require_fitting(source: Path, config: Config, num_workers: int) -> None:
    """Refuse a source whose newest readable checkpoint is not of this run, or of a later format."""
    for checkpoint in candidates(source):
        try:
            manifest, before = inspect(checkpoint)
        except DamagedError:
            continue  # the ranks find it again together, and say so
        _require_same(before, config, checkpoint)
        require(
            manifest.num_workers == num_workers,
            "workers",
            num_workers,
            f"{manifest.num_workers}, as in {checkpoint} (on any number of processes dividing it)",
        )
        iterations = config.algorithm.iterations
        require(
            iterations >= manifest.iteration,
            "algorithm.iterations",
            iterations,
            f"at least {manifest.iteration}, which {checkpoint} has done",
        )
        return


def _require_same(before: dict[str, Any], config: Config, where: Path) -> None:
    """Refuse a key that was different when the run began."""
    old = _flat(before)
    new = _flat(OmegaConf.to_container(OmegaConf.structured(config)))
    for key in new:
        free = key.partition(".")[0] in _FREE or key in _FREE_KEYS
        if free or key not in old:  # a key that this version has added
            continue
        require(
            old[key] == new[key],
            key,
            new[key],
            f"{old[key]}, as in {where} (a run is continued as it began)",
        )


def _flat(node: Any, path: str = "") -> dict[str, Any]:
    """Dotted key -> value; an empty dictionary is a value."""
    if not isinstance(node, dict) or not node:
        return {path: node}
    return {
        key: value
        for name, child in node.items()
        for key, value in _flat(child, f"{path}.{name}" if path else str(name)).items()
    }


def _started_again(config: Config, launch: Launch, run_dir: Path | None) -> Path | None:
    """The directory of this very launch from before torchrun restarted it, if it got that far."""
    if launch.restart == 0:
        return None
    if run_dir is not None:
        return run_dir
    root = Path(config.output.root)
    for lock in sorted(root.glob(f"*/{LOCK}"), reverse=True):  # names begin with their date
        if _holder(lock).get("launch") == launch.name:
            return lock.parent
    return None


def _holder(lock: Path) -> dict[str, Any]:
    """What the last holder of a lock wrote into it."""
    try:
        content = json.loads(lock.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


class RunDirectory:
    """The directory of a run, made and locked. The constructor is a collective.

    Args:
        origin: Where to write, and from where the run continues.
        config: Saved there as config.yaml.
        launch: Noted in the lock.
        group: The processes of the run.

    Attributes:
        path: The directory, on every rank.
        warning: What should be known about it, None if nothing.

    Raises:
        GroupError: On every rank, if it cannot be made or another run holds it.
    """

    def __init__(self, origin: Origin, config: Config, launch: Launch, group: Group) -> None:
        self.warning: str | None = None
        self._lock: IO[bytes] | None = None
        path, problem = None, None
        if group.rank == 0:
            try:
                path = origin.run_dir or _new_directory(config)
                path.mkdir(parents=True, exist_ok=True)
                problem = self._take(path, launch)
                if problem is None:
                    content = OmegaConf.to_yaml(OmegaConf.structured(config)).encode()
                    write_whole(path / "config.yaml", content)
            except OSError as error:
                problem = f"cannot write the run directory: {error.strerror}: {error.filename}"
        self._raise_together(group, problem)
        self.path: Path = group.share(path)
        # Every rank holds the lock, so that it lasts as long as any of them: also if the launcher
        # and rank 0 are killed and the others do not know yet.
        problem = None
        if group.rank > 0:
            try:
                problem = self._join()
            except OSError as error:
                problem = f"cannot lock the run directory: {error.strerror}: {error.filename}"
        self._raise_together(group, problem)

    def _raise_together(self, group: Group, problem: str | None) -> None:
        try:
            group.raise_together(problem)
        except GroupError:
            self.close()
            raise

    def _take(self, path: Path, launch: Launch) -> str | None:
        """Rank 0: alone first, which fails while any rank of another run lives; then shared."""
        self._lock = (path / LOCK).open("a+b")
        if not self._acquire(fcntl.LOCK_EX):
            holder = _holder(path / LOCK)
            who = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"
            return f"{path} is in use by another run, begun by {who}, or by ranks left of it"
        note = {"pid": os.getpid(), "host": socket.gethostname(), "launch": launch.name}
        self._lock.truncate(0)
        self._lock.write(json.dumps(note).encode())
        self._lock.flush()
        if not self._acquire(fcntl.LOCK_SH):
            return f"{path} is in use by another run, which began at the same moment"
        return None

    def _join(self) -> str | None:
        self._lock = (self.path / LOCK).open("a+b")
        return None if self._acquire(fcntl.LOCK_SH) else f"{self.path} is in use by another run"

    def _acquire(self, kind: int, patience_s: float = 3.0) -> bool:
        """Try for a while: ranks of a launch that has just been killed need a moment to be gone."""
        assert self._lock is not None
        deadline = time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(self._lock, kind | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.1)
            except OSError:  # some network file systems have no locks
                self.warning = f"{self._lock.name} cannot be locked here: take care of it yourself"
                return True

    def close(self) -> None:
        """Release the lock; the kernel does it for a process that dies."""
        if self._lock is not None:
            self._lock.close()


def _new_directory(config: Config) -> Path:
    """A directory under output.root that did not exist, named by date, time and run."""
    output = config.output
    algorithm, potential = config.algorithm.name, config.potential.name
    name = output.name or f"{algorithm}-{potential}-{config.data.name}"
    stamp = f"{datetime.now():%Y%m%d-%H%M%S}-{name}"
    root = Path(output.root)
    root.mkdir(parents=True, exist_ok=True)
    for attempt in range(1, 1000):  # two runs may start within a second
        path = root / (stamp if attempt == 1 else f"{stamp}-{attempt}")
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise FileExistsError(17, "no free name for a run directory", str(root / stamp))
