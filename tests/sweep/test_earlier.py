"""Repeated sweeps: what counts as done, what continues, what is refused; no training."""

import json
import os
import sys
from unittest import mock

import pytest

from consensus.sweep.job import Status
from consensus.train import main as train
from tests.testing.sweeps import call_sweep, started

BASE = ["experiment=smoke", "workers=2", "model=logistic", "seed=1,2", "sweep.dir=many"]


def listed(out):
    """State -> names of the runs in the output of --dry-run."""
    found = {}
    for line in out.splitlines()[1:]:
        state, name, *_ = line.split()
        found.setdefault(state, []).append(name)
    return found


@pytest.fixture
def done(sweep):
    """`BASE`, done once by stand-ins: 20 iterations of two workers."""
    assert sweep(*BASE)[0] == 0
    return sweep


# ---- what is done


def test_the_same_command_has_nothing_to_do_wherever_files_lie(done, tmp_path):
    free = ["data.root=elsewhere", "group.timeout_s=9", "device=cpu", "output.tensorboard=false"]
    for more in ([], free, ["output.keep_checkpoints=9", "cuda_graph=false", "workers=2,2"]):
        code, out, err = done(*BASE, *more)
        assert (code, err) == (0, "")
        assert "2 runs in many, 2 of them done before\n" in out
    assert [len(started(tmp_path / "many" / f"seed={seed}")) for seed in (1, 2)] == [1, 1]


def test_another_setting_is_refused_before_anything_starts(done, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "many").rglob("*")}
    for override, key, new, old in [
        ("potential=tan", "potential.name", "tan", "quad"),
        ("potential.eta=0.01", "potential.eta", "0.01", "1.0"),
        ("algorithm.batch_size=100", "algorithm.batch_size", "100", "20"),
        ("algorithm.iterations=10", "algorithm.iterations", "10", "20"),
        ("algorithm.iterations=40", "algorithm.iterations", "40", "20"),  # without checkpoints
        ("dtype=float64", "dtype", "float64", "float32"),
        ("output.eval_every=3", "output.eval_every", "3", "10"),
        ("stationarity.every=10", "stationarity.every", "10", "None"),
        ("+data.options.x=1", "data.options.x", "1", "no such option"),
        ("seed=1,2,3 algorithm.sigma=0.001", "algorithm.sigma", "0.001", "0.005"),
    ]:
        for engine in ("separate", "population"):
            code, out, err = done(*BASE, *override.split(), f"sweep.engine={engine}")
            assert (code, out) == (2, "")
            where = "as in many/seed=1, which is finished; or another sweep.dir"
            assert err == f"consensus.sweep: `{key}` is {new}; allowed: {old}, {where}\n"
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "many").rglob("*")}
    assert after == before


def test_workers_are_compared_by_their_number(done, tmp_path):
    """`workers=null` is as many as processes."""
    for seed in (1, 2):
        path = tmp_path / "many" / f"seed={seed}" / "summary.json"
        summary = json.loads(path.read_text()) | {"environment": {"workers": 2}}
        path.write_text(json.dumps(summary))
    assert done(*BASE, "workers=null", "sweep.processes=2")[0] == 0
    code, _, err = done(*BASE, "workers=null")
    assert code == 2
    assert err.startswith("consensus.sweep: `workers` is 1; allowed: 2, as in many/seed=1, which")


def test_an_unfinished_run_with_another_setting_is_refused(done, tmp_path):
    (tmp_path / "many" / "seed=2" / "summary.json").unlink()
    code, out, err = done(*BASE, "potential=tan")
    assert (code, out) == (2, "")
    (tmp_path / "many" / "seed=1" / "summary.json").unlink()
    code, out, err = done(*BASE, "potential=tan")
    assert (code, out) == (2, "")
    assert err.startswith("consensus.sweep: `potential.name` is tan; allowed: quad, as in ")
    assert err.endswith("(a run is continued as it began); or another sweep.dir\n")


def test_a_narrowed_grid_reports_only_what_it_means(done, tmp_path):
    code, out, err = done(*BASE, "seed=1,2,3")
    assert (code, err) == (0, "")
    code, out, _ = done(*BASE, "seed=1,3")
    assert code == 0
    assert "2 runs in many, 2 of them done before" in out
    runs = (tmp_path / "many" / "report" / "runs.csv").read_text()
    assert [line.split(",")[0] for line in runs.splitlines()[1:]] == ["seed=1", "seed=3"]


# ---- more iterations


