"""The sweep with stand-ins for its runs, which start in no time, and once with real ones."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from consensus import train
from consensus.population import Population
from consensus.problem import PopulationRisk
from consensus.records import last_row
from consensus.sweep import __main__ as entry
from consensus.sweep import job as cells
from consensus.sweep.dashboard import duration
from consensus.sweep.job import Status
from consensus.sweep.population_trainer import Member, key_of, populations

STAND_IN = """
import json, os, pathlib, signal, sys, time
keys = dict(text.split("=", 1) for text in sys.argv[1:])
run_dir = pathlib.Path(keys["output.run_dir"].strip("'"))
with (run_dir / "started").open("a") as file:
    print(json.dumps({"argv": sys.argv[1:], "env": dict(os.environ)}), file=file)
if keys["seed"] == "13":
    print("consensus.train: `seed` is 13; allowed: luck")
    print("more")
    sys.exit(2)
if keys["seed"] == "14":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    (run_dir / "slow").touch()
    time.sleep(60)
row = dict.fromkeys(["epoch", "objective", "train_loss", "train_error", "test_loss"], 1.0)
row |= {"iteration": 20, "test_error": float(keys["seed"])}
(run_dir / "metrics.jsonl").write_text(json.dumps(row) + "\\n")
(run_dir / "summary.json").write_text("{}")
"""


@pytest.fixture
def sweep(monkeypatch, capsys, tmp_path):
    """`sweep("seed=1,2")`: exit code, stdout and stderr of the command, in this process."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    real = cells.command

    def command(processes, overrides):
        assert real(processes, overrides)[-len(overrides) :] == overrides
        return [sys.executable, str(tmp_path / "stand_in.py"), *overrides]

    monkeypatch.setattr(cells, "command", command)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # of the test, not of main

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["consensus.sweep", *arguments])
        code = 0
        try:
            entry.main()
        except SystemExit as left:
            code = left.code
        out, err = capsys.readouterr()
        return code, out, err

    return call


def started(path):
    return [json.loads(line) for line in (path / "started").read_text().splitlines()]


def test_runs_are_started_once_and_told_of(sweep, tmp_path):
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


def test_a_failed_run_is_a_row_and_is_tried_again(sweep, tmp_path):
    for times in (1, 2):
        code, out, err = sweep("seed=1,13,2", "sweep.dir=many")
        assert code == 1
        assert err == "consensus.sweep: 1 of 3 runs are not done; status.json in each says why\n"
        (line,) = [line for line in out.splitlines() if "failed  seed=13" in line]
        assert line.endswith("exit code 2: `seed` is 13; allowed: luck")
        assert "\n2 done, 1 failed\n" in out
        assert len(started(tmp_path / "many" / "seed=13")) == times
    assert (tmp_path / "many" / "seed=13" / "output.txt").read_text().endswith("more\n")


