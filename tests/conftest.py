"""Fixtures of all tests: real rank processes, the composed config, and the real MNIST if there."""

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from ranks import RankPool

from consensus.run.compose import config_dir, register_schema, to_config
from consensus.run.config import Config

if not torch.cuda.is_available():  # read by Triton when it is imported, which torch does late
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).resolve().parents[1]
MNIST_ROOT = Path(os.environ.get("CONSENSUS_MNIST_ROOT", ROOT.parent / "shared" / "data"))

# torch.distributed.checkpoint logs every call; a failing test would print thousands of them.
logging.getLogger("c10d-NullHandler-dcp_logger").propagate = False


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs a GPU or the real MNIST where there is none; pytest counts them.

    With pytest-xdist, all that use the rank processes run one after another, so that there is one
    pool of them; so do those that share what is made for their module.
    """
    for item in items:
        scopes = shared_fixtures(item)
        if "rank_pool" in scopes:
            item.add_marker(pytest.mark.xdist_group("ranks"))
        elif "module" in scopes.values():
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))
    absent = set()
    if not torch.cuda.is_available():
        absent.add("gpu")
    if not (MNIST_ROOT / "MNIST" / "raw").is_dir():
        absent.add("mnist")
    needing = [item for item in items if any(item.get_closest_marker(name) for name in absent)]
    if needing:
        config.hook.pytest_deselected(items=needing)
        items[:] = [item for item in items if item not in needing]


def shared_fixtures(item: pytest.Item) -> dict[str, str]:
    """The fixtures of a test that outlive it, and their scopes."""
    found = item._fixtureinfo.name2fixturedefs if isinstance(item, pytest.Function) else {}
    scopes = {name: definitions[-1].scope for name, definitions in found.items()}
    return {name: scope for name, scope in scopes.items() if scope != "function"}


@pytest.fixture(scope="session")
def mnist_root() -> str:
    return str(MNIST_ROOT)


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[RankPool]:
    """Rank processes that start once: importing torch costs seconds of CPU in each."""
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
    register_schema()

    def make(*overrides: str) -> Config:
        with initialize_config_dir(config_dir(), version_base="1.3"):
            where = [f"output.root={tmp_path / 'runs'}", "output.tensorboard=false"]
            return to_config(compose("train", overrides=[*where, *overrides]))

    return make
