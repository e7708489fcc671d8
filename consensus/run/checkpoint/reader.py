"""Reading checkpoints; nothing is used before it is validated.

    checkpoints/00000500/   manifest.json       index: iteration, place of each tensor, and hash of
                                                every other file
                            config.yaml         the run
                            __RANK_0.distcp     the tensors of a rank, each by torch.save

The tensors are keyed by worker (`worker/3/z`), not by rank, so any number of processes can read
them. The index is JSON: torch's own, `.metadata`, is a pickle, and is neither written nor read.

Data flow of a read: the manifest (its own digest, then the format), the hash of every file, keys,
shapes and dtypes, the tensors by torch.load(weights_only=True), and finally the digest of u. A
checkpoint that fails a hash is damaged; it is reported before it is used. One that passes and was
not written by this package is refused, and none of its content is executed.

Everything outside a checkpoint is a function of its content: shuffles, minibatches and dropout of
(seed, worker, position), schedules and the phase of the communication period of the iteration.
"""

import hashlib
import io
import re
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from consensus.comm import Group, GroupError
from consensus.run.checkpoint.manifest import (
    CONFIG,
    LARGEST,
    MANIFEST,
    DamagedError,
    Manifest,
    Place,
    brief,
    read_regular,
    require_regular,
)
from consensus.run.checks import ConfigError
from consensus.stored_config import parse_config

FOLDER = "checkpoints"
_NAME = re.compile(r"\d{8,}")


def file_digest(path: Path) -> tuple[int, str]:
    """Bytes and SHA-256 of a regular file."""
    require_regular(path)
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), sha256


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The published checkpoints of a run directory, newest first."""
    folder = run_dir / FOLDER
    found = [path for path in folder.glob("*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name), reverse=True)


def candidates(path: Path) -> list[Path]:
    """A checkpoint as a list of one, or the checkpoints of a run, newest first."""
    return [path] if (path / MANIFEST).exists() else list_checkpoints(path)


def inspect(checkpoint: Path) -> tuple[Manifest, dict[str, Any]]:
    """The manifest and the config of a checkpoint, without a look at its tensors.

    DamagedError unless they are as written; ConfigError without a mapping, or in a later format.
    """
    manifest = Manifest.read(checkpoint)
    _require_intact(checkpoint, manifest, CONFIG)
    try:
        text = read_regular(checkpoint / CONFIG, LARGEST).decode()
        return manifest, parse_config(text)
    except (OSError, ValueError) as error:
        allowed = "a checkpoint written by consensus"
        message = f"`resume` finds no config in {checkpoint / CONFIG}; allowed: {allowed}"
        raise ConfigError(message) from error


def verify_files(checkpoint: Path, group: Group) -> Manifest:
    """Compare every file with its hash, divided between the ranks; all raise alike. Collective."""
    problem, manifest = None, None
    try:
        manifest = Manifest.read(checkpoint)
        for name in sorted(manifest.files)[group.rank :: group.size]:
            _require_intact(checkpoint, manifest, name)
    except (DamagedError, ConfigError) as error:
        problem = str(error)
    for rank, text in enumerate(group.gather_objects(problem)):
        if text:
            raise DamagedError(text if group.size == 1 else f"rank {rank}: {text}")
    assert manifest is not None
    return manifest


def _require_intact(checkpoint: Path, manifest: Manifest, name: str) -> None:
    size, sha256 = manifest.files[name]
    try:
        require_regular(checkpoint / name)
        if (found_size := (checkpoint / name).stat().st_size) != size:
            raise DamagedError(f"{name} has {found_size} bytes instead of {size}")
        found = file_digest(checkpoint / name)
    except OSError as error:
        raise DamagedError(f"{name}: {brief(error)}") from error
    if found[1] != sha256:
        raise DamagedError(f"{name} is not as it was written")


def choose(paths: list[Path], group: Group, say: Callable[[str], None]) -> Path | None:
    """The first intact checkpoint of rank 0's list; None if all are damaged. A collective."""
    for path in group.share(paths):
        try:
            verify_files(path, group)
            return Path(path)
        except DamagedError as error:
            say(f"checkpoint {path} is damaged and skipped: {error}")
    return None


