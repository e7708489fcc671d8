"""`algorithm.step_every`: workers that make a step in some of the iterations only.

Their loops for the methods with names are in test_methods.py.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from consensus.comm import Launch, Solo
from consensus.replay import obstacle_to_replay
from consensus.run.build import build_algorithm
from consensus.run.checks import ConfigError
from consensus.run.plan import make_plan
from consensus.sweep.__main__ import can_be_member
from tests.testing.small_runs import same_rows

SMALL = ["model=logistic", "device=cpu", "dtype=float64", "algorithm.batch_size=4"]
ADAM = "algorithm.optimizer={optimizer: AdamW, lr: 0.002}"
UNCOUPLED = {
    "Nesterov": ["algorithm.lam=inf"],
    "clipped": ["algorithm.lam=inf", "algorithm.clip_grad_norm=0.1"],
    "AdamW": ["algorithm.lam=inf", ADAM],
    "period": ["algorithm.lam=inf", "algorithm.period=4"],
    "delay": ["algorithm.lam=inf", "algorithm.period=4", "algorithm.delay=2"],
}


def stepped(config, iterations):
    plan = make_plan(config, Launch())
    algorithm = build_algorithm(plan, Solo())
    for t in range(iterations):
        algorithm.step(t)
    return plan, algorithm


@pytest.mark.parametrize("name", UNCOUPLED)
def test_a_straggler_alone_is_a_worker_that_is_behind(make_config, name):
    """Without a coupling: after 9 iterations where others were after 3, to the last bit."""
    own = [*SMALL, "workers=2", *UNCOUPLED[name]]
    _, slow = stepped(make_config(*own, "algorithm.step_every=[3,1]"), 9)
    for iterations, j in (3, 0), (9, 1):
        _, usual = stepped(make_config(*own, "deterministic=true"), iterations)
        assert torch.equal(slow.worker.z[j], usual.worker.z[j])
        assert (usual.worker.z[j] - usual.worker.z[1 - j]).abs().max() > 1e-4


@pytest.mark.parametrize("optimizer", [["algorithm.sigma=0.0005"], [ADAM]])
def test_a_worker_at_rest_moves_by_the_coupling_alone(make_config, optimizer):
    """tan: z+ = z + (sigma / lam) grad phi(u+ - z), s = |w|^2 / eta^2, with the largest step."""
    eta, strength = 0.2, 0.01  # a pull of 2 strength / eta^2
    own = [*SMALL, "workers=2", "potential=tan", f"potential.eta={eta}", *optimizer]
    config = make_config(*own, "algorithm.pull=0.5", "algorithm.step_every=[1,5]")
    _, algorithm = stepped(config, 1)
    worker = algorithm.worker
    for t in range(1, 10):
        before, velocity = worker.z[1].clone(), worker.v[1].clone()
        algorithm.step(t)
        if t == 5:
            assert not torch.equal(worker.v[1], velocity)
            continue
        w = (algorithm.u - before).numpy()
        force = 2 / eta**2 * w / np.cos(w @ w / eta**2) ** 2
        np.testing.assert_allclose(worker.z[1], before.numpy() + strength * force, 0, 1e-14)
        assert np.abs(strength * force).max() > 1e-6
        if ADAM not in optimizer:
            assert torch.equal(worker.v[1], velocity)
    assert worker.cuts.tolist() == [0, 0]


def test_a_worker_at_rest_has_no_pass(make_config):
    config = make_config(*SMALL, "workers=3", "algorithm.step_every=[1,3,6]")
    plan = make_plan(config, Launch())
    passes = []
    plan.model.register_forward_hook(lambda *_: passes.append(1))
    algorithm = build_algorithm(plan, Solo())
    for t in range(12):
        algorithm.step(t)
    assert len(passes) == 12 + 4 + 2
    assert plan.oracle.losses.isfinite().all()
    assert plan.epochs(12) == pytest.approx(4 * (12 + 4 + 2) / 3 / 1437)
    assert "period" not in plan.description()
    assert plan.description().endswith("step_every [1, 3, 6]")


@pytest.mark.parametrize("options", [["algorithm.period=4"], [ADAM, "potential=tan"]])
def test_a_run_continues_to_the_same_bits(train, tmp_path, options):
    own = [*options, "algorithm.step_every=[1,5]"]
    whole = train(*own, f"output.run_dir={tmp_path}/whole")
    train(*own, "algorithm.iterations=8", f"output.run_dir={tmp_path}/a")
    again = train(*own, "resume=auto", f"output.run_dir={tmp_path}/a")
    assert torch.equal(again.algorithm.u, whole.algorithm.u)
    assert torch.equal(again.algorithm.worker.z, whole.algorithm.worker.z)
    assert same_rows(tmp_path / "a", tmp_path / "whole")


def test_refusals(refusal, make_config):
    start = "`algorithm.step_every` is"
    for given in "[0,1]", "[1,-2]":
        shown = given.replace(",", ", ")
        assert refusal(f"algorithm.step_every={given}") == (
            f"{start} {shown}; allowed: a list of whole numbers >= 1, one for each worker, or null "
            "for a step in every iteration"
        )
    for name in "ddp", "msgd":
        assert refusal(f"algorithm={name}", "algorithm.step_every=[2]") == (
            f"{start} [2]; allowed: null for algorithm={name}"
        )
    assert refusal("algorithm.momentum_on=objective", "algorithm.step_every=[1,2]") == (
        "`algorithm.momentum_on` is objective; allowed: loss with algorithm.step_every: the "
        "velocity of a worker at rest stays"
    )
    assert refusal("stationarity.every=5", "algorithm.step_every=[1,2]") == (
        "`stationarity.lam` is null; allowed: a number > 0 with algorithm.step_every, or "
        "stationarity.every=null"
    )
    assert refusal("group.elastic=true", "algorithm.step_every=[1,2]") == (
        f"{start} [1, 2]; allowed: null with group.elastic=true"
    )
    with pytest.raises(ConfigError) as caught:
        make_plan(make_config(*SMALL, "workers=3", "algorithm.step_every=[1,2]"), Launch())
    assert str(caught.value) == (
        f"{start} [1, 2]; allowed: null, or a list of 3 whole numbers >= 1, one for each worker"
    )


def test_neither_a_population_nor_a_recording_takes_stragglers(make_config):
    config = make_config(*SMALL, "workers=2", "algorithm.step_every=[1,2]")
    assert not can_be_member(config)
    u = SimpleNamespace(device=torch.device("cuda"))
    worker = SimpleNamespace(oracle=make_plan(config, Launch()).oracle)
    algorithm = SimpleNamespace(u=u, worker=worker, closed_form=True)
    assert obstacle_to_replay(algorithm, 1) == "some workers rest in some iterations"
