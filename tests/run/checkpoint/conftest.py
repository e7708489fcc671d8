"""Fixtures of the tests of checkpoints."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from consensus.comm import Solo
from consensus.run.compose import config_dir, register_schema, to_config
from consensus.run.config import Config
from tests.testing.checkpoints import at, save


@pytest.fixture(scope="session")
def config() -> Config:
    """Any config, composed once."""
    register_schema()
    with initialize_config_dir(config_dir(), version_base="1.3"):
        return to_config(compose("train", overrides=["output.tensorboard=false"]))


@pytest.fixture
def good(config, tmp_path) -> Path:
    """A checkpoint, written by one process."""
    assert save(Solo(), tmp_path, config, [5])[0] is None
    return at(tmp_path, 5)
