"""Sweeps with successive halving: the runs that they train, repeat and stop."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from consensus.population import Population
from consensus.sweep.job import Status
from tests.testing import ROOT
from tests.testing.small_runs import rows_of
from tests.testing.sweeps import call_sweep, started

GRID = [
    *("model=logistic", "workers=2", "dtype=float64", "algorithm.iterations=60", "device=cpu"),
    *("potential=quad,tan", "algorithm.lam=0.1,0.05,0.025,0.01", "output.eval_every=20"),
    *("output.checkpoint_every=20", "output.tensorboard=false", "sweep.engine=population"),
]
HALVING = [*GRID, "sweep.halving=[5,30]", "sweep.keep=[0.5,1]", "sweep.within=potential"]


def places(folder):
    """The rows of halving.csv."""
    with (folder / "report" / "halving.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def digests(run_dir):
    return {row["iteration"]: row["digest"] for row in rows_of(run_dir)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The directory of GRID without halving."""
    folder = tmp_path_factory.mktemp("whole")
    assert call_sweep(*GRID, f"sweep.dir={folder}")[0] == 0
    return folder


@pytest.fixture(scope="module")
def halved(tmp_path_factory):
    """The directory of HALVING, and its output."""
    folder = tmp_path_factory.mktemp("halved")
    code, out, err = call_sweep(*HALVING, f"sweep.dir={folder}")
    assert (code, err) == (0, "")
    return folder, out


def test_the_runs_are_those_of_the_whole_grid_as_far_as_they_go(whole, halved):
    """To the bit. The ends are found here from the rows of the whole grid and the table."""
    folder, out = halved
    ends = {name: 5 for name in sorted(path.name for path in whole.glob("potential=*"))}
    assert len(ends) == 8
    at_5 = {name: rows_of(folder / name)[0]["test_error"] for name in ends}
    for potential in ("quad", "tan"):
        own = sorted((at_5[n], n) for n in ends if n.startswith(f"potential={potential},"))
        second = {n: [r for r in rows_of(folder / n) if r["iteration"] == 30] for _, n in own}
        assert [n for n in second if second[n]] == [n for _, n in own[:2]]
        ends |= dict.fromkeys([n for _, n in own[:2]], 30)
        ends[min((second[n][0]["test_error"], n) for _, n in own[:2])[1]] = 60
    for name, end in ends.items():
        found, expected = digests(folder / name), digests(whole / name)
        assert max(found) == end
        assert found == found | {t: d for t, d in expected.items() if t <= end}
        assert set(found) - set(expected) <= {5, 30}
        assert (folder / name / "summary.json").exists() == (end == 60)
        assert Status.read(folder / name, 60).state == ("done" if end == 60 else "stopped")
    assert sorted(ends.values()) == [5, 5, 5, 5, 30, 30, 60, 60]
    assert "\nrung 3 of 3, 60 iterations: 2 done, 6 stopped\n" in out
    assert "rung 2 of 3, 30 iterations: 2 of 4 configurations go on\n" in out
    first = out.partition("rung 1 of 3, 5 iterations: 4 of 8 configurations go on\n")[0]
    assert sorted(re.findall(r"\nstopped  (\S+)  ", first)) == sorted(ends)


def test_the_table_says_what_was_stopped_when(halved):
    folder, _ = halved
    table = places(folder)
    counts = [(p["rung"], p["iterations"], p["decision"]) for p in table]
    assert {key: counts.count(key) for key in counts} == {
        ("1", "5", "kept"): 4,
        ("1", "5", "stopped"): 4,
        ("2", "30", "kept"): 2,
        ("2", "30", "stopped"): 2,
        ("3", "60", "finished"): 2,
    }
    for place in table:
        of_rung = [r for r in rows_of(folder / place["configuration"])]
        (row,) = [r for r in of_rung if r["iteration"] == int(place["iterations"])]
        assert float(place["mean"]) == row["test_error"]
    page = (folder / "report" / "report.md").read_text(encoding="utf-8")
    assert "8 runs from " in page
    assert "2 finished, 0 diverged, 6 unfinished" in page
    assert "## Successive halving" in page
    assert page.count("\n| 1 | 5 | quad | 4 | 4 | 2 | 0 | test_error | ") == 1
    with (folder / "report" / "table1.csv").open(newline="") as file:
        best = [
            f"potential={r['potential']},lam={r['algorithm.lam']}" for r in csv.DictReader(file)
        ]
    assert best == [p["configuration"] for p in table if p["decision"] == "finished"]


