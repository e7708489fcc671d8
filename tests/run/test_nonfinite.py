"""`algorithm.on_nonfinite` from the command to the line that names the workers."""

import math

import numpy as np
import pytest
import torch

from consensus import MODELS
from consensus.comm import GroupError, Launch, Solo
from consensus.run.build import build_algorithm
from consensus.run.checks import ConfigError
from consensus.run.plan import make_plan
from consensus.run.trainer import Trainer
from consensus.sweep.__main__ import can_be_member

RUN = [
    *("model=logistic", "device=cpu", "dtype=float64", "workers=4", "algorithm.batch_size=4"),
    *("algorithm.lam=0.05", "algorithm.tau=0.02", "algorithm.sigma=0.01", "algorithm.momentum=0.5"),
    *("algorithm.iterations=6", "output.log_every=1", "output.checkpoint_every=null"),
]
DROP = "algorithm.on_nonfinite=drop"


def spoil(oracle, wild):
    """Make the gradients of workers `wild(t)` nan or inf at iteration t; keep all gradients."""
    inner, seen = oracle.gradient, []

    def gradient(points, batch):
        delta = inner(points, batch)
        for j in wild(len(seen)):
            delta[j, 3] = math.nan if j % 2 else math.inf
        seen.append(delta.clone().numpy())
        return delta

    oracle.gradient = gradient
    return seen


def by_hand(u, gradients, wild):
    """U and the z_j of Algorithm 1 with quad, where workers `wild(t)` begin again at u."""
    z, v = np.repeat(u[None], 4, 0), np.zeros((4, len(u)))
    for t, delta in enumerate(gradients):
        u = u - 0.02 * 2 * (u - z).sum(0)
        v = 0.5 * v - 0.01 * (delta + 1e-4 * z)
        z = z + v + 0.01 / 0.05 * 2 * (u - z)
        for j in wild(t):
            z[j], v[j] = u, 0.0
    return u, z


def test_u_moves_by_the_others(make_config):
    """Worker 2 is spoilt in every iteration, worker 1 once: it takes part again afterwards."""

    def wild(t):
        return [2] if t != 2 else [1, 2]

    plan = make_plan(make_config(*RUN, DROP), Launch())
    gradients = spoil(plan.oracle, wild)
    algorithm = build_algorithm(plan, Solo())
    start = algorithm.u.clone().numpy()
    for t in range(6):
        algorithm.step(t)
    u, z = by_hand(start, gradients, wild)
    np.testing.assert_allclose(algorithm.u, u, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(algorithm.worker.z, z, rtol=1e-12, atol=1e-15)
    assert algorithm.worker.dropped.tolist() == [0, 1, 6, 0]


def test_an_optimizer_begins_anew(make_config):
    adam = "algorithm.optimizer={optimizer: Adam, lr: 0.01}"
    own = ["algorithm.sigma=0.01", "algorithm.momentum=0", "algorithm.weight_decay=0", adam]
    plan = make_plan(make_config(*RUN, *own, DROP), Launch())
    spoil(plan.oracle, lambda t: [1] if t == 1 else [])
    algorithm = build_algorithm(plan, Solo())
    steps = []
    for t in range(3):
        algorithm.step(t)
        state = algorithm.worker.state_dict()
        steps.append((state["optimizer/step"] * state["optimizer/started"]).tolist())
        assert all(bool(rows.isfinite().all()) for rows in state.values())
    assert steps == [[1, 1, 1, 1], [2, 0, 2, 2], [3, 1, 3, 3]]


@pytest.mark.parametrize("how", ["drop", "stop"])
def test_a_run_goes_on_and_names_them_or_stops(make_config, tmp_path, capsys, how):
    own = [f"algorithm.on_nonfinite={how}", f"output.run_dir={tmp_path / 'run'}"]
    plan = make_plan(make_config(*RUN, *own), Launch())
    spoil(plan.oracle, lambda t: [3] if t >= 1 else [])
    trainer = Trainer(plan, Solo())
    if how == "stop":
        with pytest.raises(GroupError, match=r"iteration 2: .* became non-finite, and u with it"):
            trainer.run()
        return
    row = trainer.run()
    assert math.isfinite(row["objective"])
    assert row["influence"][3] == 0.0 < min(row["influence"][:3])
    lines = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    told = "non-finite, left out of u and begun again at u: worker 3"
    assert [line.strip() for line in lines] == [
        f"iteration {t}: {told} ({t - 1} so far)" for t in (2, 3, 5)
    ]


def test_a_run_whose_workers_all_diverge_stops(make_config, tmp_path):
    plan = make_plan(make_config(*RUN, DROP, f"output.run_dir={tmp_path / 'run'}"), Launch())
    spoil(plan.oracle, lambda t: range(4) if t >= 2 else [0])
    with pytest.raises(GroupError, match="iterations 3 to 3: each of the 4 workers was non-finite"):
        Trainer(plan, Solo(), quiet=True).run()


def normalized(num_classes: int = 10) -> torch.nn.Module:
    nn = torch.nn
    return nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(784, num_classes))


def test_refusals(make_config, monkeypatch):
    monkeypatch.setitem(MODELS._factories, "normalized", normalized)
    for name in ("msgd", "ddp"):
        with pytest.raises(ConfigError) as caught:
            make_config("model=logistic", f"algorithm={name}", DROP)
        allowed = f"allowed: stop for algorithm={name}"
        assert str(caught.value) == f"`algorithm.on_nonfinite` is drop; {allowed}"
    with pytest.raises(
        ConfigError, match=r"`algorithm.on_nonfinite` is ignore; allowed: drop, stop"
    ):
        make_config("model=logistic", "algorithm.on_nonfinite=ignore")
    config = make_config("workers=2", DROP)
    config.model.name = "normalized"
    with pytest.raises(ConfigError, match=r"allowed: stop with model=.*whose running statistics"):
        make_plan(config, Launch())
    assert not can_be_member(make_config(DROP))
