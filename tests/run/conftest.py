"""Fixtures of the tests of a run."""

from collections.abc import Callable

import pytest
import torch

from consensus.comm import Launch, Solo
from consensus.run.compose import REFUSALS, explain
from consensus.run.plan import make_plan
from consensus.run.trainer import Trainer
from tests.testing.small_runs import PACE, SMALL


@pytest.fixture
def train(make_config) -> Callable[..., Trainer]:
    """`train("resume=auto", ...)`: a small run to its end in this process; its trainer."""

    def call(*overrides: str, launch: Launch | None = None) -> Trainer:
        config = make_config(*SMALL, *PACE, *overrides)
        trainer = Trainer(make_plan(config, launch or Launch()), Solo())
        trainer.run()
        return trainer

    return call


@pytest.fixture
def refusal(make_config):
    """`refusal("lam=abc", ...)`: the line that refuses these overrides."""

    def refuse(*overrides: str) -> str:
        with pytest.raises(REFUSALS) as caught:
            make_config(*overrides)
        line = explain(caught.value)
        assert "\n" not in line
        return line

    return refuse


@pytest.fixture
def cuda_devices(monkeypatch):
    """`cuda_devices(n)`: torch sees n CUDA devices."""

    def pretend(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return pretend
