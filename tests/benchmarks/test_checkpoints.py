"""The overhead of checkpoints, by arithmetic."""

import subprocess

import pytest

from benchmarks import checkpoints

CASE = checkpoints.CASES["lenet5"]


def summary(seconds, wait_s=0.0, write_s=0.0):
    """The summary of a run of 5,500 iterations of two workers in so many seconds."""
    return {
        "iteration": 5500,
        "samples_per_s": 5500 * 20 * 2 / seconds,
        "environment": {"workers": 2},
        "checkpoints": {"written": 11, "wait_s": 11 * wait_s, "write_s": 11 * write_s},
    }


def test_the_shares_by_hand():
    # 10 checkpoints during training; an iteration takes 4 ms, 500 of them 2 s.
    pairs = [(summary(22.0 + x, 0.01, 0.3), summary(22.0)) for x in (0.2, 5.0, 0.1)]
    row = checkpoints.row_of("lenet5", CASE.every, pairs)
    assert checkpoints.training_s(summary(22.0)) == pytest.approx(22.0)
    assert row.iteration_s == pytest.approx(0.004)
    assert row.slower == pytest.approx(100 * 0.02 / 2.0)
    assert row.wait == pytest.approx(0.5)
    assert row.write_s == pytest.approx(0.3)


def test_a_run_with_and_one_without_alternate(monkeypatch, capsys):
    seen = []

    def train(case, every, processes, folder):
        seen.append((case.overrides[0], every, processes))
        return summary(22.0)

    monkeypatch.setattr(checkpoints, "train", train)
    checkpoints.main(["--repetitions", "2", "--processes", "4", "--models", "lenet5"])
    assert seen == [("model=lenet5", every, 4) for every in (500, None)] * 2
    assert capsys.readouterr().out.splitlines()[2].split()[:2] == ["lenet5", "0.0040"]


def test_a_run_that_fails_ends_the_command(monkeypatch, tmp_path, capsys):
    def run(command, **options):
        return subprocess.CompletedProcess(command, 1, "out", "why")

    monkeypatch.setattr(checkpoints.subprocess, "run", run)
    with pytest.raises(SystemExit, match="scripts/bench checkpoints: a run in mine has failed"):
        checkpoints.train(CASE, None, 2, tmp_path / "mine")
    assert "why" in capsys.readouterr().err
