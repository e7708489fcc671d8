"""Jobs: command line, child environment, GPU reservation, and the status file."""

import os
import subprocess
import sys

import pytest

from consensus.sweep import job
from consensus.sweep.job import Status
from tests.testing.sweeps import started


def test_the_command_of_a_run():
    assert job.command(1, ["a=1"]) == [sys.executable, "-m", "consensus.train", "a=1"]
    assert job.command(3, ["a=1"])[1:] == [
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"),
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


def test_each_of_several_runs_has_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    with job.reserved_gpu(tmp_path, 1) as alone:
        assert alone == {}
    with job.reserved_gpu(tmp_path, 2) as first, job.reserved_gpu(tmp_path, 2) as second:
        taken = {first["CUDA_VISIBLE_DEVICES"], second["CUDA_VISIBLE_DEVICES"]}
        assert taken == {"5", "7"}
    with job.reserved_gpu(tmp_path, 2) as again:
        assert again == first
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with job.reserved_gpu(tmp_path, 2) as none:
        assert none == {}


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
