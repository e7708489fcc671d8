"""Checks of the disk and of the output folder: shared by all members, its speed, its locks."""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

from consensus.doctor.exchange import Exchange
from consensus.doctor.finding import Finding, amount, fault, warning
from consensus.run.checkpoint.directory import LOCK
from consensus.run.config import Config
from consensus.run.plan import Plan

SIZE = 16 << 20  # bytes
SEEN_S = 10.0
BULK = "bulk"


def check_disk(config: Config, plan: Plan | None) -> list[Finding]:
    """Room and permission for the files of a run."""
    folder = Path(config.output.run_dir or config.output.root)
    elsewhere = "output.root=... or output.run_dir=..."
    remedy = f"{elsewhere} on a disk with room, or delete what is there"
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        return [fault("disk", f"{there} is not a folder", elsewhere)]
    try:
        status = os.statvfs(there)
    except OSError as error:
        return [fault("disk", f"{there}: {error.strerror}", elsewhere)]
    free, need = status.f_bavail * status.f_frsize, 0
    text = f"{there} has {amount(free)} free"
    if plan is not None and config.output.checkpoint_every is not None:
        vectors = 1 + 2 * plan.num_workers  # u, and z and v of each worker
        each = vectors * plan.risk.layout.size * plan.start.element_size()
        need = (config.output.keep_checkpoints + 1) * each  # one more while it is written
        text += f", the checkpoints of this run take {amount(need)}"
    if not status.f_blocks:  # some file systems do not tell; the check of the folder writes there
        return [Finding("disk", f"the file system of {there} does not tell its free space")]
    if free < max(need, 1):
        remedy += "; or output.keep_checkpoints=1"
        return [fault("disk", f"{text}: the disk is full", remedy)]
    if status.f_files and not status.f_favail:
        return [fault("disk", f"{there} has room, but for no more files (inodes)", remedy)]
    if not os.access(there, os.W_OK | os.X_OK):
        return [fault("disk", f"{there} may not be written to by user {os.getuid()}", remedy)]
    if need and free < 10 * need:
        return [warning("disk", f"{text}: room for few runs", remedy)]
    return [Finding("disk", text)]


def check_in_use(config: Config) -> Iterator[Finding]:
    """Whether another run has locked the run directory."""
    if config.output.run_dir is None:
        return
    lock = Path(config.output.run_dir) / LOCK
    try:
        with lock.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        text = f"{lock.parent} is in use by a run that goes on"
        yield fault("disk", text, "another output.run_dir, or wait for its end")
    except OSError:  # no run has been there, or there are no locks
        pass


def check_folder(exchange: Exchange, folder: Path) -> list[Finding]:
    """Write on the first member; read and write on the others; remove it again. A collective."""
    with ExitStack() as stack:
        own = _prepare(folder, stack) if exchange.index == 0 else None
        place, problem, locked, seconds = exchange.gather(own)[0]
        if problem:
            text = f"cannot write {SIZE >> 20} MiB to {folder}: {problem}"
            remedy = "output.root=... or output.run_dir=... that this user may write to, with room"
            return [] if exchange.index else [fault("folder", text, remedy)]
        findings = list(_look(Path(place), exchange.index, locked)) if exchange.index else []
        wrong = exchange.gather(bool(findings))
        text = f"{folder}: {SIZE / 1e6 / seconds:.0f} MB/s written and synced"
        if exchange.size > 1 and not any(wrong):
            text += "; all see it, write there, and respect a lock"
        return [*findings, Finding("folder", text)]


def _prepare(folder: Path, stack: ExitStack) -> tuple[str, str, bool, float]:
    """Create a locked folder with a file: its path, the problem, whether locked, seconds."""
    try:
        for path in (*reversed(folder.parents), folder):
            if not path.exists():
                path.mkdir()
                stack.callback(_remove_empty, path)
        place = tempfile.mkdtemp(prefix=".doctor-", dir=folder)
        stack.callback(shutil.rmtree, place, ignore_errors=True)
        content = os.urandom(SIZE)  # random: file systems may compress
        began = time.monotonic()
        with Path(place, BULK).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        seconds = time.monotonic() - began
        lock = os.open(Path(place, LOCK), os.O_CREAT | os.O_WRONLY)
        stack.callback(os.close, lock)
    except OSError as error:
        return "", error.strerror or str(error), False, 0.0
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return place, "", False, seconds
    return place, "", True, seconds


def _remove_empty(path: Path) -> None:
    with suppress(OSError):
        path.rmdir()


def _look(place: Path, index: int, locked: bool) -> Iterator[Finding]:
    """Problems that another member has with the folder of the first."""
    folder, began = place.parent, time.monotonic()
    while not (place / BULK).exists():
        if time.monotonic() - began > SEEN_S:
            text = f"{folder} is not the folder of that name on the first: "
            text += f"what is written there is not seen here in {SEEN_S:g} s"
            remedy = "output.root=... on a folder that all nodes share, under the same path"
            yield fault("folder", text, remedy)
            return
        time.sleep(0.02)
    late = time.monotonic() - began
    try:
        if (place / BULK).stat().st_size != SIZE:
            raise OSError("a file that was synced there is incomplete here")
        (place / f"{index}").write_text("")
    except OSError as error:
        text = f"{folder} is seen but cannot be used: {error.strerror or error}"
        remedy = "the same user, with the same number, on every node; mounted for writing"
        yield fault("folder", text, remedy)
        return
    if late > 1.0:
        text = f"{folder} shows what the first writes {late:.1f} s later"
        remedy = "a mount with a shorter attribute cache (NFS: actimeo=1), or another folder"
        yield warning("folder", text, remedy)
    try:
        with (place / LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return  # as it should be: the first member holds the lock
    except OSError as error:
        problem = f"has no locks ({error.strerror})"
    else:
        problem = "has locks of each node for itself" if locked else "has no locks"
    text = f"{folder} {problem}: a second run in one directory would not be refused"
    remedy = "a file system with locks (NFS: without `nolock`, `local_lock`)"
    yield warning("folder", text, f"{remedy}, or only one run at a time")
