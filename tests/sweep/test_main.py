"""The sweep command: exit codes, messages and the runs that it starts, with stand-ins for them."""

import csv
import os
import re
import signal
import sys
import threading
import time

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from consensus.sweep import __main__ as entry
from consensus.sweep import job
from consensus.sweep.job import Status
from tests.testing import ROOT
from tests.testing.plugins import forget, plugin_in
from tests.testing.sweeps import call_sweep, started


def test_runs_are_started_once_and_reported(sweep, tmp_path, monkeypatch, figures):
    monkeypatch.setattr(Figure, "savefig", figures)
    code, out, err = sweep("seed=1,2", "potential=tan", "sweep.dir=many")
    assert (code, err) == (0, "")
    assert "2 runs in many\n" in out
    assert "done  seed=1" in out
    assert "test error 2.00 %" in out
    assert "\n2 done\n" in out
    assert out.splitlines()[-1] == "figure in many/report.png"
    assert (tmp_path / "many" / "report.png").read_bytes().startswith(b"\x89PNG")
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


def test_methods_are_compared_in_one_report(sweep, tmp_path):
    code, _, err = sweep("algorithm=ddp,local_sgd,easgd,consensus", "seed=1", "sweep.dir=many")
    assert (code, err) == (0, "")
    table = (tmp_path / "many" / "report" / "table1.md").read_text(encoding="utf-8")
    lines = [line.split(" | ")[0] for line in table.splitlines() if " 1.00 " in line]
    assert lines == 3 * ["| quad", "| EASGD", "| local SGD", "| DDP"]


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
    assert err.endswith("; did you mean `tan`?\n")
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


def test_a_launcher_is_refused_before_anything_starts(sweep, monkeypatch):
    monkeypatch.setattr(entry.importlib.util, "find_spec", lambda name: None)
    for arguments, line in [
        (
            ["hydra/launcher=submitit_slurm"],
            "`hydra/launcher` is submitit_slurm; allowed: with the package: "
            "pip install hydra-submitit-launcher",
        ),
        (
            ["hydra/launcher=joblib"],
            "`hydra/launcher` is joblib; allowed: without it sweep.jobs=N runs N at once, and "
            "stops them with a checkpoint",
        ),
        (
            ["hydra.launcher.timeout_min=3"],
            "`hydra.launcher.timeout_min` is 3; allowed: with a launcher of Hydra, such as "
            "submitit_slurm",
        ),
    ]:
        code, out, err = sweep("seed=1,2", *arguments)
        assert (code, out, err) == (2, "", f"consensus.sweep: {line}\n")


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_reaches_all_runs_at_once(sweep, tmp_path, number):
    """Each of two runs gets SIGTERM, and ends as after a checkpoint."""
    slow = [tmp_path / "many" / f"seed={seed}" / "slow" for seed in (14, 15)]

    def ask():
        while not all(path.exists() and path.read_text() for path in slow):
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    asking = threading.Thread(target=ask)
    asking.start()
    code, _, err = sweep("seed=14,15,1", "sweep.dir=many", "sweep.jobs=2")
    asking.join()
    assert (code, err) == (130, "consensus.sweep: stopped; the same command continues it\n")
    statuses = [Status.read(path.parent) for path in slow]
    assert [(status.state, status.code) for status in statuses] == [("stopped", 75)] * 2
    assert not (tmp_path / "many" / "seed=1").exists()
    for path in slow:
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)


def test_a_full_disk_starts_nothing_and_costs_a_line(sweep, tmp_path, monkeypatch):
    write = job.write_whole

    def full(path, content):
        if path.parent.name == "seed=1":
            raise OSError(28, "No space left on device", str(path))
        write(path, content)

    monkeypatch.setattr(job, "write_whole", full)
    code, out, err = sweep("seed=1,2", "sweep.dir=many")
    assert code == 1
    assert err == "consensus.sweep: 1 of 2 runs are not done; see status.json in each\n"
    assert " failed  seed=1  No space left on device: many/seed=1/status.json" in out
    assert not (tmp_path / "many" / "seed=1" / "started").exists()
    assert Status.read(tmp_path / "many" / "seed=2").state == "done"


def test_a_file_in_the_place_of_a_run_costs_that_run(sweep, tmp_path):
    (tmp_path / "many").mkdir()
    (tmp_path / "many" / "seed=1").touch()
    code, out, _ = sweep("seed=1,2", "sweep.dir=many")
    assert code == 1
    assert " failed  seed=1  File exists: many/seed=1" in out
    assert Status.read(tmp_path / "many" / "seed=2").state == "done"


def test_a_command_without_arguments_prints_its_usage(sweep, tmp_path):
    code, out, err = sweep()
    assert (code, out) == (2, "")
    assert "Usage: python -m consensus.sweep [grid=NAME] [KEY=VALUE" in err
    assert sweep("--help")[:2] == (0, err)
    assert not (tmp_path / "runs").exists()


