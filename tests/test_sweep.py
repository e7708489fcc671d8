"""The sweep with stand-ins for its runs, which start in no time, and once with real ones."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from consensus import sweep as entry
from consensus.run import cell as cells
from consensus.run.board import duration, last_row
from consensus.run.cell import Status

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
        assert err == "consensus.sweep: 1 of 3 runs are not done; see output.txt in each\n"
        (line,) = [line for line in out.splitlines() if "failed  seed=13" in line]
        assert line.endswith("exit code 2: `seed` is 13; allowed: luck")
        assert "\n2 done, 1 failed\n" in out
        assert len(started(tmp_path / "many" / "seed=13")) == times
    assert (tmp_path / "many" / "seed=13" / "output.txt").read_text().endswith("more\n")


def test_several_at_once_and_the_cores_shared_out(sweep, tmp_path, monkeypatch):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
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


def test_a_launcher_that_is_not_installed_is_named(sweep, monkeypatch):
    monkeypatch.setattr(entry.importlib.util, "find_spec", lambda name: None)
    code, _, err = sweep("seed=1,2", "sweep.jobs=2")
    assert code == 2
    assert err == (
        "consensus.sweep: `sweep.jobs` is 2; allowed: 1, or with the package "
        "hydra-joblib-launcher: pip install hydra-joblib-launcher\n"
    )


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


RUNS = [
    *("model=logistic", "workers=2", "output.log_every=50,51", "algorithm.iterations=1000"),
    *("output.eval_every=100", "output.checkpoint_every=100", "output.tensorboard=false"),
    "sweep.dir=many",
]


@pytest.mark.slow
def test_a_sweep_that_is_stopped_continues_to_the_same_bits(tmp_path, monkeypatch, capsys):
    """Stopped in the first of two runs that differ in nothing that counts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["consensus.sweep", *RUNS])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    first, second = (tmp_path / "many" / f"log_every={every}" for every in (50, 51))

    def stop():
        deadline = time.monotonic() + 120
        while last_row(first) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)  # which is Ctrl+C to a sweep

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
    assert Status.read(first).state == "stopped"
    assert Status.read(second).state == "waiting"
    assert last_row(first)["iteration"] < 1000
    assert list((first / "checkpoints").iterdir())

    entry.main()
    signal.signal(signal.SIGTERM, before)
    out, _ = capsys.readouterr()
    assert "\n2 done\n" in out
    assert "continues" in (first / "output.txt").read_text()
    assert "continues" not in (second / "output.txt").read_text()
    assert last_row(first)["digest"] == last_row(second)["digest"]
    rows = [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == list(range(100, 1001, 100))
    assert (second / "model.pt").exists()
