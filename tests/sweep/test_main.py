"""The sweep command: exit codes, messages and the runs that it starts, with stand-ins for them."""

import os
import signal
import threading
import time

import pytest

from consensus.sweep import __main__ as entry
from consensus.sweep.job import Status
from tests.testing.sweeps import started


def test_runs_are_started_once_and_reported(sweep, tmp_path):
    code, out, err = sweep("seed=1,2", "potential=tan", "sweep.dir=many")
    assert (code, err) == (0, "")
    assert "2 runs in many\n" in out
    assert "done  seed=1" in out
    assert "test error 2.00 %" in out
    assert "\n2 done\n" in out
    assert out.splitlines()[-1] == "figure in many/report.png"
    assert (tmp_path / "many" / "report.png").exists()
    for seed in (1, 2):
        (once,) = started(tmp_path / "many" / f"seed={seed}")
        assert once["argv"] == [
            f"seed={seed}",
            "potential=tan",
            f"output.run_dir='many/seed={seed}'",
            "resume=auto",
        ]
        assert Status.read(tmp_path / "many" / f"seed={seed}").state == "done"
    code, out, _ = sweep("seed=1,2,3", "potential=tan", "sweep.dir=many")
    assert code == 0
    assert "3 runs in many, 2 of them done before\n" in out
    assert [len(started(tmp_path / "many" / f"seed={seed}")) for seed in (1, 2, 3)] == [1, 1, 1]


def test_a_failed_run_is_reported_and_started_again(sweep, tmp_path):
    for times in (1, 2):
        code, out, err = sweep("seed=1,13,2", "sweep.dir=many")
        assert code == 1
        assert err == "consensus.sweep: 1 of 3 runs are not done; see status.json in each\n"
        (line,) = [line for line in out.splitlines() if "failed  seed=13" in line]
        assert line.endswith("exit code 2: `seed` is 13; allowed: luck")
        assert "\n2 done, 1 failed\n" in out
        assert len(started(tmp_path / "many" / "seed=13")) == times
    assert (tmp_path / "many" / "seed=13" / "output.txt").read_text().endswith("more\n")


def test_a_refused_sweep_prints_one_line_and_starts_nothing(sweep, tmp_path):
    code, out, err = sweep("potential=tan,tann", "sweep.dir=many")
    assert (code, out) == (2, "")
    assert err.startswith("consensus.sweep: `potential` is tann; allowed: cubic, ")
    assert err.count("\n") == 1
    assert not (tmp_path / "many").exists()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ("workers=3000",),
            "`workers` is 3000; allowed: at most 2481, whose z, v and gradients fit the memory",
        ),
        (  # a phi-prox takes 36 vectors
            ("workers=3000", "stationarity.every=9"),
            "`workers` is 3000; allowed: at most 2469, whose z, v and gradients fit the memory",
        ),
        (
            ("stationarity.every=9", "model=mlp", "model.options.hidden=[10000]"),
            "`stationarity.every` is 9; allowed: null for this model: a phi-prox needs "
            "2,289,602,880 bytes of memory, there are 2,000,000,000",
        ),
        (
            ("workers=1000", "sweep.jobs=4"),
            "`sweep.jobs` is 4; allowed: at most 2 of 1000 workers each, whose z, v and gradients",
        ),
        (
            ("workers=null", "sweep.processes=2500"),
            "`workers` is 2500; allowed: at most 0, whose",  # all on one device
        ),
        (("sweep.gradients=vmap",), "`sweep.gradients` is vmap; allowed: auto, grouped, measure, "),
        (
            ("sweep.gradients=grouped",),
            "`sweep.gradients` is grouped; allowed: auto with sweep.engine=separate",
        ),
    ],
)
def test_too_little_memory_is_refused(sweep, monkeypatch, tmp_path, arguments, line):
    """In float64, LeNet-5: 3 vectors of 33,580 coordinates, 806 kB for a worker. mlp: 7,950,010."""
    monkeypatch.setattr("consensus.run.plan.memory_of", lambda device: 2 * 10**9)
    own = ("seed=1,2", "dtype=float64", "device=cpu", "sweep.dir=many")
    code, out, err = sweep(*own, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"consensus.sweep: {line}")
    assert err.count("\n") == 1
    assert not (tmp_path / "many").exists()


