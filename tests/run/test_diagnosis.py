"""Diagnosis of made rows, and of runs that do not train."""

import math

import pytest

from consensus.comm import GroupError, Launch
from consensus.run.diagnosis import divergence, no_progress
from consensus.run.plan import make_plan


@pytest.mark.parametrize(
    ("objective", "diverged"),
    [
        (1.0, False),
        (1e6 * 1437 * math.log(10) * 0.99, False),
        (4e9, True),
        (math.inf, True),
        (math.nan, True),
    ],
)
def test_an_objective_far_beyond_guessing_is_divergence(make_config, objective, diverged):
    plan = make_plan(make_config("model=logistic", "device=cpu", "workers=2"), Launch())
    message = divergence({"iteration": 7, "objective": objective}, plan)
    assert (message is not None) == diverged
    assert message is None or message.startswith("iteration 7: the run has diverged: the objecti")


def test_no_progress_after_an_epoch(make_config):
    plan = make_plan(make_config("model=logistic", "device=cpu", "workers=2"), Launch())
    largest = max((plan.dataset.test_labels == c).sum().item() for c in range(10))
    error = 100 * (1 - largest / 360)
    for epoch, test_error, said in (
        (0.9, 95.0, False),
        (1.0, error - 0.1, False),
        (1.0, error + 1e-9, True),
        (3.0, 95.0, True),
    ):
        remark = no_progress({"iteration": 1, "epoch": epoch, "test_error": test_error}, plan)
        assert (remark is not None) == said


def test_a_run_that_diverges_is_not_finished(train, tmp_path, capsys):
    """sigma far above 2 / L: the logistic loss grows, and the weights stay finite."""
    huge = ["algorithm.sigma=1e8", "algorithm.tau=1e8", "algorithm.lam=1e9", "potential=quad"]
    with pytest.raises(GroupError, match=r"iteration \d+: the run has diverged: the objective is"):
        train(f"output.run_dir={tmp_path}/a", *huge)
    assert not (tmp_path / "a" / "summary.json").exists()
    assert (tmp_path / "a" / "metrics.jsonl").read_text()
    assert "diverged" not in capsys.readouterr().out