def test_the_same_command_again_trains_nothing_and_decides_the_same(halved):
    folder, _ = halved
    before = (folder / "report" / "halving.csv").read_bytes()
    code, out, err = call_sweep(*HALVING, f"sweep.dir={folder}")
    assert (code, err) == (0, "")
    assert "advance" not in out
    assert (folder / "report" / "halving.csv").read_bytes() == before
    dry = call_sweep(*HALVING, f"sweep.dir={folder}", "--dry-run")[1].splitlines()
    expected = {
        "finished": "     done  {configuration}",
        "stopped": "  stopped  {configuration}  after rung {rung}, {iterations} iterations",
    }
    of_each = [(p["decision"], p) for p in places(folder) if p["decision"] != "kept"]
    assert sorted(dry[1:9]) == sorted(expected[state].format(**p) for state, p in of_each)


@pytest.mark.parametrize(
    ("within", "second", "third", "total"),
    [
        ("potential", 4, 2, "200 iterations, 41.7 %"),  # 8 * 5 + 4 * 25 + 2 * 30 of 480
        ("[potential]", 4, 2, "200 iterations, 41.7 %"),
        ("[potential,algorithm.lam]", 8, 8, "480 iterations, 100 %"),
        ("null", 4, 1, "170 iterations, 35.4 %"),
    ],
)
def test_dry_run_lists_the_rungs(tmp_path, within, second, third, total):
    own = [*HALVING[:-1], f"sweep.within={within}"]
    code, out, _ = call_sweep(*own, f"sweep.dir={tmp_path}", "--dry-run")
    assert code == 0
    assert out.splitlines()[-4:] == [
        "rung 1: 8 runs to 5 iterations",
        f"rung 2: at most {second} runs to 30 iterations",
        f"rung 3: at most {third} runs to 60 iterations",
        f"at most {total} of the whole grid's",
    ]


def test_screened_by_one_seed_the_best_train_with_all(tmp_path):
    """The decisions are those of a sweep of seed 0 alone, and all seeds of the best train whole."""
    alone, screened = tmp_path / "alone", tmp_path / "screened"
    own = [text for text in HALVING if not text.startswith("potential")]
    code, _, _ = call_sweep(*own, "potential=tan", "sweep.within=null", f"sweep.dir={alone}")
    assert code == 0
    own += ["potential=tan", "sweep.within=null", "sweep.screening_seeds=1", "seed=0,1"]
    dry = call_sweep(*own, f"sweep.dir={screened}", "--dry-run")[1].splitlines()
    assert dry[-4:] == [
        "rung 1: 4 runs to 5 iterations",
        "rung 2: at most 2 runs to 30 iterations",
        "rung 3: at most 2 runs to 60 iterations",
        "at most 190 iterations, 39.6 % of the whole grid's",  # 4 * 5 + 2 * 25 + 2 * 60 of 8 * 60
    ]
    code, _, err = call_sweep(*own, f"sweep.dir={screened}")
    assert (code, err) == (0, "")
    kept = [(p["rung"], p["configuration"], p["decision"]) for p in places(alone)]
    assert [(p["rung"], p["configuration"], p["decision"]) for p in places(screened)] == kept
    assert [p["runs"] for p in places(screened)] == ["1"] * 6 + ["2"]
    best = places(screened)[-1]["configuration"]
    finished = {path.parent.name for path in screened.glob("*/summary.json")}
    assert finished == {f"{best},seed={seed}" for seed in (0, 1)}
    assert digests(screened / f"{best},seed=0")[60] == digests(alone / best)[60]


