"""Writing checkpoints in the background; a checkpoint appears complete or not at all.

Data flow: the training thread copies the state to the CPU and continues. A second thread, over a
group of its own, compares the digests of u, writes every rank's tensors, hashes the files, writes
the manifest, syncs, and renames

    checkpoints/.00000500.tmp  ->  checkpoints/00000500

so a name without a dot is a complete checkpoint, at whatever time the run is killed.
"""

import io
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor

from consensus.atomic_files import sync, write_whole
from consensus.comm import Group, GroupError
from consensus.run.checkpoint.manifest import CONFIG, MANIFEST, Manifest, Place, as_hex, brief
from consensus.run.checkpoint.reader import (
    FOLDER,
    by_worker,
    file_digest,
    list_checkpoints,
)
from consensus.run.config import Config

Files = dict[str, tuple[int, str]]
"""Name -> bytes and SHA-256."""


@dataclass(frozen=True)
class Facts:
    """The entries of a manifest that do not depend on its files."""

    iteration: int
    digest: int
    wall_s: float
    best: dict[str, float] | None


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time, in a thread of its own on every rank.

    Args:
        run_dir: The run directory.
        config: Saved in each checkpoint.
        side: A group that the training thread does not use.
        workers: The numbers j of the workers of this process, and M.
        keep: The number of checkpoints to keep.
        before_publish: Called on rank 0 before a checkpoint appears, to flush files that it relies
            on. May raise OSError.

    Attributes:
        problem: The error of the last write, None if it succeeded.
        written: The number of checkpoints written.
        wait_s: Total seconds for which `write` has delayed the training.
        write_s: Total seconds of work of the second thread.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Config,
        side: Group,
        workers: tuple[range, int],
        keep: int,
        before_publish: Callable[[], None],
    ) -> None:
        self.folder = run_dir / FOLDER
        self.config = OmegaConf.to_yaml(OmegaConf.structured(config)).encode()
        self.side = side
        self.workers, self.num_workers = workers
        self.keep = keep
        self.before_publish = before_publish
        self.problem: str | None = None
        self.written = 0
        self.wait_s = self.write_s = 0.0
        self._copy: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None

    def write(self, state: dict[str, Tensor], facts: Facts) -> None:
        """Copy the state and write it in the background.

        Waits until the copy is made. Before that it waits for the previous checkpoint, because only
        one copy exists at a time.
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
            self.problem = str(error)
        except Exception as error:
            self.problem = f"rank {self.side.rank}: checkpoint {facts.iteration}: {brief(error)}"
        self.write_s += time.perf_counter() - started

    def _write(self, facts: Facts) -> None:
        side = self.side
        final = self.folder / f"{facts.iteration:08d}"
        aside = final.with_name(f".{final.name}.tmp")
        first = side.rank == 0
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
            files, tensors = self._save(aside, final)
            with self._together(final):
                if first:
                    self.before_publish()
                    manifest = Manifest(
                        facts.iteration,
                        self.num_workers,
                        as_hex(facts.digest),
                        facts.wall_s,
                        facts.best,
                        torch.__version__,
                        files,
                        tensors,
                    )
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
        except GroupError:
            raise
        except OSError as error:
            problem = brief(error)
        self.side.raise_together(problem and f"cannot write checkpoint {final}: {problem}")

    def _save(self, aside: Path, final: Path) -> tuple[Files, dict[str, Place]]:
        """Write and hash the files. Returns those of all ranks, and the places of all tensors."""
        side, places = self.side, {}
        tensors = aside / f"__{side.rank}_0.distcp"
        with self._together(final):
            with tensors.open("wb") as file:
                for key, tensor in by_worker(self._copy, self.workers).items():
                    if side.rank == 0 or key.startswith("worker/"):  # the rest is replicated
                        content = io.BytesIO()
                        torch.save(tensor.clone(), content)  # a view would bring its whole storage
                        offset, length = file.tell(), file.write(content.getbuffer())
                        shape = tuple(tensor.shape)
                        places[key] = Place(str(tensor.dtype), shape, tensors.name, offset, length)
                file.flush()
                os.fsync(file.fileno())
            paths = [tensors, aside / CONFIG] if side.rank == 0 else [tensors]
            files = {path.name: file_digest(path) for path in paths}
        of_ranks = side.gather_objects((files, places))
        return (
            {name: facts for files, _ in of_ranks for name, facts in files.items()},
            {key: place for _, places in of_ranks for key, place in places.items()},
        )

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
