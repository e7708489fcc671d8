"""The run directory: its creation, the lock on it, and write errors that concern all ranks."""

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from consensus.atomic_files import write_whole
from consensus.comm import Group, GroupError, Launch
from consensus.run.config import Config
from consensus.stored_config import to_text

LOCK = ".lock"
MARKS = ("summary.json", "metrics.jsonl")  # files that show that a directory holds a run


@dataclass(frozen=True)
class Origin:
    """The start of a run."""

    run_dir: Path | None = None  # None: named when the group has opened
    source: Path | None = None  # a run or a checkpoint; None: start at iteration 0

    @property
    def continues(self) -> bool:
        """Whether the run continues in its own directory."""
        return self.source is not None and self.source == self.run_dir


def lock_holder(lock: Path) -> dict[str, Any]:
    """The note that the last holder wrote into a lock file; {} if it cannot be read."""
    try:
        content = json.loads(lock.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


class RunDirectory:
    """The directory of a run, created and locked. The constructor is a collective.

    Rank 0 alone creates it and writes to it, except for checkpoints. GroupError on every rank if it
    cannot be created or another run holds the lock.
    """

    def __init__(self, origin: Origin, config: Config, launch: Launch, group: Group) -> None:
        self.group, self.origin = group, origin
        self.warning: str | None = None  # a line for the user about the lock
        self.problem: str | None = None  # the first write error of this rank
        self._lock: IO[bytes] | None = None
        path = None
        with self._locking("write"):
            if group.rank == 0:
                path = origin.run_dir or _new_directory(config)
                path.mkdir(parents=True, exist_ok=True)
                self.problem = self._take(path, launch) or self._overtaken(path)
                if self.problem is None:
                    content = to_text(config).encode()
                    write_whole(path / "config.yaml", content)
        self.path: Path = group.share(path)
        # Every rank holds the lock, so that it lasts as long as any rank: also if the launcher and
        # rank 0 are killed and the others have not noticed yet.
        with self._locking("lock"):
            if group.rank > 0:
                self._lock = (self.path / LOCK).open("a+b")
                if not self._acquire(fcntl.LOCK_SH):
                    self.problem = f"{self.path} is in use by another run"

    @contextmanager
    def _locking(self, action: str) -> Iterator[None]:
        """One step of the constructor: a failure on any rank is raised on all."""
        try:
            yield
        except OSError as error:
            where = f"{error.strerror}: {error.filename}"
            self.problem = f"cannot {action} the run directory: {where}"
        try:
            self.group.raise_together(self.problem)
        except GroupError:
            self.close()
            raise

    def _take(self, path: Path, launch: Launch) -> str | None:
        """Lock on rank 0: exclusively first, which fails if a rank of another run is alive."""
        self._lock = (path / LOCK).open("a+b")
        if not self._acquire(fcntl.LOCK_EX):
            holder = lock_holder(path / LOCK)
            who = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"
            return f"{path} is in use by another run, begun by {who}, or by ranks left of it"
        note = {"pid": os.getpid(), "host": socket.gethostname(), "launch": launch.name}
        self._lock.truncate(0)
        self._lock.write(json.dumps(note).encode())
        self._lock.flush()
        if not self._acquire(fcntl.LOCK_SH):
            return f"{path} is in use by another run, which began at the same moment"
        return None

    def _overtaken(self, path: Path) -> str | None:
        """A run that has begun here since the plan found none, on rank 0 and under the lock."""
        if self.origin.continues:
            return None
        written = [name for name in MARKS if (path / name).exists()]
        began = f"{path} holds a run ({', '.join(written)}) that began after this one was planned"
        return f"{began}: another directory, or resume=auto" if written else None

    def _acquire(self, kind: int) -> bool:
        """Retry for three seconds: ranks of a launch that was just killed need time to exit."""
        assert self._lock is not None
        deadline = time.monotonic() + 3.0
        while True:
            try:
                fcntl.flock(self._lock, kind | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.1)
            except OSError:  # some network file systems have no locks
                self.warning = f"{self._lock.name} cannot be locked here: start no second run in it"
                return True

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Record a write error in `problem`: one rank alone must not raise it."""
        try:
            yield
        except OSError as error:
            where = f": {error.filename}" if error.filename else ""
            self.problem = self.problem or f"cannot write to {self.path}: {error.strerror}{where}"

    def close(self) -> None:
        """Release the lock. The kernel does so for a process that dies."""
        if self._lock is not None:
            self._lock.close()


class JoinedDirectory(RunDirectory):
    """The directory of a run that this process joins, once it is known where."""

    def __init__(self) -> None:
        self.origin, self.warning, self.problem = Origin(), None, None
        self.path, self._lock = Path(), None

    def enter(self, path: Path) -> None:
        """Lock it with the others; a failure becomes the `problem`."""
        self.path = path
        try:
            self._lock = (path / LOCK).open("a+b")
            if not self._acquire(fcntl.LOCK_SH):
                self.problem = f"{path} is in use by another run"
        except OSError as error:
            self.problem = f"cannot lock the run directory: {error.strerror}: {error.filename}"


def _new_directory(config: Config) -> Path:
    """Create a directory under output.root, named by date, time and run."""
    output = config.output
    algorithm, potential = config.algorithm.name, config.potential.name
    name = output.name or f"{algorithm}-{potential}-{config.data.name}"
    stamp = f"{datetime.now():%Y%m%d-%H%M%S}-{name}"
    root = Path(output.root)
    root.mkdir(parents=True, exist_ok=True)
    for attempt in range(1, 1000):  # two runs may start within a second
        path = root / (stamp if attempt == 1 else f"{stamp}-{attempt}")
        with suppress(FileExistsError):
            path.mkdir()
            return path
    raise FileExistsError(17, "no free name for a run directory", str(root / stamp))