@pytest.mark.parametrize("at", [2, 17, 44])
def test_a_stopped_sweep_continues_to_the_same_runs(halved, tmp_path, monkeypatch, at):
    """In each of the rungs."""
    step, mark = Population.step, tmp_path / "stopped"

    def stopping(self, t):
        step(self, t)
        if t == at and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Population, "step", stopping)
    own = tmp_path / "many"
    code, _, err = call_sweep(*HALVING, f"sweep.dir={own}")
    assert (code, mark.exists()) == (75, True)
    assert f"stopped at iteration {at + 1} with a checkpoint" in err
    code, out, err = call_sweep(*HALVING, f"sweep.dir={own}")
    assert (code, err) == (0, "")
    assert f"at iteration {at + 1}\n" in out
    require_equal(own, halved[0])


def require_equal(folder, other):
    assert places(folder) == places(other)
    names = sorted(path.name for path in other.glob("potential=*"))
    assert sorted(path.name for path in folder.glob("potential=*")) == names
    for name in names:
        assert digests(folder / name) == digests(other / name)


def test_rows_that_were_lost_at_a_rung_are_written_again(halved, tmp_path, monkeypatch):
    """Killed after the checkpoint of rung 1, with a row less than the members have."""
    monkeypatch.setattr("consensus.sweep.__main__.write_places", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call_sweep(*HALVING, f"sweep.dir={tmp_path}")
    monkeypatch.undo()
    metrics = tmp_path / "potential=tan,lam=0.05" / "metrics.jsonl"
    metrics.write_text("")
    assert call_sweep(*HALVING, f"sweep.dir={tmp_path}")[0] == 0
    require_equal(tmp_path, halved[0])


def test_more_that_go_on_start_again_to_the_same_bits(whole, tmp_path, monkeypatch):
    """The checkpoint of a population lacks what was stopped before it."""
    step = Population.step

    def stopping(self, t):
        step(self, t)
        if t == 44:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Population, "step", stopping)
    own = [*HALVING, "potential=tan", "sweep.within=null", f"sweep.dir={tmp_path}"]
    assert call_sweep(*own)[0] == 75
    monkeypatch.undo()
    code, out, _ = call_sweep(*own, "sweep.keep=3")
    assert code == 0
    assert "lacks runs that now go on: these runs start again" in out
    ends = [max(digests(path)) for path in tmp_path.glob("lam=*")]
    assert sorted(ends) == [5, 60, 60, 60]
    for path in tmp_path.glob("lam=*"):
        found = digests(path)
        expected = digests(whole / f"potential=tan,{path.name}")
        assert found == found | {t: d for t, d in expected.items() if t <= max(found)}


def test_a_finished_sweep_is_ranked_by_its_rows(whole, tmp_path):
    """Of the iterations of the rungs, or before; nothing is trained, and all are done."""
    (tmp_path / "many").symlink_to(whole)
    own = [*GRID, f"sweep.dir={tmp_path}/many", "sweep.halving=[20,50]", "sweep.keep=2"]
    code, out, err = call_sweep(*own, "sweep.metric=train_loss")
    assert (code, err) == (0, "")
    assert "advance" not in out
    for place in places(whole):
        at = {"20": 20, "50": 40, "60": 60}[place["iterations"]]
        (row,) = [r for r in rows_of(whole / place["configuration"]) if r["iteration"] == at]
        assert float(place["mean"]) == row["train_loss"]
    assert call_sweep(*GRID, f"sweep.dir={tmp_path}/many")[0] == 0
    assert not (whole / "report" / "halving.csv").exists(), "the sweep has no rungs now"


def test_diverged_members_never_go_on(tmp_path):
    """Three of four become non-finite or far from guessing; 3 could go on."""
    own = [*GRID, "potential=quad", "algorithm.lam=0.1,1e-20", "algorithm.sigma=0.005,1e19"]
    own += ["sweep.halving=[20]", "sweep.keep=3", f"sweep.dir={tmp_path}"]
    for _ in range(2):  # they are not repeated: they would diverge again
        code, out, err = call_sweep(*own)
        assert (code, err) == (0, ""), "a setting that diverges is a result of the screening"
        found = [p["decision"] for p in places(tmp_path)]
        assert found == ["kept", "no number", "no number", "no number", "finished"]
    assert "advance" not in out
    assert Status.read(tmp_path / "lam=0.1,sigma=0.005").state == "done"


# ---- separate runs, with stand-ins for them

LAMS = ["experiment=smoke", "algorithm.lam=0.3,0.1,0.2,0.4", "seed=1,2", "sweep.dir=many"]


