"""Checks of software: versions of packages and of this code, on one machine and between members."""

import hashlib
import importlib
import importlib.metadata
import platform
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from consensus.comm import backends
from consensus.doctor.finding import Finding, fault, warning
from consensus.run.compose import config_dir

PACKAGES = ("torch", "torchvision", "numpy", "hydra-core", "omegaconf", "scikit-learn")
MUST_AGREE = ("python", "torch", "cuda", "nccl", "consensus")
"""Versions that must be equal on all ranks: others may hang or give different bits of u."""
PACKAGE = Path(__file__).resolve().parents[1]


def versions() -> dict[str, str]:
    """Versions by name; of consensus a digest of its code."""
    found = {"python": platform.python_version(), "consensus": _digest_of_code()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    found["torch"] = torch.__version__  # with the build, such as +cu132 or +cpu
    found["cuda"] = str(torch.version.cuda or torch.version.hip or "none")
    found["nccl"] = "none"
    if "nccl" in backends():  # also where no GPU is visible; `check_devices` reports that
        nccl: Any = torch.cuda.nccl  # without types
        found["nccl"] = ".".join(map(str, nccl.version()))
    return found


def _digest_of_code() -> str:
    code = hashlib.sha256()
    for folder, pattern in ((PACKAGE, "*.py"), (Path(config_dir()), "*.yaml")):
        for path in sorted(folder.rglob(pattern)):
            code.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return code.hexdigest()[:12]


def compare_versions(found: Sequence[dict[str, str]], index: int) -> Iterator[Finding]:
    """Differences between a member and the first, of the `versions` of all."""
    if all(other == found[0] for other in found):
        yield Finding("versions", "the same everywhere")
    for name in sorted(found[index].keys() | found[0].keys()):
        here, there = (found[i].get(name, "absent") for i in (index, 0))
        if here == there:
            continue
        text = f"{name} is {here} here and {there} on the first"
        if name == "consensus":
            text = f"the code of consensus is not that of the first ({here}, {there})"
        patch = name == "python" and here.split(".")[:2] == there.split(".")[:2]
        kind = fault if name in MUST_AGREE and not patch else warning
        yield kind(
            "versions",
            text,
            "the same checkout and the same environment on every node (scripts/setup makes it from "
            "requirements.lock), best on a folder that all of them see; CONSENSUS_VENV names one",
        )


def check_software() -> Iterator[Finding]:
    """Versions, and whether torchvision fits torch."""
    found = versions()
    shown = [f"{name} {found[name]}" for name in ("python", "torch", "torchvision", "hydra-core")]
    yield Finding("versions", f"{', '.join(shown)}, consensus {found['consensus']}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("torchvision")
    except Exception as error:  # builds that do not fit raise errors of any type
        text = f"torchvision {found['torchvision']} does not work with torch {found['torch']}"
        remedy = "install both at once: scripts/setup, or `uv pip install torch torchvision`"
        yield fault("versions", f"{text} ({error})", remedy)