def test_the_cores_are_shared_out(sweep, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    code, _, _ = sweep("seed=1,2", "sweep.dir=many", "sweep.processes=2")
    assert code == 0
    (once,) = started(tmp_path / "many" / "seed=1")
    assert once["env"]["OMP_NUM_THREADS"] == "4"


def test_a_refusal_is_one_line_and_starts_nothing(sweep, tmp_path):
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
def test_more_memory_than_there_is_is_refused(sweep, monkeypatch, tmp_path, arguments, line):
    """In float64, LeNet-5: 3 vectors of 33,580 coordinates, 806 kB for a worker. mlp: 7,950,010."""
    monkeypatch.setattr("consensus.run.device.memory_of", lambda device: 2 * 10**9)
    own = ("seed=1,2", "dtype=float64", "device=cpu", "sweep.dir=many")
    code, out, err = sweep(*own, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"consensus.sweep: {line}")
    assert err.count("\n") == 1
    assert not (tmp_path / "many").exists()


def test_a_launcher_that_is_not_installed_is_named(sweep, monkeypatch):
    monkeypatch.setattr(entry.importlib.util, "find_spec", lambda name: None)
    code, _, err = sweep("seed=1,2", "sweep.jobs=2")
    assert code == 2
    assert err == (
        "consensus.sweep: `sweep.jobs` is 2; allowed: 1, or with the package "
        "hydra-joblib-launcher: pip install hydra-joblib-launcher\n"
    )


QUEUE = """#!{python}
import pathlib, sys
name, *arguments = pathlib.Path(sys.argv[0]).name, *sys.argv[1:]
queue = pathlib.Path(sys.argv[0]).parent / "queue"
if name == "squeue":
    print(queue.read_text(), end="")
else:
    left = [line for line in queue.read_text().splitlines() if line not in arguments]
    queue.write_text("".join(line + chr(10) for line in left))
"""


@pytest.fixture
def queue(monkeypatch, tmp_path):
    """A file with the jobs of this user, as squeue and scancel see them: 7 is someone else's."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name in ("squeue", "scancel"):
        (folder / name).write_text(QUEUE.format(python=sys.executable))
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    for name in ("8", "8_0", "8_1", "9_0"):
        (tmp_path / "many" / ".submitit" / name).mkdir(parents=True)
    (folder / "queue").write_text("7\n8\n8\n9\n")
    return folder / "queue"


def test_a_sweep_whose_jobs_are_in_the_queue_is_not_started_beside_them(sweep, queue, tmp_path):
    code, out, err = sweep("seed=1", "sweep.dir=many")
    assert (code, out) == (2, "")
    assert err == (
        "consensus.sweep: the jobs 8, 9 of many are still in the queue: wait for them, or "
        "`scancel 8 9`; then the same command continues\n"
    )
    assert not (tmp_path / "many" / "run").exists()
    queue.write_text("7\n")
    assert sweep("seed=1", "sweep.dir=many")[0] == 0


def test_a_sweep_that_is_stopped_cancels_its_jobs(sweep, queue, monkeypatch):
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
def test_a_sweep_that_is_stopped_before_it_starts_cancels_nothing(sweep, queue, monkeypatch, where):
    """The jobs in the queue are those of an earlier call."""

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(entry, where, stopped)
    before = queue.read_text()
    code, _, err = sweep("seed=1", "sweep.dir=many")
    assert code == 130
    assert err == "consensus.sweep: stopped; the same command continues it\n"
    assert queue.read_text() == before


def test_a_run_that_a_cluster_asks_to_stop_is_no_failure(sweep, tmp_path):
    """All processes of a job get the signal, the run among them."""
    run_dir = tmp_path / "many" / "seed=14"

    def ask():
        while not (run_dir / "slow").exists():
            time.sleep(0.02)
        children = subprocess.run(
            ["pgrep", "-f", "stand_in.py.*seed=14"], capture_output=True, text=True, check=True
        )
        for pid in children.stdout.split():
            os.kill(int(pid), signal.SIGTERM)

    asking = threading.Thread(target=ask)
    asking.start()
    code, out, _ = sweep("seed=14,1", "sweep.dir=many")
    asking.join()
    assert code == 1
    status = Status.read(run_dir)
    assert (status.state, status.code) == ("stopped", 75)
    assert "failed" not in out


def test_the_command_of_a_run():
    assert cells.command(1, ["a=1"]) == [sys.executable, "-m", "consensus.train", "a=1"]
    assert cells.command(3, ["a=1"])[1:] == [
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"),
        *("-m", "consensus.train", "a=1"),
    ]


def test_a_launch_around_the_sweep_is_not_that_of_its_runs(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    own = cells.environment(1, 1)
    assert "RANK" not in own
    assert "TORCHELASTIC_RUN_ID" not in own
    assert own["OMP_NUM_THREADS"] == "7"


def test_a_job_of_slurm_has_the_cores_that_it_asked_for(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")
    assert cells.environment(2, 1)["OMP_NUM_THREADS"] == "3"
    monkeypatch.delenv("SLURM_CPUS_PER_TASK")
    assert cells.environment(2, 1)["OMP_NUM_THREADS"] == "32"


def test_each_of_several_runs_has_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    with cells.a_gpu(tmp_path, 1) as alone:
        assert alone == {}
    with cells.a_gpu(tmp_path, 2) as first, cells.a_gpu(tmp_path, 2) as second:
        taken = {first["CUDA_VISIBLE_DEVICES"], second["CUDA_VISIBLE_DEVICES"]}
        assert taken == {"5", "7"}
    with cells.a_gpu(tmp_path, 2) as again:
        assert again == first
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with cells.a_gpu(tmp_path, 2) as none:
        assert none == {}


def test_what_the_files_say_of_a_run(tmp_path):
    assert Status.read(tmp_path / "nowhere").state == "waiting"
    mine = Status("running", os.getpid(), os.uname().nodename)
    mine.write(tmp_path)
    assert Status.read(tmp_path) == mine
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    Status("running", ended.pid, os.uname().nodename).write(tmp_path)
    assert Status.read(tmp_path).state == "stopped", "killed together with the sweep"
    Status("running", ended.pid, "another machine").write(tmp_path)
    assert Status.read(tmp_path).state == "running"
    (tmp_path / "status.json").write_text("{")
    assert Status.read(tmp_path).state == "waiting"
    (tmp_path / "summary.json").write_text("{}")
    assert Status.read(tmp_path).state == "done"
    assert last_row(tmp_path) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(5, "5 s"), (89.6, "90 s"), (90, "2 min"), (3600, "60 min"), (7500, "2 h 5 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


# ---- real runs


SMOKE = [
    *("grid=smoke", "potential=tan", "dtype=float64", "algorithm.iterations=400", "device=cpu"),
    *("output.eval_every=100", "output.checkpoint_every=100", "output.tensorboard=false"),
]


@pytest.mark.slow
def test_grid_smoke_by_both_engines_one_of_them_stopped_and_continued(
    tmp_path, monkeypatch, capsys
):
    """Separate runs, stopped in the first of two, give the numbers of a population."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["consensus.sweep", *SMOKE, "sweep.dir=separate"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def stop():
        deadline = time.monotonic() + 120
        while not started and time.monotonic() < deadline:
            time.sleep(0.02)
            started.extend(tmp_path.glob("separate/*/metrics.jsonl"))
        os.kill(os.getpid(), signal.SIGTERM)  # which is Ctrl+C to a sweep

    started = []
    before = signal.getsignal(signal.SIGTERM)
    stopping = threading.Thread(target=stop)
    stopping.start()
    try:
        with pytest.raises(SystemExit) as left:
            entry.main()
    finally:
        stopping.join()
        signal.signal(signal.SIGTERM, before)
    assert left.value.code == 130
    _, err = capsys.readouterr()
    assert err == "consensus.sweep: stopped; the same command continues it\n"
    (first,) = (path.parent for path in started)
    begun = rows(first)
    assert len(begun) < 4
    assert Status.read(first).state == "stopped"

    entry.main()
    signal.signal(signal.SIGTERM, before)
    out, _ = capsys.readouterr()
    assert "\n2 done\n" in out
    if begun:  # else nothing may have been there to continue from
        assert "continues" in (first / "output.txt").read_text()
    code, out, err = together(monkeypatch, capsys, *SMOKE, "sweep.dir=together")
    assert (code, err) == (0, "")
    assert out.count("2 runs of 2 advance together") == 1
    names = sorted(path.name for path in (tmp_path / "separate").glob("*lam=*"))
    assert len(names) == 2
    for name in names:
        apart, found = rows(tmp_path / "separate" / name), rows(tmp_path / "together" / name)
        assert [row["iteration"] for row in apart] == [100, 200, 300, 400]
        assert [set(row) for row in found] == [set(row) for row in apart]
        for one, other in zip(found, apart, strict=True):
            assert [one[key] for key in COUNTS] == [other[key] for key in COUNTS]
            for key in NUMBERS:
                assert one[key] == pytest.approx(other[key], rel=1e-9), (name, key)
    losses = {rows(tmp_path / "together" / name)[-1]["train_loss"] for name in names}
    assert len(losses) == 2


# ---- together in one process


GRID = [
    *("model=logistic", "workers=2", "dtype=float64", "algorithm.iterations=60", "device=cpu"),
    *("potential=quad,tan", "algorithm.lam=0.1,0.05", "output.eval_every=20"),
    *("output.checkpoint_every=20", "output.tensorboard=false", "sweep.dir=many"),
]
FILES = {"config.yaml", "metrics.jsonl", "model.pt", "status.json", "summary.json"}


def together(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["consensus.sweep", *arguments, "sweep.engine=population"])
    before = signal.getsignal(signal.SIGTERM)
    code = 0
    try:
        entry.main()
    except SystemExit as left:
        code = left.code
    finally:
        signal.signal(signal.SIGTERM, before)
    out, err = capsys.readouterr()
    return code, out, err


def rows(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def alone(monkeypatch, tmp_path, *overrides):
    """The rows of `consensus.train`, in this process."""
    monkeypatch.setattr(sys, "argv", ["consensus.train", *overrides, "output.run_dir=alone"])
    train.main()
    return rows(tmp_path / "alone")


NUMBERS = ("objective", "train_loss", "test_loss", "coupling", "regularizer", "distance")
COUNTS = ("iteration", "epoch", "train_error", "test_error", "cuts_u", "cuts_z")


def test_a_population_leaves_the_files_and_numbers_of_separate_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out, err = together(monkeypatch, capsys, *GRID, "sweep.gradients=measure")
    assert (code, err) == (0, "")
    assert "\n4 done\n" in out
    assert out.count("2 runs of 2 advance together") == 2  # one population for each potential
    for potential, lam in (("quad", "0.1"), ("quad", "0.05"), ("tan", "0.1"), ("tan", "0.05")):
        run_dir = tmp_path / "many" / f"potential={potential},lam={lam}"
        assert {path.name for path in run_dir.iterdir() if path.name[0] != "."} == FILES
        state = torch.load(run_dir / "model.pt", weights_only=True)
        assert sum(value.numel() for value in state.values()) == 7850
    own = [text for text in GRID[:-1] if "," not in text]
    expected = alone(monkeypatch, tmp_path, *own, "potential=tan", "algorithm.lam=0.05")
    found = rows(run_dir)
    assert [set(row) for row in found] == [set(row) for row in expected]
    for one, other in zip(found, expected, strict=True):
        assert [one[key] for key in COUNTS] == [other[key] for key in COUNTS]
        for key in NUMBERS:
            assert one[key] == pytest.approx(other[key], rel=1e-9), key
    environment = json.loads((run_dir / "summary.json").read_text())["environment"]
    assert (environment["workers"], environment["population"]) == (2, 2)
    assert f"\ngradients {environment['gradients']}\n" in out
    assert not list((tmp_path / "many" / ".population").glob("*"))
    code, out, _ = together(monkeypatch, capsys, *GRID)  # nothing is left to do
    assert code == 0
    assert "advance" not in out


def test_a_population_that_is_stopped_continues_to_the_same_bits(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    step = Population.step

    def stopping(self, t):
        step(self, t)
        if t == 33 and not (tmp_path / "stopped").exists():
            (tmp_path / "stopped").touch()
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Population, "step", stopping)
    code, _, err = together(monkeypatch, capsys, *GRID)
    assert code == 130
    assert err == "consensus.sweep: stopped; the same command continues it\n"
    first = tmp_path / "many" / "potential=quad,lam=0.1"
    assert Status.read(first).state == "stopped"
    assert [row["iteration"] for row in rows(first)] == [20]
    code, out, err = together(monkeypatch, capsys, *GRID)
    assert (code, err) == (0, "")
    assert "continues 2 runs at iteration 34" in out
    found = {path.name: rows(path)[-1]["digest"] for path in (tmp_path / "many").glob("p*")}
    assert [row["iteration"] for row in rows(first)] == [20, 40, 60]
    code, _, _ = together(monkeypatch, capsys, *GRID[:-1], "sweep.dir=whole")
    assert code == 0
    whole = {path.name: rows(path)[-1]["digest"] for path in (tmp_path / "whole").glob("p*")}
    assert found == whole
    assert len(set(whole.values())) == 4


def test_a_diverged_run_of_a_population_is_a_row(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    wild = [*GRID, "potential=quad", "algorithm.lam=0.1,1e-20", "algorithm.sigma=0.005,1e19"]
    code, out, err = together(monkeypatch, capsys, *wild)
    assert code == 1
    assert err.startswith("consensus.sweep: 3 of 4 runs are not done")
    assert "failed  lam=1e-20,sigma=1e+19" in out
    assert "became non-finite, by iteration 20 at the latest" in out
    assert Status.read(tmp_path / "many" / "lam=0.1,sigma=0.005").state == "done"


def test_the_rate_of_training_is_without_the_evaluations(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
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
    code, _, _ = together(monkeypatch, capsys, *GRID, "potential=quad", "algorithm.lam=0.1")
    assert code == 0
    found = rows(tmp_path / "many" / "run")
    assert [row["wall_s"] > 1000 * 2 * i for i, row in enumerate(found)] == [True] * 3
    assert all(row["samples_per_s"] > 20 * 2 * 20 / 100 for row in found)


def test_a_way_that_is_not_possible_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def cannot(*_):
        raise RuntimeError("vmap: no\nmore")

    monkeypatch.setattr("consensus.problem.population_risk._seconds_of", cannot)
    code, _, err = together(monkeypatch, capsys, *GRID, "sweep.gradients=products")
    assert code == 2
    assert err == (
        "consensus.sweep: `sweep.gradients` is products; allowed here: one_by_one (vmap: no)\n"
    )


def test_momentum_sgd_runs_beside_a_population(sweep, tmp_path):
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
def test_who_can_be_of_a_population(make_config, overrides, can):
    assert entry.can_be_member(make_config(*overrides)) == can


def test_the_state_of_a_population_is_for_the_same_configs_only(make_config):
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