def test_separate_runs_get_the_rung_and_seeds_go_together(sweep, tmp_path):
    """The train loss of a stand-in is lam; 4 configurations of two seeds, 2, then 1."""
    own = [*LAMS, "sweep.halving=[5,10]", "sweep.metric=train_loss"]
    code, out, err = sweep(*own)
    assert (code, err) == (0, "")
    stops = {
        path.name: [[a for a in s["argv"] if "stop_at" in a] for s in started(path)]
        for path in (tmp_path / "many").glob("lam=*")
    }
    first, second, last = ["output.stop_at=5"], ["output.stop_at=10"], []
    expected = {"0.4": [first], "0.3": [first], "0.2": [first, second]}
    expected["0.1"] = [first, second, last]
    assert stops == {f"lam={v},seed={s}": own for v, own in expected.items() for s in (1, 2)}
    assert out.splitlines().count("rung 3 of 3, 20 iterations: 2 done, 6 stopped") == 1
    assert [p["configuration"] for p in places(tmp_path / "many")][:4] == [
        *("lam=0.1", "lam=0.2", "lam=0.3", "lam=0.4")
    ]
    status = Status.read(tmp_path / "many" / "lam=0.4,seed=1", 20)
    assert (status.state, status.code) == ("stopped", 0)
    written = json.loads((tmp_path / "many" / "lam=0.4,seed=1" / "status.json").read_text())
    assert written["state"] == "stopped"
    assert sweep(*own)[0] == 0
    assert sum(len(started(path)) for path in (tmp_path / "many").glob("lam=*")) == 14


def test_a_launcher_of_hydra_gets_the_rungs(sweep, tmp_path):
    """`basic` runs the task in this process; submitit runs it in a job of a cluster."""
    own = [*LAMS, "algorithm.lam=0.3,0.1", "seed=1", "hydra/launcher=basic", "sweep.halving=[5]"]
    code, _, err = sweep(*own, "sweep.metric=train_loss")
    assert (code, err) == (0, "")
    starts = {v: len(started(tmp_path / "many" / f"lam={v}")) for v in (0.3, 0.1)}
    assert starts == {0.3: 1, 0.1: 2}
    assert Status.read(tmp_path / "many" / "lam=0.1", 20).state == "done"


def test_a_failed_seed_stops_its_configuration(sweep, tmp_path):
    """Seed 13 fails each time, so that no configuration has a number in all of its seeds."""
    own = [*LAMS, "algorithm.lam=0.1", "seed=1,13", "sweep.halving=[5]"]
    code, _, err = sweep(*own)
    assert code == 1
    line = "rung 1 of 2, 5 iterations: no configuration has a number"
    assert err == f"consensus.sweep: {line}\n"
    (place,) = places(tmp_path / "many")
    assert (place["decision"], place["runs"]) == ("no number", "2")
    assert len(started(tmp_path / "many" / "seed=1")) == 1
    sweep(*own)
    assert [len(started(tmp_path / "many" / f"seed={s}")) for s in (1, 13)] == [1, 2]
    code, _, err = sweep(*own, "seed=1,2", "sweep.metric=validation_error")
    assert (code, err) == (1, f"consensus.sweep: {line} in validation_error\n")


def test_a_run_that_failed_is_not_done_where_the_others_go_on(sweep, tmp_path):
    """Its config cannot be read, which is no result of its configuration."""
    own = [*LAMS, "seed=1", "sweep.halving=[5]", "sweep.metric=train_loss"]
    assert sweep(*own)[0] == 0
    (tmp_path / "many" / "lam=0.4" / "config.yaml").write_text("a: [")
    code, _, err = sweep(*own)
    assert code == 1
    assert err == "consensus.sweep: 1 of 4 runs are not done; see status.json in each\n"


@pytest.mark.slow
def test_a_killed_sweep_ends_with_the_same_runs(halved, tmp_path):
    """SIGKILL of the process after the first decision."""
    own = [*HALVING, f"sweep.dir={tmp_path}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "consensus.sweep", *own]
    killed = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "report" / "halving.csv").exists() and killed.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "report" / "report.md").exists()
    code, _, err = call_sweep(*own)
    assert (code, err) == (0, "")
    require_equal(tmp_path, halved[0])
