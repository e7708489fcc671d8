"""Fixtures of all tests: rank processes, composed configurations, and MNIST where present."""

import gc

gc.disable()  # until the tests are collected: neither that nor an import leaves garbage

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from hydra import compose
from matplotlib.figure import Figure

from consensus import DATASETS, LOSSES, MODELS, POTENTIALS, SCHEDULES, SINKS
from consensus.core.kernels import native
from consensus.run.compose import composing, to_config
from consensus.run.config import Config
from tests.testing import ROOT, container, hosts, parsed_configs, slurm
from tests.testing.ranks import RankPool

if not torch.cuda.is_available():  # read by Triton when it is imported, which torch does late
    os.environ["TRITON_INTERPRET"] = "1"

parsed_configs.remember()

MNIST_ROOT = Path(os.environ.get("CONSENSUS_MNIST_ROOT", ROOT.parent / "shared" / "data"))

# Beginnings of paths. With pytest-xdist the longest files must start first; those that wait for
# processes and those that compute alternate, so that the cores are busy throughout.
SLOWEST = (
    "tests/test_check.py",  # waits for the type checker
    "tests/launch/test_hosts.py",  # mostly waits
    "tests/launch/test_elastic_hosts.py",  # mostly waits
    "tests/test_algorithm.py",
    "tests/launch/test_slurm_script.py",  # mostly waits
    "tests/test_kill.py",
    "tests/launch/test_elastic.py",  # mostly waits
    "tests/test_population.py",
    "tests/launch/test_kubernetes.py",  # mostly waits
    "tests/test_faults.py",  # mostly waits
    "tests/test_elastic.py",
    "tests/test_train.py",
    "tests/doctor/test_examination.py",  # mostly waits
    "tests/test_docs.py",
    "tests/test_examples.py",
    "tests/test_any_config.py",
    "tests/sweep/",
    "tests/coupling/",
    "tests/core/kernels/",
    "tests/test_layouts.py",
    "tests/problem/test_stored.py",
    "tests/test_differential.py",
    "tests/launch/test_container.py",
    "tests/run/checkpoint/",
    "tests/run/test_optimizers.py",
    "tests/problem/",
    "tests/benchmarks/",
    "tests/doctor/",
    "tests/theory/",
    "tests/comm/",
)


DRAWN = (  # beginnings of paths of tests that look at figures, or should draw them
    "tests/report/",
    "tests/benchmarks/",
    "tests/test_any_config.py",
    "tests/run/test_results.py",
    "tests/test_docs.py",
    "tests/test_examples.py",
    "tests/test_train.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests whose GPU, MNIST, SLURM, root or image is absent; put slow files first."""

    def place(item: pytest.Item) -> int:
        found = (i for i, start in enumerate(SLOWEST) if item.nodeid.startswith(start))
        return next(found, len(SLOWEST))

    items.sort(key=place)
    absent = set()
    if not torch.cuda.is_available():
        absent.add("gpu")
    if not (MNIST_ROOT / "MNIST" / "raw").is_dir():
        absent.add("mnist")
    if not slurm.available() or importlib.util.find_spec("submitit") is None:
        absent.add("slurm")
    if not hosts.available():
        absent.add("hosts")
    if not container.available():
        absent.add("container")
    needing = [item for item in items if any(item.get_closest_marker(name) for name in absent)]
    if needing:
        config.hook.pytest_deselected(items=needing)
        items[:] = [item for item in items if item not in needing]


def pytest_collection_finish() -> None:
    """Let the garbage collector continue, without the objects that live to the end."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    """Give the frozen objects back: Triton reports those that it finds at the exit of Python."""
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="module")
def figures(request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """Empty files in place of figures but in `DRAWN`; the value is the function that draws.

    To draw takes a third of a second, which is most of a small run.
    """
    draw = Figure.savefig
    if request.node.nodeid.startswith(DRAWN):
        yield draw
        return
    with mock.patch.object(Figure, "savefig", lambda _, path, **__: Path(path).write_bytes(b"")):
        yield draw


@pytest.fixture(autouse=True, scope="module")
def tables() -> Iterator[None]:
    """Restore the tables of names after each module, without the entries of its plugins.

    The next one may import an example again, which then registers again.
    """
    every = (POTENTIALS, DATASETS, LOSSES, MODELS, SCHEDULES, SINKS)
    before = [dict(table._factories) for table in every]
    yield
    for table, factories in zip(every, before, strict=True):
        table._factories = factories
    for name, module in list(sys.modules.items()):
        if Path(str(getattr(module, "__file__", None))).parent == ROOT / "examples":
            del sys.modules[name]


@pytest.fixture
def operations_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines 3 and 6 by operations of torch in this process, also where a C compiler is.

    For tests in which a tape stands in for a CUDA graph: it records no functions of C, and on a GPU
    there are none.
    """
    monkeypatch.setattr(native, "library", lambda: None)


@pytest.fixture(scope="session")
def mnist_root() -> str:
    return str(MNIST_ROOT)


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[RankPool]:
    """Rank processes that start once per worker of pytest: each takes seconds to import torch."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture
def ranks(rank_pool: RankPool, tmp_path: Path) -> Callable[..., list]:
    """`ranks(size, function, *args)`: call function(group, *args) on `size` processes."""

    def run(size: int, function: Callable[..., object], *args: object, timeout: float = 120.0):
        return rank_pool.run(size, function, *args, folder=tmp_path, timeout=timeout)

    return run


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., Config]:
    """`make_config("potential=tan", ...)`: a checked config whose run would go to tmp_path."""

    def make(*overrides: str) -> Config:
        with composing("test", overrides) as (own, _):
            where = [f"output.root={tmp_path / 'runs'}", "output.tensorboard=false"]
            return to_config(compose("train", overrides=[*where, *own]))

    return make
