"""Whether all members see one folder, how fast it is, and whether locks hold there."""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from consensus.comm.rendezvous import Exchange
from consensus.doctor.finding import Finding, fault, warning

SIZE = 16 << 20
SEEN_S = 10.0
LOCK, BULK = "lock", "bulk"


def check_folder(exchange: Exchange, folder: Path) -> list[Finding]:
    """Write on the first member, look on the others and write there too. A collective.

    Args:
        exchange: All members.
        folder: Where the run will write. What is made there is removed again.
    """
    with contextlib.ExitStack() as stack:
        place, problem, locked, seconds = "", "", False, 0.0
        if exchange.index == 0:
            try:
                for path in _absent(folder):
                    path.mkdir()
                    stack.callback(_remove_empty, path)
                place = tempfile.mkdtemp(prefix=".doctor-", dir=folder)
                stack.callback(shutil.rmtree, place, ignore_errors=True)
                seconds = _write(Path(place, BULK))
                lock = stack.enter_context(Path(place, LOCK).open("wb"))
                with contextlib.suppress(OSError):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    locked = True
            except OSError as error:
                problem = error.strerror or str(error)
        first = exchange.gather([place, problem, locked, seconds])[0]
        place, problem, locked, seconds = first
        if problem:
            if exchange.index:
                return []
            return [
                fault(
                    "folder",
                    f"cannot write {SIZE >> 20} MiB to {folder}: {problem}",
                    "output.root=... or output.run_dir=... that this user may write to, with room",
                )
            ]
        findings = list(_look(Path(place), exchange.index, locked)) if exchange.index else []
        wrong = exchange.gather(bool(findings))
        text = f"{folder}: {SIZE / 1e6 / seconds:.0f} MB/s written and synced"
        if exchange.size > 1 and not any(wrong):
            text += "; all see it, write there, and respect a lock"
        findings.append(Finding("folder", text))
        exchange.gather("looked")
        return findings


def _absent(folder: Path) -> list[Path]:
    """What has to be made for the folder to be there, outermost first."""
    return [path for path in (*reversed(folder.parents), folder) if not path.exists()]


def _remove_empty(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.rmdir()


def _write(path: Path) -> float:
    """Seconds to write SIZE bytes down to the disk."""
    content = os.urandom(SIZE)  # a disk that compresses must not look fast
    began = time.monotonic()
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return time.monotonic() - began


def _look(place: Path, index: int, locked: bool) -> Iterator[Finding]:
    """What another member sees of it; nothing if all is well."""
    began = time.monotonic()
    while not (place / BULK).exists():
        if time.monotonic() - began > SEEN_S:
            yield fault(
                "folder",
                f"{place.parent} is not the folder of that name on the first: what is written "
                f"there is not seen here in {SEEN_S:g} s",
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
        yield fault(
            "folder",
            f"{place.parent} is seen but cannot be used: {error.strerror or error}",
            "the same user, with the same number, on every node; mounted for writing",
        )
        return
    if late > 1.0:
        yield warning(
            "folder",
            f"{place.parent} shows what the first writes {late:.1f} s later",
            "a mount with a shorter attribute cache (NFS: actimeo=1), or another folder",
        )
    yield from _try_lock(place / LOCK, locked)


def _try_lock(path: Path, locked: bool) -> Iterator[Finding]:
    """The first member holds it, if it can. Who gets it all the same finds that none holds."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    except OSError as error:
        problem = f"has no locks ({error.strerror})"
    else:
        problem = "has locks of each node for itself" if locked else "has no locks"
    yield warning(
        "folder",
        f"{path.parents[1]} {problem}: a second run in one directory would not be refused",
        "a file system with locks (NFS: without `nolock`, `local_lock`), or take care yourself",
    )
