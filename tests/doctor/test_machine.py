import os

import pytest
import torch

from consensus.comm import Launch
from consensus.doctor import machine
from consensus.doctor.finding import Finding, Level


def test_versions_that_differ():
    first = {"python": "3.11.7", "torch": "2.15.0", "numpy": "2.0", "consensus": "aa"}
    assert list(machine.compare_versions([first, first], 1)) == [
        Finding("versions", "the same everywhere")
    ]
    other = {"python": "3.11.7", "torch": "2.14.0", "numpy": "2.1", "consensus": "bb"}
    assert list(machine.compare_versions([first, other], 0)) == []
    found = list(machine.compare_versions([first, other], 1))
    assert [(finding.level, finding.text) for finding in found] == [
        (Level.FAULT, "the code of consensus is not that of the first (bb, aa)"),
        (Level.WARNING, "numpy is 2.1 here and 2.0 on the first"),
        (Level.FAULT, "torch is 2.14.0 here and 2.15.0 on the first"),
    ]


@pytest.mark.parametrize(
    ("processes", "threads", "cores", "remedy"),
    [(4, 1, 2, "NPROC=2"), (2, 4, 4, "OMP_NUM_THREADS=2"), (2, 2, 4, None), (1, 1, 1, None)],
)
def test_threads_and_cores(monkeypatch, processes, threads, cores, remedy):
    monkeypatch.setattr(machine, "num_cores", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    (finding,) = machine.check_cores(Launch(0, processes, 0, processes))
    assert finding.level == (Level.FINE if remedy is None else Level.WARNING)
    assert remedy is None or finding.remedy.startswith(remedy)


def test_the_quota_of_a_container_counts(monkeypatch, tmp_path):
    monkeypatch.setattr("consensus.run.limits.CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    assert machine.num_cores() == 16
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert machine.num_cores() == 16
    (tmp_path / "cpu.max").write_text("250000 100000\n")
    assert machine.num_cores() == 3
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    (tmp_path / "memory.stat").write_text("anon 7\ninactive_file 400000\n")
    assert machine.memory_left() == 2_400_000


@pytest.mark.parametrize(
    ("overrides", "measuring"),
    [
        ([], ""),
        (["stationarity.every=5"], "; to measure the stationarity: 1.1 MB"),  # 36 vectors, once
        (
            ["stationarity.every=5", "data.partition=sharded"],
            "; to measure the stationarity: 2.3 MB",
        ),
    ],
)
def test_the_memory_of_a_measurement_counts(make_config, monkeypatch, overrides, measuring):
    """Vectors of 7,850 numbers of 4 bytes: three for each of two workers on two processes."""
    config = make_config("model=logistic", "workers=4", "device=cpu", *overrides)
    plan = machine.make_plan(config, Launch(0, 2, 0, 2))
    monkeypatch.setattr(machine, "memory_left", lambda: 1_400_000)
    finding = next(iter(machine.check_memory(plan)))
    workers = "1.4 MB left; z, v and gradients of the workers of this node: 377 kB"
    assert finding.text == workers + measuring
    assert finding.level == (Level.FAULT if measuring else Level.FINE)
    assert ("stationarity.every=null" in finding.remedy) == bool(measuring)


@pytest.mark.parametrize(
    ("known", "capability", "runs"),
    [
        (["sm_80", "sm_90"], (8, 6), True),
        (["sm_80", "sm_90"], (7, 0), False),  # a V100, too old for this build
        (["sm_80", "sm_90"], (10, 0), False),
        (["sm_80", "compute_90"], (10, 0), True),  # compiled when it is loaded
        (["sm_120"], (12, 1), True),
        (["sm_90a"], (9, 0), True),
        (["sm_100a"], (10, 3), False),
        ([], (9, 0), True),  # unknown
    ],
)
def test_compute_capabilities_of_a_build_of_torch(known, capability, runs):
    assert machine.runs_on(known, *capability) == runs
