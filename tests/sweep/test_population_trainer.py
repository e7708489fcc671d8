"""Grouping of runs, and population training against separate runs: files, numbers, resume."""

import json
import math
import os
import signal
import sys
import threading
import time
from unittest import mock

import pytest
import torch

from consensus.population import Population
from consensus.problem import PopulationRisk
from consensus.sweep.job import Status
from consensus.sweep.members import Member, key_of, populations
from consensus.train import main as train
from tests.testing.small_runs import rows_of
from tests.testing.sweeps import call_sweep

SMOKE = [
    *("grid=smoke", "potential=tan", "dtype=float64", "algorithm.iterations=120", "device=cpu"),
    *("output.eval_every=30", "output.checkpoint_every=30", "output.tensorboard=false"),
]
GRID = [
    *("model=logistic", "workers=2", "dtype=float64", "algorithm.iterations=60", "device=cpu"),
    *("potential=quad,tan", "algorithm.lam=0.1,0.05", "output.eval_every=20"),
    *("output.checkpoint_every=20", "output.tensorboard=false"),
]
FILES = {"config.yaml", "metrics.jsonl", "model.pt", "status.json", "summary.json"}
NUMBERS = (
    "objective",
    "train_loss",
    "test_loss",
    "coupling",
    "regularizer",
    "distance",
    "influence",
)
COUNTS = ("iteration", "epoch", "train_error", "test_error", "cuts_u", "cuts_z")


def call_population(*arguments):
    return call_sweep(*arguments, "sweep.engine=population")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """GRID, trained without a stop: its directory and its output."""
    folder = tmp_path_factory.mktemp("whole")
    code, out, err = call_population(*GRID, f"sweep.dir={folder}")
    assert (code, err) == (0, "")
    return folder, out


@pytest.fixture(scope="module")
def separate(tmp_path_factory):
    """The rows of one configuration of GRID, trained by `consensus.train`."""
    folder = tmp_path_factory.mktemp("separate")
    own = [text for text in GRID if "," not in text]
    own += ["potential=tan", "algorithm.lam=0.05", f"output.run_dir={folder}"]
    with mock.patch.object(sys, "argv", ["consensus.train", *own]):
        train()
    return rows_of(folder)


def require_equal_runs(found, expected):
    """The rows of a population against those of a separate run, to 1e-9."""
    assert [set(row) for row in found] == [set(row) for row in expected]
    for one, other in zip(found, expected, strict=True):
        assert [one[key] for key in COUNTS] == [other[key] for key in COUNTS]
        for key in NUMBERS:
            assert one[key] == pytest.approx(other[key], rel=1e-9), key


