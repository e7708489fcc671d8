"""Check of the output folder: shared by all members, its speed, and its locks."""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

from consensus.doctor.exchange import Exchange
from consensus.doctor.finding import Finding, fault, warning

SIZE = 16 << 20  # bytes
SEEN_S = 10.0
LOCK, BULK = "lock", "bulk"


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
        exchange.gather("looked")
        return [*findings, Finding("folder", text)]


def _prepare(folder: Path, stack: ExitStack) -> tuple[str, str, bool, float]:
    """Create a locked folder with a file: its path, the problem, whether locked, seconds."""
    place, locked, seconds = "", False, 0.0
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
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
    except OSError as error:
        return place, error.strerror or str(error), locked, seconds
    return place, "", locked, seconds


def _remove_empty(path: Path) -> None:
    with suppress(OSError):
        path.rmdir()


def _look(place: Path, index: int, locked: bool) -> Iterator[Finding]:
    """Problems that another member has with the folder of the first."""
    folder, began = place.parent, time.monotonic()
    while not (place / BULK).exists():
        if time.monotonic() - began > SEEN_S:
            yield fault(
                "folder",
                f"{folder} is not the folder of that name on the first: what is written there is "
                f"not seen here in {SEEN_S:g} s",
                "output.root=... on a folder that all nodes share, under the same path",
            )
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
    yield warning(
        "folder",
        f"{folder} {problem}: a second run in one directory would not be refused",
        "a file system with locks (NFS: without `nolock`, `local_lock`), or only one run at a time",
    )