def test_runs_get_the_folders_of_yaml_files(sweep, tmp_path):
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    text = "# @package _global_\nalgorithm:\n  iterations: 7\n"
    (tmp_path / "own" / "experiment" / "mine.yaml").write_text(text)
    code, out, err = sweep("--config-dir=own", "experiment=glob(mi*)", "seed=1", "sweep.dir=many")
    assert (code, err) == (0, "")
    (once,) = started(tmp_path / "many" / "run")
    assert once["argv"][0] == f"--config-dir={tmp_path}/own"
    code, out, err = sweep("--config-dir=none", "experiment=mine", "seed=1")
    assert (code, out) == (2, "")
    assert err.startswith(f"consensus.sweep: `--config-dir` is {tmp_path}/none; allowed: a folder")


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


# ---- plugins


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with the plugin mine.py."""
    with plugin_in(tmp_path, monkeypatch):
        yield tmp_path


def test_a_sweep_over_the_names_of_a_plugin(sweep, folder):
    own = ["plugins=[mine]", "data=stripes", "model=tiny", "model.options.depth=1", "device=cpu"]
    code, out, err = sweep(*own, "potential=quad,quartic", "seed=1", "sweep.dir=many")
    assert (code, err) == (0, "")
    assert "\n2 done\n" in out
    (once,) = started(folder / "many" / "potential=quartic")
    assert {"plugins=[mine]", "potential=quartic"} <= set(once["argv"])
    names = sorted(path.name for path in folder.glob("many/potential=*"))
    assert names == ["potential=quad", "potential=quartic"]
    forget(folder)
    code, _, err = sweep("plugins=[mine]", "potential=quad,quartik", "sweep.dir=few")
    assert code == 2
    assert "`potential` is quartik; allowed: cubic, " in err
    assert ", quartic, " in err


def test_a_grid_names_its_plugin(sweep, folder):
    (folder / "own" / "grid").mkdir(parents=True)
    (folder / "own" / "grid" / "mine.yaml").write_text(
        "parts:\n  - plugins: [[mine]]\n    potential: glob(quart*)\n    seed: [1, 2]\n"
    )
    code, out, err = sweep("grid=mine", "--config-dir=own", "sweep.dir=many")
    assert (code, err) == (0, "")
    assert "\n2 done\n" in out
    (once,) = started(folder / "many" / "seed=2")
    assert "potential=quartic" in once["argv"]


def test_a_population_of_a_plugin(folder):
    own = ["plugins=[mine]", "data=stripes", "model=tiny", "model.options.depth=1", "device=cpu"]
    own += ["potential=quartic", "algorithm.lam=0.1,0.05", "algorithm.iterations=4", "workers=2"]
    own += ["algorithm.batch_size=4", "sweep.engine=population", "sweep.dir=many"]
    code, out, err = call_sweep(*own)
    assert (code, err) == (0, "")
    assert "2 runs of 2 advance together" in out
    assert (folder / "many" / "lam=0.05" / "summary.json").exists()


def test_a_regression_is_trained_and_ranked_by_its_metric(tmp_path, monkeypatch):
    """The report against mean absolute errors of the saved models, computed here by NumPy."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, 5))
    y = x @ np.arange(5.0) + 0.1 * rng.standard_normal(60)
    np.savetxt("table.csv", np.column_stack([x, y]), delimiter=",", header="a,b,c,d,e,y")
    own = [f"plugins=[{ROOT}/examples/own_regression.py]", "data=table", "data.root=table.csv"]
    own += ["model=regression", "loss=huber", "workers=2", "algorithm.batch_size=4", "device=cpu"]
    own += ["dtype=float64", "algorithm.iterations=20", "sweep.engine=population"]
    own += ["sweep.dir=many", "algorithm.lam=0.1,0.2", "algorithm.sigma=0.0001,0.005"]
    code, out, err = call_sweep(*own)
    assert (code, err) == (0, "")

    def mae(run_dir):  # of the first fifth of the table, which the example tests on
        state = torch.load(run_dir / "model.pt", weights_only=True)
        w1, b1, w2, b2 = (value.double().numpy() for value in state.values())
        outputs = np.maximum(x[:12] @ w1.T + b1, 0.0) @ w2.T + b2
        return np.abs(outputs[:, 0] - y[:12]).mean()

    by_hand = {path.parent.name: mae(path.parent) for path in tmp_path.glob("many/*/model.pt")}
    assert len(by_hand) == 4
    best = min(by_hand, key=by_hand.get)
    (found,) = csv.DictReader((tmp_path / "many/report/table1.csv").read_text().splitlines())
    assert f"lam={found['algorithm.lam']},sigma={found['algorithm.sigma']}" == best
    for column in ("test_mae_at_best", "lowest_test_mae"):
        assert float(found[column]) == pytest.approx(by_hand[best], rel=1e-6)
    for name, value in by_hand.items():
        assert re.search(rf"   done  {re.escape(name)}  \d+ s  test mae {value:.5g}\n", out)
    assert "the best in test mae" in out
    page = (tmp_path / "many/report/report.md").read_text(encoding="utf-8")
    assert "with the lowest test mae (on ties, the lowest test loss), and its" in page
    assert not re.search(r"nan|test_error|test error", page + out)