def test_more_iterations_continue_a_finished_run(sweep, tmp_path):
    """With either engine, and as a run of its own, since its checkpoints are."""
    own = [text for text in BASE if "seed" not in text and "sweep" not in text]
    argv = [*own, "seed=1", "output.run_dir='many/seed=1'", "output.tensorboard=false"]
    with mock.patch.object(sys, "argv", ["consensus.train", *argv]):
        train()
    assert sweep(*BASE, "--dry-run")[1].count("     done  seed=1\n") == 1
    more = ["algorithm.iterations=40", "output.eval_every=3"]  # free, as in a single run
    code, out, _ = sweep(*BASE, *more, "--dry-run", "sweep.engine=population")
    assert code == 0
    assert "continues  seed=1  at iteration 20 of 40 or before" in out
    code, out, err = sweep(*BASE, "algorithm.lam=0.2", *more)
    assert (code, out) == (2, "")
    assert err.startswith("consensus.sweep: `algorithm.lam` is 0.2; allowed: 0.1, as in ")
    code, out, err = sweep(*BASE, *more)
    assert (code, err) == (0, "")
    assert "2 runs in many\n" in out, "none of them done before"
    (once,) = started(tmp_path / "many" / "seed=1")
    assert set(more) | {"resume=auto"} <= set(once["argv"])
    assert json.loads((tmp_path / "many/seed=1/summary.json").read_text())["iteration"] == 40
    assert "2 of them done before" in sweep(*BASE, *more)[1]


def test_dry_run_lists_the_runs_and_starts_nothing(done, tmp_path):
    many = tmp_path / "many"
    (many / "seed=2" / "summary.json").unlink()
    code, out, err = done(*BASE, "seed=1,2,3", "--dry-run")
    assert (code, err) == (0, "")
    assert out.startswith("3 runs in many, 1 of them done before\n")
    assert listed(out) == {"done": ["seed=1"], "continues": ["seed=2"], "new": ["seed=3"]}
    assert "  seed=2  at iteration 20 of 20 or before" in out
    assert not (many / "seed=3").exists()
    assert len(started(many / "seed=2")) == 1
    assert call_sweep(*BASE, "potential=tan", "--dry-run")[0] == 2


# ---- what ended badly


@pytest.mark.parametrize("content", ["a: [", ""])
def test_a_damaged_run_costs_itself_and_a_line(done, tmp_path, content):
    (tmp_path / "many" / "seed=1" / "config.yaml").write_text(content)
    code, out, err = done(*BASE, "seed=1,2,3")
    assert code == 1
    assert err == "consensus.sweep: 1 of 3 runs are not done; see status.json in each\n"
    (line,) = [line for line in out.splitlines() if line.startswith(" failed")]
    assert line.startswith(" failed  seed=1  many/seed=1/config.yaml cannot be read (")
    assert line.endswith("); remove many/seed=1 to run it again")
    page = (tmp_path / "many" / "report" / "report.md").read_text()
    assert f"\n- {line.removeprefix(' failed  seed=1  ')}\n" in page
    assert Status.read(tmp_path / "many" / "seed=3").state == "done"
    assert len(started(tmp_path / "many" / "seed=1")) == 1


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("summary.json", '{"iterat', "many/seed=1/summary.json cannot be read"),
        ("summary.json", "[1, 2]", "many/seed=1/summary.json cannot be read"),
        ("metrics.jsonl", '{"iterat', "many/seed=1/metrics.jsonl"),
        ("metrics.jsonl", "", "many/seed=1/metrics.jsonl holds no evaluation yet"),
        ("metrics.jsonl", None, "many/seed=1 holds no readable metrics.jsonl (No such file or"),
    ],
)
@pytest.mark.parametrize("engine", ["separate", "population"])
def test_a_finished_run_without_its_numbers_is_damaged(done, tmp_path, file, content, told, engine):
    """It would leave the statistics of its configuration, and nothing would say so."""
    path = tmp_path / "many" / "seed=1" / file
    path.unlink() if content is None else path.write_text(content)
    code, out, err = done(*BASE, f"sweep.engine={engine}")
    assert (code, err) == (
        1,
        "consensus.sweep: 1 of 2 runs are not done; see status.json in each\n",
    )
    (line,) = [line for line in out.splitlines() if line.startswith(" failed")]
    assert line.startswith(f" failed  seed=1  {told}")
    assert line.endswith("; remove many/seed=1 to run it again")
    assert len(started(tmp_path / "many" / "seed=1")) == 1


def test_ctrl_c_while_the_report_is_written_is_one_line(done, monkeypatch):
    """As SIGTERM, which interrupts the sweep likewise; many figures take minutes."""

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("consensus.sweep.__main__.report", interrupted)
    code, _, err = done(*BASE)
    line = "consensus.sweep: stopped in the report; the same command writes it\n"
    assert (code, err) == (130, line)


def test_a_run_left_running_by_a_killed_sweep_is_interrupted(done, tmp_path):
    """Also where its number belongs to another process by now, as that of this test."""
    run_dir = tmp_path / "many" / "seed=1"
    (run_dir / "summary.json").unlink()
    another = Status.running()
    Status("running", os.getpid(), another.host, began=another.began - 1).write(run_dir)
    assert Status.read(run_dir).state == "stopped"
    code, _, err = done(*BASE)
    assert (code, err) == (0, "")
    assert len(started(run_dir)) == 2


def test_a_finished_run_is_done_whatever_its_status_says(done, tmp_path):
    run_dir = tmp_path / "many" / "seed=1"
    for status in (Status.running(), Status("running", 7, "another machine")):
        status.write(run_dir)
        code, out, err = done(*BASE)
        assert (code, err) == (0, "")
        assert "2 of them done before" in out
    assert len(started(run_dir)) == 1
