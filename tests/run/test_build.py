"""The algorithm of a config: its class, its start and its schedules."""

import math

import pytest
import torch

from consensus.algorithm import Consensus, Msgd
from consensus.comm import Launch, Solo
from consensus.run.build import build_algorithm, scheduled
from consensus.run.plan import make_plan


def test_all_workers_start_at_the_weights_of_the_model(make_config):
    plan = make_plan(make_config("workers=3", "model=logistic", "device=cpu"), Launch())
    algorithm = build_algorithm(plan, Solo())
    start = torch.cat([p.detach().flatten() for p in plan.model.parameters()])
    assert isinstance(algorithm, Consensus)
    assert torch.equal(algorithm.u, start)
    assert torch.equal(algorithm.worker.z, start.expand(3, -1))
    assert (algorithm.tau, algorithm.sigma, algorithm.lam) == (0.005, 0.005, 0.1)


def test_msgd_has_one_worker_and_no_coupling(make_config):
    config = make_config("algorithm=msgd", "model=logistic", "device=cpu", "algorithm.sigma=0.02")
    algorithm = build_algorithm(make_plan(config, Launch()), Solo())
    assert isinstance(algorithm, Msgd)
    assert (algorithm.sigma, algorithm.lam, len(algorithm.worker.z)) == (0.02, math.inf, 1)


def test_a_schedule_multiplies_its_constant(make_config):
    overrides = ["algorithm.schedule.lam.name=linear", "+algorithm.schedule.lam.options.final=0.5"]
    config = make_config(*overrides, "algorithm.iterations=10", "algorithm.lam=0.2").algorithm
    lam = scheduled(config, "lam")
    assert [lam(t) for t in (0, 4, 9)] == pytest.approx([0.2, 0.2 * (1 - 0.5 * 4 / 10), 0.11])
    assert scheduled(config, "tau") == 0.005
