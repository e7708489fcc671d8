"""What a checkpoint is, and how it is read: trusting nothing.

    checkpoints/00000500/   manifest.json       what it is, and the hash of every other file
                            config.yaml         the run
                            .metadata           which tensor lies where    (torch.distributed's)
                            __RANK_0.distcp     the tensors                (likewise)

The tensors are keyed by worker (`worker/3/z`), not by rank: any number of processes can read them.

Data flow of a read: manifest (its own digest, then the format), the hash of every file, the pickled
index with an unpickler that knows eleven harmless names, keys, shapes and dtypes, and at last the
digest of u. What fails a hash is damaged: it is named and the checkpoint before it is used. What
passes and still is not ours is refused, and nothing of it has been executed.

What is not in a checkpoint is a function of what is: shuffles, minibatches and dropout of (seed,
worker, position), schedules and the phase of the communication period of the iteration.
"""

import hashlib
import json
import pickle
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from consensus.comm import Group, GroupError
from consensus.run.config import ConfigError

# torch.distributed.checkpoint is imported where it is used. It brings sympy, two seconds that a
# refused command, `--help` or a run without checkpoints need not wait for.
if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

FORMAT = 1
FOLDER = "checkpoints"
MANIFEST = "manifest.json"
CONFIG = "config.yaml"
INDEX = ".metadata"
_NAME = re.compile(r"\d{8,}")
_FILE = re.compile(r"\.metadata|config\.yaml|__\d+_\d+\.distcp")

# One process, no process group: torch warns each time that it will do what it is asked to do.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")


class DamagedError(RuntimeError):
    """A checkpoint that is not as it was written; the message says what is wrong."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself.

    Attributes:
        iteration: Iterations done.
        num_workers: M.
        digest: Of u, 16 hexadecimal digits.
        wall_s: Seconds of training so far, those before a resume included.
        best: Iteration and test error of the evaluation with the lowest, if there was one.
        torch: The version that wrote it.
        files: Name -> bytes and SHA-256.
    """

    iteration: int
    num_workers: int
    digest: str
    wall_s: float
    best: dict[str, float] | None
    torch: str
    files: dict[str, tuple[int, str]]

    def to_json(self) -> bytes:
        """With the format, and a digest over everything else."""
        content = {"format": FORMAT, **asdict(self)}
        return _json(content | {"sha256": _digest(content)}, indent=2)

    @classmethod
    def read(cls, checkpoint: Path) -> "Manifest":
        """The manifest of a checkpoint.

        Raises:
            DamagedError: If it is not as it was written.
            ConfigError: If a later version of this program wrote it.
        """
        try:
            content = json.loads((checkpoint / MANIFEST).read_bytes())
            stated = content.pop("format"), content.pop("sha256")
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise DamagedError(f"no readable {MANIFEST} ({brief(error)})") from error
        version, sha256 = stated
        if type(version) is int and version > FORMAT:
            raise ConfigError(
                f"`resume` finds {checkpoint} in format {version}; allowed: up to {FORMAT}, which "
                "this version reads"
            )
        if version != FORMAT or sha256 != _digest({"format": FORMAT, **content}):
            raise DamagedError(f"{MANIFEST} is not as it was written")
        try:
            files = {name: (int(size), str(sha)) for name, (size, sha) in content["files"].items()}
            manifest = cls(**content | {"files": files})
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            raise DamagedError(f"{MANIFEST} lacks something ({brief(error)})") from error
        strange = [name for name in files if not _FILE.fullmatch(name)]
        if strange or INDEX not in files or CONFIG not in files:
            raise DamagedError(f"{MANIFEST} lists the wrong files")
        return manifest


def _json(content: Any, indent: int | None = None) -> bytes:
    return json.dumps(content, indent=indent, sort_keys=True).encode()


def _digest(content: Any) -> str:
    return hashlib.sha256(_json(content)).hexdigest()


def brief(error: BaseException) -> str:
    """The reason of an error in a few words."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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
    """The manifest and the config of a checkpoint, after looking at all but the tensors.

    Raises:
        DamagedError: If the manifest, the config or the index is not as it was written.
        ConfigError: If it holds what no checkpoint of ours holds, or a later version wrote it.
    """
    manifest = Manifest.read(checkpoint)
    for name in (CONFIG, INDEX):
        _require_intact(checkpoint, manifest, name)
    read_index(checkpoint)
    config = OmegaConf.to_container(OmegaConf.load(checkpoint / CONFIG), resolve=False)
    assert isinstance(config, dict)
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

_HARMLESS = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}


class _Unpickler(pickle.Unpickler):
    """Makes the classes of an index and dtypes; importing anything else is refused before it is."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _HARMLESS:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise ConfigError(
            f"it names {module}.{name}; allowed: tensors only (nothing of it was executed)"
        )


def read_index(checkpoint: Path) -> "Metadata":
    """Which tensors a checkpoint holds, and where.

    Raises:
        DamagedError: If it cannot be read.
        ConfigError: If it would run code, or points outside the checkpoint.
    """
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

    where = f"`resume` finds {checkpoint / INDEX}"
    try:
        with (checkpoint / INDEX).open("rb") as file:
            index = _Unpickler(file).load()
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    except Exception as error:  # a pickle may fail in any way
        raise DamagedError(f"{INDEX} cannot be read ({brief(error)})") from error
    if not isinstance(index, Metadata) or not isinstance(index.storage_data, dict):
        raise ConfigError(f"{where}: it is no index; allowed: what a checkpoint of ours holds")
    for key, tensor in index.state_dict_metadata.items():
        if not isinstance(tensor, TensorStorageMetadata):
            raise ConfigError(f"{where}: {key} is a pickled object; allowed: tensors only")
    for place in index.storage_data.values():
        name = getattr(place, "relative_path", None)
        inside = isinstance(name, str) and _FILE.fullmatch(name) is not None
        if not inside or getattr(place, "transform_descriptors", None):
            raise ConfigError(f"{where}: it reads {name}; allowed: its own files")
    return index


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
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    class Reader(dcp.FileSystemReader):
        """torch's reader, with our index instead of its unpickling."""

        def read_metadata(self, *args: Any, **kwargs: Any) -> "Metadata":
            return read_index(checkpoint)

    fresh = {
        key: torch.empty_like(value, device="cpu").contiguous() for key, value in state.items()
    }
    wanted = by_worker(fresh, workers)
    try:
        held = read_index(checkpoint).state_dict_metadata
        for key, tensor in wanted.items():
            entry = held.get(key)
            if not isinstance(entry, TensorStorageMetadata):
                raise GroupError(f"checkpoint {checkpoint} lacks {key}")
            found, needed = (
                f"{tuple(size)} {dtype}"
                for size, dtype in (
                    (entry.size, entry.properties.dtype),
                    (tensor.shape, tensor.dtype),
                )
            )
            if found != needed:
                raise GroupError(f"checkpoint {checkpoint}: {key} is {found} instead of {needed}")
        dcp.load(wanted, storage_reader=Reader(checkpoint), no_dist=True)
    except CheckpointException as error:
        raise GroupError(f"checkpoint {checkpoint}: {first_failure(error.failures)}") from error
    except (DamagedError, ConfigError) as error:
        raise GroupError(f"checkpoint {checkpoint}: {error}") from error
    return fresh


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


def first_failure(failures: Mapping[int, tuple[BaseException, Any]]) -> str:
    """The rank and the reason, of what torch.distributed.checkpoint collects from all ranks."""
    rank, (cause, _) = sorted(failures.items())[0]
    return f"rank {rank}: {brief(cause)}"
