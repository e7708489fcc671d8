"""Writing checkpoints in the background; a checkpoint appears complete or not at all.

Data flow: the training thread copies the state to the CPU and continues. A second thread, over a
group of its own, compares the digests of u, writes every rank's tensors, hashes the files, writes
the manifest, syncs, and renames

    checkpoints/.00000500.tmp  ->  checkpoints/00000500

so a name without a dot is a complete checkpoint, at whatever time the run is killed.
"""

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from consensus.atomic_files import sync, write_whole
from consensus.comm import Group, GroupError, PeerLostError
from consensus.run.checkpoint.manifest import CONFIG, MANIFEST, Manifest, Place, as_hex, brief
from consensus.run.checkpoint.reader import FOLDER, by_worker, file_digest, list_checkpoints
from consensus.run.config import Config
from consensus.stored_config import to_text


@dataclass(frozen=True)
class Facts:
    """The entries of a manifest that do not depend on its files."""

    iteration: int
    digest: int
    wall_s: float
    best: dict[str, float] | None


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time, in a thread of its own on every rank.

    `side` is a group that the training thread does not use. `workers` are the numbers j of this
    process, and M. Rank 0 calls `before_publish` before a checkpoint appears, to flush files that
    it relies on; it may raise OSError.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Config,
        side: Group,
        workers: tuple[Sequence[int], int],
        keep: int,
        before_publish: Callable[[], None],
    ) -> None:
        self.folder = run_dir / FOLDER
        self.config = b""
        if side.rank == 0:  # which writes it; 20 ms
            self.config = to_text(config).encode()
        self.side = side
        self.workers, self.num_workers = workers
        self.keep = keep
        self.before_publish = before_publish
        self.problem: str | None = None  # the error of the last write
        self.lost = False  # whether that is a lost peer
        self.written = 0  # checkpoints
        self.wait_s = self.write_s = 0.0  # delay of the training, and work of the second thread
        self._copy: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None

    def write(self, state: dict[str, Tensor], facts: Facts) -> None:
        """Copy the state and write it in the background.

        Waits for the copy, and before it for the previous checkpoint: only one copy exists.
        """
        started = time.perf_counter()
        self.wait()
        if self.problem is not None:
            return  # the run will end with this error
        if not self._copy:
            self._copy = {key: torch.empty_like(x, device="cpu") for key, x in state.items()}
        for key, value in state.items():
            self._copy[key].copy_(value)
        self.wait_s += time.perf_counter() - started
        self._thread = threading.Thread(
            target=self._work, args=(facts,), name="checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Wait until no checkpoint is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _work(self, facts: Facts) -> None:
        started = time.perf_counter()
        try:
            self._write(facts)
            self.written += 1
        except GroupError as error:
            self.problem, self.lost = str(error), isinstance(error, PeerLostError)
        except Exception as error:
            self.problem = f"rank {self.side.rank}: checkpoint {facts.iteration}: {brief(error)}"
        self.write_s += time.perf_counter() - started

    def _write(self, facts: Facts) -> None:
        side = self.side
        final = self.folder / f"{facts.iteration:08d}"
        aside = final.with_name(f".{final.name}.tmp")
        first = side.rank == 0
        known = facts.iteration, self.num_workers, as_hex(facts.digest), facts.wall_s, facts.best
        digests = side.gather(torch.tensor(facts.digest)).tolist()
        if len(set(digests)) > 1:
            wrong = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
            raise GroupError(f"u on rank {wrong} differs from u on rank 0: no checkpoint")
        try:
            with self._together(final):
                if first:
                    shutil.rmtree(aside, ignore_errors=True)
                    aside.mkdir(parents=True)
                    (aside / CONFIG).write_bytes(self.config)
            tensors = self._save(aside, final)
            names = side.share(sorted(path.name for path in aside.iterdir()))
            mine: dict[str, tuple[int, str]] = {}
            with self._together(final):  # the files are divided between the ranks
                mine = {name: file_digest(aside / name) for name in names[side.rank :: side.size]}
            parts = side.gather_objects(mine)
            files = {name: found for part in parts for name, found in part.items()}
            with self._together(final):
                if first:
                    self.before_publish()
                    manifest = Manifest(*known, torch.__version__, files, tensors)
                    write_whole(aside / MANIFEST, manifest.to_json())
                    self._publish(aside, final)
        except GroupError:
            if first:
                shutil.rmtree(aside, ignore_errors=True)
            raise

    @contextmanager
    def _together(self, final: Path) -> Iterator[None]:
        """One step of a write: a failure on any rank is raised on all."""
        problem = None
        try:
            yield
        except OSError as error:
            problem = brief(error)
        self.side.raise_together(problem and f"cannot write checkpoint {final}: {problem}")

    def _save(self, aside: Path, final: Path) -> dict[str, Place]:
        """Write the tensors of this rank to one file. Returns the places of those of all ranks."""
        rank = self.side.rank
        rows = by_worker(self._copy, self.workers)
        if rank > 0:  # what is no worker's is equal on all ranks
            rows = {key: x for key, x in rows.items() if key.startswith("worker/")}
        places: dict[str, Place] = {}
        problem = None
        try:
            with (aside / f"__{rank}_0.distcp").open("wb") as file:
                for key, x in rows.items():
                    start = file.tell()
                    alone = x.untyped_storage().nbytes() == x.nbytes
                    torch.save(x if alone else x.clone(), file)  # not the rows beside a view
                    where = Path(file.name).name, start, file.tell() - start
                    places[key] = Place(str(x.dtype), tuple(x.shape), *where)
                file.flush()
                os.fsync(file.fileno())
        except Exception as error:
            cause = error.__context__  # torch.save hides an OSError
            cause = cause if isinstance(cause, OSError) else error
            problem = f"cannot write checkpoint {final}: {brief(cause)}"
        self.side.raise_together(problem)
        return {k: x for part in self.side.gather_objects(places) for k, x in part.items()}

    def _publish(self, aside: Path, final: Path) -> None:
        """Publish the checkpoint and remove old ones, on rank 0."""
        sync(aside / CONFIG)
        sync(aside)
        if final.exists():
            _remove(final)
        aside.rename(final)
        sync(self.folder)
        for old in list_checkpoints(self.folder.parent)[self.keep :]:
            _remove(old)


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint so that its name never denotes an incomplete one."""
    gone = checkpoint.with_name(f".{checkpoint.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    checkpoint.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)
