"""Refusals of a process of an elastic run, before it joins one."""

import os
import signal

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from consensus import MODELS
from consensus.comm import GroupError, Launch, Members
from consensus.comm.rendezvous import serve
from consensus.run.checks import ConfigError
from consensus.run.elastic.member import run_as_member, train_as_member
from consensus.run.plan import make_plan
from consensus.run.signals import RunStopped

COMPOSED = OmegaConf.create({"group": {"timeout_s": 1.0}})


def test_processes_of_torchrun_are_refused():
    with pytest.raises(ConfigError) as caught:
        train_as_member(COMPOSED, [], Launch(rank=1, size=2, local_rank=1, local_size=2))
    assert str(caught.value) == (
        "`group.elastic` is true; allowed: false under torchrun, which ends all its processes with "
        "the first that is lost; `python -m consensus.elastic` starts members"
    )


@pytest.mark.parametrize("absent", ["MASTER_ADDR", "MASTER_PORT"])
def test_a_process_without_a_store_is_refused(monkeypatch, absent):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.delenv(absent)
    with pytest.raises(ConfigError) as caught:
        train_as_member(COMPOSED, [], Launch())
    assert str(caught.value) == (
        "`group.elastic` is true; allowed: with MASTER_ADDR and MASTER_PORT of a store, as "
        "`python -m consensus.elastic` sets"
    )


def test_a_store_that_nobody_keeps_is_an_error_in_time(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises((TimeoutError, GroupError), match=r"nothing answers within 1 s \("):
        train_as_member(COMPOSED, [], Launch())


def test_a_model_with_running_statistics_is_refused(make_config):
    @MODELS.register("elastic_normalized")
    def normalized(num_classes: int = 10) -> nn.Module:
        return nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(784, num_classes))

    config = make_config("model=elastic_normalized", "group.elastic=true", "device=cpu")
    with torch.random.fork_rng(), pytest.raises(ConfigError) as caught:
        make_plan(config, Launch())
    assert str(caught.value) == (
        "`group.elastic` is true; allowed: false with model=elastic_normalized, whose running "
        "statistics a member would lack"
    )


def test_a_process_that_is_stopped_before_it_is_a_member_leaves(make_config):
    class Waiting(Members):
        def join(self, give_up):
            os.kill(os.getpid(), signal.SIGTERM)
            return super().join(give_up)

    store, _ = serve(0, "127.0.0.1")
    config = make_config("group.elastic=true", "model=logistic", "device=cpu")
    members = Waiting(store, expected=2)
    with torch.random.fork_rng(), pytest.raises(RunStopped) as stopped:
        run_as_member(make_plan(config, Launch()), members)
    assert (str(stopped.value), stopped.value.code) == ("stopped before it became a member", 75)
    assert store.get(f"gone/{members.name}") == b"has left", "the others do not wait for it"
