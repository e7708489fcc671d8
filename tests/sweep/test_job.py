"""Jobs: command line, child environment, GPU reservation, and the status file."""

import fcntl
import os
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest

from consensus.run.checkpoint.directory import LOCK
from consensus.run.checks import ConfigError
from consensus.sweep import job
from consensus.sweep.job import Status
from tests.testing.sweeps import started


def test_the_command_of_a_run():
    assert job.command(1, ["a=1"]) == [sys.executable, "-m", "consensus.train", "a=1"]
    assert job.command(3, ["a=1"])[1:] == [
        *("-m", "torch.distributed.run", "--standalone"),
        *("--local-addr=127.0.0.1", "--nproc-per-node=3"),
        *("-m", "consensus.train", "a=1"),
    ]


def test_cores_are_divided_between_processes(sweep, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    code, _, _ = sweep("seed=1", "sweep.dir=many", "sweep.processes=2")
    assert code == 0
    (once,) = started(tmp_path / "many" / "run")
    assert once["env"]["OMP_NUM_THREADS"] == "4"


def test_torchrun_variables_are_removed(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    own = job.environment(1, 1)
    assert "RANK" not in own
    assert "TORCHELASTIC_RUN_ID" not in own
    assert own["OMP_NUM_THREADS"] == "7"


def test_a_slurm_job_uses_the_cores_that_it_requested(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")
    assert job.environment(2, 1)["OMP_NUM_THREADS"] == "3"
    monkeypatch.delenv("SLURM_CPUS_PER_TASK")
    assert job.environment(2, 1)["OMP_NUM_THREADS"] == "32"


def test_each_of_several_runs_has_a_gpu(sweep, tmp_path, monkeypatch):
    for visible, jobs, seen in (("5,7", 2, {"5", "7"}), ("5,7", 1, {"5,7"}), ("", 2, {""})):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        folder = tmp_path / f"{visible}-{jobs}"
        assert (
            sweep("seed=1,2", f"sweep.dir={folder}".replace(",", "\\,"), f"sweep.jobs={jobs}")[0]
            == 0
        )
        starts = [once for path in folder.glob("seed=*") for once in started(path)]
        assert {once["env"]["CUDA_VISIBLE_DEVICES"] for once in starts} == seen
        assert len(starts) == 2


def test_the_status_of_a_run_directory(tmp_path):
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


@pytest.mark.skipif(not hasattr(job._LIBC, "prctl"), reason="Linux alone ends children")
def test_a_killed_sweep_leaves_no_run(tmp_path, monkeypatch):
    """The stand-in of a run gets SIGTERM when the process that started it is killed."""
    script = "import signal, sys, time\n"
    script += (
        "signal.signal(signal.SIGTERM, lambda *_: (print('asked', flush=True), sys.exit(75)))\n"
    )
    script += "print('up', flush=True)\ntime.sleep(60)\n"
    monkeypatch.setattr(job, "command", lambda *_: [sys.executable, "-c", script])
    output = tmp_path / "run" / "output.txt"
    if (sweep := os.fork()) == 0:
        try:
            job.run_here({tmp_path / "run": []}, 1, 1, print)
        finally:
            os._exit(1)
    try:
        wait_for(lambda: output.exists() and "up" in output.read_text())
        assert Status.read(tmp_path / "run").state == "running"
        os.kill(sweep, signal.SIGKILL)
        wait_for(lambda: "asked" in output.read_text())
        assert Status.read(tmp_path / "run").state == "stopped", "a zombie is gone as well"
    finally:
        os.kill(sweep, signal.SIGKILL)
        os.waitpid(sweep, 0)
    assert Status.read(tmp_path / "run").state == "stopped"


def wait_for(condition):
    deadline = time.monotonic() + 60.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_run_that_a_killed_sweep_left_is_waited_for(sweep, tmp_path):
    """It holds its lock until its checkpoint is written."""
    run_dir = tmp_path / "many" / "run"
    run_dir.mkdir(parents=True)
    with (run_dir / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        release = threading.Timer(0.5, lock.close)
        release.start()
        before = time.monotonic()
        assert job.in_use(run_dir)
        assert sweep("seed=1", "sweep.dir=many")[0] == 0
        release.join()
    assert not job.in_use(run_dir)
    assert len(started(run_dir)) == 1
    assert time.monotonic() - before >= 0.5


def test_the_limit_of_open_files_is_raised_or_named():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        job.allow_open_files(80)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (256, hard)
        job.allow_open_files(300)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (300 + job.OTHER_FILES, hard)
        with pytest.raises(ConfigError) as caught:
            job.allow_open_files(hard)
        assert str(caught.value) == (
            f"`sweep.engine` is population; allowed: separate here, or the limit `ulimit -Hn` at "
            f"{hard + job.OTHER_FILES} or more: {hard} runs at once keep a file open each, and "
            f"this process may have {hard}"
        )
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    ("output", "line"),
    [
        ("consensus.train: `seed` is 13\nmore\n\n", "`seed` is 13"),
        ("Traceback\n  ValueError: x  \n", "ValueError: x"),
        ("", ""),
    ],
)
def test_the_error_line_of_an_output(output, line):
    assert job.error_line(output) == line