def load(
    checkpoint: Path,
    state: dict[str, Tensor],
    workers: Sequence[int],
    absent: Sequence[int] = (),
) -> dict[str, Tensor]:
    """Read the state of the workers with these numbers j, written by any number of processes.

    Only the keys, shapes and dtypes of `state`, a result of `Algorithm.state_dict`, are used. The
    rows of `absent` workers are not read; their content is undefined.
    `choose` has verified the checkpoint. GroupError, on this rank alone, if a tensor is missing or
    has another shape or dtype.
    """
    fresh = {key: torch.empty_like(x, device="cpu").contiguous() for key, x in state.items()}
    left = tuple(f"worker/{j}/" for j in absent)
    wanted = {k: x for k, x in by_worker(fresh, workers).items() if not k.startswith(left)}
    try:
        held = Manifest.read(checkpoint).tensors
    except (DamagedError, ConfigError) as error:
        raise GroupError(f"checkpoint {checkpoint}: {error}") from error
    for key in [key for key in wanted if key.endswith("/residual") and key not in held]:
        wanted.pop(key).zero_()  # the sums were not rounded until here
    for key, tensor in wanted.items():
        if key not in held:
            raise GroupError(f"checkpoint {checkpoint} lacks {key}")
        place = held[key]
        found, needed = f"{place.shape} {place.dtype}", f"{tuple(tensor.shape)} {tensor.dtype}"
        if found != needed:
            raise GroupError(f"checkpoint {checkpoint}: {key} is {found} instead of {needed}")
        try:
            tensor.copy_(read_tensor(checkpoint / place.file, place))
        except Exception as error:  # zipfile and torch.load have many kinds
            raise GroupError(f"checkpoint {checkpoint}: {key}: {brief(error)}") from error
    return fresh


def read_tensor(path: Path, place: Place) -> Tensor:
    """The tensor at a place of a file; DamagedError if it is another one than the place says."""
    with path.open("rb") as file:
        part = io.BufferedReader(_Part(file, place))
        _require_stored(part)
        part.seek(0)
        found: Any = torch.load(part, map_location="cpu", weights_only=True)
    kind = (str(found.dtype), tuple(found.shape)) if isinstance(found, Tensor) else type(found)
    if kind != (place.dtype, place.shape):
        raise DamagedError(f"{kind} instead of {place.shape} {place.dtype}")
    assert isinstance(found, Tensor)
    return found


def _require_stored(part: BinaryIO) -> None:
    """DamagedError if the archive of a tensor is compressed: a small one may inflate to any size.

    torch stores them uncompressed.
    """
    with zipfile.ZipFile(part) as archive:
        if any(entry.file_size > entry.compress_size for entry in archive.infolist()):
            raise DamagedError("compressed, as no checkpoint is written")


class _Part(io.RawIOBase):
    """The bytes of one tensor in a file, as a file."""

    def __init__(self, file: io.BufferedReader, place: Place) -> None:
        self._file, self._place, self._at = file, place, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, self._place.length)[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._place.offset + self._at)
        count = max(0, min(len(buffer), self._place.length - self._at))
        count = self._file.readinto(memoryview(buffer)[:count])
        self._at += count
        return count


def by_worker(state: dict[str, Tensor], workers: Sequence[int]) -> dict[str, Tensor]:
    """Split `worker/z` (K, n) into views `worker/0/z`, ..., each (n,)."""
    rows: dict[str, Tensor] = {}
    for key, value in state.items():
        owner, _, name = key.partition("/")
        if owner == "worker":
            rows |= {f"worker/{j}/{name}": value[k] for k, j in enumerate(workers)}
        else:
            rows[key] = value
    return rows
