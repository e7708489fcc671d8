"""The checkpoint manifest: a JSON index, validated before use.

Every future format keeps one property: `sha256` is the digest of all other entries. It tells a
damaged manifest from one of a later version.
"""

import errno
import hashlib
import json
import re
import stat
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from consensus.run.checks import ConfigError

FORMAT = 1
LARGEST = 2**26  # bytes of a manifest; it has 200 for each tensor
LARGEST_NUMBER = 2**62
MANIFEST = "manifest.json"
CONFIG = "config.yaml"
_TENSORS = re.compile(r"__\d+_\d+\.distcp", re.ASCII)
_HEX_64, _HEX_256 = re.compile(r"[0-9a-f]{16}"), re.compile(r"[0-9a-f]{64}")


class DamagedError(RuntimeError):
    """A checkpoint differs from what was written; the message names the difference."""


@dataclass(frozen=True)
class Place:
    """The place and the type of a stored tensor."""

    dtype: str  # such as "torch.float32"
    shape: tuple[int, ...]  # of the whole tensor, which is stored in one piece
    file: str  # its name in the checkpoint
    offset: int  # of the first byte
    length: int  # in bytes


@dataclass(frozen=True)
class Manifest:
    """The content of a manifest."""

    iteration: int  # iterations done
    num_workers: int  # M
    digest: str  # of u, 16 hexadecimal digits
    wall_s: float  # of training so far, those before a resume included
    best: dict[str, float] | None  # iteration and test error of the evaluation with the lowest
    torch: str  # the version that wrote it
    files: dict[str, tuple[int, str]]  # name -> bytes and SHA-256
    tensors: dict[str, Place]

    def to_json(self) -> bytes:
        """The file: all attributes, the format, and the digest of both."""
        content = {"format": FORMAT, **asdict(self)}
        content["sha256"] = _digest(content)
        return json.dumps(content, indent=2, sort_keys=True).encode()

    @classmethod
    def read(cls, checkpoint: Path) -> "Manifest":
        """The manifest of a checkpoint.

        DamagedError unless it is as written; ConfigError if a later version wrote it.
        """
        try:
            content = json.loads(read_regular(checkpoint / MANIFEST, LARGEST))
            sha256 = content.pop("sha256")
            intact = sha256 == _digest(content)
            version = content.pop("format")
        except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as e:
            raise DamagedError(f"no readable {MANIFEST} ({brief(e)})") from e
        if not intact or not _whole(version, least=1):
            raise DamagedError(f"{MANIFEST} is not as it was written")
        if version > FORMAT:
            allowed = f"up to {FORMAT}, which this version reads"
            raise ConfigError(
                f"`resume` finds {checkpoint} in format {version}; allowed: {allowed}"
            )
        try:
            files = {name: (size, sha) for name, (size, sha) in content["files"].items()}
            tensors = {
                key: Place(**place | {"shape": tuple(place["shape"])})
                for key, place in content["tensors"].items()
            }
            manifest = cls(**content | {"files": files, "tensors": tensors})
        except (TypeError, ValueError, AttributeError, LookupError) as error:
            raise DamagedError(f"{MANIFEST} lacks something ({brief(error)})") from error
        manifest._require_sound()
        return manifest

    def _require_sound(self) -> None:
        """Raise DamagedError unless every value is of its type and within its bounds."""
        best = {} if self.best is None else self.best
        checks = {
            "iteration": _whole(self.iteration),
            "num_workers": _whole(self.num_workers, least=1),
            "digest": _matches(_HEX_64, self.digest),
            "wall_s": _number(self.wall_s) and self.wall_s >= 0,
            "best": isinstance(best, dict) and all(map(_number, best.values())),
            "torch": isinstance(self.torch, str),
            "files": CONFIG in self.files
            and all(name == CONFIG or _matches(_TENSORS, name) for name in self.files)
            and all(_whole(size) and _matches(_HEX_256, sha) for size, sha in self.files.values()),
            "tensors": all(
                isinstance(place.dtype, str)
                and all(map(_whole, place.shape))
                and _matches(_TENSORS, place.file)
                and _whole(place.offset)
                and _whole(place.length)
                and place.offset + place.length <= self.files.get(place.file, (0, ""))[0]
                for place in self.tensors.values()
            ),
        }
        wrong = [name for name, good in checks.items() if not good]
        if wrong:
            raise DamagedError(f"{MANIFEST} has impossible {' and '.join(wrong)}")


def _whole(x: Any, least: int = 0) -> bool:
    return type(x) is int and least <= x <= LARGEST_NUMBER


def _number(x: Any) -> bool:
    return type(x) in (int, float) and abs(x) <= 1e300  # an int may be too large for a float


def _matches(pattern: re.Pattern[str], x: Any) -> bool:
    return isinstance(x, str) and pattern.fullmatch(x) is not None


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_regular(path: Path, largest: int) -> bytes:
    """The content of a regular file of at most so many bytes; else OSError.

    A pipe or a device would be read for ever.
    """
    require_regular(path)
    if path.stat().st_size > largest:
        raise OSError(errno.EFBIG, "too large")
    return path.read_bytes()


def require_regular(path: Path) -> None:
    """OSError unless a path is that of a regular file."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "no regular file")


def as_hex(digest: int) -> str:
    """A digest of u, an int64, as 16 hexadecimal digits."""
    return f"{digest & (2**64 - 1):016x}"


def brief(error: BaseException) -> str:
    """The cause of an error, without line breaks."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip() or type(error).__name__).splitlines()[0]
