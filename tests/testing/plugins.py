"""A plugin of a user: a potential, a model and a data set."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from consensus import DATASETS, MODELS, POTENTIALS

MINE = '''
import torch
from consensus import DATASETS, MODELS, POTENTIALS, Dataset, Potential, Profile, Radial

@POTENTIALS.register("quartic")
def quartic(weight: float = 1.0) -> Potential:
    """weight |x|^4."""
    return Potential(
        Profile(
            psi=lambda s: weight * s**2,
            dpsi=lambda s: 2 * weight * s,
            d2psi=lambda s: 2 * weight + 0 * s,
            assumptions=frozenset({"A1", "A2", "A4", "A5"}),
        ),
        Radial(),
    )

@MODELS.register("tiny")
def tiny(depth: int, width: int = 8, act=torch.tanh, shape=(28, 28)):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 3))

@DATASETS.register("stripes")
def stripes(count: int = 60):
    labels = torch.arange(count) % 3
    images = torch.zeros(count, 1, 28, 28)
    for label in range(3):
        images[labels == label, :, label::3] = 1.0
    return Dataset((images, labels), (images, labels), num_classes=3)
'''


@contextmanager
def plugin_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make a folder with mine.py the current one; the module and its names are forgotten after."""
    for table in (POTENTIALS, MODELS, DATASETS):
        monkeypatch.setattr(table, "_factories", dict(table._factories))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(folder)
    (folder / "mine.py").write_text(MINE)
    yield
    forget(folder)


def forget(folder: Path) -> None:
    """Remove the modules of a folder, and the names that MINE registers."""
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(str(folder)):
            del sys.modules[name]
    for table in (POTENTIALS, MODELS, DATASETS):
        for name in ("quartic", "tiny", "stripes"):
            table._factories.pop(name, None)
