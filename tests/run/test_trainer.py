"""The training loop: stop requests and optional checkpoints."""

import json
import os
import signal

import pytest

from consensus.run.health import HealthCheck
from consensus.run.signals import TRY_AGAIN, RunStopped
from tests.testing.small_runs import rows_of, same_rows


def test_without_checkpoints_none_are_written(train, tmp_path):
    train(f"output.run_dir={tmp_path}/a", "output.checkpoint_every=null")
    assert not (tmp_path / "a" / "checkpoints").exists()
    assert "checkpoints" not in json.loads((tmp_path / "a" / "summary.json").read_text())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_with_a_checkpoint_and_the_rest_is_the_same(
    train, tmp_path, monkeypatch, number
):
    train(f"output.run_dir={tmp_path}/whole")
    from consensus.algorithm import Consensus  # its step is replaced here

    step = Consensus.step

    def interrupted(self, t):
        if t == 7:
            os.kill(os.getpid(), number)
        step(self, t)

    monkeypatch.setattr(Consensus, "step", interrupted)
    monkeypatch.setattr(HealthCheck, "CHECK_EVERY_S", 0.0)  # after every iteration
    where = f"output.run_dir={tmp_path}/a"
    with pytest.raises(RunStopped) as caught:
        train(where)
    assert str(caught.value) == (
        f"{number.name}: stopped at iteration 8 with a checkpoint; to continue: python -m "
        f"consensus.train resume=auto {where}"
    )
    assert caught.value.code == TRY_AGAIN == os.EX_TEMPFAIL
    assert signal.getsignal(number) == signal.SIG_DFL
    names = {path.name for path in (tmp_path / "a" / "checkpoints").iterdir()}
    assert names == {"00000006", "00000008"}
    assert not (tmp_path / "a" / "summary.json").exists()
    monkeypatch.setattr(Consensus, "step", step)
    train(where, "resume=auto")
    assert same_rows(tmp_path / "a", tmp_path / "whole")


def test_a_signal_without_checkpoints(train, tmp_path, monkeypatch):
    monkeypatch.setattr(HealthCheck, "check", lambda *args: signal.SIGTERM)
    with pytest.raises(RunStopped, match="SIGTERM: stopped at iteration 1 without a che") as caught:
        train(f"output.run_dir={tmp_path}/a", "output.checkpoint_every=null")
    assert caught.value.code == 128 + signal.SIGTERM


def test_a_run_that_stops_at_an_iteration_continues_to_the_same_bits(train, tmp_path):
    """Also with a schedule, which depends on the iterations of the whole run; 5 has no event."""
    own = ["algorithm.schedule.sigma.name=linear"]
    train(f"output.run_dir={tmp_path}/whole", *own)
    where = f"output.run_dir={tmp_path}/a"
    for stop, ends in ((5, 5), (3, 5)):  # the second: it is beyond already
        with pytest.raises(RunStopped) as caught:
            train(where, *own, f"output.stop_at={stop}", "resume=auto")
        assert caught.value.code == 0
        stopped = f"output.stop_at: stopped at iteration {ends} with a checkpoint; to continue: "
        assert str(caught.value) == f"{stopped}python -m consensus.train resume=auto {where}"
        rows = rows_of(tmp_path / "a")
        assert rows[-1]["iteration"] == ends
        assert (tmp_path / "a" / "checkpoints" / "00000005").is_dir()
        assert not (tmp_path / "a" / "summary.json").exists()
    train(where, *own, "resume=auto")
    found, expected = (
        {r["iteration"]: r["digest"] for r in rows_of(tmp_path / n)} for n in ("a", "whole")
    )
    del found[5]
    assert found == expected
    assert len(set(expected.values())) == len(expected) > 1


def test_a_run_whose_row_at_the_stop_was_lost_writes_it_again(train, tmp_path):
    own = [f"output.run_dir={tmp_path}", "output.stop_at=5", "resume=auto"]
    with pytest.raises(RunStopped):
        train(*own)
    metrics = tmp_path / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(lines[:-1]))
    with pytest.raises(RunStopped):
        train(*own)
    assert rows_of(tmp_path)[-1]["digest"] == json.loads(lines[-1])["digest"]


def test_a_run_without_figures_draws_none(train, tmp_path, monkeypatch):
    monkeypatch.setattr("consensus.run.trainer.draw_pictures", lambda *_: pytest.fail("drawn"))
    train(f"output.run_dir={tmp_path}/a", "output.figures=false")
    assert (tmp_path / "a" / "summary.json").exists()
    assert list((tmp_path / "a").glob("*.p[nd][gf]")) == []


def test_a_run_whose_picture_fails_is_complete(train, tmp_path, monkeypatch, capsys):
    def fail(rows, path, **others):
        assert (tmp_path / "a" / "summary.json").exists(), "the summary comes first"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("consensus.run.results.draw_run", fail)
    train(f"output.run_dir={tmp_path}/a")
    assert {path.name for path in (tmp_path / "a").glob("*.*")} >= {"model.pt", "summary.json"}
    said = capsys.readouterr().out
    assert "convergence.png was not drawn (OSError: [Errno 28] No space left on device)" in said
    assert f"results in {tmp_path}/a" in said