def test_a_missing_launcher_is_refused(sweep, monkeypatch):
    monkeypatch.setattr(entry.importlib.util, "find_spec", lambda name: None)
    code, _, err = sweep("seed=1,2", "sweep.jobs=2")
    assert code == 2
    assert err == (
        "consensus.sweep: `sweep.jobs` is 2; allowed: 1, or with the package "
        "hydra-joblib-launcher: pip install hydra-joblib-launcher\n"
    )


def test_a_sweep_with_jobs_in_the_queue_is_refused(sweep, queue, tmp_path):
    code, out, err = sweep("seed=1", "sweep.dir=many")
    assert (code, out) == (2, "")
    assert err == (
        "consensus.sweep: the jobs 8, 9 of many are still in the queue: wait for them, or "
        "`scancel 8 9`; then the same command continues\n"
    )
    assert not (tmp_path / "many" / "run").exists()
    queue.write_text("7\n")
    assert sweep("seed=1", "sweep.dir=many")[0] == 0


def test_a_stopped_sweep_cancels_its_jobs(sweep, queue, monkeypatch):
    queue.write_text("7\n")

    def submitted_and_stopped(*_):
        queue.write_text("7\n9\n")
        raise KeyboardInterrupt

    monkeypatch.setattr(entry, "launch", submitted_and_stopped)
    code, _, err = sweep("seed=1", "sweep.dir=many")
    assert code == 130
    assert err == "consensus.sweep: stopped, the jobs 9 cancelled; the same command continues it\n"
    assert queue.read_text() == "7\n"


@pytest.mark.parametrize("where", ["read_sweep", "require_no_jobs"])
def test_a_sweep_stopped_before_its_start_cancels_nothing(sweep, queue, monkeypatch, where):
    """The jobs in the queue belong to an earlier call."""

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(entry, where, stopped)
    before = queue.read_text()
    code, _, err = sweep("seed=1", "sweep.dir=many")
    assert code == 130
    assert err == "consensus.sweep: stopped; the same command continues it\n"
    assert queue.read_text() == before


def test_a_run_stopped_by_the_cluster_has_not_failed(sweep, tmp_path):
    """A cluster signals all processes of a job, including the run."""
    run_dir = tmp_path / "many" / "seed=14"

    def ask():
        while not ((run_dir / "slow").exists() and (run_dir / "slow").read_text()):
            time.sleep(0.02)
        os.kill(int((run_dir / "slow").read_text()), signal.SIGTERM)

    asking = threading.Thread(target=ask)
    asking.start()
    code, out, _ = sweep("seed=14,1", "sweep.dir=many")
    asking.join()
    assert code == 1
    status = Status.read(run_dir)
    assert (status.state, status.code) == ("stopped", 75)
    assert "failed" not in out


def test_momentum_sgd_is_a_separate_run(sweep, tmp_path):
    code, _, _ = sweep("algorithm=msgd", "seed=1", "sweep.dir=many", "sweep.engine=population")
    assert code == 0
    assert len(started(tmp_path / "many" / "run")) == 1


@pytest.mark.parametrize(
    ("overrides", "can"),
    [
        ([], True),
        (["algorithm=easgd"], True),
        (["algorithm=msgd"], False),
        (["algorithm.coupling=implicit"], False),
        (["algorithm.u_update=exact"], False),
    ],
)
def test_configs_that_a_population_can_train(make_config, overrides, can):
    assert entry.can_be_member(make_config(*overrides)) == can