@pytest.mark.slow
def test_both_engines_agree_and_a_stopped_sweep_continues(tmp_path, monkeypatch):
    """Separate runs, the first of which is stopped and continued, against a population."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def stop():
        deadline = time.monotonic() + 120
        while not started and time.monotonic() < deadline:
            time.sleep(0.02)
            started.extend(tmp_path.glob("separate/*/metrics.jsonl"))
        os.kill(os.getpid(), signal.SIGTERM)

    started = []
    stopping = threading.Thread(target=stop)
    stopping.start()
    code, _, err = call_sweep(*SMOKE, "sweep.dir=separate")
    stopping.join()
    assert (code, err) == (130, "consensus.sweep: stopped; the same command continues it\n")
    (first,) = (path.parent for path in started)
    begun = rows_of(first)
    assert len(begun) < 4
    assert Status.read(first).state == "stopped"

    code, out, err = call_sweep(*SMOKE, "sweep.dir=separate")
    assert (code, err) == (0, "")
    assert "\n2 done\n" in out
    if begun:  # otherwise there may be no checkpoint
        assert "continues" in (first / "output.txt").read_text()
    code, out, err = call_population(*SMOKE, "sweep.dir=together")
    assert (code, err) == (0, "")
    assert out.count("2 runs of 2 advance together") == 1
    names = sorted(path.name for path in (tmp_path / "separate").glob("*lam=*"))
    assert len(names) == 2
    for name in names:
        apart = rows_of(tmp_path / "separate" / name)
        assert [row["iteration"] for row in apart] == [30, 60, 90, 120]
        require_equal_runs(rows_of(tmp_path / "together" / name), apart)
    losses = {rows_of(tmp_path / "together" / name)[-1]["train_loss"] for name in names}
    assert len(losses) == 2


def test_a_population_leaves_the_files_of_separate_runs(whole):
    folder, out = whole
    assert "\n4 done\n" in out
    assert out.count("2 runs of 2 advance together") == 2  # one population for each potential
    for potential, lam in (("quad", "0.1"), ("quad", "0.05"), ("tan", "0.1"), ("tan", "0.05")):
        run_dir = folder / f"potential={potential},lam={lam}"
        assert {path.name for path in run_dir.iterdir() if path.name[0] != "."} == FILES
        state = torch.load(run_dir / "model.pt", weights_only=True)
        assert sum(value.numel() for value in state.values()) == 7850
        environment = json.loads((run_dir / "summary.json").read_text())["environment"]
        assert (environment["workers"], environment["population"]) == (2, 2)
        assert f"\ngradients {environment['gradients']}\n" in out
    assert not list((folder / ".population").glob("*"))
    code, out, _ = call_population(*GRID, f"sweep.dir={folder}")  # nothing is left to do
    assert code == 0
    assert "advance" not in out


def test_rates_of_many_runs(tmp_path):
    """A sweep over pull and local_pull, together and as a run of its own."""
    own = [text for text in GRID if not text.startswith(("potential=", "algorithm.lam="))]
    own += ["algorithm.outer=0.5", "algorithm.period=3", "algorithm.iterations=20"]
    values = ["algorithm.pull=0.1,0.3", "algorithm.local_pull=0.02,0.1"]
    code, out, err = call_population(*own, *values, f"sweep.dir={tmp_path}")
    assert (code, err) == (0, "")
    assert out.count("4 runs of 4 advance together") == 1
    alone = ["algorithm.pull=0.3", "algorithm.local_pull=0.1", f"output.run_dir={tmp_path}/alone"]
    with mock.patch.object(sys, "argv", ["consensus.train", *own, *alone]):
        train()
    require_equal_runs(rows_of(tmp_path / "pull=0.3,local_pull=0.1"), rows_of(tmp_path / "alone"))
    couplings = {rows_of(tmp_path / f"pull={p},local_pull=0.1")[-1]["coupling"] for p in (0.1, 0.3)}
    assert len(couplings) == 2


def test_a_population_has_the_numbers_of_separate_runs(whole, separate):
    require_equal_runs(rows_of(whole[0] / "potential=tan,lam=0.05"), separate)


def test_measured_gradients_have_the_numbers_of_separate_runs(separate, tmp_path):
    arguments = [*GRID, "potential=tan", "sweep.gradients=measure", f"sweep.dir={tmp_path}"]
    code, out, err = call_population(*arguments)
    assert (code, err) == (0, "")
    run_dir = tmp_path / "lam=0.05"
    require_equal_runs(rows_of(run_dir), separate)
    environment = json.loads((run_dir / "summary.json").read_text())["environment"]
    assert f"\ngradients {environment['gradients']}\n" in out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_population_continues_to_the_same_bits(whole, tmp_path, monkeypatch, number):
    _stop_once_at(33, tmp_path / "stopped", monkeypatch, number)
    code, _, err = call_population(*GRID, f"sweep.dir={tmp_path}")
    assert code == 75
    stopped = f"{number.name}: stopped at iteration 34 with a checkpoint"
    assert err == f"consensus.sweep: {stopped}; the same command continues it\n"
    first = tmp_path / "potential=quad,lam=0.1"
    assert Status.read(first).state == "stopped"
    assert [row["iteration"] for row in rows_of(first)] == [20]
    code, out, err = call_population(*GRID, f"sweep.dir={tmp_path}")
    assert (code, err) == (0, "")
    assert "continues 2 runs at iteration 34" in out
    assert [row["iteration"] for row in rows_of(first)] == [20, 40, 60]
    found, expected = (
        {path.name: rows_of(path)[-1]["digest"] for path in folder.glob("potential=*")}
        for folder in (tmp_path, whole[0])
    )
    assert found == expected
    assert len(set(expected.values())) == 4


def test_a_damaged_population_starts_again(whole, tmp_path, monkeypatch):
    _stop_once_at(33, tmp_path / "stopped", monkeypatch)
    assert call_population(*GRID, f"sweep.dir={tmp_path}")[0] == 75
    (checkpoint,) = tmp_path.rglob("*.pt")
    torch.save({"u": torch.zeros(3)}, checkpoint)  # readable, and no population
    code, out, err = call_population(*GRID, f"sweep.dir={tmp_path}")
    assert (code, err) == (0, "")
    assert f"{checkpoint} cannot be read: these runs start again" in out
    first = "potential=quad,lam=0.1"
    assert rows_of(tmp_path / first)[-1]["digest"] == rows_of(whole[0] / first)[-1]["digest"]


def test_a_stop_in_the_last_iteration_stops_the_next_population(tmp_path, monkeypatch):
    _stop_once_at(59, tmp_path / "stopped", monkeypatch)
    code, _, err = call_population(*GRID, f"sweep.dir={tmp_path}")
    assert (code, err) == (130, "consensus.sweep: stopped; the same command continues it\n")
    states = {path.name: Status.read(path, 60).state for path in tmp_path.glob("potential=*")}
    done = ("potential=quad,lam=0.1", "potential=quad,lam=0.05")
    assert states == dict.fromkeys(done, "done")


def test_diverged_members_fail_and_the_others_continue(tmp_path):
    wild = [*GRID, "potential=quad", "algorithm.lam=0.1,1e-20", "algorithm.sigma=0.005,1e19"]
    code, out, err = call_population(*wild, f"sweep.dir={tmp_path}")
    assert code == 1
    assert err.startswith("consensus.sweep: 3 of 4 runs are not done")
    assert "failed  lam=1e-20,sigma=1e+19" in out
    assert "became non-finite, by iteration 20 at the latest" in out
    assert Status.read(tmp_path / "lam=0.1,sigma=0.005").state == "done"


def test_a_member_far_beyond_guessing_has_diverged(tmp_path):
    """Its numbers stay finite: the gradients of the logistic loss are bounded, and it hardly pulls.

    The line is that of a separate run.
    """
    own = ["potential=quad", "algorithm.lam=1e9", "algorithm.iterations=40"]
    wild = [*GRID, *own, "algorithm.sigma=0.005,1e8"]
    code, out, err = call_population(*wild, f"sweep.dir={tmp_path}")
    assert code == 1
    assert err.startswith("consensus.sweep: 1 of 2 runs are not done")
    (run_dir,) = tmp_path.glob("sigma=1*")
    *before, last = rows_of(run_dir)
    assert last["diverged"] is True
    assert not any("diverged" in row for row in before)
    assert 1e6 * 1437 * math.log(10) < last["objective"] < math.inf
    found = f"iteration {last['iteration']}: the run has diverged: the objective is "
    assert Status.read(run_dir, 40).state == "failed"
    assert Status.read(run_dir, 40).message.startswith(found)
    assert found in out
    assert not (run_dir / "summary.json").exists()
    assert (tmp_path / "sigma=0.005" / "summary.json").exists()
    assert out.count("(diverged)") == 1


def test_members_that_do_not_train_are_mentioned_once(tmp_path, monkeypatch):
    """One of two cannot move: its domain is below the rounding of the weights."""
    own = [*GRID, "potential=log", "algorithm.lam=0.1", "dtype=float32", f"sweep.dir={tmp_path}"]
    own += ["potential.eta=1,1e-7", "output.eval_every=15"]
    _stop_once_at(33, tmp_path / "stopped", monkeypatch)
    code, out, _ = call_population(*own)
    assert code == 75
    said = "u has not moved in 15 iterations: 100% of the steps were cut at the boundary"
    (line,) = [line for line in out.splitlines() if "has not moved" in line]
    assert line.startswith(f"eta=1e-07: {said}")
    code, out, _ = call_population(*own)
    assert code == 0
    assert "has not moved" not in out


def _stop_once_at(t, mark, monkeypatch, number=signal.SIGTERM):
    """Send a stop signal in iteration t of a population, in the first of several calls."""
    step = Population.step

    def stopping(self, now):
        step(self, now)
        if now == t and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Population, "step", stopping)


def test_throughput_excludes_evaluations(tmp_path, monkeypatch):
    clock = [0.0]

    def now():
        clock[0] += 1e-3
        return clock[0]

    evaluate = PopulationRisk.evaluate

    def slowly(self, *arguments):
        clock[0] += 1000.0
        return evaluate(self, *arguments)

    monkeypatch.setattr("consensus.sweep.population_trainer.time.perf_counter", now)
    monkeypatch.setattr(PopulationRisk, "evaluate", slowly)
    own = ["potential=quad", "algorithm.lam=0.1", f"sweep.dir={tmp_path}"]
    code, _, _ = call_population(*GRID, *own)
    assert code == 0
    found = rows_of(tmp_path / "run")
    assert [row["wall_s"] > 1000 * 2 * i for i, row in enumerate(found)] == [True] * 3
    assert all(row["samples_per_s"] > 20 * 2 * 20 / 100 for row in found)


def test_an_impossible_gradient_method_is_refused_in_one_line(tmp_path, monkeypatch):
    def cannot(*_):
        raise RuntimeError("vmap: no\nmore")

    monkeypatch.setattr("consensus.problem.population_risk._seconds_of", cannot)
    own = ["sweep.gradients=products", f"sweep.dir={tmp_path}"]
    code, _, err = call_population(*GRID, *own)
    assert code == 2
    assert err == (
        "consensus.sweep: `sweep.gradients` is products; allowed here: one_by_one (vmap: no)\n"
    )


def test_the_checkpoint_name_depends_on_the_configs(make_config):
    def key(*overrides):
        config = make_config("potential=quad", *overrides)
        return key_of([Member("a", None, config), Member("b", None, config)])

    assert key() == key("output.run_dir=elsewhere")
    others = [key("algorithm.weight_decay=0"), key("seed=1"), key("algorithm.batch_size=10")]
    assert len({key(), *others}) == 4


def test_populations_fit_into_memory(make_config):
    members = [
        Member(f"{potential} {seed}", None, make_config(f"potential={potential}", f"seed={seed}"))
        for potential in ("quad", "tan")
        for seed in range(5)
    ]
    each = 8 * 1 * 33_580 * 4  # vectors, worker, LeNet-5 in float32
    names = [[member.name for member in part] for part in populations(members, 3 * each)]
    assert names == [
        ["quad 0", "quad 1", "quad 2"],
        ["quad 3", "quad 4"],
        ["tan 0", "tan 1", "tan 2"],
        ["tan 3", "tan 4"],
    ]
    assert [len(part) for part in populations(members, 10**12)] == [5, 5]
    assert [len(part) for part in populations(members, 1)] == [1] * 10
