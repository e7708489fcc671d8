"""What a checkpoint is, and how it is read: trusting nothing.

    checkpoints/00000500/   manifest.json       what it is, which tensor lies where, and the hash of
                                                every other file
                            config.yaml         the run
                            __RANK_0.distcp     the tensors, written by torch.distributed.checkpoint

The tensors are keyed by worker (`worker/3/z`), not by rank: any number of processes can read them.
The index is JSON: torch's own, `.metadata`, is a pickle, and is neither written nor ever read.

Data flow of a read: manifest (its own digest, then the format), the hash of every file, keys,
shapes and dtypes, the tensors by torch.load(weights_only=True), and at last the digest of u. What
fails a hash is damaged: it is named and the checkpoint before it is used. What passes and still is
not ours is refused, and nothing of it has been executed.

What is not in a checkpoint is a function of what is: shuffles, minibatches and dropout of (seed,
worker, position), schedules and the phase of the communication period of the iteration.
"""

import hashlib
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from consensus.comm import Group, GroupError
from consensus.private_api import storage_info
from consensus.run.checkpoint.manifest import CONFIG, MANIFEST, DamagedError, Manifest, Place, brief
from consensus.run.config import ConfigError

# torch.distributed.checkpoint is imported where it is used. It brings sympy, two seconds that a
# refused command, `--help` or a run without checkpoints need not wait for.
if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

FOLDER = "checkpoints"
_NAME = re.compile(r"\d{8,}")

# One process, no process group: torch warns each time that it will do what it is asked to do.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")


def file_digest(path: Path) -> tuple[int, str]:
    """Bytes and SHA-256 of a file."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), sha256


# ---- which checkpoints there are


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The published checkpoints of a run directory, newest first."""
    folder = run_dir / FOLDER
    found = [path for path in folder.glob("*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name), reverse=True)


def candidates(path: Path) -> list[Path]:
    """What `path` offers: itself if it is a checkpoint, else those of the run, newest first."""
    return [path] if (path / MANIFEST).exists() else list_checkpoints(path)


def inspect(checkpoint: Path) -> tuple[Manifest, dict[str, Any]]:
    """The manifest and the config of a checkpoint; the tensors are left to the ranks.

    Raises:
        DamagedError: If the manifest or the config is not as it was written.
        ConfigError: If the config is none, or a later version wrote the checkpoint.
    """
    manifest = Manifest.read(checkpoint)
    _require_intact(checkpoint, manifest, CONFIG)
    try:
        config = OmegaConf.to_container(OmegaConf.load(checkpoint / CONFIG), resolve=False)
    except Exception as error:  # two parsers, each with errors of its own
        config = brief(error)
    if not isinstance(config, dict):
        raise ConfigError(
            f"`resume` finds no config in {checkpoint / CONFIG}; allowed: a checkpoint of ours"
        )
    return manifest, {str(key): value for key, value in config.items()}


def verify_files(checkpoint: Path, group: Group) -> Manifest:
    """Check every file against its hash, each rank its share. A collective.

    Raises:
        DamagedError: On every rank, if one of them found a file changed.
    """
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
    try:
        found = file_digest(checkpoint / name)
    except OSError as error:
        raise DamagedError(f"{name}: {brief(error)}") from error
    size, sha256 = manifest.files[name]
    if found[0] != size:
        raise DamagedError(f"{name} has {found[0]} bytes instead of {size}")
    if found[1] != sha256:
        raise DamagedError(f"{name} is not as it was written")


def choose(paths: list[Path], group: Group, say: Callable[[str], None]) -> Path | None:
    """The first of the checkpoints that is intact; rank 0's list counts. A collective."""
    for path in group.share(paths):
        try:
            verify_files(path, group)
        except DamagedError as error:
            say(f"checkpoint {path} is damaged and skipped: {error}")
            continue
        chosen: Path = path
        return chosen
    return None


def set_aside(run_dir: Path, iteration: int) -> None:
    """Remove what was half written or half removed; rename what lies beyond an iteration.

    A run that went back to an earlier checkpoint must not find the later, damaged one again.
    """
    for path in (run_dir / FOLDER).glob(".*"):
        if path.name.endswith((".tmp", ".gone")):
            shutil.rmtree(path, ignore_errors=True)
    for path in list_checkpoints(run_dir):
        if int(path.name) > iteration:
            aside = path.with_name(f"{path.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


# ---- reading tensors


def load(checkpoint: Path, state: dict[str, Tensor], workers: range) -> dict[str, Tensor]:
    """The state of these workers, written by any number of processes.

    Args:
        checkpoint: Verified by `choose`.
        state: What `Algorithm.state_dict` returns: its keys, shapes and dtypes.
        workers: The j of the rows of `worker/...`.

    Raises:
        GroupError: If a tensor is missing, or has another shape or dtype. On this rank alone.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    fresh = {
        key: torch.empty_like(value, device="cpu").contiguous() for key, value in state.items()
    }
    wanted = by_worker(fresh, workers)
    try:
        held = Manifest.read(checkpoint).tensors
    except (DamagedError, ConfigError) as error:
        raise GroupError(f"checkpoint {checkpoint}: {error}") from error
    for key, tensor in wanted.items():
        if key not in held:
            raise GroupError(f"checkpoint {checkpoint} lacks {key}")
        found = f"{held[key].shape} {held[key].dtype}"
        needed = f"{tuple(tensor.shape)} {tensor.dtype}"
        if found != needed:
            raise GroupError(f"checkpoint {checkpoint}: {key} is {found} instead of {needed}")
    index = _index({key: (tensor, held[key]) for key, tensor in wanted.items()})

    class Reader(dcp.FileSystemReader):
        """torch's reader, with our index instead of its unpickling."""

        def read_metadata(self, *args: Any, **kwargs: Any) -> "Metadata":
            return index

    try:
        dcp.load(wanted, storage_reader=Reader(checkpoint), no_dist=True)
    except CheckpointException as error:
        raise GroupError(f"checkpoint {checkpoint}: {first_failure(error.failures)[1]}") from error
    return fresh


def _index(wanted: Mapping[str, tuple[Tensor, Place]]) -> "Metadata":
    """The places as torch.distributed.checkpoint wants to be told."""
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    tensors: dict[str, Any] = {}
    places = {}
    for key, (tensor, place) in wanted.items():
        start = torch.Size([0] * tensor.dim())
        chunk = ChunkStorageMetadata(start, tensor.shape)
        properties = TensorProperties.create_from_tensor(tensor)
        tensors[key] = TensorStorageMetadata(properties, tensor.shape, [chunk])
        info = storage_info(place.file, place.offset, place.length)
        places[MetadataIndex(key, start)] = info
    return Metadata(tensors, storage_data=places)


def by_worker(state: dict[str, Tensor], workers: range) -> dict[str, Tensor]:
    """`worker/z` (K, n) as `worker/0/z`, ..., each (n,); views."""
    rows: dict[str, Tensor] = {}
    for key, value in state.items():
        owner, _, name = key.partition("/")
        if owner == "worker":
            rows |= {f"worker/{j}/{name}": value[k] for k, j in enumerate(workers)}
        else:
            rows[key] = value
    return rows


def first_failure(failures: Mapping[int, tuple[BaseException, Any]]) -> tuple[int, str]:
    """The rank and the reason, of what torch.distributed.checkpoint collects from all ranks."""
    rank, (cause, _) = sorted(failures.items())[0]
    return rank, brief(cause)
