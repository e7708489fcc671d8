"""The functions of native.c, compiled where a C compiler is, once for each machine.

The library lies in the user's cache, `XDG_CACHE_HOME` or ~/.cache, under a name that depends on the
source, the compiler, its flags and the processor. Several processes may compile it at once: each
writes a file of its own and renames it. The compiler is that of `CC`, or cc.

Nothing needs the library. Without a compiler, with a cache that cannot be written, or with
CONSENSUS_NATIVE=0, `library` is None, and lines 3 and 6 are operations of torch; the reason is
logged. The library rounds otherwise than these, so processes that move u together use it together
or not at all: `agreed`.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from consensus.core.sizes import CHUNK

SOURCE = Path(__file__).with_name("native.c")
PARTS = (SOURCE, SOURCE.with_name("native_rows.h"))
SWITCH = "CONSENSUS_NATIVE"  # 0: do without
# Bits do not depend on the processor: no operation is contracted, and sums have a fixed order.
FLAGS = ("-std=c11", "-O3", "-ffp-contract=off", "-shared", "-fPIC")
TIMEOUT_S = 60.0

_POINTER, _INT, _DOUBLE = ctypes.c_void_p, ctypes.c_int, ctypes.c_double
_COUNT = ctypes.c_int64
_FUNCTIONS: dict[str, tuple[Sequence[type], type | None]] = {
    "start": ([_POINTER, _POINTER, _INT], None),
    "scale": ([_POINTER, _POINTER, _POINTER], None),
    "move": ([_POINTER, _POINTER, _DOUBLE, _DOUBLE, _INT], None),
    "lead": ([_POINTER, _POINTER, _POINTER, _DOUBLE, _POINTER], None),
    "pull": ([_POINTER, _POINTER, _POINTER, _INT], None),
    "sizes_of_rows": ([_POINTER] * 4 + [_COUNT, _POINTER], None),
    "forces": ([_POINTER] * 4 + [_COUNT] + [_POINTER] * 4, _INT),
    "move_consensus": ([_POINTER] * 5 + [_DOUBLE, _POINTER], _INT),
    "sizes_of_line_6": ([_POINTER] * 6 + [_COUNT] + [_DOUBLE] * 3 + [_POINTER], None),
    "move_rows": (
        [_POINTER] * 6 + [_COUNT] + [_DOUBLE] * 4 + [_INT] * 2 + [_POINTER] * 4 + [_INT],
        _COUNT,
    ),
    "replace": ([_POINTER, _INT], None),
    "start_radial": ([_POINTER, _POINTER, _INT, _POINTER], None),
    "add_scaled": ([_POINTER, _COUNT, _COUNT, _POINTER, _COUNT, _POINTER], None),
    "start_near": ([_POINTER] * 2 + [_INT, _DOUBLE, _DOUBLE, _INT, _POINTER], _COUNT),
    "move_near": ([_POINTER] * 2 + [_DOUBLE] * 3 + [_INT, _POINTER, _POINTER], _COUNT),
}


class Library:
    """The functions of native.c by name and type, as `squares_f32`; addresses are integers.

    Attributes:
        path: Its file.
    """

    def __init__(self, path: Path) -> None:
        """An OSError or AttributeError unless it is a library with these functions."""
        self.path, loaded = path, ctypes.CDLL(str(path))
        for name, (arguments, result) in _FUNCTIONS.items():
            for suffix in ("f32", "f64"):
                function = getattr(loaded, f"{name}_{suffix}")
                function.argtypes, function.restype = arguments, result
                setattr(self, f"{name}_{suffix}", function)

    def function(self, name: str, dtype: torch.dtype) -> Callable[..., int]:
        """A function for vectors of this type."""
        found: Callable[..., int] = getattr(
            self, f"{name}_{'f32' if dtype == torch.float32 else 'f64'}"
        )
        return found


class Run(ctypes.Structure):
    """As in native.c."""

    _fields_ = (
        ("own", ctypes.c_void_p),
        ("start", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("group", ctypes.c_int64),
    )


class Plan(ctypes.Structure):
    """As in native.c; u and z are addresses."""

    _fields_ = (
        ("runs", ctypes.c_void_p),
        ("num_runs", ctypes.c_int64),
        ("num_groups", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("u", ctypes.c_void_p),
        ("z", ctypes.c_void_p),
    )


class PotentialOfC(ctypes.Structure):
    """`struct potential` of native_rows.h."""

    _fields_ = (
        ("psi", ctypes.c_int64),
        ("separable", ctypes.c_int64),
        ("slope", ctypes.c_double),
        ("scale", ctypes.c_double),
        ("bound", ctypes.c_double),
        ("limit", ctypes.c_double),
        ("eps", ctypes.c_double),
    )


@functools.cache
def library() -> Library | None:
    """The library, compiled unless it is in the cache; None if there is none."""
    if os.environ.get(SWITCH) == "0":
        return None
    try:
        return _open(cache_folder(), shlex.split(os.environ.get("CC", "cc")))
    except (OSError, AttributeError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        logging.getLogger(__name__).info("lines 3 and 6 by torch, not by native.c: %s", error)
        return None


def library_for(like: Tensor) -> Library | None:
    """The library if it takes vectors (..., n) like a tensor in less time than torch.

    It uses one thread. Where torch has several, it takes large vectors in less time.
    """
    fits = like.device.type == "cpu" and like.dtype in (torch.float32, torch.float64)
    alone = torch.get_num_threads() == 1 or like.shape[-1] <= CHUNK
    return library() if fits and alone else None


def agreed(smallest: Callable[[Tensor], Tensor], u: Tensor) -> Library | None:
    """`library_for` u (n,) if all processes have that of one source. A collective.

    Args:
        smallest: The minimum over processes, in place.
        u: A vector that the processes would move alike.
    """
    own = library_for(u)
    key = 0 if own is None else int.from_bytes(_digest_of_source()[:7])
    found = smallest(torch.tensor([key, -key], device=u.device)).tolist()
    return own if found == [key, -key] else None


def cache_folder() -> Path:
    """The folder of the libraries; a RuntimeError if there is no home directory."""
    given = os.environ.get("XDG_CACHE_HOME")
    return (Path(given) if given else Path.home() / ".cache") / "consensus"


def _open(folder: Path, compiler: list[str]) -> Library:
    """The library of this compiler, which is compiled first if it is not in the folder."""
    found = shutil.which(compiler[0]) if compiler else None
    if found is None:
        raise OSError(f"no C compiler {shlex.join(compiler)}")
    flags = [*compiler[1:], *FLAGS]
    if platform.machine() == "x86_64":
        flags.append("-march=native")
    program = Path(found).resolve()
    known = program.stat()
    identity = [str(program), str(known.st_size), str(known.st_mtime_ns), *flags, _processor()]
    key = _digest(_digest_of_source(), *map(str.encode, identity)).hex()
    path = folder / f"native-{key}.so"
    if path.is_file():
        try:
            return Library(path)
        except (OSError, AttributeError):
            pass  # a damaged file is replaced
    folder.mkdir(parents=True, exist_ok=True)
    compile_to(path, [found, *flags])
    return Library(path)


def compile_to(path: Path, command: list[str]) -> None:
    """Compile native.c by a command, and rename the result to `path`.

    An OSError or a subprocess.SubprocessError if it fails.
    """
    with tempfile.TemporaryDirectory(prefix="compiling-", dir=path.parent) as folder:
        made = Path(folder) / path.name
        subprocess.run(
            [*command, str(SOURCE), "-o", str(made), "-lm"],
            check=True,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=TIMEOUT_S,
        )
        with made.open("rb") as file:
            os.fsync(file.fileno())  # a file that is cut off by a loss of power could end processes
        os.replace(made, path)


def _processor() -> str:
    """The instructions of this processor, on which `-march=native` depends."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        flags = platform.processor()
    return platform.machine() + flags


def _digest_of_source() -> bytes:
    return _digest(*(part.read_bytes() for part in PARTS))


def _digest(*parts: bytes) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8) + part)
    return digest.digest()
