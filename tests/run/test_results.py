"""The files of a finished run."""

import json
import math
import platform

import pytest
import torch
from torch import nn

from consensus.comm import Launch
from consensus.run import results as results_module
from consensus.run.plan import make_plan
from consensus.run.results import draw_pictures, environment, finish_run

ROW = {"iteration": 3, "epoch": 0.1, "objective": 4.0, "train_loss": math.inf, "train_error": 50.0}
ROW |= {"test_loss": 1.0, "test_error": 25.0}


@pytest.fixture
def plan(make_config):
    return make_plan(make_config("workers=2", "model=logistic", "device=cpu", "seed=4"), Launch())


def test_the_model_and_the_summary(plan, tmp_path):
    u = torch.arange(7850.0)
    best = {"iteration": 2, "test_error": 20.0}
    finish_run(tmp_path, [{"iteration": 2}, ROW], best, u, plan, {"checkpoints": {"written": 1}})
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    for parameter, saved in zip(model.parameters(), state.values(), strict=True):
        parameter.data.copy_(saved)
    assert torch.equal(torch.cat([p.detach().flatten() for p in model.parameters()]), u)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == {
        **ROW,
        "train_loss": None,  # JSON has no infinity
        "best": best,
        "selection": {"column": "test_error", "goal": "min"},
        "goals": {"error": "min"},
        "model": {"name": "logistic", "options": {"num_classes": 10}},
        "environment": environment(plan),
        "checkpoints": {"written": 1},
    }


def test_the_environment(plan):
    found = environment(plan)
    assert (found["torch"], found["python"]) == (torch.__version__, platform.python_version())
    assert (found["workers"], found["processes"], found["backend"]) == (2, 1, "none")
    assert (found["seed"], found["device"]) == (4, "cpu")


def test_the_pictures(tmp_path):
    draw_pictures(tmp_path, [ROW | {"train_loss": 2.0}], pytest.fail)
    assert {path.name for path in tmp_path.iterdir()} == {"convergence.png", "convergence.pdf"}
    assert (tmp_path / "convergence.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_fails_costs_one_line(monkeypatch, tmp_path):
    def fail(runs, path, **others):
        raise MemoryError("no room\nfor pixels")

    monkeypatch.setattr(results_module, "draw_run", fail)
    monkeypatch.setattr(results_module, "draw_stationarity", fail)
    lines = []
    draw_pictures(tmp_path, [ROW | {"stationarity": {"lam": 0.1}}], lines.append)
    assert lines == [
        f"{tmp_path / name}.png was not drawn (MemoryError: no room for pixels)"
        for name in ("convergence", "stationarity")
    ]
