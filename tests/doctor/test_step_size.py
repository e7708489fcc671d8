"""The step-size search against torch.optim.SGD and against runs of the trainer."""

import math
import sys

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch.nn.functional import cross_entropy

from consensus.comm import Launch, Solo
from consensus.doctor import __main__ as doctor
from consensus.doctor import step_size
from consensus.run.build import build_algorithm
from consensus.run.compose import config_dir, register_schema
from consensus.run.plan import make_plan
from consensus.run.trainer import Trainer

LOGISTIC = ["model=logistic", "device=cpu", "workers=2", "algorithm.batch_size=8"]


@pytest.fixture
def composed():
    """`composed("workers=2", ...)`: the composed config of a command line."""
    register_schema()

    def make(*overrides):
        with initialize_config_dir(config_dir(), version_base="1.3"):
            return compose("train", overrides=list(overrides))

    return make


@pytest.mark.parametrize(("reduction", "lr"), [("sum", 0.003 * 8), ("mean", 0.003)])
def test_sigma_is_the_lr_of_torch(make_config, reduction, lr):
    """Momentum SGD with sigma against torch's Nesterov SGD, which keeps z + kappa v."""
    own = ["algorithm=msgd", "algorithm.weight_decay=0", "algorithm.sigma=0.003", "dtype=float64"]
    config = make_config(*LOGISTIC, *own, f"algorithm.loss_reduction={reduction}")
    assert step_size.rate_of(config) == pytest.approx(lr, rel=1e-15)
    plan, twin = make_plan(config, Launch()), make_plan(config, Launch())
    algorithm = build_algorithm(plan, Solo())
    optimizer = torch.optim.SGD(twin.model.parameters(), lr=lr, momentum=0.9, nesterov=True)
    for t in range(5):
        algorithm.step(t)
        images, labels = twin.oracle.draw()
        optimizer.zero_grad()
        cross_entropy(twin.model(images[0]), labels[0]).backward()
        optimizer.step()
    found = algorithm.worker.z[0] + 0.9 * algorithm.worker.v[0]
    expected = torch.nn.utils.parameters_to_vector(twin.model.parameters()).detach()
    assert (expected - plan.start).norm() > 0.1
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-12)


def test_meaning(make_config):
    said = "sigma = 0.005 on a loss summed over 20 samples is lr = 0.1 of torch.optim.SGD, with "
    assert step_size.meaning(make_config()) == f"{said}momentum 0.9"
    assert "on a mean loss is lr = 0.005 of" in step_size.meaning(
        make_config("algorithm.loss_reduction=mean")
    )


@pytest.mark.parametrize(
    ("losses", "chosen"),
    [
        ({1: 2.0, 2: 0.5, 3: 0.49, 4: 0.6}, 2),  # 98 % of 1.81 are 1.7738; 2.3 - 0.5 is 1.8
        ({1: 2.0, 2: 0.6, 3: 0.49, 4: math.inf}, 3),
        ({1: 2.4, 2: 2.3, 3: math.inf}, None),
        ({1: math.inf, 2: math.inf}, None),
    ],
)
def test_the_smallest_of_the_good_steps(losses, chosen):
    assert step_size.choose(2.3, losses) == chosen


def test_the_search_runs_the_trainers_algorithm(composed, make_config, monkeypatch, capsys):
    """Its losses are those of whole runs; sigma = 100 / 8 is far above the limit of stability."""
    monkeypatch.setattr(step_size, "RATES", (0.01, 0.03, 100.0, 300.0, 1000.0))
    monkeypatch.setattr(step_size, "SAMPLES", 10**6)
    monkeypatch.setattr(step_size, "BUDGET_S", 0.0)
    # The schedule and the number of iterations have no effect.
    overrides = [
        *LOGISTIC,
        "dtype=float64",
        "algorithm.schedule.sigma.name=cosine",
    ]
    assert step_size.search(composed(*overrides)) == 0
    first, now, *table, proposal = capsys.readouterr().out.splitlines()
    assert first == "consensus.doctor: step sizes for logistic on digits, 2 workers"
    assert now.startswith("now sigma = 0.005 on a loss summed over 8 samples is lr = 0.04 of torch")
    heading, *lines = (line.split() for line in table)
    assert heading[-2:] == [f"{step_size.FEWEST}", "iterations"]
    expected = []
    for sigma, rate in (("0.00125", "0.01"), ("0.00375", "0.03")):
        own = [f"algorithm.sigma={sigma}", f"algorithm.iterations={step_size.FEWEST}"]
        config = make_config(*LOGISTIC, "dtype=float64", *own)
        row = Trainer(make_plan(config, Launch()), Solo()).run()
        expected.append([sigma, rate, f"{row['train_loss'] / 1437:.4g}"])
    # After two that diverge, larger ones are not tried.
    assert lines == [*expected, ["12.5", "100", "diverged"], ["37.5", "300", "diverged"]]
    assert proposal.startswith("proposal: algorithm.sigma=0.00375 (the smallest with 98% of the")


def test_no_step_that_trains(composed, monkeypatch, capsys):
    monkeypatch.setattr(step_size, "RATES", (1e4, 1e5))
    monkeypatch.setattr(step_size, "BUDGET_S", 0.0)
    assert step_size.search(composed(*LOGISTIC)) == 1
    assert capsys.readouterr().out.endswith(
        "no step lowers the loss: look at the data, the model and algorithm.lam\n"
    )


def test_tau_is_what_the_config_makes_of_sigma(composed):
    for name, tau in (("easgd", 0.02), ("consensus", 0.005)):
        cfg = step_size._alone(composed(*LOGISTIC, f"algorithm={name}"))
        algorithm = step_size._with_sigma(cfg, 0.02).algorithm
        assert (algorithm.sigma, algorithm.tau) == (0.02, tau)


def test_the_command(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(step_size, "BUDGET_S", 0.0)
    monkeypatch.setattr(step_size, "RATES", (0.01, 0.1))
    codes = []
    monkeypatch.setattr(doctor, "end", codes.append)
    monkeypatch.setattr(doctor.signal, "signal", lambda *_: None)
    for words in (["step_size=true"], ["step_size=true", "model.options.x=[]"], ["step_size=no"]):
        monkeypatch.setattr(sys, "argv", ["doctor", *LOGISTIC, *words])
        try:
            doctor.main()
        except SystemExit as left:
            codes.append(left.code)
    out, err = capsys.readouterr()
    assert codes == [0, 2, 2]
    assert out.count("proposal: algorithm.sigma=") == 1
    lines = err.splitlines()
    assert len(lines) == 2
    assert lines[1] == "consensus.doctor: `step_size` is no; allowed: true, false"
    assert not list(tmp_path.iterdir())


def test_the_search_is_of_one_process():
    assert doctor.read(["workers=4", "step_size=true"], Launch()) == (["workers=4"], True)
    assert doctor.read(["step_size=false"], Launch(0, 2, 0, 2)) == ([], False)
    with pytest.raises(ValueError, match="`step_size` is true; allowed: false on several pro"):
        doctor.read(["step_size=true"], Launch(0, 2, 0, 2))
