"""Fixtures: the sweep command with stand-ins for its runs, and a SLURM queue."""

import os
import sys
from pathlib import Path

import pytest
from hydra import compose
from omegaconf import OmegaConf

from consensus.run.compose import to_config
from consensus.sweep import job
from tests.testing.sweeps import SLURM, STAND_IN, call_sweep


@pytest.fixture
def sweep(monkeypatch, tmp_path):
    """`sweep("seed=1,2")`: exit code, stdout and stderr; the runs are stand-ins."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    real = job.command

    def command(processes, overrides):
        assert real(processes, overrides)[-len(overrides) :] == overrides
        config = to_config(compose("train", overrides=[o for o in overrides if o[0] != "-"]))
        content = OmegaConf.to_yaml(OmegaConf.structured(config))
        (Path(config.output.run_dir) / "config.yaml").write_text(content)
        return [sys.executable, str(tmp_path / "stand_in.py"), *overrides]

    monkeypatch.setattr(job, "command", command)
    return call_sweep


@pytest.fixture
def queue(monkeypatch, tmp_path):
    """The file of the SLURM queue. Jobs 8 and 9 belong to the sweep `many`, and 7 does not."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name in ("squeue", "scancel"):
        (folder / name).write_text(SLURM.format(python=sys.executable))
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    for name in ("8", "8_0", "8_1", "9_0"):
        (tmp_path / "many" / ".submitit" / name).mkdir(parents=True)
    (folder / "queue").write_text("7\n8\n8\n9\n")
    return folder / "queue"
